"""What can be concluded from a few runs: means, interquartile means, probabilities of improvement, performance profiles.

The measures are those of Agarwal et al., Deep RL at the Edge of the Statistical Precipice (arXiv 2108.13264), the intervals
those of SciPy: Student's for the mean over seeds, and the percentile bootstrap for everything that is taken over several
tasks. ``scipy.stats.bootstrap`` resamples each of its samples on its own; with one sample for each task, that is the
stratified bootstrap. It takes any number of runs per task and its results are reproducible, which the ``rliable`` package
does not offer; the tests compare the two.

Everywhere, ``scores`` are one array for each task with the scores of its runs. Every task weighs the same, however many runs
it has: a run weighs 1 / (tasks · runs of its task).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
N_RESAMPLES = 5_000

Scores = Sequence[np.ndarray]


class Estimate(NamedTuple):
    """A number with its 95 % interval, whose ends are NaN where there are not enough runs for one."""

    value: float
    low: float
    high: float


def mean(values: np.ndarray) -> Estimate:
    """Mean of normally distributed values, with Student's interval.

    :param values: (N,)
    """
    center = float(np.mean(values))
    if len(values) < 2:
        return Estimate(center, np.nan, np.nan)
    error = float(stats.sem(values)) * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Estimate(center, center - error, center + error)


def interquartile_mean(scores: Scores) -> Estimate:
    """Weighted mean of the middle half of all runs, with its stratified bootstrap interval.

    A quarter of the weight is cut off at each end, of a run on the border a part. ``scipy.stats.trim_mean`` and ``rliable``
    round to whole runs, and agree where each task has the same number of runs and all of them can be divided by four.
    """
    weights = np.concatenate([np.full(len(task), 1 / (len(scores) * len(task))) for task in scores])
    cut = 0.25

    def statistic(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        values = np.concatenate(samples, axis=axis)
        order = np.argsort(values, axis=axis)
        upper = np.cumsum(weights[order], axis=axis)
        kept = np.diff(np.clip(upper, cut, 1 - cut), axis=axis, prepend=cut)
        return (kept * np.take_along_axis(values, order, axis)).sum(axis) / (1 - 2 * cut)

    return _bootstrap(statistic, scores)


def probability_of_improvement(x: Scores, y: Scores) -> Estimate:
    """Probability that a run of one algorithm beats a run of another, averaged over tasks.

    :param x: Scores of the one
    :param y: Scores of the other, for the same tasks
    :raises ValueError: if the tasks are not as many
    """
    if len(x) != len(y):
        raise ValueError(f"Both algorithms need scores for the same tasks, got {len(x)} and {len(y)} of them.")

    def statistic(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        n_tasks = len(samples) // 2
        return np.mean([_wins(a, b) for a, b in zip(samples[:n_tasks], samples[n_tasks:], strict=True)], axis=0)

    return _bootstrap(statistic, [*x, *y])


def _wins(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of the pairs in which x is larger, ties counting half: Mann and Whitney's U over the number of pairs."""
    difference = x[..., :, None] - y[..., None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean((-1, -2))


def performance_profile(scores: Scores, thresholds: np.ndarray) -> list[Estimate]:
    """Share of the runs whose score exceeds each threshold, averaged over tasks.

    :param scores: Scores
    :param thresholds: (T,)
    """

    def exceeding(threshold: float) -> Callable[..., np.ndarray]:
        return lambda *samples, axis=-1: np.mean([(sample > threshold).mean(axis) for sample in samples], axis=0)

    return [_bootstrap(exceeding(threshold), scores, n_resamples=1_000) for threshold in thresholds]


def _bootstrap(statistic: Callable[..., Any], samples: Scores, n_resamples: int = N_RESAMPLES) -> Estimate:
    """A statistic of several samples with its percentile interval, each sample being resampled on its own."""
    value = float(statistic(*(np.asarray(sample, dtype=float) for sample in samples)))
    if any(len(sample) < 2 for sample in samples):
        return Estimate(value, np.nan, np.nan)
    interval = stats.bootstrap(
        tuple(np.asarray(sample, dtype=float) for sample in samples),
        statistic,
        n_resamples=n_resamples,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        axis=-1,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))
