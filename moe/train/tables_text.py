"""Text out of a column: Parquet files, row group by row group, and the Arrow streams that datasets are saved as."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe.train.stop import SpecRefused

_ROWS = 1024


def parquet(path: Path, name: str, text_field: str, where: str) -> Iterator[tuple[str, str]]:
    """(name#row, text) of each row of a Parquet file whose text is not empty. Raises SpecRefused."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            _check(file.schema_arrow, path, text_field)
            yield from _rows(file.iter_batches(_ROWS, columns=[text_field]), path, name, text_field)
    except (pa.ArrowException, OSError) as error:
        raise SpecRefused(where, f"{path} is not a whole Parquet file: {str(error)[:300]}") from error


def arrow_stream(path: Path, name: str, text_field: str, where: str) -> Iterator[tuple[str, str]]:
    """(name#row, text) of each row of a file in Arrow's stream format, likewise."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
            _check(stream.schema, path, text_field)
            yield from _rows((batch.select([text_field]) for batch in stream), path, name, text_field)
    except (pa.ArrowException, OSError) as error:
        raise SpecRefused(where, f"{path} is not a whole Arrow stream: {str(error)[:300]}") from error


def _check(schema: Any, path: Path, text_field: str) -> None:
    import pyarrow.types as types

    index = schema.get_field_index(text_field)
    if index < 0:
        names = ", ".join(sorted(schema.names)[:10]) or "nothing"
        raise SpecRefused("data.text_field", f"{path} has no one column {text_field!r}; it has {names}")
    kind = schema.field(index).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise SpecRefused("data.text_field", f"column {text_field!r} of {path} holds {kind}, not text")


def _rows(batches: Iterator[Any], path: Path, name: str, text_field: str) -> Iterator[tuple[str, str]]:
    row = 0
    for batch in batches:
        try:
            texts = batch.column(0).to_pylist()
        except UnicodeDecodeError as error:
            raise SpecRefused("data.text_field", f"column {text_field!r} of {path} is not UTF-8 near row {row + 1}: {error.reason}") from error
        for text in texts:
            row += 1
            if text is None:
                raise SpecRefused("data.text_field", f"row {row} of {path} has no text under {text_field!r}: it is null")
            if text:
                yield f"{name}#{row}", text
