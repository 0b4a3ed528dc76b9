"""The trainer of the chaos tests: the real one for runs whose name begins with "real", else the one without a model."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

name = json.loads(Path(sys.argv[1]).read_text())["name"]
runpy.run_module("moe.train" if name.startswith("real") else "tests.workers.fake_trainer", run_name="__main__", alter_sys=True)
