"""What every call of the Python client is made of: requests, pages, blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from moelab.http import Http
from spec import block

Json = dict[str, Any]


class Steps(NamedTuple):
    """A `steps` block (docs/protocol.md, section 7): its header, and one array for each name."""

    header: Json
    arrays: dict[str, NDArray[Any]]

    def scalar(self, name: str) -> NDArray[np.float32]:
        """The values of one scalar at each row (means, above level 1). Raises KeyError for an unknown name."""
        if name not in self.header["names"]:
            raise KeyError(f"{name} is not among {', '.join(self.header['names'])}")
        values = self.arrays.get("scalars", self.arrays.get("scalars_mean"))
        if values is None:
            raise KeyError("the block holds no scalars")
        column: NDArray[np.float32] = values[:, self.header["names"].index(name)]
        return column


class Calls:
    """A connection to a moelab server. Usable as a context manager; not shared between threads."""

    def __init__(self, server: str | None = None, token: str | None = None, *, timeout_s: float = 30.0) -> None:
        """Without arguments: MOELAB_SERVER and MOELAB_TOKEN, else the local server's `client.json`."""
        self.http = Http(server, token, timeout_s)

    @property
    def server(self) -> str:
        """The server's address, without a slash at the end."""
        return self.http.connection.server

    def close(self) -> None:
        self.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _get(self, path: str, *, params: Mapping[str, Any] | None = None, timeout_s: float | None = None) -> Json:
        return as_json(self.http.request("GET", path, params=params, timeout_s=timeout_s))

    def _post(self, path: str, body: Mapping[str, Any] | None = None, key: str | None = None) -> Json:
        headers = {"Idempotency-Key": key} if key else {}
        return as_json(self.http.request("POST", path, json=dict(body or {}), headers=headers))

    def _block(self, path: str, query: Mapping[str, Any]) -> Steps:
        response = self.http.request("GET", path, params=query, headers={"Accept": "application/octet-stream"})
        return Steps(*block.decode(response.content))

    def _items(self, path: str) -> list[Json]:
        return list(self._pages(path, {}))

    def _pages(self, path: str, query: Mapping[str, Any], limit: int | None = None) -> Iterator[Json]:
        cursor, left = None, limit
        while left is None or left > 0:
            page = self.http.request("GET", path, params={**query, **given(cursor=cursor, limit=None if left is None else min(left, 100))}).json()
            items = page if isinstance(page, list) else page["items"]
            yield from items if left is None else items[:left]
            left = None if left is None else left - len(items)
            cursor = None if isinstance(page, list) else page.get("next_cursor")
            if not cursor:
                return


def given(**fields: Any) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def as_json(response: Any) -> Json:
    body = response.json() if response.content else {}
    return body if isinstance(body, dict) else {"items": body}
