"""How well the posterior-mean estimator does: errors, ablation and K-equivalence, as tables and figures.

.. code-block:: bash

    python -m sb3_rfm.benchmark.estimator --critic dm_control/cheetah-run-v0          # writes docs/results/estimator/
    python -m sb3_rfm.benchmark.estimator --critic dm_control/cheetah-run-v0 --clock  # then times it, on a quiet machine
    python -m sb3_rfm.benchmark.estimator --densities crescents --update         # measures one density again
    python -m sb3_rfm.benchmark.estimator --rows 32 --candidates 16 32 --densities crescents --output runs/estimator

For each density, ``x_t`` is drawn along the conditional-OT path, the exact velocity comes from a closed form or quadrature
(for critics in more than one dimension: from two passes of 4096 localised candidates, whose own error is in the table), and
each rule sees the same candidates. These come from the source, are *localised* by ``data_scale``, or localised with half of
them around a *guess* of the data mean. The *ratio* is a rule's mean squared error over that of the better of the
coefficients 0 and 1 in the same cell; errors below a thousandth of the mean squared velocity count as equal to that.

Sources: Midgley et al., Flow annealed importance sampling bootstrap (arXiv 2208.01893), for the 40-mode mixture and
many-well; Rezende & Mohamed (arXiv 1505.05770), for the two moons.
"""

import argparse
import csv
import math
import textwrap
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sb3_rfm.actors import squash, unsquash
from sb3_rfm.candidates import draw_candidates
from sb3_rfm.control_variates import fit_diagonal, fit_robust, fit_scalar, weighted_mean
from sb3_rfm.execution import keep_freed_memory
from sb3_rfm.flow_actor_critic import log_sech2
from sb3_rfm.monte_carlo import effective_sample_size, importance_weights
from sb3_rfm.paths import CondOTPath
from sb3_rfm.posterior import PosteriorMeanEstimator, value_and_gradient
from sb3_rfm.sources import GaussianSource

TIMES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)
CANDIDATES = (8, 16, 32, 128, 500)
PLAIN = (16, 32, 64, 128, 256, 500, 1000, 2000, 4000)
"""Numbers of plain samples for K-equivalence."""
LINE = 1.05
"""What the ratio of ``"optimal"`` should not exceed."""
KINDS = ("source", "localised", "guess")
ENDPOINTS = ("noise (0)", "gradient (1)")
NEGLIGIBLE = 1e-3
"""Errors below this share of the mean squared velocity count as equal to it."""
PATH, SOURCE = CondOTPath(), GaussianSource()


# Densities


class Points(NamedTuple):
    """Points of the path, and what is known there."""

    x_t: Tensor
    """(n, D)"""
    mean: Tensor
    """True data mean, (n, D)"""
    guess: Tensor
    """A guess of it, (n, D)"""
    error: float
    """Mean squared error of the velocity that follows from ``mean``"""


class Density(ABC):
    """A target with samples and posterior means that are known.

    :param name: For tables
    :param dim: D
    """

    data_scale = 1.0
    expensive = False  # to know the truth of
    reference_error = 0.0

    def __init__(self, name: str, dim: int) -> None:
        self.name, self.dim = name, dim
        self._time, self._points = math.nan, dict[tuple[int, int], Points]()

    def points(self, t: float, n: int, seed: int) -> "Points":
        """Points of the path at time ``t``; they are kept until another time is asked for."""
        if t != self._time:
            self._time, self._points = t, {}
        if (n, seed) not in self._points:
            generator = torch.Generator().manual_seed(seed)
            x_1 = self.sample(n, generator)
            x_t = t * x_1 + (1 - t) * torch.randn(x_1.shape, generator=generator)
            mean = self.data_mean(x_t, t)
            self._points[n, seed] = Points(x_t, mean, self.guess(x_t, t, mean.float(), generator), self.reference_error)
        return self._points[n, seed]

    def guess(self, x_t: Tensor, t: float, mean: Tensor, generator: torch.Generator) -> Tensor:
        """A rough guess of the data mean: off by half the width of the target in each dimension."""
        return mean + 0.5 * self.data_scale * torch.randn(mean.shape, generator=generator)

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """(..., D) → (...)."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D)."""

    @abstractmethod
    def data_mean(self, x_t: Tensor, t: float) -> Tensor:
        """``E[x_1 | x_t]``, (B, D)."""


