"""moelab: launch, watch and inspect Mixture-of-Experts training.

    from moelab import Client, Recorder, attach

Nothing is imported before it is asked for, so that `import moelab` costs nothing and needs no Django.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelab.client import ApiError as ApiError
    from moelab.client import Client as Client
    from moelab.client import ServerUnreachable as ServerUnreachable
    from moelab.foreign import attach as attach
    from moelab.recorder import Recorder as Recorder

__version__ = "0.1.0"

_HOME_OF = {"Client": "client", "ApiError": "client", "ServerUnreachable": "client", "Recorder": "recorder", "attach": "foreign"}

__all__ = ["ApiError", "Client", "Recorder", "ServerUnreachable", "__version__", "attach"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moelab' has no attribute {name!r}")
    return getattr(import_module(f"moelab.{_HOME_OF[name]}"), name)
