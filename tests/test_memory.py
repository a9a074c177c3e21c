"""What is freed stays at hand for the next allocation."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from bksdm_tune.memory import keep_freed_pages
if sys.argv[1] == "kept":
    keep_freed_pages()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    together = [torch.ones(1_000_000) for _ in range(50)]
    del together
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries are left alone")
def test_freed_pages_are_not_fetched_again() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True).stdout)
        for how in ("default", "kept")
    }
    assert faults["kept"] < faults["default"] / 4
