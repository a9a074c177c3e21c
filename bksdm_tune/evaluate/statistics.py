"""Uncertainty by resampling: intervals of means, paired where the pictures are, and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES, LEVEL = 10_000, 0.95
Z95 = 1.959963985
FEW_DEGREES = (12.706, 4.303, 3.182, 2.776)
BLOCKS = 10
EXACT_SUBJECTS = 16  # up to here all sign patterns are tried, 2^16


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


@dataclass(frozen=True)
class Cells:
    """A figure a (subject, prompt); ``values`` (subjects, prompts), NaN where there is none.

    ``group`` numbers the prompt list each subject has; lists share no prompts, whatever their
    columns say.
    """

    values: NDArray[Any]
    group: NDArray[Any]

    @staticmethod
    def of(figures: dict[tuple[str, str], float], lists: dict[str, str]) -> Cells:
        """``figures``: (subject, prompt) -> value; ``lists``: subject -> name of its list."""
        subjects = sorted({subject for subject, _ in figures})
        prompts = sorted({prompt for _, prompt in figures})
        names = sorted(set(lists.values()))
        values = np.full((len(subjects), len(prompts)), np.nan)
        for (subject, prompt), value in figures.items():
            values[subjects.index(subject), prompts.index(prompt)] = value
        return Cells(values, np.array([names.index(lists[subject]) for subject in subjects]))

    def by_subject(self) -> NDArray[Any]:
        """Mean over its prompts, (subjects,)."""
        return np.asarray(np.nanmean(self.values, axis=1))


def bootstrap_cells(
    cells: Cells, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """95 % interval of the mean over subjects of means over prompts; None for one subject.

    Two-way: subjects are drawn again, and within each list the prompts, the same ones for all its
    subjects (Owen 2007, the pigeonhole bootstrap).  Its spread counts the residual three times and
    ignores how few subjects there are, so it is scaled to ``crossed_variance`` with Student's
    quantile; tests hold the coverage by simulation.
    """
    if len(cells.values) < 2:
        return None
    means = _resampled_means(cells, seed, resamples)
    centre, spread = cells.by_subject().mean(), means.std()
    variance, freedom = crossed_variance(cells)
    scale = variance**0.5 * student_quantile(freedom) / Z95 / spread if spread > 0 else 1.0
    low, high = percentiles((means - means.mean()) * scale)
    return float(centre + low), float(centre + high)


def _resampled_means(cells: Cells, seed: int, resamples: int) -> NDArray[Any]:
    rows = len(cells.values)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(rows, np.full(rows, 1 / rows), size=resamples).astype(np.float64)
    means = np.full((resamples, rows), np.nan)
    for mine, part in _lists(cells):
        columns = part.shape[1]
        drawn = rng.multinomial(columns, np.full(columns, 1 / columns), size=resamples)
        there = ~np.isnan(part)
        with np.errstate(invalid="ignore"):
            means[:, mine] = (drawn @ np.where(there, part, 0).T) / (drawn @ there.T)
    weights[np.isnan(means)] = 0  # of this subject none of the drawn prompts is there
    total = weights.sum(1)
    return np.asarray((weights * np.nan_to_num(means)).sum(1)[total > 0] / total[total > 0])


def _lists(cells: Cells) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Row numbers and values of each list's subjects, with the prompts it has."""
    for name in np.unique(cells.group):
        mine = np.flatnonzero(cells.group == name)
        part = cells.values[mine]
        yield mine, part[:, ~np.isnan(part).all(axis=0)]


def crossed_variance(cells: Cells) -> tuple[float, float]:
    """Variance of the mean where subjects and prompts are both random, and degrees of freedom.

    var(subject means) / S + var(prompt means) / P - var(residual) / (S P): each of the first two
    holds the residual's part once.  Freedom after Satterthwaite.
    """
    subjects = len(cells.values)
    by_subject = float(np.var(cells.by_subject(), ddof=1)) / subjects
    by_prompt, twice, squares = 0.0, 0.0, by_subject**2 / (subjects - 1)
    for _, part in _lists(cells):
        rows, columns = part.shape
        if columns < 2:
            continue
        share = (rows / subjects) ** 2
        column_means = np.nanmean(part, axis=0)
        own = share * float(np.var(column_means, ddof=1)) / columns
        by_prompt, squares = by_prompt + own, squares + own**2 / (columns - 1)
        if rows > 1:
            rest = part - np.nanmean(part, axis=1, keepdims=True) - column_means + np.nanmean(part)
            twice += share * float(np.nansum(rest**2)) / (rows - 1) / (columns - 1) / rows / columns
    variance = max(by_subject + by_prompt - twice, by_subject, by_prompt)
    return variance, variance**2 / squares if squares > 0 else np.inf


def student_quantile(freedom: float) -> float:
    """97.5 % quantile of Student's t: a table up to four degrees, then its expansion in 1 / freedom
    (Abramowitz and Stegun 26.7.5), within 0.5 %."""
    if freedom < 4.5:
        return FEW_DEGREES[max(1, round(freedom)) - 1]
    z, inverse = Z95, 1 / freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term * inverse ** (power + 1) for power, term in enumerate(terms))


def sign_flip(differences: NDArray[Any], seed: int = 0, draws: int = 100_000) -> float | None:
    """Two-sided p of a zero mean, under which each subject's difference may have either sign.

    All patterns up to EXACT_SUBJECTS subjects, random ones beyond; None for one subject.
    """
    count = len(differences)
    if count < 2:
        return None
    observed = abs(differences.sum())
    slack = 1e-12 * np.abs(differences).sum()
    if count <= EXACT_SUBJECTS:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
        sums = (1 - 2 * bits) @ differences
        return float((np.abs(sums) >= observed - slack).mean())
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, size=(draws, count)) * 2 - 1
    hits = (np.abs(signs @ differences) >= observed - slack).sum()
    return float((hits + 1) / (draws + 1))


def holm(values: dict[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values (Holm 1979): the family-wise error stays below the level."""
    adjusted, highest = {}, 0.0
    for place, (name, value) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, value * (len(values) - place)))
        adjusted[name] = highest
    return adjusted
