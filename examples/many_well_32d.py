"""Train flows to sample a density with 2^16 modes in 32 dimensions.

.. code-block:: bash

    python examples/many_well_32d.py                       # about two minutes on two cores
    python examples/many_well_32d.py --updates 100

Many-well: 16 independent double wells, each beside a Gaussian dimension. The wells are unequal, so a sampler has to find
both of each and fill them in the right proportion. Since the density is a product, the truth is known by quadrature in one
dimension. For each coefficient of the control variate the same flow is trained and its samples are compared with exact ones:
by the Wasserstein-2 distance between marginals and in all 32 dimensions, the maximum mean discrepancy (MMD), the share of
samples in the deeper wells, and the effective sample size (ESS) of the samples reweighted to the target.

Source: Midgley et al., Flow annealed importance sampling bootstrap (arXiv 2208.01893); Noé et al., Boltzmann generators
(arXiv 1812.01729), for the double well.
"""

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

from sb3_rfm.benchmark.sample_quality import effective_share, squared_mmd, wasserstein_2
from sb3_rfm.posterior import PosteriorMeanEstimator, ReverseFlowMatchingLoss
from sb3_rfm.samplers import time_grid

matplotlib.use("Agg")  # pictures go to files, with or without a display
import matplotlib.pyplot as plt

COEFFICIENTS: dict[str, float | str] = {"noise": 0.0, "gradient": 1.0, "optimal": "optimal"}
DIM, T_MIN = 32, 0.01
SCALE = 1.6  # lengths are divided by it, which makes the target about as wide as the source


def log_well(x: Tensor) -> Tensor:
    """One double well, with minima near ±1.1."""
    return -((SCALE * x) ** 4) + 6 * (SCALE * x) ** 2 + 0.5 * SCALE * x


def log_prob(x: Tensor) -> Tensor:
    """(..., 32) → (...)."""
    return log_well(x[..., ::2]).sum(-1) - 0.5 * (SCALE * x[..., 1::2]).square().sum(-1)


