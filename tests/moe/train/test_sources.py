"""Parquet files and saved datasets read as the same text in JSON lines; own splits are kept; what is wrong is said at its field."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe.train import corpus
from moe.train.stop import SpecRefused
from spec.data import Data

TEXTS = [f"text {n}: naïve 天気\n" * (n % 7 + 1) for n in range(3000)]


def load(home: Path, *paths: Path, **changes: object) -> list[corpus.Domain]:
    return corpus.load(Data.model_validate({"source": "files", "paths": [str(path) for path in paths], **changes}), home)


def documents(*streams: np.ndarray) -> list[str]:
    found = []
    for stream in streams:
        parts = np.split(stream, np.flatnonzero(stream == corpus.SEPARATOR) + 1)
        found += [part[:-1].astype(np.uint8).tobytes().decode() for part in parts[:-1]]
    return sorted(found)


def save_to_disk(directory: Path, texts: list[str], shards: int = 2, column: str = "text") -> Path:
    """A dataset as `Dataset.save_to_disk` writes it: Arrow streams, state.json, dataset_info.json."""
    directory.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{shards:05d}.arrow" for n in range(shards)]
    for name, part in zip(names, np.array_split(np.array(texts, object), shards), strict=True):
        table = pa.table({"id": list(range(len(part))), column: pa.array(part.tolist(), pa.large_string())})
        with pa.OSFile(str(directory / name), "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
            for batch in table.to_batches(max_chunksize=100):
                stream.write_batch(batch)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_format_type": None, "_split": None}
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "dataset_info.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    home = tmp_path_factory.mktemp("lines")
    path = home / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    domain = load(home, path)[0]
    return documents(domain.training, domain.validation)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_reads_as_the_same_lines(tmp_path: Path, lines: list[str], kind: pa.DataType) -> None:
    table = pa.table({"n": list(range(len(TEXTS))), "body": pa.array(TEXTS).cast(kind) if kind == pa.large_string() else pa.array(TEXTS, kind)})
    pq.write_table(table, tmp_path / "text.parquet", row_group_size=500)
    domain = load(tmp_path, tmp_path / "text.parquet", text_field="body")[0]
    assert documents(domain.training, domain.validation) == lines
    assert 0.03 < len(documents(domain.validation)) / len(TEXTS) < 0.07


def test_a_directory_mixes_every_kind_of_file(tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    pq.write_table(pa.table({"text": TEXTS[:100]}), mixed / "a.parquet")
    (mixed / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[100:200]))
    (mixed / "c.md").write_text(TEXTS[200])
    domain = load(tmp_path, mixed)[0]
    assert documents(domain.training, domain.validation) == sorted(TEXTS[:201])


def test_a_saved_dataset_reads_as_the_same_lines(tmp_path: Path, lines: list[str]) -> None:
    domain = load(tmp_path, save_to_disk(tmp_path / "saved", TEXTS, 3))[0]
    assert domain.name == "saved"
    assert documents(domain.training, domain.validation) == lines


@pytest.mark.parametrize(("splits", "held"), [(["train", "validation", "test"], "validation"), (["test", "train"], "test")])
def test_a_dataset_dict_is_validated_on_its_own_split(tmp_path: Path, splits: list[str], held: str) -> None:
    root = tmp_path / "dict"
    texts = {split: [f"{split} {n}" for n in range(50)] for split in splits}
    for split in splits:
        save_to_disk(root / split, texts[split])
    (root / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    domain = load(tmp_path, root, validation_share=0.5)[0]
    assert documents(domain.training) == sorted(texts["train"])
    assert documents(domain.validation) == sorted(texts[held])


def test_a_dict_without_a_split_to_hold_out_is_split_by_document(tmp_path: Path) -> None:
    for split in ("train", "extra"):
        save_to_disk(tmp_path / "dict" / split, [f"{split} {n}" for n in range(200)])
    (tmp_path / "dict" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "extra"]}))
    domain = load(tmp_path, tmp_path / "dict", validation_share=0.25)[0]
    assert len(documents(domain.training, domain.validation)) == 400
    assert (
        {text.split()[0] for text in documents(domain.training)} == {text.split()[0] for text in documents(domain.validation)} == {"train", "extra"}
    )


def test_a_link_inside_an_allowed_directory_leads_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = tmp_path / "open", tmp_path / "closed"
    inside.mkdir()
    outside.mkdir()
    (inside / "mine.txt").write_text("mine\n" * 10)
    (outside / "secret.txt").write_text("secret\n" * 10)
    (inside / "link.txt").symlink_to(outside / "secret.txt")
    saved = save_to_disk(inside / "saved", TEXTS[:10], 1)
    (outside / "data.arrow").write_bytes((saved / "data-00000-of-00001.arrow").read_bytes())
    monkeypatch.setenv("MOELAB_DATA_ROOTS", str(inside))
    with pytest.raises(SpecRefused, match=r"link\.txt lies outside .*MOELAB_DATA_ROOTS"):
        load(tmp_path, inside)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../closed/data.arrow"}]}))
    with pytest.raises(SpecRefused, match="lists no data files"):
        load(tmp_path, saved)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "link.arrow"}]}))
    (saved / "link.arrow").symlink_to(outside / "data.arrow")
    with pytest.raises(SpecRefused, match=r"link\.arrow lies outside .*MOELAB_DATA_ROOTS"):
        load(tmp_path, saved)


def parquet(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda at: parquet(at / "a.parquet", pa.table({"body": ["a"]})), r"^data\.text_field: .*a\.parquet has no one column 'text'; it has body"),
        (lambda at: parquet(at / "a.parquet", pa.table({"text": [1, 2]})), r"^data\.text_field: column 'text' of .* holds int64, not text"),
        (lambda at: parquet(at / "a.parquet", pa.table({"text": ["a", None]})), r"^data\.text_field: row 2 of .*a\.parquet has no text .*null"),
        (lambda at: (at / "a.parquet").write_bytes(b"PAR1 no") and at / "a.parquet", r"^data\.paths\[0\]: .*a\.parquet is not a whole Parquet file"),
        (lambda at: save_to_disk(at / "d", ["a"], 1, "body"), r"^data\.text_field: .*\.arrow has no one column 'text'; it has body, id"),
        (lambda at: cut(save_to_disk(at / "d", TEXTS, 1)), r"^data\.paths\[0\]: .*\.arrow is not a whole Arrow stream"),
        (lambda at: lost(save_to_disk(at / "d", TEXTS, 1)), r"^data\.paths\[0\]: .* cannot be read: No such file"),
        (lambda at: spoilt(at / "d", "[1"), r"^data\.paths\[0\]: .*dataset_dict\.json is not JSON"),
        (lambda at: spoilt(at / "d", '{"splits": ["../etc"]}'), r"^data\.paths\[0\]: .*dataset_dict\.json names no splits"),
    ],
)
def test_what_cannot_be_read_is_said_at_its_field(tmp_path: Path, make: object, complaint: str) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    with pytest.raises(SpecRefused, match=complaint):
        load(tmp_path, path)
    assert not list((tmp_path / "corpus").glob("*"))


def cut(directory: Path) -> Path:
    (file,) = directory.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:5000])
    return directory


def lost(directory: Path) -> Path:
    next(directory.glob("*.arrow")).unlink()
    return directory


def spoilt(directory: Path, text: str) -> Path:
    directory.mkdir()
    (directory / "dataset_dict.json").write_text(text)
    return directory


@pytest.mark.parametrize("name", ["", "runs/7", "log", "secret_key", "link"])
def test_what_moelab_keeps_is_not_data(tmp_path: Path, name: str) -> None:
    (tmp_path / "runs" / "7").mkdir(parents=True)
    (tmp_path / "log").mkdir()
    (tmp_path / "secret_key").write_text("a key")
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    with pytest.raises(SpecRefused, match=r"moelab's own \(MOELAB_HOME\)"):
        load(tmp_path, tmp_path / name)
