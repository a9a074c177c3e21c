"""``python -m bksdm_tune`` is ``bksdm-tune``."""

from bksdm_tune.cli import entry

entry()
