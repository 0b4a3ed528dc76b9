"""The built-in corpus and the user's own: enough of it, always the same, held out by document, and clear about what is wrong."""

from __future__ import annotations

import ast
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from moe.train import corpus, stdlib_text, user_text
from moe.train.stop import SpecRefused
from spec.data import Data

DOMAINS = {"code": 1_000_000, "prose": 1_000_000, "tables": 500_000}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[corpus.Domain]]:
    """A home, and the stdlib corpus in it."""
    home = tmp_path_factory.mktemp("home")
    return home, corpus.load(Data(), home)


def texts(stream: np.ndarray) -> list[bytes]:
    """The documents in a token stream."""
    assert stream[-1] == corpus.SEPARATOR
    ends = np.flatnonzero(stream == corpus.SEPARATOR)
    return [part[:-1].astype(np.uint8).tobytes() for part in np.split(stream, ends + 1)[:-1]]


@pytest.mark.parametrize("index", range(3))
def test_the_standard_library_is_read_whole_and_split_by_document(built: tuple[Path, list[corpus.Domain]], index: int) -> None:
    domain = built[1][index]
    training, validation = texts(domain.training), texts(domain.validation)
    documents = dict(stdlib_text.DOMAINS[domain.name]())
    assert sum(map(len, training + validation)) >= DOMAINS[domain.name]
    held = [name for name in documents if corpus.held_out(name, 0.05)]
    assert sorted(validation) == sorted(documents[name].encode() for name in held)
    assert sorted(training) == sorted(text.encode() for name, text in documents.items() if name not in held)
    assert 0.01 < len(validation) / len(documents) < 0.1


def test_a_module_and_its_docstrings_have_one_name_and_so_fall_on_the_same_side() -> None:
    code, prose = dict(stdlib_text.code()), dict(stdlib_text.prose())
    assert len(code.keys() & prose.keys()) > 250
    assert not [name for name in code if {"test", "tests"} & {*name.split("/")}]


@pytest.mark.parametrize("module", ["sched.py", "heapq.py", "asyncio/queues.py"])
def test_the_docstrings_are_those_that_the_parser_finds(module: str) -> None:
    source = dict(stdlib_text.code())[module]
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    expected = {" ".join(text.split()) for node in nodes if (text := ast.get_docstring(node, clean=False)) and len(text.strip()) > 40}
    assert expected
    assert {" ".join(text.split()) for text in stdlib_text._docstrings(source)} == expected


def test_prose_and_tables_are_what_they_say() -> None:
    prose, tables = dict(stdlib_text.prose()), dict(stdlib_text.tables())
    assert 'The "if" statement' in prose["topics/if"]
    assert "Decode a JSON document from" in prose["json/decoder.py"]
    assert "import re" not in prose["json/decoder.py"]
    assert "U+0041,LATIN CAPITAL LETTER A,Lu,L,0," in tables["unicode/00000"]
    assert "0x80,U+20AC,EURO SIGN" in tables["encodings/cp1252"]
    assert "404,NOT_FOUND,Not Found,Nothing matches the given URI" in tables["http"]


def test_a_second_build_is_the_same_bytes_and_a_second_look_takes_no_time(built: tuple[Path, list[corpus.Domain]], tmp_path: Path) -> None:
    home, domains = built
    started = time.perf_counter()
    corpus.load(Data(), home)
    assert time.perf_counter() - started < 0.1
    for domain, again in zip(domains, corpus.load(Data(), tmp_path), strict=True):
        assert np.array_equal(domain.training, again.training)
        assert np.array_equal(domain.validation, again.validation)


def test_builders_at_the_same_time_leave_one_whole_corpus(tmp_path: Path) -> None:
    data = Data(domains=["tables"])
    (tmp_path / "corpus" / "tmp-4194999-dead").mkdir(parents=True)
    with ThreadPoolExecutor(4) as pool:
        streams = [domains[0].training for domains in pool.map(lambda _: corpus.load(data, tmp_path), range(4))]
    assert all(np.array_equal(stream, streams[0]) for stream in streams)
    assert len(list((tmp_path / "corpus").iterdir())) == 1


def test_a_corpus_cut_short_is_built_again(tmp_path: Path) -> None:
    data = Data(domains=["tables"])
    whole = corpus.load(data, tmp_path)[0].training.copy()
    path = next((tmp_path / "corpus").glob("*/training.bin"))
    os.truncate(path, 1000)
    assert np.array_equal(corpus.load(data, tmp_path)[0].training, whole)


# ----- the user's files


def load(home: Path, *paths: Path, text_field: str = "text") -> list[corpus.Domain]:
    return corpus.load(Data(source="files", paths=[str(path) for path in paths], text_field=text_field, validation_share=0.2), home)


