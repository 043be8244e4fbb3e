"""Errors of the posterior-mean estimator: of each rule for the coefficient, and in plain samples.

A *cell* is a density, a time t, a number K and a kind of candidates (:data:`KINDS`). All rules see the same candidates. The
*ratio* of a rule is its mean squared error over that of the better of the coefficients 0 and 1 in the same cell.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sb3_rfm.benchmark.densities import PATH, Density, stream
from sb3_rfm.benchmark.tables import Row
from sb3_rfm.candidates import PointSet, draw_candidates
from sb3_rfm.control_variates import fit_diagonal, fit_robust, fit_scalar, weighted_mean
from sb3_rfm.monte_carlo import effective_sample_size, importance_weights
from sb3_rfm.posterior import value_and_gradient
from sb3_rfm.sources import GaussianSource

PLAIN = (16, 32, 64, 128, 256, 500, 1000, 2000, 4000)
"""Numbers of plain samples for K-equivalence."""
LINE = 1.05
"""What the ratio of ``"optimal"`` should not exceed."""


class Kind(NamedTuple):
    """Where candidates come from.

    :param localised: Whether ``data_scale`` is known
    :param guess: Whether half of them are around a guess of the data mean
    :param points: Point set
    """

    localised: bool
    guess: bool
    points: PointSet


KINDS = {
    "source": Kind(localised=False, guess=False, points="independent"),
    "localised": Kind(localised=True, guess=False, points="independent"),
    "guess, antithetic": Kind(localised=True, guess=True, points="antithetic"),  # as the algorithms use them
    "guess, Sobol": Kind(localised=True, guess=True, points="sobol"),
}
ENDPOINTS = ("noise (0)", "gradient (1)")
NEGLIGIBLE = 1e-3
"""Errors below this share of the mean squared velocity count as equal to it."""
SOURCE = GaussianSource()


# Rules


class Sample:
    """Candidates at one ``x_t``-batch with all that a rule sees."""

    def __init__(
        self, density: Density, x_t: Tensor, t: float, n: int, kind: str, guess: Tensor, generator: torch.Generator
    ) -> None:
        at = torch.full((len(x_t),), t)
        candidates = draw_candidates(
            PATH,
            SOURCE,
            n,
            x_t,
            at,
            data_scale=density.data_scale if KINDS[kind].localised else None,
            guess=guess if KINDS[kind].guess else None,
            points=KINDS[kind].points,
            generator=generator,
        )
        self.values = candidates.x_0
        x_1 = PATH.data_from_noise(self.values, x_t[:, None], at)
        log_p1, score_1 = value_and_gradient(density.log_prob, x_1)
        self.stein = SOURCE.score(self.values) - (1 - t) / t * score_1
        log_ratio = 0.0 if candidates.log_ratio is None else candidates.log_ratio
        self.weights, self.valid = importance_weights(log_p1 + log_ratio, self.stein)
        self.alpha_over_sigma = t / (1 - t)

    def estimate(self, coefficient: Tensor) -> Tensor:
        """Noise mean with a coefficient (B,) or (B, D)."""
        c = coefficient if coefficient.dim() == 2 else coefficient[:, None]
        return weighted_mean(self.weights, self.values) + c * weighted_mean(self.weights, self.stein)


def textbook(s: Sample) -> Tensor:
    """Plug-in diagonal with ridge 1e-4, clipped to ±2 in data coordinates: the rule of the paper's experiments."""
    squared = s.weights.square().unsqueeze(-1)
    x_1 = -s.values / s.alpha_over_sigma
    stein_1 = -s.alpha_over_sigma * s.stein
    centred = stein_1 - weighted_mean(s.weights, stein_1)[:, None]
    covariance = (squared * (x_1 - weighted_mean(s.weights, x_1)[:, None]) * centred).sum(1)
    return s.alpha_over_sigma**2 * (-covariance / ((squared * centred.square()).sum(1) + 1e-4)).clamp(-2, 2)


def two_halves(s: Sample) -> Tensor:
    """The smaller of two bounded scalars, each fitted on one half of the candidates."""
    fits = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        weights = s.weights[:, half] / s.weights[:, half].sum(1, keepdim=True).clamp(min=1e-30)
        fits.append(fit_scalar(weights, s.values[:, half], s.stein[:, half]).clamp(0, 1))
    return torch.minimum(*fits)


def shrunk_by_ess(s: Sample) -> Tensor:
    """One bounded scalar times (ESS - 1) / ESS."""
    return fit_scalar(s.weights, s.values, s.stein).clamp(0, 1) * (1 - s.weights.square().sum(1))


RULES: dict[str, Callable[[Sample], Tensor]] = {
    "noise (0)": lambda s: torch.zeros(len(s.values)),
    "gradient (1)": lambda s: torch.ones(len(s.values)),
    "textbook diagonal, clipped": textbook,
    "bounded diagonal": lambda s: fit_diagonal(s.weights, s.values, s.stein).clamp(0, 1),
    "bounded scalar": lambda s: fit_scalar(s.weights, s.values, s.stein).clamp(0, 1),
    "shrunk by ESS": shrunk_by_ess,
    "two halves": two_halves,
    "optimal": lambda s: fit_robust(s.weights, s.values, s.stein, s.valid),
}


# Measurement


