"""The routing, live: what a person sees while a model trains."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.end_to_end.browser.conftest import Live, Opened

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

HEATMAP = "#routing-canvas"
PIXELS = """canvas => {
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return data.reduce((hash, value) => (hash * 31 + value) | 0, 0);
}"""


def pixels(page: Page) -> int:
    """A number that changes when the picture does."""
    return int(page.eval_on_selector(HEATMAP, PIXELS))


def step(page: Page) -> int:
    return int(page.input_value("#step-number"))


def until(page: Page, so: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Waits until `so()`; Playwright's own wait evaluates text, which the policy of the pages forbids."""
    deadline = time.monotonic() + timeout_s
    while not so():
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)


def test_launches_a_run_from_the_form_and_watches_the_heatmap_change(live: Live, open_page: Opened) -> None:
    page = open_page("/runs/new?preset=nano-mixtral")
    page.locator("#spec-form").get_by_label("name", exact=True).fill("from the browser")
    page.locator("[data-path='training.steps'] input").fill("60")
    expect(page.locator("#yaml")).to_have_value(re.compile(r"steps: 60\b"))
    expect(page.locator("#price-total")).to_have_text(re.compile(r"\d"))
    page.get_by_role("button", name="Launch").click()
    page.wait_for_url(re.compile(r"/runs/\d+$"), wait_until="commit")
    page.evaluate("window.sameDocument = true")

    expect(page.locator(HEATMAP)).to_have_attribute("aria-label", re.compile(r"layers by experts at step \d+: 4 rows, 8 columns"), timeout=60_000)
    first, seen = pixels(page), step(page)
    until(page, lambda: step(page) > seen + 5)
    assert pixels(page) != first
    expect(page.locator("#state")).to_have_text("succeeded", timeout=90_000)
    expect(page.locator("#step-number")).to_have_value("60")
    assert page.evaluate("window.sameDocument") is True
    expect(page).to_have_title("✓ from the browser · moelab")


def test_reads_the_router_with_pointer_keyboard_and_tables(live: Live, open_page: Opened) -> None:
    run = live.made_up("an expert that dies", 200)
    run.train()
    run.end()
    page = open_page(f"/runs/{run.run}")
    expect(page.locator(HEATMAP)).to_have_attribute("aria-label", re.compile("at step 200.*1 without tokens"))
    expect(page.locator("[data-stat=tflop_per_s]")).to_have_text(re.compile(r"^4\d\d · 4[0-4] %$"))
    page.get_by_role("button", name="What is MFU?").click()
    expect(page.locator("figure", has=page.get_by_role("heading", name="MFU", exact=True))).to_contain_text("without recomputation")
    page.focus(HEATMAP)
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    expect(page.locator("#routing-readout")).to_have_text(re.compile(r"step 200 · layer 3 · expert 1 · 0 tokens.*dead"))
    page.keyboard.press("Enter")
    expect(page.locator("#expert h3")).to_have_text("Layer 3, expert 1 over time")
    page.locator("#routing summary").click()
    expect(page.locator("#routing tbody tr").nth(1)).to_contain_text("1")
    assert page.locator("#routing tbody tr").count() == 8

    page.get_by_label("Step", exact=True).first.focus()
    page.keyboard.press("Home")
    expect(page.locator(HEATMAP)).to_have_attribute("aria-label", re.compile(r"at step 1:.* 0 without tokens"))
    expect(page.locator("#follow")).to_have_attribute("aria-pressed", "false")

    page.get_by_role("button", name="Experts × steps").click()
    expect(page.locator(HEATMAP)).to_have_attribute("aria-label", re.compile("experts by steps of layer 3: 8 rows, 200 columns"))
    page.get_by_role("button", name="Last 100").click()
    expect(page.locator("#range-text")).to_have_text("steps 101–200")
    expect(page.locator(HEATMAP)).to_have_attribute("aria-label", re.compile("8 rows, 100 columns"))


def test_the_balancing_terms_are_shown_layer_by_layer_and_over_the_steps(live: Live, open_page: Opened) -> None:
    run = live.made_up("balanced", 200)
    run.train()
    run.end()
    page = open_page(f"/runs/{run.run}")
    table = page.locator("#balancing-table")
    expect(table.locator("th")).to_have_text(["layer", "switch_aux", "router entropy", "dropped"])
    expect(table.locator("tbody tr")).to_have_count(4)
    expect(table.locator("tbody tr").first).to_have_text(re.compile(r"^0\d\.\d+\d\.\d+ nats(0|\d+ \(\d+\.\d %\))$"))
    page.locator("#balancing .plot").scroll_into_view_if_needed()  # a chart that is far off the screen is not drawn
    expect(page.locator("#balancing .plot")).to_have_attribute("aria-label", re.compile("switch_aux"))
    table.get_by_role("button", name="2").click()
    expect(page.locator("#balancing h3")).to_have_text("Balancing of layer 2")
    expect(table.locator("tr[aria-current]")).to_contain_text("2")
    expect(page.locator("#events")).to_contain_text("logits differ by 3.1 % with the batch's other sequences")


