"""What the examples of sampling a density have in common: the regression of a flow on its unnormalised log-density."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sb3_rfm.posterior import LogProb, PosteriorMeanEstimator, ReverseFlowMatchingLoss

T_MIN = 0.01
"""Flows run from this time to one minus it."""


def train(
    model: nn.Module,
    estimator: PosteriorMeanEstimator,
    log_prob: LogProb,
    draw_data: Callable[[int], Tensor],
    n_updates: int,
    learning_rate: float,
    batch_size: int = 256,
) -> None:
    """Regress a network for ``E[x_1 | x_t]`` on posterior-mean estimates, with its own prediction as the guess.

    :param model: (B, D), (B,) → (B, D); trained in place
    :param estimator: Of the posterior mean
    :param log_prob: Unnormalised log-density of the target, (B, K, D) → (B, K)
    :param draw_data: Draws (n, D) that are noised to points of the path; the regression's optimum does not depend on them
    :param n_updates: Gradient steps
    :param learning_rate: At the beginning; it falls to zero
    :param batch_size: Points of the path in each
    """
    loss_fn = ReverseFlowMatchingLoss(estimator, "data")
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_updates)
    for _ in range(n_updates):
        t = T_MIN + (1 - 2 * T_MIN) * torch.rand(batch_size)
        x_1 = draw_data(batch_size)
        x_t = estimator.path.interpolate(torch.randn_like(x_1), x_1, t)
        with torch.no_grad():
            guess = model(x_t, t)
        loss, _ = loss_fn(model, log_prob, x_t, t, guess=guess)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
