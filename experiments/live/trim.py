"""The rest of a block, where a viewer has its beginning already."""

from __future__ import annotations

from spec import block


def after_step(data: bytes, step: int) -> bytes:
    """The `steps` block `data` without the rows up to `step`."""
    header, arrays = block.decode(data)
    keep = arrays["step"] > step
    rows = {name: array[keep] for name, array in arrays.items()}
    return block.encode({**header, "from": step + 1, "total": int(keep.sum())}, rows)
