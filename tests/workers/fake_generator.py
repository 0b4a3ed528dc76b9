"""Stands for `python -m moe.generate`: says what it was asked, or does what the prompt names."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    prompt, arguments = sys.stdin.read(), sys.argv[1:]
    if prompt.startswith("exit "):
        print("first line\nthe last \x1b[31mline\n")
        sys.exit(int(prompt.split()[1]))
    if prompt == "sleep":
        time.sleep(60)
    seen = {name: os.environ.get(name) for name in ("MOELAB_TOKEN", "MOELAB_DEVICE", "MOELAB_THREADS")}
    said = {"prompt": prompt, "arguments": arguments, "environment": seen, "nice": os.nice(0)}
    Path(arguments[arguments.index("--out") + 1]).write_text("{" if prompt == "broken" else json.dumps(said))
