"""What the examples of sampling a density have in common: the regression of a flow on its unnormalised log-density."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from sb3_rfm.posterior import LogProb, PosteriorMeanEstimator, ReverseFlowMatchingLoss


def path_times(u: Tensor, t_min: float = 0.01, power: float = 1.0) -> Tensor:
    """Map [0, 1] to the times of a flow, from ``t_min`` to one minus it; with ``power`` > 1 more densely near the data."""
    return t_min + (1 - 2 * t_min) * (1 - (1 - u) ** power)


def train(
    model: nn.Module,
    estimator: PosteriorMeanEstimator,
    log_prob: LogProb,
    draw_data: Callable[[int], Tensor],
    n_updates: int,
    learning_rate: float,
    regress: Literal["data", "velocity"] = "data",
    times: Callable[[Tensor], Tensor] = path_times,
    batch_size: int = 256,
) -> None:
    """Regress a network for ``E[x_1 | x_t]`` on posterior-mean estimates, with its own prediction as the guess.

    :param model: (B, D), (B,) → (B, D); trained in place
    :param estimator: Of the posterior mean
    :param log_prob: Unnormalised log-density of the target, (B, K, D) → (B, K)
    :param draw_data: Draws (n, D) that are noised to points of the path; the regression's optimum does not depend on them
    :param n_updates: Gradient steps
    :param learning_rate: After a warm-up of 100 steps (a third of them, if fewer); it falls to zero
    :param regress: ``"data"`` → the mean itself; ``"velocity"`` → the velocity that follows from it, in which errors count the
        more the nearer the data is. That needs a network whose output is exact as t goes to 1
    :param times: Times of quantiles, (N,) → (N,)
    :param batch_size: Points of the path in each
    """
    path, loss_fn = estimator.path, ReverseFlowMatchingLoss(estimator, regress)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    warm_up = min(100, n_updates / 3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * i / n_updates))
    )

    def prediction(x_t: Tensor, t: Tensor) -> Tensor:
        return path.convert(model(x_t, t), x_t, t, "data", regress)

    for _ in range(n_updates):
        t = times((torch.arange(batch_size) + torch.rand(batch_size)) / batch_size)
        x_1 = draw_data(batch_size)
        x_t = path.interpolate(torch.randn_like(x_1), x_1, t)
        with torch.no_grad():
            guess = model(x_t, t)
        loss, _ = loss_fn(prediction, log_prob, x_t, t, guess=guess)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