class Gaussian(Density):
    """A Gaussian with variances spread over [1 / condition, 1] along random axes."""

    def __init__(self, dim: int, condition: float) -> None:
        super().__init__(f"Gaussian, {dim}-D, condition {condition:g}", dim)
        generator = torch.Generator().manual_seed(dim)
        self.axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
        self.variances = torch.logspace(0, -math.log10(condition), dim, dtype=torch.float64)
        self.precision = ((self.axes / self.variances) @ self.axes.T).float()

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * (((x - 0.5) @ self.precision) * (x - 0.5)).sum(-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        return (0.5 + (z * self.variances.sqrt()) @ self.axes.T).float()

    def data_mean(self, x_t: Tensor, t: float) -> Tensor:
        gain = t * self.variances / (t**2 * self.variances + (1 - t) ** 2)
        return 0.5 + (((x_t.double() - 0.5 * t) @ self.axes) * gain) @ self.axes.T


class Mixture(Density):
    """An equal mixture of isotropic Gaussians."""

    def __init__(self, name: str, means: Tensor, std: float) -> None:
        super().__init__(name, means.shape[1])
        self.means, self.std = means, std
        self.data_scale = float(means.std())

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.logsumexp(-0.5 * torch.cdist(x.flatten(0, -2), self.means).square() / self.std**2, -1).view(x.shape[:-1])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(self.means), (n,), generator=generator)
        return self.means[index] + self.std * torch.randn(n, self.dim, generator=generator)

    def data_mean(self, x_t: Tensor, t: float) -> Tensor:
        variance = t**2 * self.std**2 + (1 - t) ** 2
        offset = x_t.double()[:, None] - t * self.means.double()
        share = torch.softmax(-0.5 * offset.square().sum(-1) / variance, -1)
        return weighted_mean(share, self.means.double() + t * self.std**2 / variance * offset)


class OnGrid(Density):
    """A density in one or two dimensions, by quadrature on a grid.

    :param log_prob: (..., D) → (...)
    :param axis: Grid points in each dimension
    """

    def __init__(
        self, name: str, dim: int, log_prob: Callable[[Tensor], Tensor], axis: Tensor, data_scale: float = 1.0
    ) -> None:
        super().__init__(name, dim)
        self._log_prob, self.data_scale = log_prob, data_scale
        grid = axis[:, None] if dim == 1 else torch.cartesian_prod(axis, axis)
        log_mass = torch.log_softmax(log_prob(grid.float()).double(), 0)
        kept = log_mass > log_mass.max() - 30
        self.grid, self.log_mass, self.step = grid[kept], log_mass[kept], float(axis[1] - axis[0])

    def log_prob(self, x: Tensor) -> Tensor:
        return self._log_prob(x)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        index = torch.multinomial(self.log_mass.exp(), n, replacement=True, generator=generator)
        within = torch.rand(n, self.dim, generator=generator, dtype=torch.float64) - 0.5
        return (self.grid[index] + self.step * within).float()

    def data_mean(self, x_t: Tensor, t: float) -> Tensor:
        rows = x_t.double().split(64)
        log_source = (-0.5 * torch.cdist(x, t * self.grid).square() / (1 - t) ** 2 for x in rows)
        return torch.cat([torch.softmax(self.log_mass + log_p, -1) @ self.grid for log_p in log_source])


