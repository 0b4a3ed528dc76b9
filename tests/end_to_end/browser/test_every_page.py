"""Every page, in both themes, wide and narrow: nothing complains, nothing sticks out, everything has a name."""

from __future__ import annotations

import csv
import os
import re
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect
from yaml import safe_load

from spec.experiment import ExperimentSpec
from tests.end_to_end.browser.conftest import Live, Opened

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

SHOTS = Path(os.environ.get("MOELAB_SCREENSHOTS") or tempfile.mkdtemp(prefix="moelab-screenshots-"))
HOSTILE = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>{{7*7}}&amp;"
PAGES = [
    "/runs",
    "/runs?q=nothing-has-this-name",
    "/runs?metric=nonsense",
    "/runs/new",
    "/runs/new?preset=deepseek-v3",
    "/presets",
    "/presets/mixtral-8x7b",
    "/presets/deepseek-v3",
    "/methods",
    "/runs/new?method=mla",
]
PAGES += [
    "/workers",
    "/tokens",
    "/api/v1/docs",
    "/runs/{run}",
    "/runs/{run}#specialisation",
    "/runs/{run}#placement",
    "/runs/{run}#timeline",
    "/runs/{run}#checkpoints",
    "/runs/{run}#spec",
    "/runs/compare?id={run}&id={other}",
]
PAGES += ["/runs/compare", "/nowhere"]
LOOKS = [("dark", 1280), ("light", 1280), ("dark", 390), ("light", 390)]

NAMELESS = """() => {
  const named = (node) => node.labels?.length || node.getAttribute('aria-label') || node.getAttribute('aria-labelledby') || node.textContent.trim();
  const shown = (node) => !node.closest('[hidden], dialog:not([open]), [aria-hidden=true]') && node.type !== 'hidden' && node.getClientRects().length;
  return [...document.querySelectorAll('input, select, textarea, button, a[href], canvas, [role=img], progress, dialog, summary')]
    .filter((node) => shown(node) && !named(node) && !node.closest('.uplot')).map((node) => node.outerHTML.slice(0, 120));
}"""
TWICE = "() => { const ids = [...document.querySelectorAll('[id]')].map((node) => node.id); return ids.filter((id, i) => ids.indexOf(id) !== i); }"
OUTLINES = "() => { const style = getComputedStyle(document.activeElement); return style.outlineStyle !== 'none' || style.boxShadow !== 'none'; }"


