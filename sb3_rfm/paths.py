"""Probability paths between a source and a target, and the conversions that belong to them.

A path joins a source sample ``x_0 ~ p0`` (noise) and a target sample ``x_1 ~ p1`` (data), drawn independently, by

    x_t = alpha(t) x_1 + sigma(t) x_0,        t = 0: noise,  t = 1: data.

Every convention of the package is fixed here: the direction of time, the meaning of ``alpha`` and ``sigma``, and the
four interchangeable ways to describe a path's drift at ``x_t``: the posterior means of the *data* ``x_1`` and the
*noise* ``x_0``, the marginal *velocity* ``alpha' x_1 + sigma' x_0``, and the *score* ``grad log p_t``.

Sources: Lipman et al., Flow Matching (arXiv 2210.02747); Albergo et al., Stochastic Interpolants (arXiv 2303.08797);
Li, Tang & Azizan, Reverse Flow Matching (arXiv 2601.08136), section 2.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

Parametrisation = Literal["velocity", "noise", "data", "score"]


def expand_to(t: Tensor, x: Tensor) -> Tensor:
    """View ``t`` (B,) with as many trailing dimensions as ``x`` (B, ...) has, for broadcasting."""
    return t.reshape(t.shape + (1,) * (x.dim() - t.dim()))


class Path(ABC):
    """A probability path ``x_t = alpha(t) x_1 + sigma(t) x_0``.

    A path of one's own is a subclass that defines the four scalar functions below, each mapping times of any shape to
    values of the same shape. Everything else follows from them.
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data ``x_1``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise ``x_0``."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """Time derivative of :meth:`alpha`."""

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor:
        """Time derivative of :meth:`sigma`."""

    def interpolate(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
        """Point of the path at time ``t``.

        :param x_0: Noise, (B, ..., D)
        :param x_1: Data, (B, ..., D)
        :param t: Times, (B,)
        :return: ``x_t``, (B, ..., D)
        :raises ValueError: where one of them has more dimensions than the other
        """
        if x_0.dim() != x_1.dim():
            raise ValueError(f"x_0 and x_1 must have as many dimensions, got {tuple(x_0.shape)} and {tuple(x_1.shape)}.")
        t = expand_to(t, x_1)
        return self.alpha(t) * x_1 + self.sigma(t) * x_0

    def velocity(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
        """Velocity of the path that joins ``x_0`` and ``x_1``: ``alpha' x_1 + sigma' x_0``; shapes as above."""
        t = expand_to(t, x_1)
        return self.alpha_dot(t) * x_1 + self.sigma_dot(t) * x_0

    def noise_from_data(self, x_1: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The ``x_0`` that, with ``x_1``, gives ``x_t``; for (B, K, D), pass ``x_t`` as (B, 1, D)."""
        t = expand_to(t, x_t)
        return (x_t - self.alpha(t) * x_1) / self.sigma(t)

    def data_from_noise(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The ``x_1`` that, with ``x_0``, gives ``x_t``; for (B, K, D), pass ``x_t`` as (B, 1, D)."""
        t = expand_to(t, x_t)
        return (x_t - self.sigma(t) * x_0) / self.alpha(t)

    def convert(self, value: Tensor, x_t: Tensor, t: Tensor, source: Parametrisation, target: Parametrisation) -> Tensor:
        """Translate one parametrisation of a network's output into another.

        The score stands for ``-x_0 / sigma``, which is the score of the path when p0 is the standard Gaussian, and not with
        other sources. Where ``alpha`` or ``sigma`` is 0, at the ends of most paths, one end does not follow from the other,
        and the result may not be finite.

        :param value: What is known at ``x_t``, in the parametrisation ``source``, (B, ..., D)
        :param x_t: (B, ..., D)
        :param t: (B,)
        :param source: ``"velocity"``, ``"noise"``, ``"data"`` or ``"score"``
        :param target: The same choices
        :return: The same knowledge in the parametrisation ``target``, (B, ..., D)
        :raises ValueError: for an unknown parametrisation, or a value of another shape than ``x_t``
        """
        for name in (source, target):
            if name not in ("velocity", "noise", "data", "score"):
                raise ValueError(f"Unknown parametrisation {name!r}: expected 'velocity', 'noise', 'data' or 'score'.")
        if value.shape != x_t.shape:
            raise ValueError(f"value must have the shape of x_t, {tuple(x_t.shape)}, got {tuple(value.shape)}.")
        if source == target:
            return value
        s = expand_to(t, x_t)
        if source == "data":
            x_1, x_0 = value, self.noise_from_data(value, x_t, t)
        elif source == "velocity":
            # Solve [alpha, sigma; alpha', sigma'] (x_1, x_0) = (x_t, v).
            determinant = self.sigma(s) * self.alpha_dot(s) - self.sigma_dot(s) * self.alpha(s)
            x_1 = (self.sigma(s) * value - self.sigma_dot(s) * x_t) / determinant
            x_0 = (self.alpha_dot(s) * x_t - self.alpha(s) * value) / determinant
        else:
            x_0 = value if source == "noise" else -self.sigma(s) * value
            x_1 = self.data_from_noise(x_0, x_t, t)
        if target == "data":
            return x_1
        if target == "noise":
            return x_0
        if target == "score":
            return -x_0 / self.sigma(s)
        return self.velocity(x_0, x_1, t)


class CondOTPath(Path):
    """Conditional optimal transport: ``alpha = t, sigma = 1 - t``; straight lines from noise to data."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)


class CosinePath(Path):
    """Variance preserving, cosine schedule: ``alpha = sin(pi t / 2), sigma = cos(pi t / 2)``."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * (1 - t))  # the cosine would cancel near t = 1

    def alpha_dot(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * self.sigma(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * torch.sin(0.5 * math.pi * t)


class LinearVPPath(Path):
    """Variance preserving with the linear noise rate of DDPM (Ho et al., arXiv 2006.11239; Song et al., 2011.13456).

    ``alpha = exp(-b(1 - t) / 2), sigma = sqrt(1 - alpha^2)`` with ``b(s) = beta_min s + (beta_max - beta_min) s^2 / 2``.

    :param beta_min: Noise rate at the data end, per unit of time
    :param beta_max: Noise rate at the noise end, per unit of time
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min < beta_max < math.inf:
            raise ValueError(
                f"LinearVPPath needs 0 < beta_min < beta_max < inf, got beta_min={beta_min}, beta_max={beta_max}."
            )
        self.beta_min, self.beta_max = beta_min, beta_max

    def _rate(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * (1 - t)

    def _log_alpha(self, t: Tensor) -> Tensor:
        s = 1 - t
        return -0.5 * s * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * s)

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def alpha_dot(self, t: Tensor) -> Tensor:
        return 0.5 * self._rate(t) * self.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)


