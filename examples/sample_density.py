"""Train a flow to sample an unnormalised density: the estimator on its own, with no reinforcement learning in sight.

.. code-block:: bash

    python examples/sample_density.py

All that is known about the target is its log-density, up to a constant. No sample of it is ever seen in training.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from sb3_rfm.posterior import PosteriorMeanEstimator, ReverseFlowMatchingLoss
from sb3_rfm.samplers import integrate_ode, time_grid

matplotlib.use("Agg")  # pictures go to files, with or without a display
import matplotlib.pyplot as plt


def log_prob(x: Tensor) -> Tensor:
    """Two bananas, (..., 2) → (...); Rezende & Mohamed, Variational Inference with Normalizing Flows, table 1."""
    ring = ((x.norm(dim=-1) - 2) / 0.4).square() / 2
    sides = torch.stack([-((x[..., 0] - 2) / 0.6).square() / 2, -((x[..., 0] + 2) / 0.6).square() / 2])
    return sides.logsumexp(0) - ring


class Velocity(nn.Module):
    """A small network ``v(x_t, t)``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
        )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 2), (B,) → (B, 2)"""
        return self.net(torch.cat([x_t, t.expand(len(x_t)).unsqueeze(-1)], dim=-1))


def train(n_updates: int, batch_size: int = 512) -> Velocity:
    """Regress a network on the posterior-mean estimates."""
    model = Velocity()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_updates)
    estimator = PosteriorMeanEstimator(path="cond_ot", n_candidates=32, coefficient="optimal", data_scale=2.0)
    loss_fn = ReverseFlowMatchingLoss(estimator)
    for update in range(1, n_updates + 1):
        # Any distribution of x_t with full support has the same optimum; this one is broad enough to cover the target.
        t = 0.01 + 0.98 * torch.rand(batch_size)
        x_t = estimator.path.interpolate(torch.randn(batch_size, 2), 2 * torch.randn(batch_size, 2), t)
        loss, result = loss_fn(model, log_prob, x_t, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if update % max(n_updates // 5, 1) == 0:
            print(f"update {update:5}   loss {loss:6.2f}   effective candidates {result.ess.mean():4.1f}", flush=True)
    return model


def plot(file: Path, samples: Tensor) -> None:
    """The target density and the samples, side by side."""
    grid = torch.linspace(-4, 4, 200)
    density = log_prob(torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1)).exp()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
    left.imshow(density, extent=(-4, 4, -4, 4), origin="lower", cmap="Blues")
    left.set_title("target density")
    right.hist2d(*samples.T.numpy(), bins=80, range=((-4, 4), (-4, 4)), cmap="Blues")
    right.set(title="samples of the flow", aspect="equal")
    for axes in (left, right):
        axes.set(xticks=[-4, -2, 0, 2, 4], yticks=[-4, -2, 0, 2, 4])
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> Tensor:
    """Train, sample and plot.

    :param argv: Command-line arguments; those of the process by default
    :return: Samples, (20000, 2)
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=3000, help="gradient steps")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the picture")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    model = train(args.updates)
    with torch.no_grad():
        samples = integrate_ode(model, torch.randn(20_000, 2), time_grid(50, t_min=0.01, t_max=0.99))
    args.runs.mkdir(parents=True, exist_ok=True)
    plot(args.runs / "density.png", samples)
    print(f"Written: {args.runs / 'density.png'}")
    return samples


if __name__ == "__main__":
    main()
