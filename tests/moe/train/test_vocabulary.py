"""Tokenizers: text comes back as it was, byte pairs are learnt once and always the same, files say what is wrong with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from moe.train import bpe, corpus
from moe.train.stop import SpecRefused
from moe.train.vocabulary import BYTES, KEPT, FromFile, Vocabulary, keep
from spec.data import Data
from tests.moe.train.tiny import Run, tiny

TEXTS = [f"the weather of day {n} was {'fair' if n % 3 else 'foul'} <|endoftext|> naïve café 天気 {n * n}\n" * 5 for n in range(60)]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "notes.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def data(notes: Path, **changes: object) -> Data:
    return Data.model_validate({"source": "files", "paths": [str(notes)], "tokenizer": "bpe", "bpe_vocab_size": 300, **changes})


@pytest.fixture(scope="module")
def learnt(notes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Vocabulary]:
    home = tmp_path_factory.mktemp("home")
    return home, corpus.load(data(notes), home)[0].vocabulary


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text("the weather<|endoftext|> \n"))
def test_any_text_comes_back(learnt: tuple[Path, Vocabulary], text: str) -> None:
    for vocabulary in (BYTES, learnt[1]):
        tokens = vocabulary.encode([text])[0].tolist()
        assert vocabulary.separator not in tokens
        assert vocabulary.decode(tokens) == text
        assert b"".join(vocabulary.bytes_of[token] for token in tokens) == text.encode()


def test_the_stream_is_the_documents_with_separators(learnt: tuple[Path, Vocabulary], notes: Path) -> None:
    home, vocabulary = learnt
    domain = corpus.load(data(notes), home)[0]
    assert vocabulary.size == 300
    found = []
    for stream in (domain.training, domain.validation):
        assert stream.dtype == np.uint16
        documents = np.split(stream, np.flatnonzero(stream == vocabulary.separator) + 1)
        found += [vocabulary.decode(document[:-1].tolist()) for document in documents[:-1]]
        assert not len(documents[-1])
    assert sorted(found) == sorted(TEXTS)
    assert len(domain.training) < sum(len(text.encode()) for text in TEXTS) / 2, "byte pairs compress"


def test_a_second_load_learns_nothing_and_a_changed_text_learns_anew(
    learnt: tuple[Path, Vocabulary], notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, vocabulary = learnt
    calls: list[Path] = []
    learn = bpe.learn
    monkeypatch.setattr(bpe, "learn", lambda texts, size, path: (calls.append(path), learn(texts, size, path)))
    assert corpus.load(data(notes), home)[0].vocabulary.identity == vocabulary.identity
    assert not calls
    changed = tmp_path / "notes.jsonl"
    changed.write_text(notes.read_text().replace("fair", "mild"))
    assert corpus.load(data(changed), tmp_path)[0].vocabulary.identity != vocabulary.identity
    assert len(calls) == 1


def test_another_process_learns_the_same(learnt: tuple[Path, Vocabulary], notes: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from moe.train import corpus; from spec.data import Data\n"
        "corpus.load(Data(source='files', paths=[sys.argv[1]], tokenizer='bpe', bpe_vocab_size=300), Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", program, str(notes), str(tmp_path)], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    (mine,), (other,) = (sorted(home.glob("tokenizers/*/tokenizer.json")) for home in (learnt[0], tmp_path))
    assert mine.read_bytes() == other.read_bytes()


def test_held_out_text_is_not_learnt_from(notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    learn = bpe.learn
    monkeypatch.setattr(bpe, "learn", lambda texts, size, path: learn((seen.append(text) or text for text in texts), size, path))  # type: ignore[func-returns-value]
    domain = corpus.load(data(notes, validation_share=0.3), tmp_path)[0]
    held = domain.vocabulary.decode(domain.validation[:-1].tolist())
    assert seen
    assert not [text for text in seen if text in held]


def test_what_is_learnt_works_in_transformers(learnt: tuple[Path, Vocabulary]) -> None:
    from transformers import PreTrainedTokenizerFast

    (path,) = learnt[0].glob("tokenizers/*/tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path))
    text = "the weather, naïve 天気\n"
    assert theirs(text)["input_ids"] == learnt[1].encode([text])[0].tolist()
    assert theirs.convert_tokens_to_ids(bpe.END) == learnt[1].separator


def test_more_than_65536_tokens_take_four_bytes(notes: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {char: n for n, char in enumerate(alphabet)} | {f"{n:08d}": 256 + n for n in range(70_000)} | {"</s>": 70_256}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path))
    domain = corpus.load(data(notes, tokenizer="file", tokenizer_path=str(path)), tmp_path)[0]
    assert domain.training.dtype == np.uint32
    assert domain.vocabulary.separator == domain.training[-1] == 70_256


def sentencepiece(path: Path) -> Path:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", "e", "t", "h"]
    merges = [("▁", "t")][:0]
    tokenizer = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path))
    return path


def test_a_sentencepiece_vocabulary_knows_its_bytes(tmp_path: Path) -> None:
    vocabulary = FromFile(sentencepiece(tmp_path / "tokenizer.json"))
    assert vocabulary.separator == 2
    for text in ("he the é天\n", "</s> the <0x41>"):
        assert vocabulary.decode(vocabulary.encode([text])[0].tolist()) == text
    assert vocabulary.bytes_of[3 + 65] == b"A"
    assert vocabulary.bytes_of[2] == b""


def test_a_document_that_a_tokenizer_makes_nothing_of_leaves_no_separator(tmp_path: Path) -> None:
    path = sentencepiece(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.save(str(path))
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the {n}" if n % 2 else "  "}) + "\n" for n in range(60)))
    found = corpus.load(data(text, tokenizer="file", tokenizer_path=str(path), validation_share=0.3), tmp_path)[0]
    for stream in (found.training, found.validation):
        ends = np.flatnonzero(stream == found.vocabulary.separator)
        assert len(ends) and np.diff(ends, prepend=-1).min() > 1
    assert len(found.python) == np.count_nonzero(found.validation == found.vocabulary.separator)


def test_the_separator_may_be_named(tmp_path: Path) -> None:
    path = sentencepiece(tmp_path / "tokenizer.json")
    assert FromFile(path, "<s>").separator == 1


@pytest.mark.parametrize(
    ("content", "separator", "complaint"),
    [
        (None, None, r"^data\.tokenizer_path: .*tokenizer\.json cannot be read: No such file"),
        ("{}", None, r"^data\.tokenizer_path: .* is not a tokenizer\.json"),
        ("\x00", None, r"^data\.tokenizer_path: .* is not a tokenizer\.json"),
        ("good", "<end>", r"^data\.tokenizer_path: .* has no token '<end>'"),
    ],
)
def test_a_bad_file_is_refused_at_its_field(notes: Path, tmp_path: Path, content: str | None, separator: str | None, complaint: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content == "good":
        sentencepiece(path)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(SpecRefused, match=complaint):
        corpus.load(data(notes, tokenizer="file", tokenizer_path=str(path), separator=separator), tmp_path)


def test_a_tokenizer_outside_the_allowed_directories_is_refused(notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sentencepiece(tmp_path / "tokenizer.json")
    monkeypatch.setenv("MOELAB_DATA_ROOTS", str(notes.parent))
    with pytest.raises(SpecRefused, match=r"^data\.tokenizer_path: .*MOELAB_DATA_ROOTS"):
        corpus.load(data(notes, tokenizer="file", tokenizer_path=str(path)), tmp_path)


def test_the_vocabulary_must_fit_the_model(tmp_path: Path) -> None:
    path = sentencepiece(tmp_path / "tokenizer.json")
    spec = tiny(model={"vocab_size": 260}, data={"tokenizer": "file", "tokenizer_path": str(path)})
    with pytest.raises(SpecRefused, match=r"^model\.vocab_size: 260 is less than the 264 tokens of data\.tokenizer_path"):
        Run(spec, tmp_path / "run")
    with pytest.raises(ValueError, match=r"model\.vocab_size 264 < 300, which data\.bpe_vocab_size asks for"):
        tiny(data={"tokenizer": "bpe", "bpe_vocab_size": 300})


def test_the_tokenizer_is_kept_beside_the_checkpoints(learnt: tuple[Path, Vocabulary], tmp_path: Path) -> None:
    run = tmp_path / "run"
    keep(BYTES, run, first_rank=True)
    assert not run.exists()
    keep(learnt[1], run, first_rank=True)
    assert FromFile(run / KEPT).identity == learnt[1].identity
    other = FromFile(sentencepiece(tmp_path / "other.json"))
    keep(other, run, first_rank=True)  # nothing was trained with the first one
    assert (run / KEPT).read_bytes() == other.data
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    keep(other, run, first_rank=True)
    for first_rank in (True, False):
        with pytest.raises(SpecRefused, match=r"^data\.tokenizer: is not the one of the checkpoints in .*: the text it was learnt from"):
            keep(learnt[1], run, first_rank=first_rank)


@pytest.mark.slow
def test_a_run_on_byte_pairs_writes_text_when_its_corpus_is_gone(notes: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.jsonl"
    text.write_bytes(notes.read_bytes())
    spec = tiny(
        model={"n_layers": 1, "d_model": 16, "d_ff": 16, "vocab_size": 300, "moe": {"n_experts": 2, "top_k": 1, "d_expert": 16}},
        data={**data(text).model_dump(exclude={"domains"}), "seq_len": 32, "validation_share": 0.2},
        training={"steps": 1, "batch_size": 2, "eval_batches": 1},
    )
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    environment = {**os.environ, "MOELAB_HOME": str(tmp_path / "home"), "MOELAB_DEVICE": "cpu", "MOELAB_THREADS": "1"}
    run = tmp_path / "run"
    subprocess.run([sys.executable, "-m", "moe.train", str(tmp_path / "spec.json"), "--out", str(run)], check=True, env=environment)
    text.unlink()
    shutil.rmtree(tmp_path / "home")
    arguments = ["--spec", str(tmp_path / "spec.json"), "--prompt", "the weather <|endoftext|> é", "--tokens", "3"]
    done = subprocess.run([sys.executable, "-m", "moe.generate", str(run), *arguments], check=True, env=environment, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1])["texts"][0]
