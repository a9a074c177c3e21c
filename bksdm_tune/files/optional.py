"""Libraries that only some formats need."""

from __future__ import annotations

import importlib
from contextlib import redirect_stderr
from io import StringIO

from bksdm_tune.errors import UsageError


def check_installed(*names: str, extra: str) -> None:
    """Raises UsageError: a library is not installed."""
    for name in names:
        try:
            with redirect_stderr(StringIO()):  # remarks about what the library misses
                importlib.import_module(name)
        except ImportError:
            raise UsageError(
                f"--format {extra} needs {name}. Type: pip install 'bksdm-tune[{extra}]'"
            ) from None