def test_each_path_is_a_domain_of_its_own(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    (notes / "deep").mkdir(parents=True)
    for index in range(20):
        (notes / "deep" / f"{index}.md").write_text(f"# note {index}\n")
    (notes / "picture.png").write_bytes(b"\x89PNG\xff")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"body": f"línea {index}"}) + "\n\n" for index in range(30)))
    first, second = load(tmp_path, notes, lines, text_field="body")
    assert (first.name, second.name) == ("notes", "lines")
    assert sorted(texts(first.training) + texts(first.validation)) == sorted(f"# note {index}\n".encode() for index in range(20))
    assert sorted(texts(second.training) + texts(second.validation)) == sorted(f"línea {index}".encode() for index in range(30))


def test_one_long_text_is_split_between_its_lines(tmp_path: Path) -> None:
    text = "".join(f"line {index}\n" for index in range(10_000))
    (tmp_path / "book.txt").write_text(text)
    domain = load(tmp_path, tmp_path / "book.txt")[0]
    pieces = texts(domain.training) + texts(domain.validation)
    assert len(pieces) > 5
    assert domain.validation.size
    assert all(piece.endswith(b"\n") and piece in text.encode() for piece in pieces)
    assert sum(map(len, pieces)) == len(text)


def test_few_documents_leave_one_to_validate_on(tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    domain = load(tmp_path, tmp_path / "few.jsonl")[0]
    assert (len(texts(domain.training)), len(texts(domain.validation))) == (2, 1)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    before = load(tmp_path, path)[0]
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    after = load(tmp_path, path)[0]
    assert len(texts(after.training) + texts(after.validation)) == len(texts(before.training) + texts(before.validation)) + 1


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("none.txt", None, r"^data\.paths\[0\]: .*none\.txt does not exist"),
        ("data.pdf", b"%PDF", r"^data\.paths\[0\]: .* is a \.pdf file; \.txt, \.md, \.py, \.jsonl, \.parquet are read"),
        ("empty.txt", b"", r"^data\.paths\[0\]: holds no text"),
        ("short.txt", b"only this", r"^data\.paths\[0\]: holds only one document"),
        ("latin.txt", b"caf\xe9", r"^data\.paths\[0\]: .*latin\.txt is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', r"^data\.paths\[0\]: line 2 of .*bad\.jsonl is not JSON"),
        ("key.jsonl", b'{"text": "a"}\n{"title": "b", "n": 1}\n', r"^data\.text_field: line 2 of .*has no text under 'text'; it has n, title"),
        ("list.jsonl", b'["a"]\n', r"^data\.text_field: line 1 of .*; it has list"),
        ("half.jsonl", b'{"text": "\\ud800"}\n{"text": "a"}\n', r"^data\.paths\[0\]: document half\.jsonl#1 holds a lone surrogate"),
        ("deep.jsonl", b"[" * 100_000 + b"\n", r"^data\.paths\[0\]: line 1 of .*deep\.jsonl is not JSON"),
    ],
)
def test_what_cannot_be_read_is_said_at_its_field(tmp_path: Path, name: str, content: bytes | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecRefused, match=complaint):
        load(tmp_path, tmp_path / name)
    assert not list((tmp_path / "corpus").glob("*")), "nothing half-built is left"


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecRefused, match=rf"holds no {', '.join(user_text.SUFFIXES)} file"):
        user_text.files(tmp_path, "data.paths[0]")


@pytest.mark.parametrize("path", ["~nobody-has-this-name/text", "x" * 300 + ".txt"])
def test_a_path_that_cannot_even_be_looked_at_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(SpecRefused, match=r"^data\.paths\[0\]: .* cannot be read: "):
        corpus.load(Data(source="files", paths=[path]), tmp_path)


def test_pipes_and_dead_links_are_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "dead.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "real.txt").write_text("text")
    assert user_text.files(tmp_path, "data.paths[0]") == [tmp_path / "real.txt"]


def test_a_worker_reads_only_what_its_owner_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = tmp_path / "open", tmp_path / "closed"
    for directory in (inside, outside):
        directory.mkdir()
        for number in range(40):
            (directory / f"{number}.txt").write_text(f"text {number} " * 50)
    (inside / "link").symlink_to(outside)
    monkeypatch.setenv("MOELAB_DATA_ROOTS", str(inside))
    assert [domain.name for domain in corpus.load(Data(source="files", paths=[str(inside)]), tmp_path)] == ["open"]
    for path in (outside, inside / ".." / "closed", inside / "link"):
        with pytest.raises(SpecRefused, match="MOELAB_DATA_ROOTS"):
            corpus.load(Data(source="files", paths=[str(path)]), tmp_path)