def measure_cell(
    group: Sequence[Density], t: float, n: int, kind: str, n_rows: int, seed: int, rules: Iterable[str]
) -> list[Row]:
    """Errors of rules at one t, with K candidates of one kind.

    :param group: Targets of one family, over which errors are averaged
    :param t: Time
    :param n: K
    :param kind: Name in :data:`KINDS`
    :param n_rows: Number of ``x_t``
    :param seed: Of all randomness
    :param rules: Names in :data:`RULES`
    :return: One row for each rule
    """
    errors: dict[str, list[Tensor]] = defaultdict(list)
    sizes, counts, reference = [], [], 0.0
    for i, density in enumerate(group):
        x_t, mean_1, guess, reference_error = density.points(t, max(1, n_rows // len(group)), seed + i)
        reference += reference_error / len(group)
        mean_0 = (x_t - t * mean_1) / (1 - t)
        sizes.append((mean_1 - mean_0).square().sum(-1))
        generator = stream("candidates", seed + i)
        chunk = max(1, 1_000_000 // (n * density.dim))
        for part in (slice(start, start + chunk) for start in range(0, len(x_t), chunk)):
            sample = Sample(density, x_t[part], t, n, kind, guess[part], generator)
            counts.append(effective_sample_size(sample.weights))
            for rule in rules:
                # On this path v = (x_t - mu_0) / t.
                error = (sample.estimate(RULES[rule](sample)) - mean_0[part]) / t
                errors[rule].append(error.square().sum(-1))
    row = {"density": group[0].name, "dim": group[0].dim, "candidates": kind, "t": t, "K": n}
    size = float(torch.cat(sizes).mean())
    ends = {"mean squared velocity": size, "ess": float(torch.cat(counts).mean()), "reference error": reference}
    joined = {rule: torch.cat(values).double() for rule, values in errors.items()}
    least = NEGLIGIBLE * size
    best = min((joined[end] for end in ENDPOINTS if end in joined), key=lambda e: float(e.mean()))
    rows = []
    for rule, error in joined.items():
        ratio = max(float(error.mean()), least) / max(float(best.mean()), least)
        # Delta method; below the least error that counts, a mean is a constant.
        spread = (error if error.mean() > least else 0 * error) - ratio * (best if best.mean() > least else 0 * best)
        uncertainty = float(spread.std()) / math.sqrt(len(error)) / max(float(best.mean()), least)
        judged = (
            {"ratio": ratio, "ratio error": uncertainty} if len(joined) > 1 else {"ratio": math.nan, "ratio error": math.nan}
        )
        rows.append(row | {"rule": rule, "rows": len(error), "mse": float(error.mean())} | ends | judged)
    return rows


def measure(group: Sequence[Density], times: Iterable[float], candidates: Sequence[int], n_rows: int, seed: int) -> list[Row]:
    """Errors of every rule in every cell; cells whose verdict is uncertain are measured again with more points.

    A cell is (t, K, kind of candidates). Where the ratio of ``"optimal"`` is not two standard errors below :data:`LINE`, the
    cell is replaced by one of 8 times as many fresh points, and once more (only once where truth or candidates are expensive).

    :param group: Targets of one family
    :param times: Values of t
    :param candidates: Values of K
    :param n_rows: Number of ``x_t`` in each cell
    :param seed: Of all randomness
    :return: One row for each cell and rule
    """
    rows: list[Row] = []
    for t in times:
        for kind in KINDS:
            for n in candidates:
                for attempt in range(2 if group[0].expensive else 3):
                    cell = measure_cell(group, t, n, kind, n_rows * 8**attempt, seed + 1000 * attempt, RULES)
                    (optimal,) = (row for row in cell if row["rule"] == "optimal")
                    if optimal["ratio"] + 2 * optimal["ratio error"] < LINE or n_rows * 8**attempt * n * group[0].dim > 3e7:
                        break
                rows += cell
        for n in set(PLAIN) - set(candidates):
            rows += measure_cell(group, t, n, "source", n_rows, seed, ("noise (0)",))
    return rows


Curve = list[tuple[int, float]]
"""Mean squared errors of plain samples against their number, in its order."""


def plain_curves(rows: list[Row]) -> dict[Any, Curve]:
    """Errors of plain samples from the source, for each density and t."""
    curves: dict[Any, Curve] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["K"]):
        if row["rule"] == "noise (0)" and row["candidates"] == "source":
            curves[row["density"], row["t"]].append((row["K"], row["mse"]))
    return curves


def worth(curve: Curve, mse: float) -> float:
    """Number of plain samples with this error, by interpolation of log error against log K; infinite beyond the curve."""
    points = [(math.log(k), math.log(error)) for k, error in curve]
    target = math.log(max(mse, 1e-12))
    # Errors fall with K up to noise; the last number of samples that is still worse decides.
    last = max((i for i, (_, error) in enumerate(points) if error > target), default=-1)
    if last < 0:
        return curve[0][0]
    if last + 1 == len(points):
        return math.inf
    (k_0, e_0), (k_1, e_1) = points[last : last + 2]
    return math.exp(k_0 + (k_1 - k_0) * (e_0 - target) / (e_0 - e_1))


def equivalent(rows: list[Row], n: int = 32) -> list[Row]:
    """Number of plain samples with the same error as ``n`` candidates and the coefficient ``"optimal"``."""
    curves, keys = plain_curves(rows), ("density", "candidates", "t", "K")
    chosen = [row for row in rows if row["rule"] == "optimal" and row["K"] == n]
    return [
        {key: row[key] for key in keys} | {"plain samples": worth(curves[row["density"], row["t"]], row["mse"])}
        for row in chosen
    ]
