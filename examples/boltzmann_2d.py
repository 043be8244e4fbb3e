"""Train flows to sample two densities in the plane, and measure how well they do.

.. code-block:: bash

    python examples/boltzmann_2d.py                        # both densities, a minute and a half on two cores
    python examples/boltzmann_2d.py --densities moons --updates 500

Of a density, training is told its unnormalised logarithm and its width. For each coefficient of the control variate (0:
noise, 1: gradient, "optimal") a flow is trained in the same way, and compared with exact samples by the Wasserstein-2
distance, the maximum mean discrepancy (MMD), the share of modes found, the samples of the emptiest mode over those that it
should have, and the effective sample size (ESS) of the flow's samples reweighted to the target, as a share of their number.
The densities of the flow's samples follow from its divergence.

Source: Midgley et al., Flow annealed importance sampling bootstrap (arXiv 2208.01893), for the 40-mode mixture.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from sampling import path_times, train
from torch import Tensor, nn

from sb3_rfm.benchmark.sample_quality import effective_share, squared_mmd, wasserstein_2
from sb3_rfm.benchmark.tables import write_csv
from sb3_rfm.posterior import PosteriorMeanEstimator

matplotlib.use("Agg")  # pictures go to files, with or without a display
import matplotlib.pyplot as plt

late_times = partial(path_times, t_min=0.005, power=1.5)
"""Modes much narrower than the plane separate late."""

COEFFICIENTS: dict[str, float | str] = {"noise": 0.0, "gradient": 1.0, "optimal": "optimal"}


@dataclass
class Target:
    """A density in the plane.

    :param log_prob: (..., 2) → (...)
    :param samples: Exact samples, (N, 2)
    :param modes: Where its modes are, (M, 2)
    :param radius: How far from a mode its samples lie; further off, they are of none
    :param extent: Half the width of pictures
    :param n_updates: Gradient steps that it needs
    """

    log_prob: Callable[[Tensor], Tensor]
    samples: Tensor
    modes: Tensor
    radius: float
    extent: float
    n_updates: int


def forty_modes() -> Target:
    """Forty Gaussians at random places; lengths are divided by 25, so that the mixture is about as wide as the source."""
    generator = torch.Generator().manual_seed(0)
    means = (80 * torch.rand(40, 2, generator=generator) - 40) / 25
    std = 1.31 / 25
    slope, offset = means / std**2, -0.5 * means.square().sum(-1) / std**2

    def log_prob(x: Tensor) -> Tensor:
        # Bayes: p(x) = p(x, first component) / p(first component | x). A softmax is one pass over the forty, a logsumexp many.
        first = -0.5 * (x - means[0]).square().sum(-1) / std**2
        return first - nn.functional.linear(x, slope, offset).log_softmax(-1)[..., 0]

    index = torch.randint(40, (2000,), generator=generator)
    return Target(log_prob, means[index] + std * torch.randn(2000, 2, generator=generator), means, 3 * std, 1.9, 1500)


def moons() -> Target:
    """Two crescents that face each other; exact samples by inversion on a fine grid."""

    def log_prob(x: Tensor) -> Tensor:
        sides = torch.stack([-0.5 * ((x[..., 0] - s) / 0.6).square() for s in (-2.0, 2.0)])
        return sides.logsumexp(0) - 0.5 * ((x.square().sum(-1) + 1e-12).sqrt() - 2).square() / 0.3**2

    axis = torch.linspace(-4, 4, 801)
    grid = torch.cartesian_prod(axis, axis)
    generator = torch.Generator().manual_seed(0)
    index = torch.multinomial(torch.softmax(log_prob(grid), 0), 2000, replacement=True, generator=generator)
    jitter = (torch.rand(2000, 2, generator=generator) - 0.5) * 0.01
    return Target(log_prob, grid[index] + jitter, torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), math.inf, 3.5, 300)


TARGETS = {"forty-modes": forty_modes, "moons": moons}


class DataMean(nn.Module):
    """A network for ``E[x_1 | x_t]``: what it would be if the target were Gaussian, plus a correction.

    A Gaussian target has a Gaussian posterior of ``x_1``. The correction is in units of its standard deviation, and the inputs
    are the means over it of Fourier features: these resolve modes much narrower than the plane at late times, and at early
    ones nothing that the posterior would blur, which keeps the field smooth.

    :param spread: Width of the target; wavelengths are from a quarter of it to six times it
    """

    frequencies: Tensor

    def __init__(self, spread: float, width: int = 192) -> None:
        super().__init__()
        self.spread = spread
        angle = 2 * math.pi * torch.rand(64)
        self.register_buffer("frequencies", torch.stack([angle.cos(), angle.sin()]) * torch.logspace(0, 1.4, 64) / spread)
        self.first, self.last = nn.Linear(134, width), nn.Linear(width, 2)
        self.residual = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        nn.init.zeros_(self.last.weight)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 2), (B,) → (B, 2)"""
        t = t[:, None]
        std = ((t * self.spread).square() + (1 - t).square()).sqrt()  # of x_t
        mean, deviation = t * (self.spread / std).square() * x_t, (1 - t) * self.spread / std  # of x_1, given x_t
        blur = torch.exp(-0.5 * deviation.square() * self.frequencies.square().sum(0))
        phase = mean @ self.frequencies
        h = torch.cat([x_t / std, mean, t, torch.log(t / (1 - t)) / 4, blur * phase.sin(), blur * phase.cos()], -1)
        h = nn.functional.silu(self.first(h))
        for layer in self.residual:
            h = h + nn.functional.silu(layer(h))
        return mean + deviation * self.last(h)

    def velocity(self, x_t: Tensor, t: float) -> Tensor:
        """Velocity on the conditional-OT path, (B, 2)."""
        return (self(x_t, torch.full((len(x_t),), t)) - x_t) / (1 - t)


