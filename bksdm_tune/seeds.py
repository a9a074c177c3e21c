"""Randomness as a function of what it is for."""

from __future__ import annotations

import numpy as np
import torch


def seed_for(*numbers: int) -> int:
    """A 63-bit seed from a tuple of integers; unrelated tuples give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def reseed(seed: int) -> None:
    """Seed the global generators that are in use.

    ``torch.manual_seed`` also leaves word for devices that nobody has used, which takes ten times
    as long.
    """
    if torch.cuda.is_initialized() or torch.backends.mps.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