def test_a_spike_opens_to_what_the_router_did_and_takes_the_page_there(live: Live, open_page: Opened) -> None:
    run = live.made_up("a spike", 100)
    run.train()
    page = open_page(f"/runs/{run.run}")
    spike = page.locator("#events [data-kind=spike_detected]")
    expect(spike).to_contain_text("Loss spike")
    spike.get_by_role("button", name="62", exact=True).click()
    expect(page.locator("#step-number")).to_have_value("62")
    spike.locator("summary").click()
    assert spike.locator("tbody tr").count() == 4
    run.end()
    expect(page.locator("#state")).to_have_text("succeeded")


def test_a_lost_connection_is_said_and_what_was_missed_is_fetched(live: Live, open_page: Opened) -> None:
    run = live.made_up("the line is cut", 120)
    run.train(1, 40)
    page = open_page(f"/runs/{run.run}")
    expect(page.locator("#step-number")).to_have_value("40", timeout=20_000)
    run.close()
    live.kill_web()
    expect(page.locator("#disconnected")).to_be_visible()
    expect(page.locator("#disconnected-text")).to_contain_text("Training goes on")
    expect(page.locator("#disconnected")).to_be_hidden(timeout=40_000)
    run.train(41, 120)
    expect(page.locator("#step-number")).to_have_value("120", timeout=20_000)
    rows = page.evaluate(
        "fetch(location.pathname.replace('/runs', '/api/v1/runs') + '/steps?from=1&to=120&points=2000&scalars=loss&tensors=').then(r => r.ok)"
    )
    assert rows is True
    run.end()


def test_cancel_and_notes_go_through_the_api(live: Live, open_page: Opened) -> None:
    run = live.made_up("to be cancelled", 100)
    run.train(1, 10)
    page = open_page(f"/runs/{run.run}")
    page.get_by_text("More", exact=True).click()
    page.get_by_role("button", name="Edit name, tags, notes").click()
    page.locator("#edit-tags").fill("one, two")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#run-tags")).to_have_text("onetwo")
    page.get_by_role("button", name="Cancel", exact=True).first.click()
    page.get_by_role("button", name="Yes").click()
    expect(page.locator("#state")).to_have_text("stopping")
    run.end("cancelled", "stopped")
    expect(page.locator("#state")).to_have_text("cancelled")
    assert live.client.run(run.run)["tags"] == ["one", "two"]


def test_between_steps_that_were_told_the_page_says_so_and_shows_the_nearest(live: Live, open_page: Opened) -> None:
    run = live.made_up("tells rarely", 3000, **{"telemetry.every": 500})
    page = open_page(f"/runs/{run.run}")
    expect(page.locator("#loss .plot")).to_have_attribute("data-empty", re.compile(r"^The loss appears at step 500: this run tells every 500 steps"))
    run.send([event for step in range(500, 3001, 500) for event in run.step(step)])
    run.end()
    step = page.locator("#step-number")
    expect(step).to_have_value("3000")
    step.fill("700")
    step.press("Enter")
    expect(page.locator("#routing-readout")).to_have_attribute("data-hint", re.compile(r"^Step 500, the last that was told before 700\. "))
    expect(page.locator("#bars .readout")).to_contain_text("step 500 · ")
    expect(page.locator("#loss .readout")).to_contain_text(" @ 500")
    box = page.locator("#loss .u-over").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.21 * box["width"], box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 50, steps=3)
    page.mouse.up()
    said = re.compile(r"^Nothing was told of steps 6\d\d to [89]\d\d; nearest: steps 500 and 1,000\. This run tells every 500 steps")
    expect(page.locator("#untold")).to_have_text(said)
    page.get_by_role("button", name="Experts × steps").click()
    expect(page.locator("#routing .canvas-box")).to_have_attribute("data-empty", said)
    expect(page.locator("#loss .plot")).to_have_attribute("aria-label", re.compile(r"^Loss, steps 500 to 1,000: "))
    page.get_by_role("button", name="Layers × experts").click()
