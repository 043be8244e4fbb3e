"""Train flows to sample a Bayesian posterior in 32 dimensions.

.. code-block:: bash

    python examples/bayes_32d.py                           # about a minute on two cores
    python examples/bayes_32d.py --updates 100

Logistic regression with 32 coefficients, a standard Gaussian prior and 200 observations. The flow sees nothing but the
unnormalised posterior. For each coefficient of the control variate the same flow is trained, and its samples are compared
with a long run of Hamiltonian Monte Carlo: by the error of the means in units of the posterior's standard deviations, by
the mean ratio of standard deviations, by the Wasserstein-2 distance and the maximum mean discrepancy (MMD), and by the
effective sample size (ESS) of the samples reweighted to the posterior, as a share of their number.

Sources: Gelman et al., Bayesian Data Analysis, chapter 16, for the model; Neal, MCMC using Hamiltonian dynamics
(arXiv 1206.1901), for the reference.
"""

import argparse
import math
from collections.abc import Sequence
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

COEFFICIENTS: dict[str, float | str] = {"noise": 0.0, "gradient": 1.0, "optimal": "optimal"}
DIM = 32


class LogisticRegression:
    """Posterior of the coefficients, given simulated observations."""

    def __init__(self, n_observations: int = 200) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(n_observations, DIM, generator=generator) / DIM**0.5 * 2
        truth = torch.randn(DIM, generator=generator)
        positive = torch.rand(n_observations, generator=generator) < torch.sigmoid(inputs @ truth)
        self.signed_inputs = torch.where(positive[:, None], inputs, -inputs)

    def log_prob(self, x: Tensor) -> Tensor:
        """Unnormalised, (..., 32) → (...)."""
        return nn.functional.logsigmoid(x @ self.signed_inputs.T).sum(-1) - 0.5 * x.square().sum(-1)

    def exact_samples(self, n: int, n_steps: int = 400) -> Tensor:
        """The ends of n independent chains of Hamiltonian Monte Carlo from the prior, (n, 32)."""

        def gradient(x: Tensor) -> Tensor:
            x = x.detach().requires_grad_(True)
            (result,) = torch.autograd.grad(self.log_prob(x).sum(), x)
            return result

        x = torch.randn(n, DIM)
        for _ in range(n_steps):
            start, momentum = x, torch.randn(n, DIM)
            energy = self.log_prob(x) - 0.5 * momentum.square().sum(-1)
            step = 0.05 + 0.15 * torch.rand(())
            momentum = momentum + 0.5 * step * gradient(x)
            for i in range(10):
                x = x + step * momentum
                momentum = momentum + (0.5 if i == 9 else 1.0) * step * gradient(x)
            accept = torch.rand(n).log() < self.log_prob(x) - 0.5 * momentum.square().sum(-1) - energy
            x = torch.where(accept[:, None], x, start)
        return x


class DataMean(nn.Module):
    """A residual network for ``E[x_1 | x_t]``, bounded so that sampling cannot diverge."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(DIM + 4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * DIM)
        )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, 32), (B,) → (B, 32)"""
        time = torch.stack([t, torch.log(t / (1 - t)) / 4, t**2, t**3], -1)
        offset, gain = self.net(torch.cat([x_t, time], -1)).chunk(2, -1)
        return 4 * torch.tanh((offset + gain * x_t) / 4)


def fit(target: LogisticRegression, coefficient: float | str, n_updates: int) -> DataMean:
    """Train a flow on points of the prior."""
    model = DataMean()
    estimator = PosteriorMeanEstimator("cond_ot", 32, coefficient, data_scale=1.0)
    train(model, estimator, target.log_prob, lambda n: torch.randn(n, DIM), n_updates, 2e-3)
    return model


