"""Source distributions p0: where a flow starts.

A source needs samples, a log-density and a score on R^D. The standard Gaussian has closed forms for the score of the
path; every other source is a ``torch.distributions`` distribution.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.distributions import Distribution


class Source(ABC):
    """A distribution on R^D, D taken from the tensors it is used with."""

    @abstractmethod
    def sample(self, shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw samples.

        :param shape: (..., D)
        :param like: A tensor whose dtype and device the samples take
        :param generator: Source of randomness; torch's global one by default
        :return: Samples, (..., D)
        """

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density, (..., D) → (...)."""

    @abstractmethod
    def score(self, x: Tensor) -> Tensor:
        """Gradient of the log-density, (..., D) → (..., D)."""


class GaussianSource(Source):
    """The standard Gaussian."""

    def sample(self, shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * x.square().sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)

    def score(self, x: Tensor) -> Tensor:
        return -x


class DistributionSource(Source):
    """Any ``torch.distributions`` distribution with ``log_prob`` and support R^D.

    :param distribution: Either scalar (``Laplace(0, 1)``; dimensions are then independent copies of it) or a
        distribution whose samples are vectors (D,)
    :raises ValueError: when the samples are neither scalars nor vectors
    """

    def __init__(self, distribution: Distribution) -> None:
        shape = distribution.batch_shape + distribution.event_shape
        if len(shape) > 1:
            raise ValueError(f"A source has scalar or (D,) samples, got a distribution with samples of shape {tuple(shape)}.")
        self.distribution = distribution

    def sample(self, shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        own = self.distribution.batch_shape + self.distribution.event_shape
        if own and own[0] != shape[-1]:
            raise ValueError(f"The source has dimension {own[0]}, but samples of dimension {shape[-1]} are needed.")
        sample_shape = torch.Size(shape[:-1] if own else shape)
        if generator is None:
            return self.distribution.sample(sample_shape).to(like)
        # torch.distributions draw from the global generator only: seed it from ours, and leave it as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
            return self.distribution.sample(sample_shape).to(like)

    def log_prob(self, x: Tensor) -> Tensor:
        log_prob = self.distribution.log_prob(x)
        return log_prob if self.distribution.event_shape else log_prob.sum(-1)

    def score(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            (score,) = torch.autograd.grad(self.log_prob(x).sum(), x)
        return score


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
