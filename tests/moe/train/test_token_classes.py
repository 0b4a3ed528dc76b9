"""Classes of tokens against Python's own tokenize and a plain loop over characters."""

from __future__ import annotations

import bisect
import io
import keyword
import re
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.train import bpe, corpus, token_classes
from moe.train.corpus import Domain
from moe.train.token_classes import CLASSES, of_python, of_text, of_tokens, of_windows
from moe.train.vocabulary import BYTES, FromFile, Vocabulary
from spec.data import Data

SOURCE = '''# café
def area(r: float) -> float:
\t"""Two
lines."""
    return 3.14 * r ** 2 if r else 0x1F + 1e-3  # π
match = [f"{area!r}", b"x\\n"] \\
    + None
'''.replace("\t", "    ")


def names(classes: np.ndarray) -> list[str]:
    return [CLASSES[code] for code in classes]


def at(text: str, classes: np.ndarray, piece: str) -> set[str]:
    start = text.index(piece)
    return set(names(classes[start : start + len(piece)]))


def test_python_has_the_classes_of_tokenize() -> None:
    classes = of_python(SOURCE)
    for piece, kind in [
        ("# café", "comment"),
        ("def", "keyword"),
        ("area", "name"),
        ("->", "operator"),
        ('"""Two\nlines."""', "string"),
        ("3.14", "number"),
        ("**", "operator"),
        ("0x1F", "number"),
        ("# π", "comment"),
        ("match", "name"),
        ('b"x\\n"', "string"),
        ("None", "keyword"),
        ("\n    +", None),
    ]:
        if kind:
            assert at(SOURCE, classes, piece) == {kind}, piece
    assert names(classes[SOURCE.index("(r:") :])[:3] == ["operator", "name", "operator"]


@pytest.mark.parametrize("module", [bisect, re])
def test_whole_modules_agree_with_tokenize(module: object) -> None:
    text = Path(module.__file__).read_text()  # type: ignore[attr-defined]
    classes, lines = of_python(text), text.splitlines(keepends=True)
    starts = np.cumsum([0, *map(len, lines)])
    kinds = {tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.OP: "operator", tokenize.COMMENT: "comment"}
    seen = 0
    for token in tokenize.tokenize(io.BytesIO(text.encode()).readline):
        kind = ("keyword" if keyword.iskeyword(token.string) else "name") if token.type == tokenize.NAME else kinds.get(token.type)
        if kind:
            begin = starts[token.start[0] - 1] + token.start[1]
            assert set(names(classes[begin : begin + len(token.string)])) == {kind}
            seen += 1
    assert seen > 300


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text("()'\"#\\\n\t def1é"))
def test_any_text_has_a_class_for_each_character(text: str) -> None:
    for classes in (of_python(text), of_text(text)):
        assert classes.shape == (len(text),)
        assert not len(classes) or classes.max() < len(CLASSES) - 1


def test_what_cannot_be_read_is_an_error() -> None:
    text = "x = 1\ny = '''never closed\nz = 2\n"
    classes = names(of_python(text))
    assert classes[0] == "name"
    assert set(classes[text.index("'''") :]) <= {"error", "space"}
    assert "error" in classes


def test_other_text_is_lexical() -> None:
    assert names(of_text("aé天 1½,+\n€\x00")) == [
        *["letter"] * 3,
        "space",
        "digit",
        "digit",
        "punctuation",
        "punctuation",
        "space",
        "punctuation",
        "other",
    ]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    bpe.learn(iter([Path(tokenize.__file__).read_text(), "naïve 天気 é " * 50]), 600, path)
    return FromFile(path, bpe.END)


def test_a_token_has_the_class_of_its_first_byte_that_is_no_space(learnt: Vocabulary) -> None:
    for vocabulary in (BYTES, learnt):
        for text, python in ((SOURCE, True), ("naïve 天気, 1 é\n\n  x", False)):
            tokens = vocabulary.encode([text])[0].astype(np.int64)
            found = names(of_tokens(np.append(tokens, vocabulary.separator), vocabulary, python=python))
            by_byte = [name for char, name in zip(text, names((of_python if python else of_text)(text)), strict=True) for _ in char.encode()]
            chars = [char for char in text for _ in char.encode()]
            place, expected = 0, []
            for token in tokens:
                own = range(place, place + len(vocabulary.bytes_of[token]))
                expected.append(next((by_byte[byte] for byte in own if not chars[byte].isspace()), "space"))
                place = own.stop
            assert found == [*expected, "separator"]
    assert any(b" " in learnt.bytes_of[token] and len(learnt.bytes_of[token]) > 3 for token in tokens) or len(tokens) < 20


def test_windows_know_the_document_that_they_begin_in() -> None:
    documents = ["x = '''" + "if " * 40 + "'''\n", "words and 12 numbers " * 5, SOURCE]
    stream = np.concatenate([np.append(np.frombuffer(text.encode(), np.uint8).astype(np.uint16), 256) for text in documents])
    domain = Domain("d", stream, stream, BYTES, None, np.array([1, 0, 1], np.uint8))
    parts = [of_tokens(np.append(BYTES.encode([text])[0].astype(np.int64), 256), BYTES, python=n != 1) for n, text in enumerate(documents)]
    whole = np.concatenate(parts)
    firsts = np.arange(0, len(stream) - 32, 17)
    assert np.array_equal(of_windows(domain, firsts, 32), np.stack([whole[first : first + 32] for first in firsts]))
    assert names(of_windows(domain, np.array([50]), 4)[0]).count("keyword") == 0, "inside a string there are no keywords"


def test_the_corpus_knows_what_is_python(tmp_path: Path) -> None:
    home = tmp_path / "code"
    home.mkdir()
    for n in range(40):
        (home / f"{n}.py").write_text(f"x = {n}\n")
        (home / f"{n}.txt").write_text(f"text {n}\n")
    domain = corpus.load(Data(source="files", paths=[str(home)], validation_share=0.3), tmp_path)[0]
    held = np.split(domain.validation, np.flatnonzero(domain.validation == 256) + 1)[:-1]
    assert [bytes(part[:-1].astype(np.uint8)).startswith(b"x") for part in held] == domain.python.astype(bool).tolist()
    assert 0 < domain.python.sum() < len(held)


def test_every_kind_of_token_of_this_python_is_known() -> None:
    assert token_classes.CODE["string"] == token_classes._PYTHON[tokenize.STRING]
    if sys.version_info >= (3, 12):
        assert token_classes._PYTHON[tokenize.FSTRING_MIDDLE] == token_classes.CODE["string"]
