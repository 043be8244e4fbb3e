"""Candidates for the hidden noise: where a posterior is evaluated to average over it.

Given ``x_t = alpha x_1 + sigma x_0``, candidates ``x_0^k`` are drawn from a density ``r`` that is known exactly, and the
log-ratio ``log p0 - log r`` goes into their importance weights. So every choice of ``r`` estimates the same posterior mean:

- the source itself, ``r = p0``;
- the posterior under a Gaussian p1 around 0 of a given *data scale* ``S``: a Gaussian source of mean ``m`` and variance ``v``
  makes ``x_1`` Gaussian with precision ``1/S^2 + alpha^2/(sigma^2 v)`` and mean ``alpha (x_t - sigma m) / (sigma^2 v) /
  precision``. It follows the posterior over the whole range of t, where the source loses it as t goes to 0. Other sources
  keep their own shape, with that mean and precision in each dimension (correlations are not looked at);
- an equal mixture of either with the same density, somewhat narrower, around a *guess* of the data mean (a network's own
  prediction). The broad half keeps the weights bounded by twice those without the guess, however bad the guess.

The points can be independent, antithetic or randomised quasi-Monte-Carlo.

Sources: Hesterberg, Weighted average importance sampling and defensive mixture distributions (1995); Owen, Monte Carlo theory,
methods and examples, chapters 8 and 9, and Practical quasi-Monte Carlo integration, chapter 17 (scrambling, random shifts).
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sb3_rfm.paths import Path
from sb3_rfm.sources import Source

PointSet = Literal["independent", "antithetic", "sobol"]


class Candidates(NamedTuple):
    """Draws of the hidden noise."""

    x_0: Tensor
    """(B, K, D)"""
    log_ratio: Tensor | None
    """``log p0 - log r`` for the density ``r`` they were drawn from, (B, K); None where r = p0"""


def draw_points(
    source: Source, shape: tuple[int, int, int], like: Tensor, points: PointSet, generator: torch.Generator | None
) -> Tensor:
    """Draw from the source.

    :param source: The source p0
    :param shape: (B, K, D)
    :param like: A tensor whose dtype and device the draws take
    :param points: ``"independent"``; ``"antithetic"`` → in pairs at opposite quantiles; ``"sobol"`` → scrambled Sobol points,
        shifted at random for each of the B rows
    :param generator: Source of randomness
    :return: (B, K, D)
    """
    n_batch, n_points, dim = shape
    if points == "independent":
        return source.sample(shape, like, generator)
    if points == "antithetic":
        first = source.sample((n_batch, (n_points + 1) // 2, dim), like, generator)
        return torch.stack([first, source.opposite(first)], dim=2).flatten(1, 2)[:, :n_points]
    seed = int(torch.randint(2**31, (), generator=generator, device=None if generator is None else generator.device))
    sobol = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(n_points, dtype=torch.float64).to(like)
    shift = torch.rand((n_batch, 1, dim), dtype=like.dtype, device=like.device, generator=generator)
    margin = torch.finfo(like.dtype).eps  # quantiles 0 and 1 are infinite
    return source.from_uniform(((sobol + shift) % 1).clamp(margin, 1 - margin))


def draw_candidates(
    path: Path,
    source: Source,
    n_candidates: int,
    x_t: Tensor,
    t: Tensor,
    data_scale: float | None = None,
    guess: Tensor | None = None,
    guess_spread: float = 0.75,
    points: PointSet = "independent",
    generator: torch.Generator | None = None,
) -> Candidates:
    """Draw candidates for the hidden noise at ``x_t``.

    :param path: The probability path
    :param source: The source p0
    :param n_candidates: K
    :param x_t: (B, D)
    :param t: (B,)
    :param data_scale: Standard deviation of the Gaussian p1 around 0 whose posterior is drawn from; None → the source
    :param guess: Data mean around which half of the candidates are drawn, (B, D)
    :param guess_spread: Spread of those, relative to the others
    :param points: See :func:`draw_points`
    :param generator: Source of randomness
    """
    noise = draw_points(source, (x_t.shape[0], n_candidates, x_t.shape[1]), x_t, points, generator)
    if data_scale is None and guess is None:
        return Candidates(noise, None)
    alpha, sigma = path.alpha(t)[:, None, None], path.sigma(t)[:, None, None]
    x_t = x_t[:, None]
    source_mean, variance = source.moments(x_t)
    noise_precision = (alpha / sigma).square() / variance
    precision = (0.0 if data_scale is None else data_scale**-2) + noise_precision
    # Data of noise x_0: mean - spread * (x_0 - source_mean), in units of the source's standard deviation.
    spread = (precision * variance).rsqrt()
    broad = (x_t / alpha - sigma / alpha * source_mean) * noise_precision / precision + spread * source_mean
    if guess is None:
        x_1 = broad - spread * noise
        log_r = source.log_prob(noise)
    else:
        n_near = n_candidates // 2
        if points == "antithetic":
            n_near -= n_near % 2  # pairs stay together
        narrow = guess_spread * spread
        close = guess[:, None] + narrow * source_mean
        x_1 = torch.cat([close - narrow * noise[:, :n_near], broad - spread * noise[:, n_near:]], dim=1)
        log_near = source.log_prob((close - x_1) / narrow) - x_t.shape[-1] * math.log(guess_spread)
        log_broad = source.log_prob((broad - x_1) / spread)
        log_r = torch.logaddexp(log_near + _log(n_near / n_candidates), log_broad + _log(1 - n_near / n_candidates))
    # The factor spread^-D of both densities and that of x_1 = (x_t - sigma x_0) / alpha are the same for all candidates.
    x_0 = (x_t - alpha * x_1) / sigma
    return Candidates(x_0, source.log_prob(x_0) - log_r)


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf
