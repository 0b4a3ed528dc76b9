"""From a run that has ended to the next one in a click: upcycled, fine-tuned, and beside its dense baseline. Real runs on the real worker."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.end_to_end.browser.conftest import Live, Opened

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]
SMALL = {
    "model.n_layers": 2,
    "model.d_model": 32,
    "model.d_ff": 64,
    "data.domains": ["tables"],
    "data.seq_len": 32,
    "training.steps": 4,
    "training.batch_size": 4,
    "training.eval_batches": 1,
    "training.checkpoint_every": 0,
    "parallel.device": "cpu",
}


@pytest.fixture(scope="module")
def dense(live: Live) -> int:
    """A dense run that has succeeded, with its checkpoint."""
    run = live.client.submit(preset="nano-dense", name="the dense one", overrides=SMALL)
    assert live.client.wait(run["id"], timeout_s=120)["state"] == "succeeded"
    return int(run["id"])


def choose(page: Page, words: str) -> None:
    page.locator("summary", has_text="More").click()
    page.get_by_role("link", name=words, exact=True).click()
    page.wait_for_url("**/runs/new?*")


def launched(page: Page, live: Live) -> dict[str, object]:
    """The run that the form makes, once it has ended."""
    page.get_by_role("button", name="Launch").click()
    page.wait_for_url(re.compile(r"/runs/\d+$"))
    run = live.client.wait(int(page.url.rsplit("/", 1)[1]), timeout_s=120)
    assert run["state"] == "succeeded", run["detail"]
    return run


def test_a_dense_run_is_upcycled_in_a_click_and_the_moe_is_fine_tuned(live: Live, open_page: Opened, dense: int) -> None:
    page = open_page(f"/runs/{dense}")
    choose(page, "Upcycle into a MoE")
    expect(page.get_by_text("A Mixture of Experts upcycled from")).to_be_visible()
    start = page.locator('[data-union="start"]')
    expect(start.locator("[data-kind]")).to_have_value("upcycle")
    expect(start.locator('[data-variant="upcycle"] [data-path="start.run"] input')).to_have_value(str(dense))
    expect(page.locator("#price-total small")).to_be_visible()
    expect(page.locator("#compared")).to_contain_text(f"run {dense}")
    start.locator('[data-variant="upcycle"] [data-path="start.noise_std"] input').fill("-1")
    expect(start.locator('[data-variant="upcycle"] [data-path="start.noise_std"] .error')).to_contain_text("greater than or equal to 0")
    start.locator('[data-variant="upcycle"] [data-path="start.noise_std"] input').fill("0.01")
    expect(start.locator('[data-variant="upcycle"] [data-path="start.noise_std"] .error')).to_be_hidden()
    moe = launched(page, live)
    assert f"run {dense} at step 4 upcycled: 2 dense layers became MoE layers of 8 copies, noise of 0.01" in live.client.logs(int(str(moe["id"])))
    assert moe["parent"] == dense

    page = open_page(f"/runs/{moe['id']}")
    choose(page, "Fine-tune from this run")
    kind = page.locator('[data-union="start"] [data-kind]')
    expect(kind).to_have_value("checkpoint")
    page.locator('[data-path="training.train"] select').select_option("only_router")
    expect(page.locator("#yaml")).to_have_value(re.compile("train: only_router"))
    fine = launched(page, live)
    assert f"start: the weights of run {moe['id']} at step 4" in live.client.logs(int(str(fine["id"])))

    page = open_page(f"/runs/new?from={moe['id']}&as=fine-tuning")
    page.locator('[data-union="start"] [data-kind]').select_option("scratch")
    expect(page.locator("#yaml")).to_have_value(re.compile(r"start:\n\s+kind: scratch\n"))
    page.locator('[data-union="start"] [data-kind]').select_option("checkpoint")
    page.locator('[data-variant="checkpoint"] [data-path="start.run"] input').fill("99999999")
    expect(page.locator('[data-variant="checkpoint"] [data-path="start.run"] .error')).to_contain_text("no run 99999999")


def test_the_form_makes_a_dense_baseline_and_shows_both_prices(open_page: Opened) -> None:
    page = open_page("/runs/new?preset=nano-mixtral")
    expect(page.locator("#price-flops")).not_to_have_text("–")
    before = page.locator("#price-flops").inner_text()
    page.get_by_role("button", name="FLOPs", exact=True).click()
    expect(page.locator("#price-flops small")).to_have_text(f"({before})")
    expect(page.locator("#compared")).to_contain_text("nano-mixtral")
    expect(page.locator('[data-path="model.d_ff"] input')).to_have_value("515")
    expect(page.locator("#baseline")).to_be_hidden()
    expect(page.locator('[data-path="name"] input')).to_have_value("nano-mixtral, dense")


def test_a_runs_baseline_is_a_click_away(live: Live, open_page: Opened) -> None:
    run = live.made_up("a sparse one", 10)
    page = open_page(f"/runs/{run.run}")
    choose(page, "Dense baseline at equal parameters")
    expect(page.get_by_text("The dense baseline at equal active parameters of")).to_be_visible()
    expect(page.locator("#price-active small")).to_be_visible()
    expect(page.locator("#yaml")).to_have_value(re.compile("moe: null"))
