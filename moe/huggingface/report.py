"""What became of every tensor: the account of an import or an export."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Line:
    """One tensor of theirs. `ours` is the tensor that it is part of; empty where there is none, and `note` says why."""

    theirs: str
    shape: tuple[int, ...]
    dtype: str
    ours: str
    note: str = ""


@dataclass
class Report:
    """Of a whole model. `notes` are about more than one tensor."""

    family: str
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def left_out(self) -> list[Line]:
        """Tensors that went nowhere, each with its reason."""
        return [line for line in self.lines if not line.ours]

    def text(self) -> str:
        """For the terminal: one line a tensor, then the notes."""
        rows = [
            (line.theirs, "x".join(map(str, line.shape)) or "scalar", line.dtype, f"-> {line.ours}" if line.ours else line.note)
            for line in self.lines
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        told = ["  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3])) for row in rows]
        summary = f"{self.family}: {len(self.lines)} tensors, {len(self.left_out)} left out"
        return "\n".join([*told, *self.notes, summary])

    def json(self) -> str:
        """The same, for programs."""
        return json.dumps(asdict(self), indent=1)
