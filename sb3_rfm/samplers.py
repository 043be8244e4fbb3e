"""From a trained field to samples: ODE, reverse SDE and Langevin dynamics.

Four ways to draw from p1, with times that run from noise (t = 0) to data (t = 1):

- :func:`integrate_ode` follows any velocity ``v(x, t)``;
- :func:`integrate_sde` follows a velocity and a score, for any source: the marginals of ``dx = v dt`` are also those of
  ``dx = (v + d^2/2 grad log p_t) dt + d dW``, whatever the diffusion ``d(t)``;
- :func:`denoise` follows a *data* prediction ``E[x_1 | x_t]`` of any path; as every step is a combination of the state and
  predictions, bounded predictions cannot make it diverge. Its ODE goes with any source, its SDE with the standard Gaussian;
- :func:`langevin` follows a score at one fixed noise level.

Sources: Song et al., DDIM (arXiv 2010.02502), eq. 12; Lu et al., DPM-Solver++ (arXiv 2211.01095), algorithm 2; Song et al.,
score SDEs (arXiv 2011.13456); Albergo et al., Stochastic interpolants (arXiv 2303.08797), section 2.4, for the SDE of any
source; Roberts & Tweedie (1996) for Langevin dynamics.
"""

import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sb3_rfm.checks import check_integer
from sb3_rfm.paths import Path

Field = Callable[[Tensor, Tensor], Tensor]
"""A function of ``x`` (B, ..., D) and ``t`` (scalar tensor) with values (B, ..., D)."""


