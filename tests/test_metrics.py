"""Metrics on constructed features have closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bksdm_tune.errors import DataError
from bksdm_tune.evaluate import metrics
from bksdm_tune.evaluate.metrics import Gaussian
from bksdm_tune.evaluate.statistics import block_interval, bootstrap_crossed, bootstrap_mean


def corners(width: int, scale: float, shift: float = 0.0) -> np.ndarray:
    """2 * width points with mean ``shift`` and covariance scale^2 * 2 / (2 width - 1) * I."""
    return np.concatenate([np.eye(width), -np.eye(width)]) * scale + shift


def test_frechet_of_two_gaussians() -> None:
    width = 6
    a, b = corners(width, 3.0), corners(width, 1.0, shift=2.0)
    variance = [s**2 * 2 / (2 * width - 1) for s in (3.0, 1.0)]
    expected = width * 4 + width * (math.sqrt(variance[0]) - math.sqrt(variance[1])) ** 2
    assert metrics.frechet(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_commuting_and_rotated_covariances() -> None:
    """For 2 x 2 matrices tr sqrt(AB) = sqrt(tr AB + 2 sqrt det AB)."""
    a = np.array([[2.0, 0.7], [0.7, 1.0]])
    b = np.array([[0.5, -0.3], [-0.3, 3.0]])
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * root
    zero = np.zeros(2)
    assert metrics.frechet(Gaussian(zero, a), Gaussian(zero, b)) == pytest.approx(expected)
    assert metrics.frechet(Gaussian(zero, a), Gaussian(zero, a)) == pytest.approx(0, abs=1e-12)


def test_frechet_with_fewer_pictures_than_dimensions() -> None:
    rng = np.random.default_rng(0)
    few = rng.normal(size=(5, 20))
    same, moved = Gaussian.of(few), Gaussian.of(few + 1)
    # Zero eigenvalues are known to 1e-16 only, so their roots to 1e-8.
    assert metrics.frechet(same, moved) == pytest.approx(20, rel=1e-7)


def test_frechet_of_other_extractors_is_refused() -> None:
    a, b = Gaussian.of(corners(3, 1)), Gaussian.of(corners(4, 1))
    with pytest.raises(DataError, match="another extractor"):
        metrics.frechet(a, b)


def test_inception_score_counts_equally_likely_classes() -> None:
    classes = np.eye(5)[np.arange(100) % 5]
    assert metrics.inception_score(classes) == pytest.approx((5.0, 0.0))
    flat = np.full((100, 5), 0.2)
    assert metrics.inception_score(flat) == pytest.approx((1.0, 0.0))
    with pytest.raises(DataError, match="10 splits"):
        metrics.inception_score(classes[:9])


def test_kid_of_one_dimensional_points() -> None:
    """k(x, y) = (xy + 1)^3 on {-1, 1} against {-2, 2}: within -0 and -27, across (27 - 1) / 2."""
    a, b = np.array([[1.0], [-1.0]]), np.array([[2.0], [-2.0]])
    across = np.mean([(x * y + 1) ** 3 for x in (1, -1) for y in (2, -2)])
    expected = (1 * -1 + 1) ** 3 + (2 * -2 + 1) ** 3 - 2 * across
    assert metrics.unbiased_mmd(a, b) == pytest.approx(expected)
    assert metrics.kid(a, b) == pytest.approx(expected)


def test_kid_is_unbiased() -> None:
    rng = np.random.default_rng(1)
    values = [metrics.kid(*rng.normal(size=(2, 20, 4))) for _ in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20


def test_cmmd_of_two_points() -> None:
    """One point on each side at distance d: 1000 * 2 (1 - exp(-d^2 / 200))."""
    a, b = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert metrics.cmmd(a, b) == pytest.approx(2000 * (1 - math.exp(-2 / 200)))
    many = np.random.default_rng(0).normal(size=(5000, 3))
    assert metrics.cmmd(many, many) == pytest.approx(0, abs=1e-9)


def test_cosine_is_row_by_row() -> None:
    a = np.array([[1.0, 0.0], [3.0, 4.0]], dtype=np.float32)
    b = np.array([[1.0, 1.0], [6.0, 8.0]], dtype=np.float32)
    assert metrics.cosine(a, b) == pytest.approx([math.sqrt(0.5), 1.0])


def test_bootstrap_interval_of_a_mean() -> None:
    values = np.random.default_rng(2).normal(size=400)
    low, high = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)
    assert bootstrap_mean(np.ones(5)) == (1.0, 1.0)


def test_crossed_bootstrap_holds_for_other_seeds_too() -> None:
    rng = np.random.default_rng(0)
    captions = rng.normal(size=(1, 400))
    same = np.repeat(captions, 3, 0)
    low, high = bootstrap_crossed(same)
    assert (low, high) == pytest.approx(bootstrap_mean(captions[0]), abs=0.02)
    differing = same + np.array([[-1.0], [0.0], [1.0]])
    wider = bootstrap_crossed(differing)
    assert wider[0] < low - 0.5 and wider[1] > high + 0.5


def test_block_intervals_shrink_with_the_rows() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(5, 1, size=2000)
    low, high = block_interval(5.0, lambda part: float(part.mean()), rows) or (0, 0)
    assert (low + high) / 2 == pytest.approx(5.0)
    assert 0.02 < (high - low) / 2 < 0.08  # 1.96 / sqrt(2000) is 0.044
    assert block_interval(5.0, lambda part: float(part.mean()), rows[:19]) is None
