"""A published model's config.json, from a file or pasted, fills the form of a new run."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import expect

from tests.end_to_end.browser.conftest import Opened
from tests.end_to_end.browser.test_every_page import LOOKS, SHOTS
from tests.spec.test_huggingface import CONFIGS

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]
TOTAL, QWEN = CONFIGS["Qwen3-30B-A3B"]


def test_a_file_fills_form_yaml_and_price(open_page: Opened) -> None:
    page = open_page("/runs/new")
    page.get_by_text("Import a Hugging Face").click()
    file = {"name": "config.json", "mimeType": "application/json", "buffer": json.dumps(QWEN).encode()}
    page.get_by_label("A config.json", exact=True).set_input_files(file)  # type: ignore[arg-type]
    expect(page.locator("#config-said")).to_have_text("Read as qwen3_moe.")
    expect(page.locator('[data-path="model.n_layers"] input')).to_have_value("48")
    expect(page.locator('[data-path="model.moe.n_experts"] input')).to_have_value("128")
    assert "qk_norm: head" in page.get_by_label("YAML").input_value()
    expect(page.locator("#price-total")).to_contain_text("30.5")


@pytest.mark.parametrize(("theme", "width"), LOOKS)
def test_pasted_text_is_read_and_its_problems_are_named(open_page: Opened, theme: str, width: int) -> None:
    page = open_page("/runs/new", theme=theme, width=width)
    page.get_by_text("Import a Hugging Face").click()
    said, text = page.locator("#config-said"), page.get_by_label("The text of a config.json")
    for content, told in (
        ("{", "not JSON"),
        ("[1]", "a mapping of fields"),
        (json.dumps({**QWEN, "mystery": "<b>1</b>", "hidden_act": "relu"}), "hidden_act: 'relu' is not among"),
        (json.dumps({"model_type": "gpt2"}), "model_type: 'gpt2' is not among"),
    ):
        text.fill(content)
        page.get_by_role("button", name="Read", exact=True).click()
        expect(said).to_contain_text(told)
        expect(page.locator('[data-path="model.n_layers"] input')).to_have_value("4")
    page.screenshot(path=SHOTS / f"import-config-{theme}-{width}.png")
    text.fill(json.dumps(CONFIGS["DeepSeek-V3"][1]))
    page.get_by_role("button", name="Read", exact=True).click()
    expect(said).to_contain_text("Read as deepseek_v3. num_nextn_predict_layers 1 is left behind")
    expect(page.locator('[data-path="model.n_layers"] input')).to_have_value("61")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