def time_grid(
    n_steps: int,
    t_min: float = 0.0,
    t_max: float = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``n_steps + 1`` equally spaced times from ``t_min`` to ``t_max``.

    At 0 and 1 themselves, velocities and scores of some paths are infinite, or not known from a prediction of the data or the
    noise (:meth:`Path.convert`): for these, stay a little away from both ends. :func:`denoise` needs the whole way.

    :param n_steps: Number of steps
    :param t_min: First time
    :param t_max: Last time
    :param device: Device of the times
    :param dtype: Their dtype, that of the state; PyTorch's default one if None
    :raises ValueError: unless ``n_steps >= 1`` and ``t_min < t_max``
    """
    check_integer("n_steps", n_steps, 1)
    if not t_min < t_max:
        raise ValueError(f"Time runs from noise to data: expected t_min < t_max, got {t_min} and {t_max}.")
    return torch.linspace(t_min, t_max, n_steps + 1, device=device, dtype=dtype)


def noise_grid(path: Path, n_steps: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """``n_steps + 1`` times from 0 to 1 that get denser towards the data, where narrow distributions take their shape: after
    i of n steps, the share ``sigma / (alpha + sigma)`` of the noise has ``(1 - i / n)^2`` of its whole way down before it.

    It is this library's, after Karras et al. (arXiv 2206.00364), eq. 5.

    :param path: The probability path, on which that share falls
    :param n_steps: n; single precision can tell the times of some hundred steps apart
    :param device: Device of the times
    :param dtype: Their dtype, that of the state; PyTorch's default one if None
    :return: Times, (n_steps + 1,)
    :raises ValueError: unless ``n_steps >= 1``
    """

    def share(t: Tensor) -> Tensor:
        return path.sigma(t) / (path.alpha(t) + path.sigma(t))

    remaining = (1 - time_grid(n_steps, dtype=dtype).double()) ** 2
    first, last = torch.zeros_like(remaining), torch.ones_like(remaining)
    aim = share(last) + remaining * (share(first) - share(last))
    low, high = first, last
    for _ in range(60):  # bisection, to the last bit
        middle = 0.5 * (low + high)
        is_before = share(middle) > aim
        low, high = torch.where(is_before, middle, low), torch.where(is_before, high, middle)
    times = torch.where(remaining == 0, last, torch.where(remaining == 1, first, high))
    return times.to(device=device, dtype=dtype or torch.get_default_dtype())


def integrate_ode(velocity: Field, x: Tensor, times: Tensor, method: Literal["euler", "midpoint", "heun"] = "euler") -> Tensor:
    """Integrate ``dx/dt = v(x, t)`` over a grid of times, from noise to data or back.

    :param velocity: ``v(x, t)``
    :param x: State at ``times[0]``, (B, ..., D)
    :param times: Increasing times, (N + 1,); decreasing ones carry data back to noise
    :param method: ``"euler"`` (N evaluations), ``"midpoint"`` or ``"heun"`` (2 N evaluations, second order)
    :return: State at ``times[-1]``, (B, ..., D)
    :raises ValueError: for an unknown method, or a velocity of another shape than ``x``
    """
    if method not in ("euler", "midpoint", "heun"):
        raise ValueError(f"Unknown ODE method {method!r}: expected 'euler', 'midpoint' or 'heun'.")
    for t, t_next in itertools.pairwise(times):
        dt = t_next - t
        v = _of_shape("velocity", velocity(x, t), x)
        if method == "midpoint":
            v = _of_shape("velocity", velocity(x + 0.5 * dt * v, t + 0.5 * dt), x)
        elif method == "heun":
            v = 0.5 * (v + _of_shape("velocity", velocity(x + dt * v, t_next), x))
        x = x + dt * v
    return x


def integrate_sde(
    velocity: Field,
    score: Field,
    x: Tensor,
    times: Tensor,
    diffusion: Callable[[Tensor], Tensor],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Integrate ``dx = (v + d^2/2 grad log p_t) dt + d dW`` over a grid of times by Euler-Maruyama.

    :param velocity: ``v(x, t)``
    :param score: ``grad log p_t(x)``
    :param x: State at ``times[0]``, (B, ..., D)
    :param times: Increasing times, (N + 1,)
    :param diffusion: ``d(t)`` of a scalar tensor; 0 → the probability-flow ODE
    :param generator: Source of the noise
    :return: State at ``times[-1]``, (B, ..., D)
    :raises ValueError: unless times increase, or for a field of another shape than ``x``
    """
    _check_times(times)
    for t, t_next in itertools.pairwise(times):
        dt, d = t_next - t, diffusion(t)
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        v, s = _of_shape("velocity", velocity(x, t), x), _of_shape("score", score(x, t), x)
        x = x + dt * (v + 0.5 * d**2 * s) + d * dt.sqrt() * noise
    return x


def denoise(
    data_prediction: Field,
    x: Tensor,
    times: Tensor,
    path: Path,
    noise_scale: float = 0.0,
    generator: torch.Generator | None = None,
    order: Literal[1, 2] = 2,
) -> Tensor:
    """Carry noise to data with a data prediction; one sampler for the ODE and the reverse SDE.

    Each step splits the state into predicted data and noise, ``x = alpha mu_1 + sigma mu_0``, and puts it together again
    at the next time, with a part of the noise drawn afresh. On the conditional-OT path the ODE step of first order is exactly
    Euler's. That of second order (DPM-Solver++ 2M) takes for ``mu_1`` what the line through the last two predictions says in
    the middle of the step, in terms of ``log(alpha / sigma)``; it asks for no more predictions. A step from pure noise or to
    pure data is of first order.

    :param data_prediction: ``mu_1(x, t) = E[x_1 | x_t = x]``
    :param x: State at ``times[0]``, (B, ..., D)
    :param times: Increasing times, (N + 1,); the last state returned is the data predicted at ``times[-2]`` where
        ``sigma(times[-1]) = 0``
    :param path: The probability path
    :param noise_scale: 0 → probability-flow ODE (DDIM), 1 → reverse SDE (DDPM's posterior variance); above 0 for the standard
        Gaussian source only, of which the fresh noise is (others: :func:`integrate_sde`)
    :param generator: Source of the fresh noise
    :param order: Order of a step, 1 or 2
    :return: State at ``times[-1]``, (B, ..., D)
    :raises ValueError: for a ``noise_scale`` outside [0, 1], another ``order``, times that do not increase, or a prediction of
        another shape than ``x``
    """
    if not 0 <= noise_scale <= 1:
        raise ValueError(f"noise_scale must be from 0 (ODE) to 1 (reverse SDE), got {noise_scale}.")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}.")
    _check_times(times)
    return denoise_unchecked(data_prediction, x, times, path, noise_scale, generator, order)