def sample(model: DataMean, n: int, n_steps: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Integrate the flow by Euler's method, with its log-density.

    A step ``x + dt v(x)`` changes the density by the determinant of ``1 + dt dv/dx``; this is exact for the discrete map.

    :return: Samples (n, 32), their log-densities (n,), and trajectories (n_steps + 1, n, 32)
    """
    x = torch.randn(n, DIM)
    log_q = -0.5 * x.square().sum(-1) - 0.5 * DIM * math.log(2 * math.pi)
    states = [x]
    times = path_times(torch.linspace(0, 1, n_steps + 1))

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


def assess(target: LogisticRegression, samples: Tensor, log_q: Tensor, truth: Tensor) -> dict[str, float]:
    """Distances to exact samples of the same number."""
    spread = truth.std(0)
    return {
        "error of means": float(((samples.mean(0) - truth.mean(0)) / spread).square().mean().sqrt()),
        "standard deviations": float((samples.std(0) / spread).mean()),
        "W2": wasserstein_2(samples, truth),
        "MMD^2": squared_mmd(samples, truth, float(spread.square().sum().sqrt())),
        "ESS": effective_share(target.log_prob(samples), log_q),
    }


def plot(file: Path, flows: dict[str, tuple[Tensor, Tensor]], truth: Tensor) -> None:
    """Means and standard deviations of all coefficients, two of them against each other, and trajectories of the last flow."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    rows, columns = zip(*((i, j) for i in range(DIM) for j in range(i)), strict=True)
    correlation = torch.corrcoef(truth.T)[rows, columns].abs()
    i, j = rows[int(correlation.argmax())], columns[int(correlation.argmax())]
    for label, (samples, _) in flows.items():
        axes[0].scatter(truth.mean(0), samples.mean(0), s=10, label=label)
        axes[1].scatter(truth.std(0), samples.std(0), s=10, label=label)
        axes[2].scatter(samples[:, i], samples[:, j], s=3, alpha=0.6, linewidths=0, label=label)
    for panel, name in zip(axes, ("means", "standard deviations"), strict=False):
        low, high = panel.get_xlim()
        panel.plot([low, high], [low, high], color="0.7", linewidth=0.8, zorder=0)
        panel.set(title=name, xlabel="Hamiltonian Monte Carlo", ylabel="flow")
    axes[2].scatter(truth[:, i], truth[:, j], s=3, color="k", alpha=0.4, linewidths=0, label="exact", zorder=0)
    axes[2].set(title="the two most correlated coefficients", xlabel=f"coefficient {i}", ylabel=f"coefficient {j}")
    for panel in axes[:3]:
        panel.legend(fontsize=7, markerscale=2)
    label, (_, trajectories) = list(flows.items())[-1]
    axes[3].plot(path_times(torch.linspace(0, 1, len(trajectories))), trajectories[:, :60, i], color="C2", linewidth=0.4)
    axes[3].set(title=f"trajectories, {label}", ylabel=f"coefficient {i}", xlabel="t")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, assess and plot.

    :param argv: Command-line arguments; those of the process by default
    :return: One row for the exact samples (against others) and one for each coefficient
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=800, help="gradient steps for each flow")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for picture and table")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    target = LogisticRegression()
    truth, other = target.exact_samples(2 * args.samples).split(args.samples)
    # Exact against exact: what the distances are for a perfect sampler.
    rows: list[dict[str, Any]] = [{"coefficient": "(exact)"} | assess(target, other, target.log_prob(other), truth)]
    flows = {}
    for label, coefficient in COEFFICIENTS.items():
        torch.manual_seed(args.seed)
        model = fit(target, coefficient, args.updates)
        samples, log_q, trajectories = sample(model, args.samples)
        flows[label] = (samples, trajectories)
        rows.append({"coefficient": label} | assess(target, samples, log_q, truth))
    for row in rows:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v:9}" for k, v in row.items()), flush=True)
    plot(args.runs / "bayes_32d.png", flows, truth)
    write_csv(args.runs / "bayes_32d.csv", rows)
    print(f"Written: {args.runs}/bayes_32d.png and bayes_32d.csv")
    return rows


if __name__ == "__main__":
    main()
