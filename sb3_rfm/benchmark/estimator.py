"""How well the posterior-mean estimator does: errors, ablation and K-equivalence, as tables and figures.

.. code-block:: bash

    python -m sb3_rfm.benchmark.estimator                    # writes docs/results/estimator/
    python -m sb3_rfm.benchmark.estimator --densities --critic shimmy:dm_control/cheetah-run-v0 --output docs/results/critic
    python -m sb3_rfm.benchmark.estimator --rows 32 --candidates 16 32 --densities crescents --output /tmp/estimator

For each density, ``x_t`` is drawn along the conditional-OT path, the exact velocity comes from a closed form or quadrature
(for random networks in more than one dimension: from two passes of 8192 localised candidates, whose own error is in the
table), and each rule sees the same candidates. The *ratio* is a rule's mean squared error over that of the better of the
coefficients 0 and 1 in the same cell; errors below a thousandth of the mean squared velocity count as equal to that.

Sources: Midgley et al., Flow annealed importance sampling bootstrap (arXiv 2208.01893), for the 40-mode mixture and
many-well; Rezende & Mohamed (arXiv 1505.05770), for the two moons.
"""

import argparse
import csv
import math
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sb3_rfm.candidates import draw_candidates
from sb3_rfm.control_variates import fit_diagonal, fit_robust, fit_scalar, weighted_mean
from sb3_rfm.flow_actor_critic import log_sech2
from sb3_rfm.monte_carlo import effective_sample_size, importance_weights
from sb3_rfm.paths import CondOTPath
from sb3_rfm.posterior import PosteriorMeanEstimator, value_and_gradient
from sb3_rfm.sources import GaussianSource

TIMES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)
CANDIDATES = (16, 32, 128, 500)
PLAIN = (16, 32, 64, 128, 256, 500, 1000, 2000, 4000)
"""Numbers of plain samples for K-equivalence."""
NEGLIGIBLE = 1e-3
"""Errors below this share of the mean squared velocity count as equal to it."""
PATH, SOURCE = CondOTPath(), GaussianSource()


# Densities


class Density(ABC):
    """A target with samples and posterior means that are known.

    :param name: For tables
    :param dim: D
    """

    data_scale = 1.0
    reference = "closed form"

    def __init__(self, name: str, dim: int) -> None:
        self.name, self.dim = name, dim

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

    reference = "quadrature"

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

    data_scale, reference = 1.4, "quadrature"

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

    reference = "8192 localised candidates"

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
        estimator = PosteriorMeanEstimator(PATH, 8192, data_scale=1.0)
        generator, means = torch.Generator().manual_seed(seed), []
        for row in x_t.split(1):
            at = torch.full((1,), t)
            guess = estimator(self.log_prob, row, at, generator).x1
            means.append(estimator(self.log_prob, row, at, generator, guess).x1)
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
        self.critic, self.temperature = model.critic, temperature
        with torch.no_grad():
            self.encoded = self.critic.encode(self.critic.features(observation))
        name = f"critic of {model.env_name}, temperature {temperature:.3g}"
        super().__init__(name, model.action_space.shape[0])

    def q(self, action: Tensor) -> Tensor:
        return self.critic.min_q(self.encoded, action.reshape(1, -1, self.dim)).view(action.shape[:-1]) / self.temperature


def trained_critics(env: str, steps: int, n_states: int) -> list[list[Density]]:
    """Train RFM at its defaults and take its critics at states of its replay buffer.

    :return: For each of two temperatures, the model's own and a fifth of it, one density for each state
    """
    from sb3_rfm import RFM

    model: Any = RFM("MlpPolicy", env, seed=0, device="cpu").learn(steps)
    model.env_name = env.split("/")[-1]
    model.policy.set_training_mode(False)
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

    def __init__(self, density: Density, x_t: Tensor, t: float, n: int, localised: bool, generator: torch.Generator) -> None:
        at = torch.full((len(x_t),), t)
        scale = density.data_scale if localised else None
        candidates = draw_candidates(PATH, SOURCE, n, x_t, at, data_scale=scale, generator=generator)
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