@pytest.fixture(scope="module")
def runs(live: Live) -> dict[str, int]:
    """Two runs that have ended, one with a hostile name, and a child of it."""
    run = live.made_up(HOSTILE, 60, seed=2)
    run.train()
    run.end("failed", "nan_loss", HOSTILE)
    live.client.edit(run.run, tags=["<b>tag</b>"], notes=HOSTILE)
    other = live.made_up("a quiet one", 50, seed=3)
    other.train()
    other.end()
    return {"run": run.run, "other": other.run}


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_sound_in_every_look(live: Live, open_page: Opened, runs: dict[str, int], path: str) -> None:
    for theme, width in LOOKS:
        page = open_page(path.format(**runs), width=width, theme=theme)
        page.wait_for_load_state("networkidle") if "#" not in path and "/runs" not in path else page.wait_for_timeout(700)
        name = path.strip("/").translate(str.maketrans("/?#&=", "_____")).replace("{", "").replace("}", "") or "home"
        page.screenshot(path=SHOTS / f"{name}-{theme}-{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, f"{theme} {width}: sticks out sideways"
        assert page.evaluate(NAMELESS) == [], f"{theme} {width}: controls without a name"
        assert page.evaluate(TWICE) == [], "two elements share an id"
        assert page.evaluate("document.documentElement.lang") == "en"
        assert page.locator("h1").count() == 1
        page.context.close()


def test_the_keyboard_reaches_the_content_and_shows_where_it_is(live: Live, open_page: Opened, runs: dict[str, int]) -> None:
    page = open_page(f"/runs/{runs['other']}")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    seen = []
    for _ in range(30):
        page.keyboard.press("Tab")
        assert page.evaluate(OUTLINES), page.evaluate("document.activeElement.outerHTML.slice(0, 100)")
        seen.append(page.evaluate("document.activeElement.id"))
    order = [
        name for name in ("theme", "star", "tab-live", "follow", "scrubber", "step-number", "layer", "view-layers", "routing-canvas") if name in seen
    ]
    assert order == sorted(order, key=seen.index) and "routing-canvas" in seen
    page.get_by_role("tab", name="Live").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tabpanel", name="Specialisation")).to_be_visible()


def test_single_keys_act_are_listed_and_can_be_turned_off(open_page: Opened, runs: dict[str, int]) -> None:
    page = open_page(f"/runs/{runs['other']}")
    step = page.locator("#step-number")
    expect(step).to_have_value("50")
    for key, then in ((",", "49"), (",", "48"), (".", "49")):
        page.keyboard.press(key)
        expect(step).to_have_value(then)
    page.keyboard.press("l")
    expect(page.locator("#follow")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("v")
    expect(page.locator("#view-steps")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("status").filter(has_text="heatmap: Experts × steps")).to_have_count(1)
    page.keyboard.press("v")
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Keyboard shortcuts")
    expect(dialog).to_contain_text("The told step before")
    page.keyboard.press(",")
    expect(step).to_have_value("50")
    dialog.get_by_label("Single keys act on the pages").uncheck()
    page.keyboard.press("Escape")
    page.keyboard.press(",")
    expect(step).to_have_value("50")
    page.evaluate("localStorage.removeItem('keys-off')")

    page = open_page("/runs")
    links = page.locator("tr.row a.name")
    for key, at in (("j", 0), ("j", 1), ("k", 0)):
        page.keyboard.press(key)
        expect(links.nth(at)).to_be_focused()
    page.keyboard.press("x")
    expect(page.locator("[data-choose]").first).to_be_checked()
    page.keyboard.press("/")
    page.keyboard.type("?jx")
    expect(page.get_by_label("Search names and notes")).to_have_value("?jx")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_a_line_says_how_the_router_fares_and_each_metric_what_it_is(open_page: Opened, runs: dict[str, int]) -> None:
    page = open_page(f"/runs/{runs['other']}")
    health = page.locator("#health")
    expect(health).to_have_text(
        re.compile(r"^Routing leaves experts out \(steps 31 to 50\): 1 of 32 experts got no token \(1 in layer 3\); the busiest takes ")
    )
    page.get_by_label("Step", exact=True).first.focus()
    page.keyboard.press("Home")
    expect(health).to_have_text(re.compile(r"\(step 1\): every expert gets tokens"))
    help_of = page.get_by_role("button", name="What is MaxVio?")
    help_of.focus()
    page.keyboard.press("Enter")
    expect(help_of).to_have_attribute("aria-expanded", "true")
    expect(page.get_by_text("0 is even; E / k − 1 is everything on the same k of E experts", exact=False)).to_be_visible()
    page.keyboard.press("Enter")
    expect(page.locator("#metrics .chart-help").first).to_be_hidden()


def test_a_picture_is_saved_with_what_it_is_of_and_its_values_as_a_table(live: Live, open_page: Opened, runs: dict[str, int]) -> None:
    page = open_page(f"/runs/{runs['other']}")

    def saved(name: str) -> Path:
        button = page.get_by_role("button", name=name)
        button.focus()
        with page.expect_download() as begun:
            page.keyboard.press("Enter")
        path = SHOTS / begun.value.suggested_filename
        begun.value.save_as(path)
        return path

    loss = saved("CSV of Loss")
    header, *rows = csv.reader(loss.open(newline=""))
    _, arrays = live.client.steps(runs["other"], scalars=["lm_loss"])
    assert (loss.name, header) == (f"run-{runs['other']}-loss-steps-1-50.csv", ["step", "Cross-entropy"])
    assert [(int(step), np.float32(value)) for step, value in rows] == list(zip(arrays["step"], arrays["scalars"][:, 0], strict=True))
    header, *rows = csv.reader(saved("CSV of Routing").open(newline=""))
    _, arrays = live.client.steps(runs["other"], tensors=["expert_tokens"])
    assert [int(row[header.index("tokens")]) for row in rows] == arrays["expert_tokens"][-1].ravel().tolist() and len(rows) == 4 * 8
    for name, figure in (("Loss", "#loss .u-wrap canvas"), ("Routing", "#routing-canvas"), ("Utilisation of the layer", "#bars-canvas")):
        data = saved(f"PNG of {name}").read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        inner = page.locator(figure).evaluate("node => [node.width, node.height]")
        assert width > inner[0] and height > inner[1] + 40, "a margin, and a head that names the run and the steps"


def test_specialisation_follows_the_layer_and_the_validation(live: Live, open_page: Opened, runs: dict[str, int]) -> None:
    page = open_page(f"/runs/{runs['other']}#specialisation")
    table = page.get_by_role("region", name="Class of token")
    first = table.inner_text()
    assert "keyword" in first
    page.locator(".specialisation select[name=layer]").select_option(index=1)
    expect(table).not_to_have_text(first, use_inner_text=True)
    told = live.client.specialisation(runs["other"], layer=1)
    assert (told["step"], told["layer"]) == (50, 1)
    shown = [f"{100 * share:.3g} %" for share in told["classes"][0]["expert_share"]]
    assert table.locator("tbody tr td:first-of-type").all_inner_texts() == shown
    second = table.inner_text()
    page.locator(".specialisation select[name=step]").select_option(index=4)
    expect(table).not_to_have_text(second, use_inner_text=True)


def test_the_theme_stays_chosen(live: Live, open_page: Opened) -> None:
    page = open_page("/runs", theme="dark")
    page.get_by_role("button", name="Switch between dark and light").click()
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(246, 246, 242)"


def test_the_form_and_the_yaml_say_the_same_and_errors_stand_at_their_field(live: Live, open_page: Opened) -> None:
    page = open_page("/runs/new")
    top_k = page.locator("[data-path='model.moe.top_k'] input")
    top_k.fill("9")
    error = page.locator("[data-path='model.moe.top_k'] .error")
    expect(error).to_have_text("top_k 9 > n_experts 8")
    expect(top_k).to_have_attribute("aria-invalid", "true")
    page.locator("#yaml").fill(
        "model:\n  moe:\n    top_k: 3\n    n_experts: 12\n    balance: [{kind: z_loss, coefficient: 0.5}]\ntraining: {steps: 7}\n"
    )
    expect(top_k).to_have_value("3")
    expect(error).to_be_hidden()
    expect(page.locator("[data-term=z_loss] [data-switch]")).to_be_checked()
    expect(page.locator("[data-term=switch_aux] [data-switch]")).not_to_be_checked()
    expect(page.locator("[data-term=z_loss] [data-path] input")).to_have_value("0.5")
    page.locator("[data-union='model.attention'] [data-kind]").evaluate("select => { select.closest('details').open = true }")
    page.locator("[data-union='model.attention'] [data-kind]").select_option("mla")
    assert "kind: mla" in page.locator("#yaml").input_value()
    page.locator("[data-term=sequence_aux] [data-switch]").check()
    expect(page.locator("#yaml-errors")).to_be_empty()
    expect(page.locator("#price-total")).not_to_have_text("–")
    page.locator("#yaml").fill("model: [")
    expect(page.locator("#yaml-errors")).to_contain_text("line 1")
    page.locator("#preset").select_option("deepseek-v3")
    expect(page.locator("#price-total")).to_have_text("671B")
    expect(page.locator("#yaml-errors")).not_to_be_empty()


def test_the_form_changes_nothing_of_a_spec_but_what_is_changed(open_page: Opened) -> None:
    """Every preset through the form and back: equal, parts that are null and the order of terms included."""
    page = open_page("/runs/new")
    names = ["", *page.evaluate("[...document.querySelectorAll('#preset option')].map(option => option.value).filter(Boolean)")]
    for name in names:
        if name:
            with page.expect_response(lambda answer: "/presets/" in answer.url):
                page.select_option("#preset", name)
            page.wait_for_function("name => document.querySelector('#yaml').value.startsWith(`name: ${name}\\n`)", arg=name)
        before = page.input_value("#yaml")
        page.locator("#spec-form").dispatch_event("input")
        said = page.input_value("#yaml")
        assert said != before, "fields without a meaning are left out: the form was read"
        assert ExperimentSpec.model_validate(safe_load(said)) == ExperimentSpec.model_validate(safe_load(before)), name
    assert "rope_scaling: null" in before
    page.locator("summary", has_text="Rope scaling").click()
    page.get_by_label("With rope scaling").check()
    expect(page.locator("#yaml")).to_have_value(re.compile(r"rope_scaling:\n    kind: "))


FIELDS = """() => [...document.querySelectorAll('#spec-form :is([data-value], [data-switch], [data-kind])')].map(node =>
  node.type === 'checkbox' ? node.checked : node.value ?? [...node.querySelectorAll('input')].map(box => box.checked))"""


def test_another_preset_leaves_nothing_of_the_one_before_hidden_or_not(open_page: Opened) -> None:
    fresh = open_page("/runs/new?preset=nano-olmoe").evaluate(FIELDS)
    page = open_page("/runs/new?preset=deepseek-v3")
    assert page.evaluate(FIELDS) != fresh and len(fresh) > 150
    page.locator("#preset").select_option("nano-olmoe")
    said = page.locator("#preset-said")
    expect(said).to_have_text(re.compile(r"^Every field is as in .*OLMoE.* now\.$", re.IGNORECASE))
    assert page.evaluate(FIELDS) == fresh, "latent attention and YaRN, which are hidden now, are as if they had never been shown"
    page.locator("[data-path='model.moe.top_k'] input").fill("3")
    page.locator("#preset").select_option("deepseek-v3")
    expect(said).to_contain_text("your changes are gone")
    said.get_by_role("button", name="Take them back").click()
    expect(page.locator("#yaml")).to_have_value(re.compile(r"^name: nano-olmoe\n[\s\S]* top_k: 3\n"))
    expect(page.locator("#preset")).to_have_value("nano-olmoe")


def test_a_token_is_shown_once_works_and_stops_working(live: Live, open_page: Opened) -> None:
    page = open_page("/tokens")
    page.get_by_label("Name").fill("for a script")
    page.get_by_role("button", name="Create token").click()
    value = page.get_by_label("The new token")
    expect(value).to_have_value(re.compile("^mlk_"))
    secret = value.input_value()
    ask = "secret => fetch('/api/v1/me', {headers: {Authorization: 'Bearer ' + secret}, credentials: 'omit'}).then(r => r.status)"
    assert page.evaluate(ask, secret) == 200
    page.reload()
    assert secret not in page.content()
    row = page.locator("tr", has_text="for a script")
    row.get_by_role("button").click()
    row.get_by_role("button").click()
    expect(row).to_have_count(0)
    second = open_page("/tokens")
    assert second.evaluate("secret => fetch('/healthz').then(r => r.status)", secret) == 200
    assert live.client.me()["user"]


def test_the_list_of_runs_is_live_filters_and_acts_on_several(live: Live, open_page: Opened, runs: dict[str, int]) -> None:
    page = open_page("/runs")
    run = live.made_up("new in the list", 40, seed=5)
    row = page.locator(f"#run-{run.run}")
    expect(row).to_contain_text("new in the list")
    run.train(1, 20)
    expect(row.locator("[data-cell=steps]")).to_have_text("20 / 40")
    run.train(21, 40)
    run.end()
    expect(row.locator("[data-cell=state]")).to_have_text("succeeded")
    page.get_by_label("Search names and notes").fill("quiet")
    expect(row).to_have_count(0)
    assert "q=quiet" in page.url
    expect(page.locator("tr.row")).to_have_count(1)
    page.get_by_label("Search names and notes").fill("")
    page.get_by_label("Choose run new in the list").check()
    page.get_by_label("Choose run a quiet one").check()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#overlay canvas")).to_be_visible()
    expect(page.locator("#legend")).to_contain_text("a quiet one")


def test_a_workers_name_is_released_at_the_second_press(live: Live, open_page: Opened) -> None:
    live.host.hello()
    page = open_page("/workers")
    page.clock.install()
    page.reload()
    row = page.get_by_role("row").filter(has_text="bench-1")
    button = row.get_by_role("button", name="Release the name bench-1")
    button.click()
    expect(button).to_have_text("Really release?")
    with page.expect_response(lambda answer: answer.url.endswith("/workers")):
        page.clock.fast_forward(6000)  # the table comes anew meanwhile
    expect(button).to_have_text("Really release?")
    page.clock.fast_forward(3000)
    expect(button).to_have_text("Release")  # who thinks longer is asked again, and a double click is one press
    button.dblclick()
    expect(button).to_have_text("Really release?")
    page.keyboard.press("Escape")
    expect(button).to_have_text("Release")
    button.click()
    button.click()
    expect(row).to_contain_text("nobody")
    live.host.hello()
    page.reload()
    expect(button).to_have_text("Release")
