"""Source distributions p0: where a flow starts.

A source needs samples, a log-density ``log p0`` and a score ``grad log p0`` on all of R^D; the posterior of the noise, its
candidates, weights and Stein score follow from these. The standard Gaussian is the default and has closed forms; every
other source is a ``torch.distributions`` distribution (Laplace, Student-t, mixtures, correlated Gaussians, ...).

Source: Li, Tang & Azizan, Reverse Flow Matching (arXiv 2601.08136), section 3, which asks nothing more of p0.
"""

import copy
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform


class Source(ABC):
    """A distribution on R^D, D taken from the tensors it is used with."""

    mean: float | Tensor = 0.0
    """Mean, a scalar or (D,)"""
    variance: float | Tensor = 1.0
    """Variance of each dimension, a scalar or (D,); ``x_0 + variance * score`` has no noise left where p0 is a Gaussian with
    independent dimensions"""
    has_quantiles: bool = False
    """Whether :meth:`opposite` and :meth:`from_uniform` are defined"""

    @abstractmethod
    def sample(self, shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw samples.

        :param shape: (..., D)
        :param like: A tensor whose dtype and device the samples take
        :param generator: Source of randomness; torch's global one by default
        :return: Samples, (..., D)
        """

    def to(self, device: torch.device | str) -> "Source":
        """The source with its parameters on a device."""
        return self

    def centre(self, like: Tensor) -> Tensor:
        """A typical point, where a deterministic policy starts: one fixed sample, unless a source knows better.

        :param like: (..., D)
        :return: Shape, dtype and device of ``like``
        """
        point = self.sample(like.shape[-1:], like.new_empty(0, device="cpu"), torch.Generator().manual_seed(0))
        return point.to(like.device).expand_as(like)

    def moments(self, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """Mean and variance, each a scalar or (D,), with dtype and device of ``like``."""
        mean, variance = (value.to(like) if isinstance(value, Tensor) else value for value in (self.mean, self.variance))
        return mean, variance

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density, (..., D) → (...)."""

    @abstractmethod
    def score(self, x: Tensor) -> Tensor:
        """Gradient of the log-density, (..., D) → (..., D)."""

    def opposite(self, x: Tensor) -> Tensor:
        """The point at the opposite quantile ``1 - F(x)`` of every dimension, for antithetic draws; (..., D) → (..., D)."""
        raise ValueError(
            f"Antithetic candidates need quantiles in each dimension, which {type(self).__name__} does not define."
        )

    def from_uniform(self, u: Tensor) -> Tensor:
        """The quantile function of every dimension, for quasi-Monte-Carlo draws; (..., D) in (0, 1) → (..., D)."""
        raise ValueError(f"Sobol candidates need quantiles in each dimension, which {type(self).__name__} does not define.")


class GaussianSource(Source):
    """The standard Gaussian."""

    has_quantiles = True

    def sample(self, shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

    def centre(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * x.square().sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)

    def score(self, x: Tensor) -> Tensor:
        return -x

    def opposite(self, x: Tensor) -> Tensor:
        return -x

    def from_uniform(self, u: Tensor) -> Tensor:
        return torch.special.ndtri(u)


class DistributionSource(Source):
    """Any ``torch.distributions`` distribution with ``log_prob`` and support R^D.

    :param distribution: Either scalar (``Laplace(0, 1)``; dimensions are then independent copies of it) or a
        distribution whose samples are vectors (D,); its parameters on the CPU, from where :meth:`to` moves them
    :raises ValueError: when the samples are neither scalars nor vectors, or do not cover all of R^D
    """

    def __init__(self, distribution: Distribution) -> None:
        shape = distribution.batch_shape + distribution.event_shape
        if len(shape) > 1:
            raise ValueError(f"A source has scalar or (D,) samples, got a distribution with samples of shape {tuple(shape)}.")
        self.distribution = _without_checks(distribution)
        if not self._covers_everything():
            kind = type(distribution).__name__
            raise ValueError(f"A source has a density on all of R^D; {kind}, with support {distribution.support}, has none.")
        self.has_quantiles = _has_quantiles(distribution)
        self.mean, self.variance = self._moments()

    def to(self, device: torch.device | str) -> "DistributionSource":
        assert isinstance(self.mean, Tensor)
        return self if self.mean.device == torch.device(device) else _moved(self, device)

    def sample(self, shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        own = self.distribution.batch_shape + self.distribution.event_shape
        if own and own[0] != shape[-1]:
            raise ValueError(f"The source has dimension {own[0]}, but samples of dimension {shape[-1]} are needed.")
        sample_shape = torch.Size(shape[:-1] if own else shape)
        if generator is None:
            return self.distribution.sample(sample_shape).to(like)
        # torch.distributions draw from the global generator only: seed it from ours, and leave it as it was.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
            return self.distribution.sample(sample_shape).to(like)

    def _covers_everything(self) -> bool:
        """Whether the density is one on all of R^D, judged far outside of a few samples."""
        support = self.distribution.support
        assert support is not None
        if support.is_discrete:
            return False
        low, median, high = self._quantiles(33)
        width = high - low
        sides = torch.tensor([-1.0, 1.0]).reshape((2,) + (1,) * width.dim())
        outside, far = (median + distance * width * sides for distance in (10, 1e4))
        if not (bool(support.check(outside).all()) and bool(torch.isfinite(self.distribution.log_prob(outside)).all())):
            return False
        # A density that can be integrated is small far out; that of an angle is not.
        relative = self.distribution.log_prob(far) + (width.log().sum() if self.distribution.event_shape else width.log())
        return bool((relative < -math.log(1e4)).all())

    def _quantiles(self, n_samples: int) -> Tensor:
        """The ends of the inner two thirds of a fixed sample, with the median between them, (3,) or (3, D)."""
        shape = self.distribution.batch_shape + self.distribution.event_shape
        sample = self.sample((n_samples, *(shape or (1,))), torch.empty(0), torch.Generator().manual_seed(0))
        return sample.reshape(-1, *shape).quantile(torch.special.ndtr(torch.tensor([-1.0, 0.0, 1.0])), dim=0)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance. Where there are none, or torch does not know them: the median of a fixed sample, and what the
        variance of a Gaussian with its inner two thirds would be."""
        moments = []
        for name in ("mean", "variance"):
            try:
                moments.append(getattr(self.distribution, name))
            except NotImplementedError:
                moments.append(torch.tensor(torch.nan))
        if not all(bool(torch.isfinite(moment).all()) for moment in moments):
            low, median, high = self._quantiles(10_001)
            instead = median, (0.5 * (high - low)).square()
            moments = [torch.where(torch.isfinite(m), m, i) for m, i in zip(moments, instead, strict=True)]
        mean, variance = moments
        return mean, variance

    def centre(self, like: Tensor) -> Tensor:
        try:
            return self.distribution.mode.to(like).expand_as(like)
        except NotImplementedError:  # the mean of a mixture may be between its modes
            return super().centre(like)

    def log_prob(self, x: Tensor) -> Tensor:
        log_prob = self.distribution.log_prob(x).to(x.dtype)
        return log_prob if self.distribution.event_shape else log_prob.sum(-1)

    def score(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_(True)  # a clone, as one made in inference mode cannot have a gradient
            (score,) = torch.autograd.grad(self.log_prob(x).sum(), x)
        return score

    def opposite(self, x: Tensor) -> Tensor:
        self._check_quantiles("Antithetic")
        margin = torch.finfo(x.dtype).eps  # quantiles 0 and 1 are infinite
        return self.distribution.icdf((1 - self.distribution.cdf(x)).clamp(margin, 1 - margin)).to(x.dtype)

    def from_uniform(self, u: Tensor) -> Tensor:
        self._check_quantiles("Sobol")
        return self.distribution.icdf(u).to(u.dtype)

    def _check_quantiles(self, points: str) -> None:
        if not self.has_quantiles:
            raise ValueError(
                f"{points} candidates need the quantile function of independent dimensions (cdf and icdf), which "
                f"{type(self.distribution).__name__} does not define; use points='independent'."
            )


def _without_checks(distribution: Distribution) -> Distribution:
    """A copy that does not look at each number it is given: for that, one waits for a GPU, and a graph has no numbers."""
    distribution = copy.copy(distribution)
    distribution._validate_args = False
    for name, part in vars(distribution).copy().items():
        if isinstance(part, Distribution):
            setattr(distribution, name, _without_checks(part))
    return distribution


def _moved(part: Any, device: torch.device | str) -> Any:
    """A copy with all tensors on a device."""
    if isinstance(part, Tensor):
        return part.to(device)
    if isinstance(part, (list, tuple)):
        return type(part)(_moved(item, device) for item in part)
    if isinstance(part, (Source, Distribution, Transform)):
        part = copy.copy(part)
        vars(part).update({name: _moved(value, device) for name, value in vars(part).items()})
    return part


def _has_quantiles(distribution: Distribution) -> bool:
    """Whether the dimensions are independent, and cdf and icdf known."""
    if distribution.event_shape:
        return False
    try:
        distribution.icdf(distribution.cdf(torch.zeros(distribution.batch_shape)))
    except NotImplementedError:
        return False
    return True


def get_source(source: str | Source | Distribution) -> Source:
    """Make a :class:`Source` of ``"gaussian"``, a ``torch.distributions`` distribution or a source.

    :raises ValueError: for anything else
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, Distribution):
        return DistributionSource(source)
    if source == "gaussian":
        return GaussianSource()
    raise ValueError(f"Unknown source {source!r}: expected 'gaussian', a torch.distributions.Distribution or a Source.")
