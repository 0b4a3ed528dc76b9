"""Two ranks on the run page: where their steps go, what they send to each other, and where experts would lie if placed by load."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.end_to_end.browser.conftest import GPU, Live, Opened
from tests.end_to_end.browser.made_up import MadeUpRun

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def two(live: Live) -> MadeUpRun:
    """A run of 44 steps, of which every tenth is sampled."""
    live.client.submit(preset="nano-mixtral", name="two ranks", overrides={"training.steps": 44, "parallel.expert": 2, **GPU})
    live.host.hello()
    run = live.host.claim(["cuda:2", "cuda:3"], 3)
    run.send(run.opening())
    run.train()
    run.end()
    return run


def rows(page: Page, table: str) -> list[list[str]]:
    return [row.split("\t") for row in page.locator(f"{table} tbody tr").all_inner_texts()]


def test_the_last_sample_is_told_part_by_part(two: MadeUpRun, open_page: Opened) -> None:
    page = open_page(f"/runs/{two.run}")
    figure = page.locator("#ranks")
    expect(figure.locator("figcaption .readout")).to_have_text("step 40")
    expect(figure.locator(".part-said")).to_have_text(["144 ms, waits 12 ms (8.3 %)", "135 ms, waits 3 ms (2.2 %)"])
    expect(figure.locator(".part-track").first).to_have_attribute("aria-label", re.compile("^Rank 0: data 12 ms, .*waiting 12 ms"))
    figure.get_by_text("Table", exact=True).click()
    expect(page.locator("#ranks > .figure-foot tbody")).to_be_visible()
    told = rows(page, "#ranks > .figure-foot")
    assert ["waiting", "9", "3", "0", "3"] in told
    assert told[-1] == ["together", "53", "91", "44", "91"]
    page.get_by_label("Step", exact=True).first.focus()
    page.keyboard.press("Home")
    expect(figure.locator("figcaption .readout")).to_have_text("step 1")
    expect(figure.locator(".part-said")).to_have_text(["120 ms", "130 ms"])
    said = "Finer parts are timed every 10 steps (telemetry.phases_every), except where the model is compiled."
    expect(page.locator("#ranks-note")).to_have_text(said)


def test_a_sample_that_cannot_be_fetched_fails_alone(two: MadeUpRun, open_page: Opened) -> None:
    page = open_page(f"/runs/{two.run}")
    expect(page.locator("#routing-canvas")).to_have_attribute("aria-label", re.compile("layers by experts at step 44"))
    page.route("**/steps?*part_ms*", lambda route: route.fulfill(status=404, json={"title": "No such sample", "status": 404}))
    page.get_by_label("Step", exact=True).first.focus()
    page.keyboard.press("Home")
    for _ in range(14):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#ranks-note")).to_have_text("Could not be loaded. No such sample")
    expect(page.locator("#ranks .part-said")).to_have_text(["120 ms", "130 ms"])
    expect(page.locator("#routing-canvas")).to_have_attribute("aria-label", re.compile("layers by experts at step 15"))
    for figure in ("routing", "bars"):
        expect(page.locator(f"#{figure}")).not_to_have_class(re.compile("is-empty"))
        assert "Could not" not in (page.locator(f"#{figure} .canvas-box").get_attribute("data-empty") or "")


def test_traffic_is_told_by_layer_in_rows_and_bytes(two: MadeUpRun, open_page: Opened) -> None:
    page = open_page(f"/runs/{two.run}")
    said = page.locator("#ranks-said")
    expect(said).to_have_text(
        re.compile(r"^[\d,]+ of 16,38\d rows \(\d+\.\d %\) left their rank: .* MB in a step, .*; expected .* MB; measured at step 40: 2.00 MB\.$")
    )
    page.get_by_label("Layer of the traffic").select_option("Layer 2")
    expect(said).to_have_text(re.compile(r"of 4,09\d rows .*expected [^;]*\.$"))
    first = rows(page, "#ranks-matrix")
    page.get_by_role("button", name="Bytes").click()
    expect(page.locator("#ranks-matrix tbody tr").first.locator("td").first).to_have_text("–")
    assert rows(page, "#ranks-matrix")[0][2].endswith("MB")
    page.get_by_role("button", name="Rows").click()
    assert rows(page, "#ranks-matrix") == first
    page.get_by_text("By layer", exact=True).click()
    expect(page.locator("#ranks-traffic details tbody tr")).to_have_count(5)
    assert [row[0] for row in rows(page, "#ranks-traffic details")] == ["0", "1", "2", "3", "all"]


def test_experts_are_placed_by_the_load_of_a_window(two: MadeUpRun, open_page: Opened) -> None:
    page = open_page(f"/runs/{two.run}#placement")
    panel = page.locator("#panel-placement")
    expect(panel.get_by_label("Devices", exact=True)).to_have_attribute("placeholder", "2")
    panel.get_by_label("Devices", exact=True).fill("4")
    panel.get_by_label("Replicas").fill("12")
    panel.get_by_role("button", name="Place", exact=True).click()
    expect(panel.locator("table").first.locator("tbody tr")).to_have_count(4)
    expect(panel.locator(".slot")).to_have_count(12)
    assert panel.locator("[data-copied]").count() >= 2
    field = panel.locator(".field", has=page.get_by_label("Replicas"))
    field.locator("input").fill("10")
    field.locator("input").press("Enter")
    expect(field.get_by_role("alert")).to_have_text("replicas 10 is not a multiple of devices 4: every device holds equally many")
    expect(field.locator("input")).to_have_attribute("aria-invalid", "true")
    expect(field.locator("input")).to_have_value("10")
    panel.get_by_label("Devices", exact=True).fill("5000")
    panel.get_by_role("button", name="Place", exact=True).click()
    expect(panel.get_by_role("alert")).to_have_text(re.compile("^devices: .*less than or equal to 4096"))
