"""Pure functions from features to scores, in float64.  Nothing here loads a model.

``features``: float arrays (N, width); ``probabilities``: (N, classes), rows summing to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bksdm_tune.errors import DataError

Array = NDArray[Any]
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, section 4
KID_DEGREE = 3  # Binkowski et al. 2018, section 4: k(x, y) = (x.y / width + 1)^3


@dataclass(frozen=True)
class Gaussian:
    """Mean (width,) and covariance (width, width, divisor N - 1) of ``count`` features."""

    mean: Array
    covariance: Array
    count: int | None = None

    @staticmethod
    def of(features: Array) -> Gaussian:
        """Raises DataError: fewer than two features."""
        if len(features) < 2:
            raise DataError(f"A covariance needs two pictures or more; there is {len(features)}.")
        rows = features.astype(np.float64)
        return Gaussian(
            rows.mean(0), np.cov(rows, rowvar=False).reshape((rows.shape[1],) * 2), len(rows)
        )


def _root(matrix: Array) -> Array:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2); with Inception features the FID.

    Heusel et al. 2017, equation 6, by symmetric eigen-decomposition.

    Raises:
        DataError: the widths differ.
    """
    if a.mean.shape != b.mean.shape:
        raise DataError(
            f"Features of width {len(a.mean)} and {len(b.mean)} cannot be compared: "
            "the statistics were made with another extractor."
        )
    half = _root(a.covariance)
    inner = np.linalg.eigvalsh(half @ b.covariance @ half)
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(inner.clip(0)).sum()
    return float(np.square(a.mean - b.mean).sum() + trace)


def inception_score(probabilities: Array, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp E KL(p(y|x) || p(y)); Salimans et al. 2016.

    Raises:
        DataError: fewer pictures than splits.
    """
    if len(probabilities) < splits:
        raise DataError(f"{splits} splits need {splits} pictures; there are {len(probabilities)}.")
    scores = []
    for part in np.array_split(probabilities.astype(np.float64), splits):
        ratio = np.log(part.clip(1e-300)) - np.log(part.mean(0).clip(1e-300))
        scores.append(np.exp((part * ratio).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kid(a: Array, b: Array, subset: int = 1000, subsets: int = 100, seed: int = 0) -> float:
    """Mean over random subsets of the unbiased squared MMD with the cubic kernel.

    Raises:
        DataError: fewer than two pictures on a side.
    """
    size = min(subset, len(a), len(b))
    if size < 2:
        raise DataError("KID needs two pictures or more on each side.")
    rng = np.random.default_rng(seed)
    values = [
        unbiased_mmd(*(_pick(rng, side, size) for side in (a, b)))
        for _ in range(subsets if size < max(len(a), len(b)) else 1)
    ]
    return float(np.mean(values))


def _pick(rng: np.random.Generator, features: Array, size: int) -> Array:
    return features[rng.choice(len(features), size, replace=False)].astype(np.float64)


def unbiased_mmd(a: Array, b: Array) -> float:
    """Squared MMD between equally many features, the cubic kernel, no diagonal terms."""
    width, n = a.shape[1], len(a)
    within = [(side @ side.T / width + 1) ** KID_DEGREE for side in (a, b)]
    across = ((a @ b.T / width + 1) ** KID_DEGREE).mean()
    means = [(k.sum() - np.trace(k)) / (n * (n - 1)) for k in within]
    return float(means[0] + means[1] - 2 * across)


def cmmd(a: Array, b: Array) -> float:
    """1000 times the squared MMD with a Gaussian kernel of sigma 10 on unit CLIP embeddings.

    Jayasumana et al. 2024.  The biased estimator (V-statistic, diagonal included), as in the
    authors' code, so two equal sets give exactly 0.
    """
    a, b = (side.astype(np.float64) for side in (a, b))
    return CMMD_SCALE * float(_gaussian(a, a) + _gaussian(b, b) - 2 * _gaussian(a, b))


def _gaussian(a: Array, b: Array, piece: int = 2048) -> float:
    """Mean of the kernel over all pairs, without a matrix of all pairs in memory."""
    squares, total = np.square(b).sum(1), 0.0
    for start in range(0, len(a), piece):
        part = a[start : start + piece]
        distance = np.square(part).sum(1)[:, None] + squares - 2 * part @ b.T
        total += float(np.exp(-distance.clip(0) / (2 * CMMD_SIGMA**2)).sum())
    return total / (len(a) * len(b))


def cosine(a: Array, b: Array) -> Array:
    """Row by row, (N,)."""
    a, b = (side.astype(np.float64) for side in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(1) / norms)
