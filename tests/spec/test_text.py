"""Text that is safe to store and to show."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec.text import clean_name, clean_text, storable_text

ANY = st.text(st.characters())


@given(ANY)
def test_accepted_text_is_normal_and_storable(text: str) -> None:
    try:
        found = clean_text(text)
    except ValueError as error:
        assert "U+" in str(error)
        return
    assert unicodedata.is_normalized("NFC", found)
    assert "\0" not in found
    found.encode()
    assert clean_text(found) == found


@given(ANY)
def test_mended_text_is_storable_and_good_text_is_left_alone(text: str) -> None:
    found = storable_text(text)
    assert isinstance(found, str) and len(found) == len(text) and "\0" not in found
    found.encode()
    assert storable_text(found) == found
    if text.isprintable():
        assert found == text


def test_what_is_no_text_is_left_to_validation() -> None:
    assert storable_text(3) == 3 and storable_text(None) is None


@pytest.mark.parametrize(("text", "code"), [("a\0b", "U+0000"), ("\x1b[31m", "U+001B"), ("\ud800", "U+D800"), ("\x7f", "U+007F"), ("\x85", "U+0085")])
def test_the_character_at_fault_is_named(text: str, code: str) -> None:
    with pytest.raises(ValueError, match=f"contains the character {code.replace('+', '[+]')}"):
        clean_text(text)


def test_names_are_one_line() -> None:
    assert clean_name("  cafe\u0301 ") == "caf\u00e9"
    for text in ("", "   ", "a\nb", "a\tb", "a\rb"):
        with pytest.raises(ValueError, match="one line that is not empty"):
            clean_name(text)
    assert clean_text("a\tb\nc") == "a\tb\nc"
