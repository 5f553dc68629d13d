# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Bootstrap intervals over whole units: images, or slides and patients where several images come from one."""

from collections.abc import Callable
from typing import Any

import numpy as np


def bootstrap_interval(
    statistic: Callable[[np.ndarray], Any],
    num_units: int,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Percentile bootstrap: resamples whole units (images, or slides where several images come from one).

    Args:
        statistic: takes the indices of the drawn units, (num_units,) int64 with repeats, and returns a number or an
            array of them; nan where the resample does not define it.
        num_units: how many units there are to draw from.
        samples: resamples.
        confidence: share of the resamples inside the interval.
        seed: of the resampling.

    Returns:
        Mean over the resamples, lower and upper end, each of the statistic's shape; nan where no resample defines it.

    Raises:
        ValueError: nothing to resample, or an impossible number of samples or confidence.

    Example:
    ```python
    >>> dice = np.array([0.7, 0.9, 0.8])  # one per image
    >>> mean, low, high = bootstrap_interval(lambda drawn: dice[drawn].mean(), len(dice))
    ```
    """
    if num_units < 1 or samples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"num_units={num_units}, samples={samples}, confidence={confidence}: an interval needs at least one unit "
            "and one resample, and a confidence inside (0, 1)."
        )
    generator = np.random.default_rng(seed)
    values = np.array([statistic(generator.integers(num_units, size=num_units)) for _ in range(samples)], dtype=float)
    defined = np.isfinite(values).any(axis=0)
    values = np.where(defined, values, 0.0)
    margin = 50 * (1 - confidence)
    low, high = np.nanpercentile(values, [margin, 100 - margin], axis=0)
    return tuple(np.where(defined, number, np.nan) for number in (np.nanmean(values, axis=0), low, high))
