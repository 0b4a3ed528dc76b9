"""Text from a run that was really trained: server, worker, `python -m moe.generate`, the page, the client and the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Route, expect

from moelab.client import ApiError
from tests.end_to_end.browser.conftest import PROJECT, Live, Opened
from tests.end_to_end.browser.test_every_page import HOSTILE, LOOKS, NAMELESS, SHOTS, TWICE

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

SPEC: dict[str, Any] = {
    "name": "a writer",
    "model": {
        "d_model": 32, "n_layers": 3, "d_ff": 64, "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1},
        "moe": {"n_experts": 8, "top_k": 2, "d_expert": 32, "first_k_dense": 1},
    },
    "data": {"domains": ["tables"], "seq_len": 64},
    "training": {"steps": 30, "batch_size": 4, "checkpoint_every": 10, "eval_every": 0, "eval_batches": 1},
    "parallel": {"device": "cpu", "threads": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(live: Live) -> int:
    made = live.client.wait(live.client.submit(SPEC)["id"], timeout_s=120)
    assert made["state"] == "succeeded", made
    return int(made["id"])


@pytest.fixture(scope="module")
def written(live: Live, run: int) -> dict[str, Any]:
    """A generation that the client asked for."""
    return live.client.generate(run, "import os\n\tdef é", tokens=40, temperature=0.7, seed=1, wait_s=60)


def test_a_worker_answers_with_the_experts_of_each_token(live: Live, run: int, written: dict[str, Any]) -> None:
    assert written["state"] == "succeeded", written
    result = written["result"]
    assert result["step"] == 30 and result["moe_layers"] == [1, 2] and len(result["ids"]) == result["prompt_tokens"] + 40
    assert bytes(result["ids"][: result["prompt_tokens"]]).decode() == "import os\n\tdef é"
    experts = np.array(result["experts"])
    assert experts.shape == (len(result["ids"]), 2, 2)
    np.testing.assert_array_equal([np.bincount(experts[:, layer].ravel(), minlength=8) for layer in range(2)], result["usage"])
    np.testing.assert_allclose(np.array(result["gates"]).sum(-1), 1, atol=1e-3)
    again = live.client.generate(run, "import os\n\tdef é", tokens=40, temperature=0.7, seed=1, wait_s=60)
    assert {**again["result"], "seconds": 0} == {**result, "seconds": 0}
    assert [one["id"] for one in live.client.generations(run)][-2:] == [again["id"], written["id"]]


def test_an_older_checkpoint_writes_and_one_that_is_not_there_does_not(live: Live, run: int) -> None:
    assert live.client.generate(run, "a", tokens=2, step=10, wait_s=60)["result"]["step"] == 10
    with pytest.raises(ApiError, match="no checkpoint at step 11"):
        live.client.generate(run, "a", step=11)


def test_a_run_whose_checkpoint_is_on_no_worker_says_so(live: Live, run: int) -> None:
    elsewhere = live.made_up("elsewhere", 10)
    elsewhere.train()
    elsewhere.end()
    live.client.wait(elsewhere.run, timeout_s=20)
    made = live.client.generate(elsewhere.run, "a", wait_s=None)
    # Two workers are alive: the real one finds that it does not have the checkpoint, the made-up one says so here.
    ended, deadline = made, time.monotonic() + 30
    while ended["state"] != "failed" and time.monotonic() < deadline:
        live.host.hello()
        offer = live.host.api.post("/worker/generations/claim", json={"worker": live.host.worker})
        if offer.status_code == 200:
            told = offer.json()
            live.host.api.post(f"/worker/generations/{told['generation']}/answer", json={"attempt": told["attempt"], "outcome": "not_here"})
        time.sleep(0.1)
        ended = live.client.generation(elsewhere.run, made["id"])
    assert (ended["state"], ended["reason"]) == ("failed", "checkpoint_not_here"), ended


def test_the_page_writes_and_shows_who_wrote(live: Live, open_page: Opened, run: int) -> None:
    page = open_page(f"/runs/{run}")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_url(re.compile("/generate$"))
    page.locator("#prompt").fill("def main")
    page.locator("#tokens").fill("12")
    page.locator("#temperature").fill("0")
    page.locator("#seed").fill("5000000000")
    page.locator("#generate-send").click()
    expect(page.locator("#generate-error")).to_contain_text("2147483647")
    page.locator("#seed").fill("5")
    page.locator("#prompt").press("Control+Enter")
    tokens = page.locator("#written-text [role=option]")
    expect(tokens).to_have_count(20, timeout=60_000)
    expect(page.locator("#generation-state")).to_have_text("succeeded")
    made = next(live.client.generations(run))
    result = live.client.generation(run, made["id"])["result"]
    assert f"id={made['id']}" in page.url and made["parameters"]["seed"] == 5
    tokens.nth(9).hover()
    chips = page.locator("#token-layers .expert-chip b")
    assert chips.all_text_contents() == [str(expert) for layer in result["experts"][9] for expert in layer]
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(page.locator("#token-figures")).to_contain_text("id 101")
    assert tokens.nth(1).get_attribute("aria-selected") == "true" and "expert" in str(tokens.nth(1).get_attribute("aria-label"))
    colours = "els => els.map(el => getComputedStyle(el).getPropertyValue('--hue'))"
    before = tokens.evaluate_all(colours)
    page.locator("#written-layer").select_option("1")
    assert tokens.evaluate_all(colours) != before
    expect(page.locator("#usage-training")).to_be_visible()
    page.locator("#written details summary").click()
    table = page.locator("#written .behind-table tbody tr")
    expect(table).to_have_count(20)
    expect(table.nth(9)).to_contain_text(", ".join(f"{e} ({g:.2f})" for e, g in zip(result["experts"][9][0], result["gates"][9][0], strict=True)))
    page.locator("#usage details summary").click()
    expect(page.locator("#usage .behind-table tbody tr")).to_have_count(16)
    page.reload()
    expect(tokens).to_have_count(20)
    expect(page.locator("#prompt")).to_have_value("def main")
    page.locator("#generation-delete").click()
    page.wait_for_url(re.compile("/generate$"))
    with pytest.raises(ApiError, match="404"):
        live.client.generation(run, made["id"])


def test_a_server_that_is_away_for_a_moment_does_not_end_the_look(open_page: Opened, run: int) -> None:
    page, cut = open_page(f"/runs/{run}/generate"), []

    def cut_twice(route: Route) -> None:
        cut.append(route)
        route.abort("connectionrefused") if len(cut) <= 2 else route.continue_()

    expect(page.locator("#token-card")).to_be_hidden()
    page.route("**/generations/*", cut_twice)
    page.locator("#tokens").fill("3")
    page.locator("#generate-send").click()
    expect(page.locator("#written-text [role=option]").first).to_be_visible(timeout=60_000)
    expect(page.locator("#token-card")).to_be_visible()
    assert len(cut) > 2


def test_the_page_is_sound_in_every_look(live: Live, open_page: Opened, run: int, written: dict[str, Any]) -> None:
    for theme, width in LOOKS:
        page = open_page(f"/runs/{run}/generate?id={written['id']}", width=width, theme=theme)
        expect(page.locator("#usage-training")).to_be_visible()
        page.locator("#written-text [role=option]").nth(14).click()
        page.wait_for_timeout(200)
        page.screenshot(path=SHOTS / f"generate-{theme}-{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, f"{theme} {width}: sticks out sideways"
        assert page.evaluate(NAMELESS) == [] and page.evaluate(TWICE) == []
        assert page.locator("h1").count() == 1
        page.context.close()
    hostile = live.client.generate(run, HOSTILE, tokens=3, wait_s=60)
    page = open_page(f"/runs/{run}/generate?id={hostile['id']}")
    expect(page.locator("#written-text [role=option]")).to_have_count(len(HOSTILE.encode()) + 3)
    expect(page.locator("#prompt")).to_have_value(HOSTILE)
    turned = live.client.generate(run, "a\u202eb", tokens=1, wait_s=60)
    page = open_page(f"/runs/{run}/generate?id={turned['id']}")
    tokens = page.locator("#written-text [role=option]")
    expect(tokens).to_have_count(6)
    places = tokens.evaluate_all("els => els.map(el => el.getBoundingClientRect().left)")
    assert places == sorted(places), "a right-to-left override turns no token but its own"
    bare = live.made_up("no checkpoint", 50)
    expect(open_page(f"/runs/{bare.run}/generate").get_by_text("No checkpoint yet")).to_be_visible()
    bare.end()  # or its lease runs out, and the next test's host is handed it


def test_the_command_line_prints_the_text(live: Live, run: int) -> None:
    env = {**os.environ, "MOELAB_HOME": str(live.home), "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "moelab.cli", "generate", str(run), "import ", "--tokens", "5", "--greedy", "--experts"]
    said = subprocess.run(command, env=env, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.startswith("import ") and "layer 1" in said and "layer 2" in said
    failed = subprocess.run([*command[:4], "999", "x"], env=env, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)
    assert failed.returncode == 4 and "404" in failed.stderr
