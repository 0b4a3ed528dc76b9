"""The language is light: it loads neither torch nor Django, nor the rest of this project."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import spec

HEAVY = {"torch", "triton", "django", "rest_framework", "celery", "redis", "moe", "kernels", "moelab", "experiments", "workers"}


def test_spec_imports_neither_torch_nor_django_nor_the_other_parts() -> None:
    modules = [module.name for module in pkgutil.walk_packages(spec.__path__, "spec.")]
    assert {"spec.accounting.figures", "spec.presets", "spec.spool", "spec.overrides"} <= set(modules)
    code = f"import sys, {', '.join(modules)}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "spec" in loaded
    assert not HEAVY & set(loaded)
