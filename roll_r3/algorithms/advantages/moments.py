"""Mean, deviation and whitening of rewards and advantages; equal values less their mean are exact zeros.

Otherwise the rounding of their mean would remain, raised by the division (0.1 + 0.1 + 0.1 is not 0.3 in binary).

Shape legend: n samples, x any values.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from roll_r3.algorithms.advantages.base import Float64n, Members

EPSILON = 1e-6
"""Added to standard deviations of rewards before a division, as in ROLL and verl."""
VARIANCE_EPSILON = 1e-8
"""Added to the variance in whitening, as in ROLL and verl."""


def mean(values_x: Float64n) -> float:
    """Return the mean, exact if all values are equal."""
    return float(values_x[0] if _equal(values_x) else values_x.mean())


def means_of(values_n: Float64n, parts: Iterable[Members]) -> Float64n:
    """Return the mean of each sample's part: float64 [n]."""
    means_n = np.zeros_like(values_n)
    for members in parts:
        means_n[members] = mean(values_n[members])
    return means_n


def divisors_of(values_n: Float64n, parts: Iterable[Members]) -> Float64n:
    """Return the standard deviation (n - 1) of each sample's part + 1e-6; 1 in a part of one sample: float64 [n]."""
    divisors_n = np.ones_like(values_n)
    for members in parts:
        if len(members) > 1:
            divisors_n[members] = values_n[members].std(ddof=1) + EPSILON
    return divisors_n


def whitened(values_x: Float64n) -> Float64n:
    """Return (value - mean) / sqrt(variance + 1e-8), with the sample variance (n - 1); a single value is unchanged."""
    if len(values_x) <= 1:
        return values_x
    centred_x = values_x - mean(values_x)
    variance = float((centred_x**2).sum() / (len(values_x) - 1))
    scaled_x: Float64n = centred_x / np.sqrt(variance + VARIANCE_EPSILON)
    return scaled_x


def _equal(values_x: Float64n) -> bool:
    return bool((values_x == values_x[0]).all())