class VEPath(Path):
    """Variance exploding: ``alpha = 1, sigma = sigma_max^(1 - t) sigma_min^t`` (Song et al., arXiv 2011.13456).

    At t = 0 the data is still present under noise of size ``sigma_max``, so ``sigma_max`` must be well above its spread.
    Sampling starts from ``sigma_max`` times a draw of the source.

    :param sigma_min: Noise at the data end, in units of the data
    :param sigma_max: Noise at the noise end, in units of the data
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 10.0) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(
                f"VEPath needs 0 < sigma_min < sigma_max < inf, got sigma_min={sigma_min}, sigma_max={sigma_max}."
            )
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * (self.sigma_min / self.sigma_max) ** t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return math.log(self.sigma_min / self.sigma_max) * self.sigma(t)


PATHS: dict[str, type[Path]] = {"cond_ot": CondOTPath, "cosine": CosinePath, "linear_vp": LinearVPPath, "ve": VEPath}


def get_path(path: str | Path) -> Path:
    """Look a path up by name; a :class:`Path` is returned as it is.

    :param path: ``"cond_ot"``, ``"cosine"``, ``"linear_vp"``, ``"ve"`` or a :class:`Path`
    :raises ValueError: for an unknown name
    """
    if isinstance(path, Path):
        return path
    if not isinstance(path, str) or path not in PATHS:
        raise ValueError(f"Unknown path {path!r}: expected one of {sorted(PATHS)} or a sb3_rfm.paths.Path.")
    return PATHS[path]()
