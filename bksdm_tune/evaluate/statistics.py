"""Uncertainty by resampling: percentile intervals of means, paired where the pictures are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES, LEVEL = 10_000, 0.95
BLOCKS = 10


def percentiles(resampled: NDArray[Any]) -> tuple[float, float]:
    """The middle 95 % of resampled figures."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


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
    return percentiles(np.concatenate(means))


def bootstrap_crossed(
    values: NDArray[Any], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``values`` (trainings, captions), both resampled.

    So it holds for other seeds of the training as well as for other captions (Davison and Hinkley
    1997, section 3.8).  With two or three trainings it can only be coarse.
    """
    rng = np.random.default_rng(seed)
    rows, columns = values.shape
    by_row = rng.multinomial(rows, np.full(rows, 1 / rows), size=resamples) / rows
    by_column = rng.multinomial(columns, np.full(columns, 1 / columns), size=resamples) / columns
    means = np.einsum("ri,ij,rj->r", by_row, values.astype(np.float64), by_column, optimize=True)
    return percentiles(means)


def block_interval(
    value: float, measure: Callable[[NDArray[Any]], float], features: NDArray[Any]
) -> tuple[float, float] | None:
    """``value``, measured on all rows, +- 1.96 standard errors from disjoint tenths of the rows.

    For figures that resampled rows would bias, because a row repeated is no new row, and that
    differ between tenths and all by no more than their own bias.  None below 20 rows.
    """
    if len(features) < 2 * BLOCKS:
        return None
    parts = [measure(part) for part in np.array_split(features, BLOCKS)]
    half = 1.96 * float(np.std(parts, ddof=1)) / BLOCKS**0.5
    return value - half, value + half
