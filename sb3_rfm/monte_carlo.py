"""Ways of averaging over the noise posterior: importance sampling, Markov chains, sequential Monte Carlo.

Each takes candidates drawn from a known density ``r`` and gives as many weighted values, together with the Stein score that
belongs to each: all that a control variate needs (:mod:`sb3_rfm.control_variates`).

- ``"snis"``: the candidates themselves, with self-normalised weights ``W_k ∝ q(x_0^k) / r(x_0^k)``. Cheapest, and consistent;
  when one weight dominates, an average over one candidate.
- ``"mcmc"``: one chain from each candidate (resampled by weight), each leaving ``q`` invariant; the values are the chains'
  averages of ``x_0`` and of the Stein score, so that a coefficient is fitted to their variance with its autocorrelation.
- ``"smc"``: draws of the source carried to ``q`` along ``p0(x_0) p1(x_1)^b``, in steps of ``b`` that keep half of the
  effective sample size, with resampling and moves after each.

The moves are Hamiltonian Monte Carlo with a step size adapted for each ``x_t``; with one leapfrog step this is MALA.

Sources: Li, Tang & Azizan (arXiv 2601.08136), section 4; Mira, Solgi & Imparato, Zero variance MCMC (arXiv 1012.2983);
Neal, MCMC using Hamiltonian dynamics (arXiv 1206.1901); Del Moral, Doucet & Jasra, Sequential Monte Carlo samplers (2006).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sb3_rfm.checks import check_integer

Density = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``x_0`` (B, K, D) → unnormalised log-density (B, K) and its gradient (B, K, D)."""


