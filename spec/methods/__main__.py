"""`python -m spec.methods`: writes docs/methods.md from the registry."""

from __future__ import annotations

import sys
from pathlib import Path

from spec.methods.page import markdown

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"

if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
