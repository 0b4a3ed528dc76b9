"""What kind of thing each token is part of: a keyword, a number, a letter … for which experts may or may not specialise.

Python source has the classes of Python's own `tokenize`, other text a small lexical set. Classes belong to characters; a token
takes the class of its first byte that is not white space. Letters: C characters, N tokens, B windows, S tokens in each.
"""

from __future__ import annotations

import io
import keyword
import tokenize
import unicodedata

import numpy as np
from numpy.typing import NDArray

from moe.train.corpus import Domain
from moe.train.vocabulary import Vocabulary

CLASSES = (
    *("keyword", "name", "number", "string", "operator", "comment", "error"),  # of Python; error: what tokenize cannot read
    *("letter", "digit", "punctuation", "other"),  # of other text
    *("space", "separator"),  # of both; the separator is the token between documents
)
CODE = {name: code for code, name in enumerate(CLASSES)}
Classes = NDArray[np.uint8]

_PYTHON = {
    tokenize.NUMBER: CODE["number"],
    tokenize.STRING: CODE["string"],
    tokenize.OP: CODE["operator"],
    tokenize.COMMENT: CODE["comment"],
    tokenize.ERRORTOKEN: CODE["error"],
} | {kind: CODE["string"] for kind, name in tokenize.tok_name.items() if name.startswith(("FSTRING_", "TSTRING_"))}


def of_python(text: str) -> Classes:
    """uint8[C]: the class of each character of Python source. What follows a place that cannot be read is `error`."""
    lines = list(io.StringIO(text, newline=""))
    starts = np.concatenate([[0], np.cumsum([len(line) for line in lines])]).tolist()
    classes = np.full(len(text), CODE["space"], np.uint8)
    done = 0
    try:
        for token in tokenize.generate_tokens(iter([*lines, ""]).__next__):
            code = CODE["keyword" if keyword.iskeyword(token.string) else "name"] if token.type == tokenize.NAME else _PYTHON.get(token.type)
            (first_line, first), (last_line, last) = token.start, token.end
            begin, end = starts[min(first_line, len(starts)) - 1] + first, starts[min(last_line, len(starts)) - 1] + last
            if code is not None:
                classes[begin:end] = code
            done = max(done, end)
    except (tokenize.TokenError, SyntaxError):
        classes[done:] = CODE["error"]
    unread = classes == CODE["error"]
    classes[unread] = np.where(_lexical(text)[unread] == CODE["space"], CODE["space"], CODE["error"])
    return classes


def of_text(text: str) -> Classes:
    """uint8[C]: the class of each character of text that is no program, by its Unicode category."""
    return _lexical(text)


def _lexical(text: str) -> Classes:
    points, places = np.unique(_points(text), return_inverse=True)
    return np.array([_class_of(chr(point)) for point in points.tolist()], np.uint8)[places]


def _class_of(char: str) -> int:
    if char.isspace():
        return CODE["space"]
    category = unicodedata.category(char)[0]
    return CODE[{"L": "letter", "M": "letter", "N": "digit", "P": "punctuation", "S": "punctuation", "Z": "space"}.get(category, "other")]


def _points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def of_tokens(tokens: NDArray[np.int64], vocabulary: Vocabulary, *, python: bool) -> Classes:
    """uint8[N]: the classes of a document's tokens."""
    pieces = [vocabulary.bytes_of[token] for token in tokens.tolist()]
    text = b"".join(pieces).decode(errors="surrogateescape")
    by_char = of_python(text) if python else of_text(text)
    points = _points(text)
    # A byte that is not UTF-8 was decoded to one surrogate.
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000) - 2 * ((points >= 0xD800) & (points < 0xE000))
    by_byte = np.append(np.repeat(by_char, widths), CODE["space"])
    is_space = np.append(np.repeat(_lexical(text) == CODE["space"], widths), False)
    lengths = np.array([len(piece) for piece in pieces])
    ends = np.cumsum(lengths)
    # For each byte the next one that is not white space, itself included.
    places = np.arange(len(by_byte))
    following = np.minimum.accumulate(np.where(is_space, len(by_byte), places)[::-1])[::-1]
    first = following[np.minimum(ends - lengths, len(by_byte) - 1)]
    classes = np.where(first < ends, by_byte[np.minimum(first, len(by_byte) - 1)], CODE["space"])
    return np.where(lengths > 0, classes, CODE["separator"]).astype(np.uint8)


def of_windows(domain: Domain, firsts: NDArray[np.int64], length: int) -> Classes:
    """uint8[B, S]: the classes of the `length` tokens from each of `firsts` on in the domain's held-out stream.

    Documents are classed whole, since a window may begin inside a string or a comment.
    """
    stream = domain.validation
    ends = np.flatnonzero(stream == domain.vocabulary.separator)
    cache: dict[int, Classes] = {}
    rows = np.empty((len(firsts), length), np.uint8)
    for row, first in zip(rows, firsts.tolist(), strict=True):
        for document in range(int(np.searchsorted(ends, first)), int(np.searchsorted(ends, first + length - 1)) + 1):
            start = int(ends[document - 1]) + 1 if document else 0
            stop = int(ends[document]) + 1 if document < len(ends) else len(stream)
            if document not in cache:
                python = document < len(domain.python) and bool(domain.python[document])
                cache[document] = of_tokens(np.asarray(stream[start:stop], np.int64), domain.vocabulary, python=python)
            low, high = max(start, first), min(stop, first + length)
            row[low - first : high - first] = cache[document][low - start : high - start]
    return rows