def denoise_unchecked(
    data_prediction: Field,
    x: Tensor,
    times: Tensor,
    path: Path,
    noise_scale: float = 0.0,
    generator: torch.Generator | None = None,
    order: Literal[1, 2] = 2,
) -> Tensor:
    """The function behind :func:`denoise`, which looks at no number and can be compiled; the parameters are the same."""
    alpha, sigma = path.alpha(times), path.sigma(times)
    previous, ahead = x, _way_ahead(alpha, sigma)
    for i in range(len(times) - 1):
        x_1 = prediction = _of_shape("data_prediction", data_prediction(x, times[i]), x)
        if order == 2 and i > 0:
            x_1 = prediction + ahead[i - 1] * (prediction - previous)
        previous = prediction
        x_0 = (x - alpha[i] * x_1) / sigma[i]
        if noise_scale == 0:
            x = alpha[i + 1] * x_1 + sigma[i + 1] * x_0
            continue
        # DDIM's eq. 16, written for any (alpha, sigma): the share of the noise that is replaced.
        ratio = (alpha[i] * sigma[i + 1] / (alpha[i + 1] * sigma[i])) ** 2
        fresh = noise_scale * sigma[i + 1] * torch.sqrt((1 - ratio).clamp(min=0))
        kept = torch.sqrt((sigma[i + 1] ** 2 - fresh**2).clamp(min=0))
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        x = alpha[i + 1] * x_1 + kept * x_0 + fresh * noise
    return x


def _way_ahead(alpha: Tensor, sigma: Tensor) -> Tensor:
    """How far the middle of a step lies ahead of its beginning, in terms of ``log(alpha / sigma)``, over the length of the
    step before (``1 / (2 r)`` in DPM-Solver++ 2M); 0 where either step has a pure end, which is infinitely far.

    :param alpha: At the times of a grid, (N + 1,)
    :param sigma: (N + 1,)
    :return: For each step but the first, (N - 1,)
    """
    mixed = (alpha > 0) & (sigma > 0)
    step = (torch.where(mixed, alpha, 1.0).log() - torch.where(mixed, sigma, 1.0).log()).diff()
    return torch.where(mixed[:-2] & mixed[2:], 0.5 * step[1:] / step[:-1], 0.0)


def langevin(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    step_size: float | Tensor,
    n_steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Unadjusted Langevin dynamics ``x <- x + step_size * score(x) + sqrt(2 step_size) * noise``.

    :param score: ``grad log p(x)``, (B, ..., D) → (B, ..., D)
    :param x: Starting points, (B, ..., D)
    :param step_size: In squared units of ``x``; a tensor is taken as it is
    :param n_steps: Number of steps
    :param generator: Source of the noise
    :return: Samples, (B, ..., D)
    :raises ValueError: for a step size that is not positive, a negative number of steps, or a score of another shape
    """
    check_integer("n_steps", n_steps, 0)
    if not isinstance(step_size, Tensor) and not step_size > 0:
        raise ValueError(f"Langevin dynamics take steps of a positive size, got {step_size}.")
    noise_size = (2 * step_size) ** 0.5
    for _ in range(n_steps):
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        x = x + step_size * _of_shape("score", score(x), x) + noise_size * noise
    return x


def _check_times(times: Tensor) -> None:
    """Check that times run from noise to data."""
    if not bool((times.diff() > 0).all()):
        raise ValueError(f"Samplers run from noise to data: expected increasing times, got {times.tolist()}.")


def _of_shape(name: str, value: Tensor, x: Tensor) -> Tensor:
    """What a field returned at ``x``; of another shape, it might broadcast."""
    if value.shape != x.shape:
        raise ValueError(f"{name} must return the shape of its argument, {tuple(x.shape)}, got {tuple(value.shape)}.")
    return value
