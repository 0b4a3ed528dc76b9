"""`python -m moelab.cli COMMAND`: the same as `moelab COMMAND`."""

from __future__ import annotations

import sys

from moelab.cli import main

sys.exit(main())