def fit(target: Target, coefficient: float | str, n_updates: int) -> DataMean:
    """Train a flow on points that cover the target; of the target, its width is told beside the log-density."""
    spread = float(target.samples.std())
    model = DataMean(spread)
    estimator = PosteriorMeanEstimator("cond_ot", 64, coefficient, data_scale=1.5 * spread, guess_spread=1.0, points="sobol")

    def draw_data(n: int) -> Tensor:
        return 1.8 * spread * (2 * torch.rand(n, 2) - 1)

    train(model, estimator, target.log_prob, draw_data, n_updates, learning_rate=1e-2, regress="velocity", times=late_times)
    return model


def sample(model: DataMean, n: int, n_steps: int = 120) -> tuple[Tensor, Tensor, Tensor]:
    """Integrate the flow by the midpoint rule, with its log-density.

    :return: Samples (n, 2), their log-densities (n,), and the trajectories (n_steps + 1, n, 2)
    """
    x = torch.randn(n, 2)
    log_q = -0.5 * x.square().sum(-1) - math.log(2 * math.pi)
    states = [x]
    times = late_times(torch.linspace(0, 1, n_steps + 1)).tolist()

    def velocity_and_divergence(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.requires_grad_(True)
            v = model.velocity(x, t)
            divergence = sum(torch.autograd.grad(v[:, j].sum(), x, retain_graph=True)[0][:, j] for j in range(2))
        return v.detach(), torch.as_tensor(divergence)

    for t, t_next in itertools.pairwise(times):
        dt = t_next - t
        with torch.no_grad():
            middle = x + 0.5 * dt * model.velocity(x, t)
        v, divergence = velocity_and_divergence(middle, t + 0.5 * dt)
        x = x.detach() + dt * v
        log_q = log_q - dt * divergence
        states.append(x)
    return x, log_q, torch.stack(states)


def assess(target: Target, samples: Tensor, log_q: Tensor) -> dict[str, float]:
    """Distances to exact samples, modes found and effective sample size."""
    n = min(len(samples), len(target.samples), 1000)
    distance = torch.cdist(samples, target.modes)
    nearest, mode = distance.min(1)
    shares = torch.bincount(mode[nearest <= target.radius], minlength=len(target.modes)) * len(target.modes) / len(samples)
    return {
        "W2": wasserstein_2(samples[:n], target.samples[:n]),
        "MMD^2": squared_mmd(samples[:n], target.samples[:n], float(target.samples.std()) / 4),
        # Found: at least a quarter of the samples that it should have.
        "modes": float((shares >= 0.25).float().mean()),
        "emptiest mode": float(shares.min()),
        "ESS": effective_share(target.log_prob(samples), log_q),
    }


def plot(file: Path, name: str, target: Target, flows: dict[str, tuple[Tensor, Tensor]]) -> None:
    """True density (its root, to show weak parts), that of each flow's samples, and trajectories of the last."""
    e = target.extent
    axis = torch.linspace(-e, e, 300)
    density = target.log_prob(torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)).exp()
    figure, axes = plt.subplots(1, len(flows) + 2, figsize=(3 * (len(flows) + 2), 3.3), layout="constrained")
    axes[0].imshow(density.sqrt().numpy(), extent=(-e, e, -e, e), origin="lower", cmap="Blues")
    axes[0].set_title(f"{name}: target")
    for axis_, (label, (samples, _)) in zip(axes[1:], flows.items(), strict=False):
        counts = torch.histogramdd(samples, [80, 80], range=[-e, e, -e, e]).hist
        axis_.imshow(counts.T.sqrt().numpy(), extent=(-e, e, -e, e), origin="lower", cmap="Blues")
        axis_.set_title(f"coefficient: {label}")
        axis_.set_xlabel(f"{float(counts.sum()) / len(samples):.1%} of samples in view", fontsize=8)
    trajectories = flows[list(flows)[-1]][1][:, :60]
    levels = (torch.tensor([0.2, 0.4, 0.6, 0.8]) * density.sqrt().max()).tolist()
    axes[-1].contour(axis, axis, density.sqrt(), levels=levels, colors="0.8", linewidths=0.6)
    axes[-1].plot(trajectories[..., 0], trajectories[..., 1], color="C0", linewidth=0.5, alpha=0.6)
    axes[-1].scatter(*trajectories[0].T, s=5, color="C1", label="noise", zorder=3)
    axes[-1].scatter(*trajectories[-1].T, s=5, color="k", label="samples", zorder=3)
    axes[-1].set_title(f"trajectories, {list(flows)[-1]}")
    figure.legend(*axes[-1].get_legend_handles_labels(), fontsize=8, loc="outside lower right", ncols=2)
    for axis_ in axes:
        axis_.set(xlim=(-e, e), ylim=(-e, e), xticks=[], yticks=[], aspect="equal")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, assess and plot.

    :param argv: Command-line arguments; those of the process by default
    :return: For each density, one row for exact samples (against others) and one for each coefficient
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--densities", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--coefficients", nargs="+", choices=list(COEFFICIENTS), default=list(COEFFICIENTS))
    parser.add_argument("--updates", type=int, help="gradient steps for each flow; as many as the density needs by default")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for pictures and table")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)

    rows: list[dict[str, Any]] = []

    def record(density: str, coefficient: str, quality: dict[str, float]) -> None:
        rows.append({"density": density, "coefficient": coefficient} | quality)
        print(f"{density:11}  {coefficient:8}", *(f"{k} {v:.3g}" for k, v in quality.items()), sep="  ", flush=True)

    for name in args.densities:
        target, flows = TARGETS[name](), {}
        # Exact samples against others: what the distances are for a perfect sampler.
        exact = target.samples.flip(0)[: args.samples]
        record(name, "(exact)", assess(target, exact, target.log_prob(exact)))
        for label in args.coefficients:
            torch.manual_seed(args.seed)
            model = fit(target, COEFFICIENTS[label], args.updates or target.n_updates)
            samples, log_q, trajectories = sample(model, args.samples)
            flows[label] = (samples, trajectories)
            record(name, label, assess(target, samples, log_q))
        plot(args.runs / f"boltzmann_2d_{name}.png", name, target, flows)
    write_csv(args.runs / "boltzmann_2d.csv", rows)
    print(f"Written: {args.runs}/boltzmann_2d*.png and boltzmann_2d.csv")
    return rows


if __name__ == "__main__":
    main()