class ManyWell(Density):
    """Sixteen copies of a double well times a Gaussian: a product, so that quadrature is one-dimensional."""

    data_scale = 1.4

    def __init__(self) -> None:
        super().__init__("many-well, 32-D", 32)
        axis = torch.linspace(-3.5, 3.5, 2001, dtype=torch.float64)[:, None]
        self.well = OnGrid("well", 1, lambda x: (-(x**4) + 6 * x**2 + 0.5 * x).sum(-1), axis[:, 0])

    def log_prob(self, x: Tensor) -> Tensor:
        return self.well.log_prob(x[..., ::2].unsqueeze(-1)).sum(-1) - 0.5 * x[..., 1::2].square().sum(-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(n, 32, generator=generator)
        x[:, ::2] = self.well.sample(n * 16, generator).view(n, 16)
        return x

    def data_mean(self, x_t: Tensor, t: float) -> Tensor:
        mean = t / (t**2 + (1 - t) ** 2) * x_t.double()
        mean[:, ::2] = self.well.data_mean(x_t[:, ::2].reshape(-1, 1), t).view(-1, 16)
        return mean


class Critic(Density):
    """``Q(tanh u) / temperature + log sech^2 u``, with the truth from many localised candidates."""

    expensive = True
    reference = (1024, 4096)
    """Candidates of the two passes that find the truth"""

    def __init__(self, name: str, dim: int) -> None:
        super().__init__(name, dim)
        generator = torch.Generator().manual_seed(dim)
        self.pool = torch.atanh((2 * torch.rand(50_000, dim, generator=generator) - 1).clamp(-1 + 1e-6, 1 - 1e-6))
        log_q = torch.cat([self.q(torch.tanh(u)) for u in self.pool.split(2000)])
        self.chances = torch.softmax(log_q, 0)

    @abstractmethod
    def q(self, action: Tensor) -> Tensor:
        """Q over temperature, (..., D) → (...)."""

    def log_prob(self, x: Tensor) -> Tensor:
        return self.q(torch.tanh(x)) + log_sech2(x).sum(-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Resampled uniform actions: near p1, which is all that ``x_t`` needs."""
        return self.pool[torch.multinomial(self.chances, n, replacement=True, generator=generator)]

    def data_mean(self, x_t: Tensor, t: float) -> Tensor:
        first, second = (self._estimate(x_t, t, seed) for seed in (1, 2))
        self.reference_error = float((first - second).square().sum(-1).mean()) / 4 / (1 - t) ** 2
        return (0.5 * (first + second)).double()

    def _estimate(self, x_t: Tensor, t: float, seed: int) -> Tensor:
        first, second = (PosteriorMeanEstimator(PATH, n, data_scale=1.0) for n in self.reference)
        generator, means = torch.Generator().manual_seed(seed), []
        for row in x_t.split(1):
            at = torch.full((1,), t)
            guess = first(self.log_prob, row, at, generator).x1
            means.append(second(self.log_prob, row, at, generator, guess).x1)
        return torch.cat(means)


class RandomCritic(Critic):
    """A random network Q with unit spread over uniform actions."""

    def __init__(self, dim: int, temperature: float) -> None:
        generator = torch.Generator().manual_seed(dim)
        self.layers = []
        for n_in, n_out in ((dim, 128), (128, 128), (128, 1)):
            weight = torch.randn(n_out, n_in, generator=generator) * math.sqrt(2 / n_in)
            self.layers.append((weight, 0.5 * torch.randn(n_out, generator=generator)))
        self.scale = 1.0
        self.scale = 1 / (float(self.q(2 * torch.rand(4000, dim, generator=generator) - 1).std()) * temperature)
        super().__init__(f"random critic, {dim}-D, temperature {temperature:g}", dim)

    def q(self, action: Tensor) -> Tensor:
        """(..., D) → (...)."""
        (w_1, b_1), (w_2, b_2), (w_3, _) = self.layers
        hidden = torch.relu(torch.relu(action @ w_1.T + b_1) @ w_2.T + b_2)
        return (hidden @ w_3.T).squeeze(-1) * self.scale


class TrainedCritic(Critic):
    """The critics of a trained model at one observation.

    :param model: Trained RFM model
    :param observation: (1, ...)
    :param temperature: λ
    """

    def __init__(self, model: Any, observation: Any, temperature: float) -> None:
        self.critic, self.actor, self.temperature = model.critic, model.actor, temperature
        with torch.no_grad():
            self.encoded = self.critic.encode(self.critic.features(observation))
            self.encoded_actor = self.actor.network.encode(self.actor.features(observation))
        name = f"critic of {model.env_name}, temperature {temperature / float(model.policy.temperature):g} of its own"
        super().__init__(name, model.action_space.shape[0])

    def q(self, action: Tensor) -> Tensor:
        return self.critic.min_q(self.encoded, action.reshape(1, -1, self.dim)).view(action.shape[:-1]) / self.temperature

    @torch.no_grad()
    def guess(self, x_t: Tensor, t: float, mean: Tensor, generator: torch.Generator) -> Tensor:
        """What the algorithms use: the flow's own prediction."""
        return self.actor.predict_data(self.encoded_actor, x_t[None], torch.tensor(t))[0]


def trained_model(env_id: str, steps: int, folder: Path = Path("runs/critics")) -> Any:
    """RFM trained at its defaults, with its replay buffer; trained once, and kept.

    :param env_id: Environment, as in the benchmark
    :param steps: Environment steps
    :param folder: Where it is kept
    """
    from sb3_rfm import RFM
    from sb3_rfm.benchmark.suites import make_env

    file = folder / f"{env_id.split('/')[-1]}-{steps}"
    if not file.with_suffix(".zip").exists():
        trained = RFM("MlpPolicy", make_env(env_id), buffer_size=steps, seed=0, device="cpu").learn(steps)
        trained.save_replay_buffer(file.with_suffix(".pkl"))
        trained.save(file.with_suffix(".zip"))
    model: Any = RFM.load(file.with_suffix(".zip"), device="cpu")
    model.load_replay_buffer(file.with_suffix(".pkl"))
    model.env_name = f"{env_id.split('/')[-1]}, {steps:,} steps"
    model.policy.set_training_mode(False)
    model.policy.requires_grad_(False)
    model.set_random_seed(0)
    return model


def trained_critics(model: Any, n_states: int) -> list[list[Density]]:
    """The critics of a trained model at states of its replay buffer.

    :return: For each of two temperatures, the model's own and a fifth of it, one density for each state
    """
    states = [model.replay_buffer.sample(1).observations for _ in range(n_states)]
    own = float(model.policy.temperature)
    return [[TrainedCritic(model, state, temperature) for state in states] for temperature in (own, own / 5)]


def crescents(x: Tensor) -> Tensor:
    """Two moons facing each other, (..., 2) → (...)."""
    sides = torch.stack([-0.5 * ((x[..., 0] - s) / 0.3).square() for s in (-2.0, 2.0)])
    return sides.logsumexp(0) - 0.5 * ((x.norm(dim=-1) - 2) / 0.2).square()


def forty_modes() -> Mixture:
    """The 40-mode mixture on [-40, 40]^2."""
    means = 80 * torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) - 40
    return Mixture("40-mode mixture, 2-D", means, 1.31)


def densities() -> dict[str, Callable[[], Density]]:
    """What can be named on the command line."""
    table: dict[str, Callable[[], Density]] = {
        f"gaussian-{dim}-{condition}": lambda dim=dim, condition=condition: Gaussian(dim, condition)  # type: ignore[misc]
        for dim, condition in ((1, 1), (2, 1000), (6, 1), (8, 10), (8, 1000), (64, 1), (64, 10), (64, 1000))
    }
    table["forty-modes"] = forty_modes
    table["crescents"] = lambda: OnGrid("two moons, 2-D", 2, crescents, torch.linspace(-4, 4, 641, dtype=torch.float64), 1.5)
    table["many-well"] = ManyWell
    for temperature in (0.01, 0.1, 1.0, 10.0):

        def line(temperature: float = temperature) -> Density:
            critic = RandomCritic(1, temperature)
            return OnGrid(critic.name, 1, critic.log_prob, torch.linspace(-9, 9, 3001, dtype=torch.float64))

        table[f"critic-1-{temperature:g}"] = line
        table[f"critic-6-{temperature:g}"] = lambda temperature=temperature: RandomCritic(6, temperature)  # type: ignore[misc]
    return table


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
            data_scale=None if kind == "source" else density.data_scale,
            guess=guess if kind == "guess" else None,
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

Row = dict[str, Any]


def measure_cell(
    group: Sequence[Density], t: float, n: int, kind: str, n_rows: int, seed: int, rules: Iterable[str]
) -> list[Row]:
    """Errors of rules at one t, with K candidates of one kind.

    :param group: Targets of one family, over which errors are averaged
    :param t: Time
    :param n: K
    :param kind: ``"source"``, ``"localised"`` or ``"guess"``
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
        generator = torch.Generator().manual_seed(seed + i)
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


# Wall-clock time


def seconds(model: Any, contenders: Sequence[tuple[str, int, Any]], n_states: int = 256, n_rounds: int = 9) -> list[float]:
    """Time of one estimate for a batch of replayed states, the median of rounds in which all contenders take turns.

    :param model: Trained model
    :param contenders: Kind of candidates, K and coefficient
    :param n_states: Size of the batch
    :param n_rounds: Number of rounds
    """
    batch = model.replay_buffer.sample(n_states)
    with torch.no_grad():
        encoded = model.critic.encode(model.critic.features(batch.observations))
        encoded_actor = model.actor.network.encode(model.actor.features(batch.observations))
    t = torch.linspace(0.05, 0.95, n_states)
    x_t = PATH.interpolate(torch.randn_like(batch.actions), unsquash(batch.actions), t)

    def log_prob(u: Tensor) -> Tensor:
        return model.critic.min_q(encoded, squash(u)) / model.policy.temperature + log_sech2(u).sum(-1)

    def once(kind: str, n: int, coefficient: Any) -> float:
        estimator = PosteriorMeanEstimator(PATH, n, coefficient, data_scale=None if kind == "source" else 1.0)
        began = time.perf_counter()
        with torch.no_grad():
            guess = model.actor.predict_data(encoded_actor, x_t, t) if kind == "guess" else None
        estimator.estimate(log_prob, x_t, t, estimator.draw(x_t, t, guess=guess))
        return time.perf_counter() - began

    rounds = [[once(*contender) for contender in contenders] for _ in range(n_rounds + 1)]
    return [sorted(times)[n_rounds // 2] for times in zip(*rounds[1:], strict=True)]  # the first warms up


def race(model: Any, rows: list[Row]) -> list[Row]:
    """Plain samples and the coefficient ``"optimal"`` in the same time, and to the same error, on a trained critic.

    :param model: Trained model
    :param rows: Errors, among others those of its critic
    :return: One row for each way, temperature and t
    """
    plain = [n for n in PLAIN if n <= 500]
    ways = [("source", 32), ("localised", 32), ("guess", 32), ("guess", 8)]
    measured = seconds(model, [("source", n, 0.0) for n in plain] + [(kind, n, "optimal") for kind, n in ways])
    clock, own = list(zip(plain, measured, strict=False)), dict(zip(ways, measured[len(plain) :], strict=True))

    curves, result = plain_curves(rows), []
    for row in rows:
        way = (row["candidates"], row["K"])
        if row["rule"] != "optimal" or way not in own or model.env_name not in row["density"]:
            continue
        curve = curves[row["density"], row["t"]]
        affordable = max(1.0, along([(time, n) for n, time in clock], own[way]))
        same_time = math.exp(along([(math.log(n), math.log(mse)) for n, mse in curve], math.log(affordable)))
        needed = worth(curve, row["mse"])
        result.append(
            {key: row[key] for key in ("density", "candidates", "K", "t")}
            | {"seconds": own[way], "affordable plain samples": affordable, "error gain": same_time / row["mse"]}
            | {"plain samples for the same error": needed, "time gain": along(clock, needed) / own[way]}
        )
    return result


def along(points: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear interpolation, with the first and last pieces extended."""
    i = max(1, min(sum(x_i < x for x_i, _ in points), len(points) - 1))
    (x_0, y_0), (x_1, y_1) = points[i - 1 : i + 1]
    return y_0 + (y_1 - y_0) * (x - x_0) / (x_1 - x_0)


def summarise_races(rows: list[Row]) -> str:
    """Markdown table of :func:`race`: error gain / time gain."""
    times = sorted({row["t"] for row in rows})
    lines = ["| critic | candidates | K | plain samples in the same time | " + " | ".join(f"t = {t:g}" for t in times) + " |"]
    lines.append("|---" * (len(times) + 4) + "|")
    table = {(row["density"], row["candidates"], row["K"], row["t"]): row for row in rows}
    for density, kind, n in dict.fromkeys((row["density"], row["candidates"], row["K"]) for row in rows):
        cells = [table[density, kind, n, t] for t in times]
        shown = [f"{c['error gain']:.2g} / " + ("∞" if math.isinf(c["time gain"]) else f"{c['time gain']:.2g}") for c in cells]
        affordable = f"{cells[0]['affordable plain samples']:.0f}"
        lines.append(f"| {density} | {kind} | {n} | {affordable} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


# Report


def summarise(rows: list[Row]) -> str:
    """Worst ratio and mean gain of each rule, as Markdown tables, and the cells whose ratio is above the line."""
    rows = [row for row in rows if not math.isnan(row["ratio"])]
    lines = []
    for kind in KINDS:
        chosen = [row for row in rows if row["candidates"] == kind]
        if not chosen:
            continue
        counts = sorted({row["K"] for row in chosen})
        lines += [f"Candidates: {kind}\n", "| rule | " + " | ".join(f"worst ratio, K = {k}" for k in counts)]
        lines[-1] += f" | cells above {LINE} | error over noise (0) | over the better of both |"
        lines.append("|---" * (len(counts) + 4) + "|")
        noise = {(r["density"], r["t"], r["K"]): floored(r) for r in chosen if r["rule"] == "noise (0)"}
        for rule in dict.fromkeys(row["rule"] for row in chosen):
            own = [row for row in chosen if row["rule"] == rule]
            worst = [max(row["ratio"] for row in own if row["K"] == k) for k in counts]
            above = sum(row["ratio"] > LINE for row in own)
            gain = math.exp(sum(math.log(floored(r) / noise[r["density"], r["t"], r["K"]]) for r in own) / len(own))
            both = math.exp(sum(math.log(row["ratio"]) for row in own) / len(own))
            numbers = " | ".join(f"{w:.3g}" for w in worst)
            lines.append(f"| {rule} | {numbers} | {above} of {len(own)} | {gain:.3g} | {both:.3g} |")
        lines.append("")
    lines += ["The five cells in which `optimal` does worst, with one standard error:\n"]
    lines += ["| density | candidates | t | K | points | ratio |", "|---" * 6 + "|"]
    for row in sorted((row for row in rows if row["rule"] == "optimal"), key=lambda row: -row["ratio"])[:5]:
        cell = " | ".join(str(row[key]) for key in ("density", "candidates", "t", "K", "rows"))
        lines.append(f"| {cell} | {row['ratio']:.3f} ± {row['ratio error']:.3f} |")
    return "\n".join(lines) + "\n"


def floored(row: Row) -> float:
    """Mean squared error, or the least that counts."""
    return float(max(row["mse"], NEGLIGIBLE * row["mean squared velocity"]))


def summarise_equivalents(rows: list[Row]) -> str:
    """Plain samples that K = 32 is worth, as a Markdown table over t."""
    times = sorted({row["t"] for row in rows})
    lines = ["| density | candidates | " + " | ".join(f"t = {t:g}" for t in times) + " |", "|---" * (len(times) + 2) + "|"]
    table = {(row["density"], row["candidates"], row["t"]): row["plain samples"] for row in rows}
    for density, kind in dict.fromkeys((row["density"], row["candidates"]) for row in rows):
        cells = [table[density, kind, t] for t in times]
        shown = (f"> {PLAIN[-1]}" if math.isinf(c) else f"< {PLAIN[0]}" if c <= PLAIN[0] else f"{c:.0f}" for c in cells)
        lines.append(f"| {density} | {kind} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def plot_errors(file: Path, rows: list[Row], n: int) -> None:
    """Error against t, one panel for each density."""
    import matplotlib

    matplotlib.use("Agg")  # pictures go to files, with or without a display
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["K"] == n and row["candidates"] == "source"]
    names = list(dict.fromkeys(row["density"] for row in rows))
    styles = {
        "noise (0)": ("C0", "-"),
        "gradient (1)": ("C1", "-"),
        "textbook diagonal, clipped": ("0.6", ":"),
        "two halves": ("C2", "--"),
        "optimal": ("k", "-"),
    }
    columns = min(4, len(names))
    height = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(3.1 * columns, 2.7 * height + 0.5), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes.flat, names, strict=False):
        for rule, (colour, line) in styles.items():
            own = sorted(
                (r["t"], r["mse"] / r["mean squared velocity"]) for r in rows if (r["density"], r["rule"]) == (name, rule)
            )
            axis.plot(*zip(*own, strict=True), line, color=colour, label=rule, linewidth=2 if rule == "optimal" else 1.2)
        axis.axhline(NEGLIGIBLE, color="0.8", linewidth=0.8)
        axis.set(yscale="log", title=textwrap.fill(name, 36), ylim=(1e-5, 1e4))
        axis.title.set_fontsize(8)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.supxlabel("t", fontsize=9)
    figure.supylabel(f"relative squared error, K = {n}", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels) if columns > 2 else 3, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def write_csv(file: Path, rows: list[Row]) -> None:
    """Rows as CSV, numbers to four digits."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})


def read_csv(file: Path) -> list[Row]:
    """Rows that :func:`write_csv` wrote."""
    words, counts = ("density", "candidates", "rule"), ("dim", "K", "rows")
    with file.open(newline="") as stream:
        return [
            {key: value if key in words else int(value) if key in counts else float(value) for key, value in row.items()}
            for row in csv.DictReader(stream)
        ]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, tabulate and plot.

    :param argv: Command-line arguments; those of the process by default
    :return: Errors with their ratios
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--densities", nargs="*", default=list(densities()), choices=list(densities()), metavar="NAME")
    parser.add_argument("--times", nargs="+", type=float, default=TIMES, metavar="T")
    parser.add_argument("--candidates", nargs="+", type=int, default=CANDIDATES, metavar="K")
    parser.add_argument("--rows", type=int, default=256, help="points x_t in each cell; fewer where the truth is expensive")
    parser.add_argument("--critic", metavar="ENV", help="train RFM on this environment and take its critic")
    parser.add_argument("--critic-steps", type=int, default=20_000, help="environment steps of that training")
    parser.add_argument("--critic-states", type=int, default=16, help="replayed states at which its critic is taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/results/estimator"))
    parser.add_argument("--update", action="store_true", help="keep what errors.csv already has of other densities")
    parser.add_argument("--clock", action="store_true", help="race on that critic, with the errors of errors.csv")
    args = parser.parse_args(argv)
    if args.clock and not args.critic:
        parser.error("--clock needs --critic")
    args.output.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()

    if args.clock:
        races = race(trained_model(args.critic, args.critic_steps), read_csv(args.output / "errors.csv"))
        write_csv(args.output / "race.csv", races)
        (args.output / "race.txt").write_text(summarise_races(races) + "\n")
        print(summarise_races(races))
        return races

    groups: list[Callable[[], Sequence[Density]]] = [lambda name=name: [densities()[name]()] for name in args.densities]  # type: ignore[misc]
    if args.critic:
        critics = trained_critics(trained_model(args.critic, args.critic_steps), args.critic_states)
        groups += [lambda group=group: group for group in critics]  # type: ignore[misc]
    rows: list[Row] = []
    for make_group in groups:
        began, group = time.perf_counter(), make_group()
        n_rows = min(args.rows, 48) if group[0].expensive else args.rows
        rows += measure(group, args.times, args.candidates, n_rows, args.seed)
        print(f"{group[0].name}: {time.perf_counter() - began:.0f} s", flush=True)
    new = {row["density"] for row in rows}
    if args.update:
        rows = [row for row in read_csv(args.output / "errors.csv") if row["density"] not in new] + rows
    write_csv(args.output / "errors.csv", rows)
    tables = [summarise(rows)]
    (args.output / "rules.txt").write_text(tables[0])
    if equivalents := equivalent(rows):
        write_csv(args.output / "equivalence.csv", equivalents)
        tables.append(summarise_equivalents(equivalents))
        (args.output / "equivalence.txt").write_text(tables[-1] + "\n")
    print("\n" + "\n".join(tables))
    plot_errors(args.output / "errors.png", rows, 16 if 16 in args.candidates else min(args.candidates))
    return rows


if __name__ == "__main__":
    main()