def exact_samples(n: int) -> Tensor:
    """By quadrature in the wells, (n, 32)."""
    axis = torch.linspace(-2.2, 2.2, 4001)
    index = torch.multinomial(torch.softmax(log_well(axis), 0), n * DIM // 2, replacement=True)
    x = torch.randn(n, DIM) / SCALE
    x[:, ::2] = axis[index].view(n, DIM // 2)
    return x


class DataMean(nn.Module):
    """A residual network for ``E[x_1 | x_t]``, bounded so that sampling cannot diverge."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.first = nn.Linear(DIM + 4, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.SiLU()) for _ in range(2))
        self.last = nn.Linear(width, DIM)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 32), (B,) → (B, 32)"""
        time = torch.stack([t, torch.log(t / (1 - t)) / 4, t**2, t**3], -1)
        hidden = nn.functional.silu(self.first(torch.cat([x_t, time], -1)))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return 3 * torch.tanh((self.last(hidden) + t[:, None] * x_t) / 3)


def train(coefficient: float | str, n_updates: int, batch_size: int = 256, n_candidates: int = 32) -> DataMean:
    """Regress the network on posterior-mean estimates, half of whose candidates are near the network's own prediction."""
    estimator = PosteriorMeanEstimator("cond_ot", n_candidates, coefficient, data_scale=1.0)
    loss_fn = ReverseFlowMatchingLoss(estimator, "data")
    model = DataMean()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_updates)
    for _ in range(n_updates):
        t = T_MIN + (1 - 2 * T_MIN) * torch.rand(batch_size)
        x_t = estimator.path.interpolate(torch.randn(batch_size, DIM), torch.randn(batch_size, DIM), t)
        with torch.no_grad():
            guess = model(x_t, t)
        loss, _ = loss_fn(model, log_prob, x_t, t, guess=guess)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return model


def sample(model: DataMean, n: int, n_steps: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Integrate the flow by Euler's method, with its log-density.

    A step ``x + dt v(x)`` changes the density by the determinant of ``1 + dt dv/dx``; this is exact for the discrete map.

    :return: Samples (n, 32), their log-densities (n,), and trajectories (n_steps + 1, n, 32)
    """
    x = torch.randn(n, DIM)
    log_q = -0.5 * x.square().sum(-1) - 0.5 * DIM * math.log(2 * math.pi)
    states = [x]
    times = time_grid(n_steps, T_MIN, 1 - T_MIN)

    def step(x: Tensor, t: Tensor, dt: Tensor) -> Tensor:
        return x + dt * (model(x[None], t[None])[0] - x) / (1 - t)

    for i in range(n_steps):
        t, dt = times[i], times[i + 1] - times[i]
        with torch.no_grad():
            jacobian = torch.func.vmap(torch.func.jacrev(step), in_dims=(0, None, None))(x, t, dt)
            x = torch.func.vmap(step, in_dims=(0, None, None))(x, t, dt)
        log_q = log_q - torch.linalg.slogdet(jacobian).logabsdet
        states.append(x)
    return x, log_q, torch.stack(states)


def assess(samples: Tensor, log_q: Tensor, truth: Tensor) -> dict[str, float]:
    """Distances to exact samples of the same number."""
    marginal = (samples.sort(0).values - truth.sort(0).values).square().mean(0)
    deeper = (samples[:, ::2] > 0).float().mean(0)
    return {
        "W2 of marginals": float(marginal.mean().sqrt()),
        "W2": wasserstein_2(samples, truth),
        "MMD^2": squared_mmd(samples, truth, math.sqrt(DIM)),
        "deeper well": float(deeper.mean()),
        "emptiest well": float(torch.minimum(deeper, 1 - deeper).min()),
        "ESS": effective_share(log_prob(samples), log_q),
    }


def plot(file: Path, flows: dict[str, tuple[Tensor, Tensor]], truth: Tensor) -> None:
    """Densities of one well and one pair of wells, and trajectories."""
    figure, axes = plt.subplots(1, 3 + len(flows), figsize=(3 * (3 + len(flows)), 3.1), layout="constrained")
    axis = torch.linspace(-2.2, 2.2, 400)
    density = log_well(axis).softmax(0) / (axis[1] - axis[0])
    axes[0].plot(axis, density, "k", label="true")
    for label, (samples, _) in flows.items():
        axes[0].hist(samples[:, ::2].flatten().numpy(), bins=80, range=(-2.2, 2.2), density=True, histtype="step", label=label)
    axes[0].legend(fontsize=7)
    axes[0].set_title("all wells")
    for panel, (label, points) in zip(
        axes[1:], {"exact": truth, **{k: samples for k, (samples, _) in flows.items()}}.items(), strict=False
    ):
        panel.scatter(points[:, 0], points[:, 2], s=2, alpha=0.5, linewidths=0)
        panel.set(title=f"two wells: {label}", xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal")
    trajectories = flows[list(flows)[-1]][1]
    axes[-1].plot(torch.linspace(T_MIN, 1 - T_MIN, len(trajectories)), trajectories[:, :80, 0], color="C0", linewidth=0.4)
    axes[-1].set(title="trajectories in one well, optimal", xlabel="t")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, assess and plot.

    :param argv: Command-line arguments; those of the process by default
    :return: One row for the exact samples (against others) and one for each coefficient
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=2000, help="gradient steps for each flow")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for picture and table")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    truth, other = exact_samples(args.samples), exact_samples(args.samples)
    # Exact against exact: what the distances are for a perfect sampler.
    rows: list[dict[str, Any]] = [{"coefficient": "(exact)"} | assess(other, log_prob(other), truth)]
    flows = {}
    for label, coefficient in COEFFICIENTS.items():
        torch.manual_seed(args.seed)
        model = train(coefficient, args.updates)
        samples, log_q, trajectories = sample(model, args.samples)
        flows[label] = (samples, trajectories)
        rows.append({"coefficient": label} | assess(samples, log_q, truth))
    for row in rows:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v:9}" for k, v in row.items()), flush=True)
    plot(args.runs / "many_well_32d.png", flows, truth)
    with (args.runs / "many_well_32d.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print(f"Written: {args.runs}/many_well_32d.png and many_well_32d.csv")
    return rows


if __name__ == "__main__":
    main()