def measure(density: Density, times: Iterable[float], candidates: Sequence[int], n_rows: int, seed: int) -> list[Row]:
    """Errors of every rule in every cell, with candidates from the source and from the density's data scale.

    :param density: The target
    :param times: Values of t
    :param candidates: Values of K
    :param n_rows: Number of ``x_t`` in each cell
    :param seed: Of all randomness
    :return: One row for each cell and rule
    """
    rows: list[Row] = []
    for t in times:
        generator = torch.Generator().manual_seed(seed)
        x_1 = density.sample(n_rows, generator)
        x_t = t * x_1 + (1 - t) * torch.randn(x_1.shape, generator=generator)
        mean_1 = density.data_mean(x_t, t)
        mean_0 = (x_t - t * mean_1) / (1 - t)
        size = float((mean_1 - mean_0).square().sum(-1).mean())
        cells = [(n, False) for n in sorted({*candidates, *PLAIN})] + [(n, True) for n in candidates]
        for n, localised in cells:
            rules = RULES if n in candidates else {"noise (0)": RULES["noise (0)"]}
            errors: dict[str, float] = defaultdict(float)
            ess = 0.0
            chunk = max(1, 1_000_000 // (n * density.dim))
            for start in range(0, n_rows, chunk):
                part = slice(start, start + chunk)
                sample = Sample(density, x_t[part], t, n, localised, generator)
                ess += float(effective_sample_size(sample.weights).sum()) / n_rows
                for name, rule in rules.items():
                    # On this path v = (x_t - mu_0) / t.
                    error = (sample.estimate(rule(sample)) - mean_0[part]) / t
                    errors[name] += float(error.square().sum()) / n_rows
            for name, mse in errors.items():
                rows.append(
                    {
                        "density": density.name,
                        "dim": density.dim,
                        "candidates": "localised" if localised else "source",
                        "t": t,
                        "K": n,
                        "rule": name,
                        "mse": mse,
                        "mean squared velocity": size,
                        "ess": ess,
                        "reference error": getattr(density, "reference_error", 0.0),
                    }
                )
    return rows


def average(groups: list[list[Row]]) -> list[Row]:
    """Averages over densities of the same family, measured in the same cells."""
    numbers = ("mse", "mean squared velocity", "ess", "reference error")
    return [
        {**cell[0], **{key: sum(row[key] for row in cell) / len(cell) for key in numbers}}
        for cell in zip(*groups, strict=True)
    ]


def ratios(rows: list[Row]) -> list[Row]:
    """Add the ratio to the better of 0 and 1 of the same cell, where both were measured."""
    cells: dict[Any, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        cells[row["density"], row["candidates"], row["t"], row["K"]][row["rule"]] = row
    result = []
    for cell in cells.values():
        if "gradient (1)" not in cell:
            continue
        least = NEGLIGIBLE * cell["noise (0)"]["mean squared velocity"]
        best = max(min(cell["noise (0)"]["mse"], cell["gradient (1)"]["mse"]), least)
        result += [{**row, "ratio": max(row["mse"], least) / best, "floored": max(row["mse"], least)} for row in cell.values()]
    return result


def equivalent(rows: list[Row], rule: str = "optimal") -> list[Row]:
    """Number of plain samples from the source with the same error, by interpolation of log error against log K."""
    plain: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["rule"] == "noise (0)" and row["candidates"] == "source":
            plain[row["density"], row["t"]].append((math.log(row["K"]), math.log(row["mse"])))
    result = []
    for row in rows:
        if row["rule"] != rule or row["K"] != 32:
            continue
        curve = sorted(plain[row["density"], row["t"]])
        target = math.log(max(row["mse"], 1e-12))
        # Errors fall with K up to noise; the last number of samples that is still worse decides.
        worse = [k for k, error in curve if error > target]
        larger = [(k, e) for k, e in curve if not worse or k >= max(worse)]
        if not worse:
            log_k = curve[0][0]
        elif len(larger) < 2:
            log_k = math.inf
        else:
            (k_0, e_0), (k_1, e_1) = larger[:2]
            log_k = k_0 + (k_1 - k_0) * (e_0 - target) / (e_0 - e_1)
        result.append({key: row[key] for key in ("density", "candidates", "t", "K")} | {"plain samples": math.exp(log_k)})
    return result


# Report


def summarise(rows: list[Row]) -> str:
    """Worst ratio and mean gain of each rule, as a Markdown table."""
    lines = []
    for kind in ("source", "localised"):
        chosen = [row for row in rows if row["candidates"] == kind]
        if not chosen:
            continue
        counts = sorted({row["K"] for row in chosen})
        lines += [f"Candidates: {kind}\n", "| rule | " + " | ".join(f"worst ratio, K = {k}" for k in counts)]
        lines[-1] += " | cells above 1.05 | error over noise (0) | over the better of both |"
        lines.append("|---" * (len(counts) + 4) + "|")
        noise = {(r["density"], r["t"], r["K"]): r["floored"] for r in chosen if r["rule"] == "noise (0)"}
        for rule in dict.fromkeys(row["rule"] for row in chosen):
            own = [row for row in chosen if row["rule"] == rule]
            worst = [max(row["ratio"] for row in own if row["K"] == k) for k in counts]
            above = sum(row["ratio"] > 1.05 for row in own)
            gain = math.exp(sum(math.log(r["floored"] / noise[r["density"], r["t"], r["K"]]) for r in own) / len(own))
            both = math.exp(sum(math.log(row["ratio"]) for row in own) / len(own))
            numbers = " | ".join(f"{w:.3g}" for w in worst)
            lines.append(f"| {rule} | {numbers} | {above} of {len(own)} | {gain:.3g} | {both:.3g} |")
        lines.append("")
    return "\n".join(lines)


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
    figure, axes = plt.subplots(height, columns, figsize=(3.1 * columns, 2.5 * height), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        for rule, (colour, line) in styles.items():
            own = sorted(
                (r["t"], r["mse"] / r["mean squared velocity"]) for r in rows if (r["density"], r["rule"]) == (name, rule)
            )
            axis.plot(*zip(*own, strict=True), line, color=colour, label=rule, linewidth=2 if rule == "optimal" else 1.2)
        axis.axhline(NEGLIGIBLE, color="0.8", linewidth=0.8)
        axis.set(yscale="log", title=name, ylim=(1e-5, 1e4))
        axis.title.set_fontsize(8)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.supxlabel("t")
    figure.supylabel(f"squared error of the velocity, relative, K = {n}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def write_csv(file: Path, rows: list[Row]) -> None:
    """Rows as CSV, numbers to four digits."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, tabulate and plot.

    :param argv: Command-line arguments; those of the process by default
    :return: Errors with their ratios
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--densities", nargs="*", default=list(densities()), choices=list(densities()), metavar="NAME")
    parser.add_argument("--times", nargs="+", type=float, default=TIMES, metavar="T")
    parser.add_argument("--candidates", nargs="+", type=int, default=CANDIDATES, metavar="K")
    parser.add_argument("--rows", type=int, default=256, help="points x_t in each cell")
    parser.add_argument("--critic", metavar="ENV", help="train RFM on this environment and take its critic")
    parser.add_argument("--critic-steps", type=int, default=10_000, help="environment steps of that training")
    parser.add_argument("--critic-states", type=int, default=16, help="replayed states at which its critic is taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/results/estimator"))
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)

    rows: list[Row] = []
    for name in args.densities:
        began = time.perf_counter()
        density = densities()[name]()
        n_rows = min(args.rows, 48) if density.reference.endswith("candidates") else args.rows
        rows += measure(density, args.times, args.candidates, n_rows, args.seed)
        print(f"{density.name}: {time.perf_counter() - began:.0f} s", flush=True)
    if args.critic:
        for group in trained_critics(args.critic, args.critic_steps, args.critic_states):
            began = time.perf_counter()
            n_rows = max(1, min(args.rows, 64) // len(group))
            rows += average([measure(d, args.times, args.candidates, n_rows, args.seed + i) for i, d in enumerate(group)])
            print(f"{group[0].name}: {time.perf_counter() - began:.0f} s", flush=True)
    measured = ratios(rows)
    write_csv(args.output / "errors.csv", rows)
    tables = summarise(measured)
    (args.output / "rules.txt").write_text(tables)
    print(f"\n{tables}")
    if 32 in args.candidates:
        equivalents = equivalent(rows)
        write_csv(args.output / "equivalence.csv", equivalents)
        tables = summarise_equivalents(equivalents)
        (args.output / "equivalence.txt").write_text(tables + "\n")
        print(tables)
    plot_errors(args.output / "errors.png", rows, min(args.candidates))
    return measured


if __name__ == "__main__":
    main()
