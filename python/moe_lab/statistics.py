"""Small samples of paired seeds: intervals, and the noise below which a difference says nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def student_t(quantile: float, freedom: int) -> float:
    """Quantile of Student's t with `freedom` ≥ 1 degrees; x = √ν tan θ turns the density into cos^(ν−1) θ."""
    theta = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    density = np.cos(theta) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(sqrt(freedom) * np.tan(np.interp(quantile, mass / mass[-1], theta)))


def bootstrap(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean and its bootstrap interval; at least two values.

    The percentiles are the expanded ones of Hesterberg (2015, "What teachers should know about the bootstrap", 5.3):
    plain percentiles are too narrow for few values. The draws are fixed: the same values give the same interval.
    """
    sample = np.asarray(values, dtype=float)
    n = sample.size
    if n < 2:
        raise ValueError("an interval needs at least two seeds")
    draws = np.random.default_rng(0).integers(0, n, size=(RESAMPLES, n))
    means = sample[draws].mean(axis=1)
    tail = NormalDist().cdf(-sqrt(n / (n - 1)) * student_t((1 + confidence) / 2, n - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(sample.mean()), float(low), float(high))


def noise_floor(arms: Sequence[Sequence[float]], pairs: int, confidence: float = CONFIDENCE) -> float | None:
    """The difference of two means over `pairs` seeds that seeds alone exceed with probability 1 − confidence.

    Measured from the spread over seeds within each arm (pooled variance, Student's t). None where no arm has two seeds.
    """
    spreads = [np.asarray(arm, dtype=float) for arm in arms if len(arm) > 1]
    freedom = sum(arm.size - 1 for arm in spreads)
    if not freedom:
        return None
    pooled = sum(float(((arm - arm.mean()) ** 2).sum()) for arm in spreads) / freedom
    return student_t((1 + confidence) / 2, freedom) * sqrt(pooled) * sqrt(2 / pairs)