def importance_weights(log_weights: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Self-normalised weights; candidates whose log-weight or score is not finite count for nothing.

    :param log_weights: (B, K)
    :param score: (B, K, D)
    :return: Weights (B, K), not-a-number where no candidate of a row is valid, and validity (B, K)
    """
    valid = torch.isfinite(log_weights) & torch.isfinite(score).all(-1)
    return torch.softmax(log_weights.masked_fill(~valid, -torch.inf), dim=1), valid


def effective_sample_size(weights: Tensor) -> Tensor:
    """``1 / sum_k W_k^2``, (B, K) → (B,)."""
    return 1 / weights.square().sum(1)


@dataclass(frozen=True)
class MCMC:
    """Markov chains on the noise posterior.

    :param n_steps: Steps of each chain; the first half adapts the step size and is not averaged
    :param n_leapfrog: Leapfrog steps in each; 1 → MALA, more → HMC
    """

    n_steps: int = 64
    n_leapfrog: int = 1

    def __post_init__(self) -> None:
        check_integer("n_steps", self.n_steps, 2)
        check_integer("n_leapfrog", self.n_leapfrog, 1)


@dataclass(frozen=True)
class SMC:
    """Tempered sequential Monte Carlo on the noise posterior.

    :param n_steps: Largest number of tempering steps; the last one goes all the way
    :param n_moves: Moves of each particle after each
    :param n_leapfrog: Leapfrog steps in each move; 1 → MALA, more → HMC
    """

    n_steps: int = 16
    n_moves: int = 4
    n_leapfrog: int = 1

    def __post_init__(self) -> None:
        for name in ("n_steps", "n_moves", "n_leapfrog"):
            check_integer(name, getattr(self, name), 1)


Method = MCMC | SMC | None
"""How to average; None → self-normalised importance sampling."""


def get_method(method: "str | Method") -> Method:
    """``"snis"``, ``"mcmc"``, ``"smc"``, or an instance of :class:`MCMC` or :class:`SMC` for other than their defaults.

    :raises ValueError: for anything else
    """
    if method == "snis":
        return None
    if method == "mcmc":
        return MCMC()
    if method == "smc":
        return SMC()
    if isinstance(method, MCMC | SMC):
        return method
    raise ValueError(f"Unknown method {method!r}: expected 'snis', 'mcmc', 'smc', an MCMC(...) or an SMC(...).")


def run_chains(
    method: MCMC,
    density: Density,
    x_0: Tensor,
    log_r: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one chain from each candidate.

    :param method: Chain length and kind
    :param density: Noise posterior ``q``
    :param x_0: Candidates, (B, K, D)
    :param log_r: Log-density they were drawn from, up to a constant, (B, K)
    :param generator: Source of randomness
    :return: States of the averaged half (N, B, K, D), the scores of ``q`` there (N, B, K, D), and the effective sample size
        judged by the chains' disagreement, not-a-number where no candidate was valid (B,)
    """
    log_q, score = density(x_0)
    weights, valid = importance_weights(log_q - log_r, score)
    state = _resample(_State(x_0, log_q, score), weights, generator)
    step = _first_step(x_0)
    n_burn = method.n_steps // 2
    states, scores = [], []
    for i in range(method.n_steps):
        state, accepted = _move(density, state, step, method.n_leapfrog, generator)
        if i < n_burn:
            step = _adapt(step, accepted, method.n_leapfrog, i)
        else:
            states.append(state.x)
            scores.append(state.score)
    x, s = torch.stack(states), torch.stack(scores)
    # The variance of all states over that of the chains' averages is 1 for stuck chains and N for independent draws.
    n_kept, _, n_chains, _ = x.shape
    spread = (x - x.mean((0, 2), keepdim=True)).square().sum(-1).mean((0, 2))
    between = x.mean(0).var(1).sum(-1) if n_chains > 1 and len(x_0) else spread
    ess = n_chains * (spread / between.clamp(min=torch.finfo(x.dtype).tiny)).clamp(1, n_kept)
    return x, s, torch.where(valid.any(1), ess, torch.nan)


def run_smc(
    method: SMC, prior: Density, likelihood: Density, x_0: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Carry draws of the source to the noise posterior.

    :param method: Number and kind of steps
    :param prior: ``p0``
    :param likelihood: ``p1`` as a function of the noise
    :param x_0: Draws of the source, (B, K, D)
    :param generator: Source of randomness
    :return: Particles (B, K, D), and their weights (B, K), equal, or not-a-number where no draw was valid
    """
    beta = x_0.new_zeros(x_0.shape[0])
    step = _first_step(x_0)

    def tempered(x: Tensor) -> tuple[Tensor, Tensor]:
        (log_prior, score_prior), (log_likelihood, score_likelihood) = prior(x), likelihood(x)
        return log_prior + beta[:, None] * log_likelihood, score_prior + beta[:, None, None] * score_likelihood

    hopeful = torch.ones_like(beta, dtype=torch.bool)
    for i in range(method.n_steps):
        log_p1, score = likelihood(x_0)
        if i == 0:
            hopeful = (torch.isfinite(log_p1) & torch.isfinite(score).all(-1)).any(1)
        next_beta = torch.ones_like(beta) if i == method.n_steps - 1 else _next_temper(log_p1, beta)
        weights, _ = importance_weights((next_beta - beta)[:, None] * log_p1, score)
        beta = next_beta
        state = _resample(_State(x_0, *tempered(x_0)), weights, generator)
        for j in range(method.n_moves):
            state, accepted = _move(tempered, state, step, method.n_leapfrog, generator)
            step = _adapt(step, accepted, method.n_leapfrog, j)
        x_0 = state.x
        if bool((beta >= 1).all()):
            break
    equal = torch.full(x_0.shape[:2], 1 / x_0.shape[1], dtype=x_0.dtype, device=x_0.device)
    return x_0, torch.where(hopeful[:, None], equal, torch.nan)


class _State(NamedTuple):
    x: Tensor
    log_density: Tensor
    score: Tensor


def _resample(state: _State, weights: Tensor, generator: torch.Generator | None) -> _State:
    """Systematic resampling of each row."""
    n_batch, n = weights.shape
    start = torch.rand((n_batch, 1), dtype=weights.dtype, device=weights.device, generator=generator)
    points = (torch.arange(n, dtype=weights.dtype, device=weights.device) + start) / n
    index = torch.searchsorted(torch.nan_to_num(weights).cumsum(1), points).clamp(max=n - 1)
    wide = index.unsqueeze(-1).expand_as(state.x)
    return _State(state.x.gather(1, wide), state.log_density.gather(1, index), state.score.gather(1, wide))


def _move(
    density: Density, state: _State, step: Tensor, n_leapfrog: int, generator: torch.Generator | None
) -> tuple[_State, Tensor]:
    """One Metropolis-adjusted Hamiltonian step: the new state, and the acceptance probability averaged over chains (B,)."""
    eps = step[:, None, None]
    momentum = torch.randn(state.x.shape, dtype=state.x.dtype, device=state.x.device, generator=generator)
    x, log_density, score = state
    p = momentum
    for _ in range(n_leapfrog):
        p = p + 0.5 * eps * score
        x = x + eps * p
        log_density, score = density(x)
        p = p + 0.5 * eps * score
    log_ratio = log_density - state.log_density - 0.5 * (p.square() - momentum.square()).sum(-1)
    # A state that is not finite is never accepted; one whose own density is not finite is always left.
    log_ratio = torch.where(torch.isfinite(state.log_density), torch.nan_to_num(log_ratio, nan=-torch.inf), torch.inf)
    log_ratio = torch.where(torch.isfinite(log_density) & torch.isfinite(score).all(-1), log_ratio, -torch.inf)
    uniform = torch.rand(log_ratio.shape, dtype=log_ratio.dtype, device=log_ratio.device, generator=generator)
    accept = uniform.log() < log_ratio
    wide = accept.unsqueeze(-1)
    new = _State(
        torch.where(wide, x, state.x),
        torch.where(accept, log_density, state.log_density),
        torch.where(wide, score, state.score),
    )
    return new, log_ratio.clamp(max=0).exp().mean(1)


def _adapt(step: Tensor, accepted: Tensor, n_leapfrog: int, i: int) -> Tensor:
    """Robbins-Monro towards the acceptance rate that is optimal in many dimensions: 0.574 for MALA, 0.651 for HMC."""
    target = 0.574 if n_leapfrog == 1 else 0.651
    return step * torch.exp(2 * (accepted - target) / (i + 1) ** 0.5)


def _next_temper(log_p1: Tensor, beta: Tensor, share: float = 0.5) -> Tensor:
    """The largest next ``beta`` that keeps ``share`` of the effective sample size, by bisection; (B, K), (B,) → (B,)."""
    low, high = beta, torch.ones_like(beta)
    valid = torch.isfinite(log_p1)
    target = share * valid.sum(1)

    def keeps(to: Tensor) -> Tensor:
        log_weights = ((to - beta)[:, None] * log_p1).masked_fill(~valid, -torch.inf)
        return effective_sample_size(torch.softmax(log_weights, 1)) >= target

    all_the_way = keeps(high)
    for _ in range(60):  # the first step may be as small as 1e-10: a narrow target, seen through a wide posterior
        middle = 0.5 * (low + high)
        good = keeps(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(all_the_way | ~valid.any(1), 1.0, low)


def _first_step(x_0: Tensor) -> Tensor:
    """A step size to adapt from, (B,)."""
    return x_0.new_full((x_0.shape[0],), 0.5 * x_0.shape[-1] ** -0.25)
