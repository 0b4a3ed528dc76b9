"""Triton's interpreter: it must be chosen before triton is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
