"""A run that begins from another run's checkpoint: the checkpoint becomes its own first one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from workers.claim import Start


def adopt(run_dir: Path, start: Start) -> None:
    """Links the checkpoint into `run_dir`, unless the run has one of its own. Raises FileNotFoundError where it is not on this host.

    Its place is found from the run's number and the step; a path that comes over the network is never followed.
    """
    own = run_dir / "checkpoints"
    if any(own.glob("step-*/MANIFEST.json")):
        return
    name = f"step-{start.step:08d}"
    source = run_dir.parent / str(start.run) / "checkpoints" / name
    if not (source / "MANIFEST.json").is_file():
        raise FileNotFoundError(f"the checkpoint of run {start.run} at step {start.step} is not on this host")
    partial = own / f"{name}.0.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=os.link)
    partial.rename(own / name)
