"""Real text that every Python carries: the standard library's source (code), documentation (prose) and data (tables).

A document is named after where it comes from. The docstrings of a module have the name of its source file, so that the
held-out split, which goes by name, never trains on the code of a module whose docstrings it validates on.
"""

from __future__ import annotations

import codecs
import errno
import locale
import mimetypes
import opcode
import re
import signal
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from html.entities import html5
from http import HTTPStatus
from pathlib import Path

Document = tuple[str, str]

# Tests, generated tables (they are the domain "tables"), and packages that only some Pythons have.
_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "encodings", "pydoc_data"}
    | {"idlelib", "lib2to3", "distutils", "turtledemo", "ensurepip", "_pyrepl"}
)


def _files(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files under `root` with one of `suffixes`, in the order of their names."""
    for entry in sorted(root.iterdir()):
        if entry.is_dir():
            if entry.name not in _SKIPPED and not entry.name.startswith("config-") and not entry.is_symlink():
                yield from _files(entry, suffixes)
        elif entry.suffix in suffixes:
            yield entry


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _sources() -> Iterator[Document]:
    root = _root()
    for path in _files(root, (".py",)):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield path.relative_to(root).as_posix(), text


def code() -> Iterator[Document]:
    """The library's modules, one document each."""
    return _sources()


# ----- prose


# A triple-quoted string that opens the file, or the block after a line that ends in a colon. Parsing the library to find
# the same strings takes 25 times as long, and a first run waits for it.
_DOCSTRING = re.compile(r'''(?:\A(?:\#[^\n]*\n|\s*\n)*|:[ \t]*(?:\#[^\n]*)?\n[ \t]+)[rRuU]?("""|\'\'\')(.+?)\1''', re.DOTALL)


def _docstrings(source: str) -> list[str]:
    """The docstrings in `source` that say more than a name does, without their indentation."""
    return [re.sub(r"\n[ \t]+", "\n", text) for match in _DOCSTRING.finditer(source) if len(text := match[2].strip()) > 40]


def _topics() -> Mapping[str, str]:
    try:
        from pydoc_data import topics
    except ImportError:  # some distributions leave it out
        return {}
    return topics.topics


def prose() -> Iterator[Document]:
    """The language reference (pydoc's topics), the text files of the library, and the docstrings of each module."""
    for name, text in sorted(_topics().items()):
        yield f"topics/{name}", text.strip() + "\n"
    for path in _files(_root(), (".txt", ".rst", ".md")):
        try:
            yield path.relative_to(_root()).as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    for name, text in _sources():
        docs = _docstrings(text)
        if docs:
            yield name, "\n\n".join(docs) + "\n"


# ----- tables


def _table(columns: str, rows: Iterable[Iterable[object]]) -> str:
    """Comma-separated rows under their header; a comma within a field becomes a semicolon."""
    lines = (",".join(str(field).replace(",", ";").replace("\n", " ") for field in row) for row in rows)
    return "\n".join([columns, *lines]) + "\n"


def _characters(start: int, stop: int) -> str:
    named = ((point, chr(point), unicodedata.name(chr(point), "")) for point in range(start, stop))
    rows = (
        (f"U+{p:04X}", name, unicodedata.category(c), unicodedata.bidirectional(c), unicodedata.combining(c), unicodedata.decomposition(c))
        for p, c, name in named
        if name
    )
    return _table("code,name,category,bidirectional,combining,decomposition", rows)


def _character_sets() -> Iterator[Document]:
    """What each byte means in every single-byte encoding of the library."""
    for path in sorted((_root() / "encodings").glob("*.py")):
        if "decoding_table" not in path.read_text(encoding="utf-8", errors="replace"):
            continue
        chars = codecs.decode(bytes(range(256)), path.stem, "replace")
        rows = ((f"0x{byte:02X}", f"U+{ord(c):04X}", unicodedata.name(c, "<control>")) for byte, c in enumerate(chars) if c != "\ufffd")
        yield f"encodings/{path.stem}", _table(f"{path.stem},code,name", rows)


def _chunks(name: str, columns: str, rows: list[tuple[object, ...]], size: int = 200) -> Iterator[Document]:
    """A long table in pieces, so that some of it can be held out."""
    for start in range(0, len(rows), size):
        yield f"{name}/{start}", _table(columns, rows[start : start + size])


def tables() -> Iterator[Document]:
    """Unicode's characters, the character sets, HTML's entities, and the library's lists of codes and names."""
    for start in (*range(0, 0x3400, 256), *range(0xA000, 0xAC00, 256), *range(0xF900, 0x10000, 256), *range(0x1D000, 0x1FC00, 256)):
        text = _characters(start, start + 256)
        if text.count("\n") > 16:
            yield f"unicode/{start:05X}", text
    yield from _character_sets()
    entities: list[tuple[object, ...]] = [
        (name, " ".join(f"U+{ord(c):04X}" for c in text), " + ".join(unicodedata.name(c, "") for c in text)) for name, text in sorted(html5.items())
    ]
    yield from _chunks("html5", "entity,code,name", entities)
    mimetypes.init(files=[])
    yield from _chunks("mimetypes", "suffix,type", sorted(mimetypes.types_map.items()))
    yield from _chunks("locales", "alias,locale", sorted(locale.locale_alias.items()))
    yield from _chunks("windows_locales", "code,locale", [(f"0x{code:04x}", name) for code, name in sorted(locale.windows_locale.items())])
    yield "errno", _table("number,name", sorted(errno.errorcode.items()))
    yield "opcode", _table("number,name", ((number, name) for number, name in enumerate(opcode.opname) if not name.startswith("<")))
    yield "http", _table("status,name,phrase,description", ((int(s), s.name, s.phrase, s.description) for s in HTTPStatus))
    yield "signal", _table("number,name", ((int(s), s.name) for s in signal.Signals))


DOMAINS: Mapping[str, Callable[[], Iterator[Document]]] = {"code": code, "prose": prose, "tables": tables}
