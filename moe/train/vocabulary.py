"""From text to tokens and back: single bytes, or what a tokenizer.json says.

A document is encoded without any control token; what looks like one in the text is text. The corpus puts `separator` behind it.
Letter: V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moe.train.stop import SpecRefused

SEPARATOR = 256
KEPT = "tokenizer.json"  # in the directory of a run
# What published tokenizers call the token at the end of a text, the commonest first.
_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|end▁of▁sentence|>", "<｜end▁of▁sentence｜>", "<|return|>", "<|eos|>", "[SEP]")


class TokenizerError(ValueError):
    """The file is no tokenizer that documents can be told apart with."""


class Vocabulary(Protocol):
    """Tokens 0 … size - 1 and what they stand for."""

    @property
    def size(self) -> int:
        """One more than the highest token."""

    @property
    def separator(self) -> int:
        """The token behind each document."""

    @property
    def identity(self) -> str | None:
        """Changes with every change of the encoding; None for bytes, whose encoding never changes."""

    @property
    def bytes_of(self) -> Sequence[bytes]:
        """The UTF-8 bytes that each token stands for, empty for control tokens; of length `size`."""

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The tokens of each text, without the separator. Raises UnicodeEncodeError for a lone surrogate."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, bytes that are not UTF-8 replaced."""


@dataclass(frozen=True)
class Bytes:
    """One token for each byte of UTF-8, and SEPARATOR."""

    size: int = SEPARATOR + 1
    separator: int = SEPARATOR
    identity: str | None = None
    bytes_of: Sequence[bytes] = field(default=(*(bytes([byte]) for byte in range(256)), b""), repr=False)

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.bytes_of[token] for token in tokens).decode(errors="replace")


BYTES = Bytes()


class FromFile:
    """The vocabulary of a tokenizer.json (the format of the `tokenizers` library)."""

    def __init__(self, path: Path, separator: str | None = None) -> None:
        """Raises TokenizerError, or OSError where `path` cannot be read."""
        from tokenizers import Tokenizer  # a run on bytes does without

        self.data = data = path.read_bytes()
        try:
            self._tokenizer = Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path} is not a tokenizer.json: {str(error)[:300]}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        self.separator = self._separator(path, separator)
        self.identity: str | None = hashlib.sha256(data + repr(self.separator).encode()).hexdigest()

    def _separator(self, path: Path, asked: str | None) -> int:
        names = _ENDS if asked is None else (asked,)
        found = next((token for name in names if (token := self._tokenizer.token_to_id(name)) is not None), None)
        if found is None:
            raise TokenizerError(
                f"{path} has no token {asked!r}" if asked is not None else f"{path} has none of {', '.join(_ENDS)}: name its token in separator"
            )
        return int(found)

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        for text in texts:
            text.encode()  # A lone surrogate is refused here with its place; the library would stop the process's thread.
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int64) for one in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.bytes_of[token] for token in tokens).decode(errors="replace")

    @cached_property
    def bytes_of(self) -> Sequence[bytes]:
        """From the tokens' spelling, in GPT-2's alphabet of bytes or SentencePiece's; control tokens stand for nothing."""
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token for token, content in added.items() if content.special}
        spell = _gpt2_bytes if "ByteLevel" in f"{self._tokenizer.pre_tokenizer}{self._tokenizer.decoder}" else _sentencepiece_bytes
        table = [b""] * self.size
        for text, token in self._tokenizer.get_vocab().items():
            if token not in special:
                table[token] = text.encode() if token in added else spell(text)
        return table


def keep(vocabulary: Vocabulary, run: Path, *, first_rank: bool) -> None:
    """Puts the tokenizer.json beside the checkpoints of the directory `run`, so that they can be read when the corpus is gone.

    Raises SpecRefused where there are checkpoints that were made with another one, whose tokens mean something else.
    """
    if not isinstance(vocabulary, FromFile):
        return
    path = run / KEPT
    if path.is_file() and path.read_bytes() != vocabulary.data and any((run / "checkpoints").glob("step-*")):
        raise SpecRefused("data.tokenizer", f"is not the one of the checkpoints in {run}: the text it was learnt from, or its file, has changed")
    if first_rank:
        run.mkdir(parents=True, exist_ok=True)
        work = path.with_name(f".{KEPT}")
        work.write_bytes(vocabulary.data)
        work.replace(path)


def _gpt2_alphabet() -> dict[str, int]:
    """Radford 2019: printable bytes stand for themselves, the others for the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _gpt2_alphabet()


def _gpt2_bytes(text: str) -> bytes:
    return b"".join(bytes([_ALPHABET[char]]) if char in _ALPHABET else char.encode() for char in text)


def _sentencepiece_bytes(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass
    return text.replace("▁", " ").encode()
