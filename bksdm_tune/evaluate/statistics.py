"""Uncertainty by resampling: percentile intervals of means, paired where the pictures are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES, LEVEL = 10_000, 0.95


def bootstrap_mean(
    values: NDArray[Any], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of the mean of independent values."""
    rng = np.random.default_rng(seed)
    values = values.astype(np.float64)
    means = [
        values[rng.integers(len(values), size=(min(500, resamples - done), len(values)))].mean(1)
        for done in range(0, resamples, 500)
    ]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
