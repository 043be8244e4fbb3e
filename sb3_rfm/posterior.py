"""Posterior means of the two hidden ends of a probability path, with Stein control variates.

Given ``x_t = alpha x_1 + sigma x_0`` and an unnormalised target density ``p1``, the noise ``x_0`` has the posterior

    q(x_0 | x_t)  ∝  p0(x_0) p1((x_t - sigma x_0) / alpha),

and its score ``s_0 = grad log p0(x_0) - (sigma / alpha) grad log p1(x_1)`` has zero mean under it (Stein's identity with a
constant test function). Hence, for every diagonal ``Lambda``,

    E[x_0 | x_t] = E_q[x_0 + Lambda s_0].

``Lambda = 0`` is the noise-expectation family (QNE, MaxEntDP), ``Lambda = 1`` the gradient-expectation family (DQS, iDEM),
and the ``Lambda`` of least variance is reverse flow matching. The expectation is taken by self-normalised importance
sampling over ``K`` candidates. The data mean, the marginal velocity and the score follow from the noise mean.

Sources: Li, Tang & Azizan, Reverse Flow Matching (arXiv 2601.08136), sections 3 and 4; Oates, Girolami & Chopin, Control
functionals (arXiv 1410.2392); Owen, Monte Carlo theory, methods and examples, chapter 9, for the variance of
self-normalised estimates.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from sb3_rfm.paths import Parametrisation, Path, get_path
from sb3_rfm.sources import GaussianSource, Source, get_source

LogProb = Callable[[Tensor], Tensor]
"""Unnormalised log-density of the target, (B, K, D) → (B, K)."""

Coefficient = str | float | Sequence[float]


class PosteriorMean(NamedTuple):
    """What is known at ``x_t``, with diagnostics."""

    x0: Tensor
    """Posterior mean of the noise, (B, D)"""
    x1: Tensor
    """Posterior mean of the data, (B, D)"""
    velocity: Tensor
    """Marginal velocity ``alpha' x1 + sigma' x0``, (B, D)"""
    score: Tensor
    """Score of the path at ``x_t``, (B, D)"""
    ess: Tensor
    """Effective sample size ``1 / sum_k W_k^2`` of the candidates, between 1 and K, (B,)"""
    coefficient: Tensor
    """``Lambda`` in noise coordinates, (B, D): 0 is a plain posterior mean, 1 a pure gradient estimate"""
    variance_ratio: Tensor
    """Estimated variance of the estimate over that of plain importance sampling, (B,); Owen, eq. 9.10"""


class Candidates(NamedTuple):
    """Draws of the hidden noise."""

    x_0: Tensor
    """(B, K, D)"""
    log_ratio: Tensor | None
    """``log p0 - log r`` for the density ``r`` they were drawn from, (B, K); None where r = p0"""


def stein_score(path: Path, source: Source, x_0: Tensor, score_1: Tensor, t: Tensor) -> Tensor:
    """Score of the noise posterior, ``grad log p0(x_0) - (sigma / alpha) grad log p1(x_1)``.

    :param x_0: Candidates, (B, K, D)
    :param score_1: ``grad log p1`` at the matching data, (B, K, D)
    :param t: (B,)
    :return: (B, K, D)
    """
    t = t[:, None, None]
    return source.score(x_0) - path.sigma(t) / path.alpha(t) * score_1


def minimum_variance_scalar(weights: Tensor, values: Tensor, stein: Tensor) -> Tensor:
    """Plug-in of the scalar that minimises the asymptotic variance of ``sum_k W_k (f_k + c s_k)``, kept within [0, 1].

    The weights enter squared: this is the delta-method variance of a self-normalised estimate.

    :param weights: Normalised importance weights, (B, K)
    :param values: ``f``, (B, K, D)
    :param stein: ``s``, (B, K, D), with mean zero under the posterior
    :return: ``c``, (B,); 0 where the candidates carry no information about it
    """
    mean = (weights.unsqueeze(-1) * values).sum(1, keepdim=True)
    squared = weights.square().unsqueeze(-1)
    # Centring s makes the fit exact, whatever the candidates, where f + c s is constant (Gaussian targets).
    stein = stein - (weights.unsqueeze(-1) * stein).sum(1, keepdim=True)
    numerator = (squared * (mean - values) * stein).sum((1, 2))
    denominator = (squared * stein.square()).sum((1, 2))
    tiny = torch.finfo(denominator.dtype).tiny
    return (numerator / denominator.clamp(min=tiny)).clamp(0.0, 1.0)


def optimal_coefficient(weights: Tensor, values: Tensor, stein: Tensor) -> Tensor:
    """The default rule: the smaller of two bounded scalars, each fitted on one half of the candidates.

    A coefficient fitted on few effective samples is unreliable, and too large a one costs far more than too small a one.
    Where the halves disagree, the smaller is the safe choice; where they agree, nothing is lost.

    :param weights: Normalised importance weights, (B, K)
    :param values: (B, K, D)
    :param stein: (B, K, D)
    :return: (B,)
    """
    halves = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        w = weights[:, half]
        w = w / w.sum(1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        halves.append(minimum_variance_scalar(w, values[:, half], stein[:, half]))
    return torch.minimum(halves[0], halves[1])


class PosteriorMeanEstimator:
    """Estimate the posterior means of noise and data at ``x_t`` from an unnormalised log-density.

    .. code-block:: python

        estimator = PosteriorMeanEstimator(path="cond_ot", n_candidates=32)
        result = estimator(log_prob, x_t, t)  # result.x0, .x1, .velocity, .score, .ess, .coefficient

    :param path: ``"cond_ot"``, ``"cosine"``, ``"linear_vp"``, ``"ve"`` or a :class:`~sb3_rfm.paths.Path`
    :param n_candidates: Number K of candidates drawn for each ``x_t``
    :param coefficient: The control variate's ``Lambda`` in noise coordinates: ``"optimal"`` → RFM, 0 → QNE, 1 → DQS,
        any other number, or one number for each dimension
    :param source: ``"gaussian"``, a ``torch.distributions`` distribution or a :class:`~sb3_rfm.sources.Source`
    :param data_scale: A standard deviation of p1, where known. Candidates then come from the posterior that a Gaussian p1
        of that scale would have, instead of the source; that is what keeps them useful at small t. The weights
        account for it exactly.
    :raises ValueError: for arguments out of range
    """

    def __init__(
        self,
        path: str | Path = "cond_ot",
        n_candidates: int = 32,
        coefficient: Coefficient = "optimal",
        source: str | Source | Distribution = "gaussian",
        data_scale: float | None = None,
    ) -> None:
        if isinstance(n_candidates, bool) or not isinstance(n_candidates, int) or n_candidates < 1:
            raise ValueError(f"n_candidates must be an integer >= 1, got {n_candidates!r}.")
        if data_scale is not None and not data_scale > 0:
            raise ValueError(f"data_scale must be positive or None, got {data_scale!r}.")
        self.path = get_path(path)
        self.n_candidates = n_candidates
        self.coefficient = check_coefficient(coefficient)
        self.source = get_source(source)
        self.data_scale = data_scale

    @property
    def needs_gradient(self) -> bool:
        """Whether the estimate uses ``grad log p1`` at all."""
        return self.coefficient != 0.0

    def __call__(
        self,
        log_prob: LogProb,
        x_t: Tensor,
        t: Tensor,
        generator: torch.Generator | None = None,
        guess: Tensor | None = None,
    ) -> PosteriorMean:
        """Estimate at ``x_t``.

        :param log_prob: Unnormalised log p1, (B, K, D) → (B, K); differentiable unless the coefficient is 0
        :param x_t: (B, D)
        :param t: (B,), strictly between 0 and 1
        :param generator: Source of the candidates' randomness
        :param guess: A guess of the data mean, (B, D), around which half of the candidates are drawn
        :return: :class:`PosteriorMean`
        :raises ValueError: for wrong shapes, or when no candidate of some row has a finite log-density
        """
        self._check_inputs(x_t, t, guess)
        candidates = self.draw(x_t, t, generator, guess)

        def checked_log_prob(x_1: Tensor) -> Tensor:
            log_p = log_prob(x_1)
            if log_p.shape != x_1.shape[:2]:
                raise ValueError(
                    f"log_prob must map (B, K, D) to (B, K): given {tuple(x_1.shape)} it returned {tuple(log_p.shape)}."
                )
            hopeless = ~torch.isfinite(log_p).any(dim=1)
            if hopeless.any():
                rows = hopeless.nonzero().flatten().tolist()
                raise ValueError(f"log_prob is not finite at any of the {x_1.shape[1]} candidates of rows {rows[:8]}.")
            return log_p

        return self.estimate(checked_log_prob, x_t, t, candidates)

    def draw(
        self, x_t: Tensor, t: Tensor, generator: torch.Generator | None = None, guess: Tensor | None = None
    ) -> Candidates:
        """Draw candidates for the hidden noise.

        :param x_t: (B, D)
        :param t: (B,)
        :param generator: Source of randomness
        :param guess: (B, D), see :meth:`__call__`
        """
        noise = self.source.sample((x_t.shape[0], self.n_candidates, x_t.shape[1]), x_t, generator)
        if self.data_scale is None and guess is None:
            return Candidates(noise, None)
        alpha, sigma = self.path.alpha(t)[:, None, None], self.path.sigma(t)[:, None, None]
        x_t = x_t[:, None]
        # In data coordinates the posterior under a Gaussian p1 has precision 1/scale^2 + (alpha/sigma)^2.
        prior_precision = 0.0 if self.data_scale is None else self.data_scale**-2
        precision = prior_precision + (alpha / sigma).square()
        spread = precision.rsqrt()
        centre = alpha * x_t / sigma.square() / precision
        if guess is not None:
            half = self.n_candidates // 2
            near = torch.arange(self.n_candidates, device=x_t.device)[None, :, None] < half
            x_1 = torch.where(near, guess[:, None], centre) + spread * noise
            distance = torch.stack([(x_1 - c) / spread for c in (guess[:, None], centre)])
            log_near, log_broad = self.source.log_prob(distance)
            share = half / self.n_candidates
            log_r = torch.logaddexp(log_near + _log(share), log_broad + _log(1 - share))
        else:
            x_1 = centre + spread * noise
            log_r = self.source.log_prob(noise)
        x_0 = (x_t - alpha * x_1) / sigma
        return Candidates(x_0, self.source.log_prob(x_0) - log_r)

    def estimate(self, log_prob: LogProb, x_t: Tensor, t: Tensor, candidates: Candidates) -> PosteriorMean:
        """The estimate from given candidates: the pure, unchecked function behind :meth:`__call__`.

        :param log_prob: (B, K, D) → (B, K)
        :param x_t: (B, D)
        :param t: (B,)
        :param candidates: Draws of the noise, with their density ratio
        """
        x_0 = candidates.x_0
        x_1 = self.path.data_from_noise(x_0, x_t[:, None], t)
        if self.needs_gradient:
            log_p, score_1 = value_and_gradient(log_prob, x_1)
        else:
            with torch.no_grad():
                log_p, score_1 = log_prob(x_1), torch.zeros_like(x_1)
        log_weights = log_p if candidates.log_ratio is None else log_p + candidates.log_ratio
        valid = torch.isfinite(log_weights) & torch.isfinite(score_1).all(-1)
        weights = torch.softmax(log_weights.masked_fill(~valid, -torch.inf), dim=1)
        stein = stein_score(self.path, self.source, x_0, score_1, t).masked_fill(~valid.unsqueeze(-1), 0.0)

        coefficient = self._coefficient(weights, x_0, stein)
        corrected = x_0 + coefficient[:, None] * stein
        mean_0 = (weights.unsqueeze(-1) * corrected).sum(1)
        mean_1 = self.path.data_from_noise(mean_0, x_t, t)
        return PosteriorMean(
            x0=mean_0,
            x1=mean_1,
            velocity=self.path.velocity(mean_0, mean_1, t),
            score=self._score(weights, x_0, stein, mean_0, t),
            ess=1 / weights.square().sum(1),
            coefficient=coefficient,
            variance_ratio=_variance(weights, corrected) / _variance(weights, x_0).clamp(min=1e-30),
        )

    def _coefficient(self, weights: Tensor, values: Tensor, stein: Tensor) -> Tensor:
        """``Lambda`` for the test function ``values``, (B, D)."""
        n_batch, _, dim = values.shape
        if self.coefficient == "optimal":
            return optimal_coefficient(weights, values, stein).unsqueeze(1).expand(n_batch, dim)
        fixed = torch.as_tensor(self.coefficient, dtype=values.dtype, device=values.device)
        return fixed.expand(n_batch, dim)

    def _score(self, weights: Tensor, x_0: Tensor, stein: Tensor, mean_0: Tensor, t: Tensor) -> Tensor:
        """``grad log p_t = E[grad log p0(x_0) | x_t] / sigma``, with its own control variate (reverse score matching)."""
        sigma = self.path.sigma(t)[:, None]
        if isinstance(self.source, GaussianSource):
            return -mean_0 / sigma
        # grad log p0 - c s_0 runs from grad log p0 (c = 0) to (sigma / alpha) grad log p1 (c = 1).
        values = -self.source.score(x_0)
        coefficient = self._coefficient(weights, values, stein)
        return -(weights.unsqueeze(-1) * (values + coefficient[:, None] * stein)).sum(1) / sigma

    def _check_inputs(self, x_t: Tensor, t: Tensor, guess: Tensor | None) -> None:
        if x_t.dim() != 2:
            raise ValueError(f"x_t must have shape (B, D), got {tuple(x_t.shape)}.")
        if t.shape != x_t.shape[:1]:
            raise ValueError(f"t must have shape (B,) = ({x_t.shape[0]},) to match x_t, got {tuple(t.shape)}.")
        if guess is not None and guess.shape != x_t.shape:
            raise ValueError(f"guess must have the shape of x_t, {tuple(x_t.shape)}, got {tuple(guess.shape)}.")
        if not bool(((t > 0) & (t < 1)).all()):
            raise ValueError("t must lie strictly between 0 and 1: at the ends one of the two posteriors is a point.")
        if isinstance(self.coefficient, tuple) and len(self.coefficient) != x_t.shape[1]:
            raise ValueError(
                f"coefficient has {len(self.coefficient)} entries, but x_t has dimension {x_t.shape[1]}; "
                "give one number, or one for each dimension."
            )


class ReverseFlowMatchingLoss(nn.Module):
    """Regression of a network onto the posterior mean: trains it to sample an unnormalised density.

    .. code-block:: python

        loss_fn = ReverseFlowMatchingLoss(PosteriorMeanEstimator())
        loss, result = loss_fn(velocity_model, log_prob, x_t, t)

    The optimum is the same for every distribution of ``x_t`` with full support (RFM, section 3).

    :param estimator: The posterior-mean estimator
    :param parametrisation: What the network predicts: ``"velocity"``, ``"data"``, ``"noise"`` or ``"score"``
    """

    def __init__(self, estimator: PosteriorMeanEstimator, parametrisation: Parametrisation = "velocity") -> None:
        super().__init__()
        fields = {"velocity": "velocity", "data": "x1", "noise": "x0", "score": "score"}
        if parametrisation not in fields:
            raise ValueError(f"Unknown parametrisation {parametrisation!r}: expected one of {sorted(fields)}.")
        self.estimator = estimator
        self.field = fields[parametrisation]

    def forward(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        log_prob: LogProb,
        x_t: Tensor,
        t: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, PosteriorMean]:
        """The loss at ``x_t``.

        :param model: ``model(x_t, t)``, (B, D), (B,) → (B, D)
        :param log_prob: Unnormalised log p1, (B, K, D) → (B, K)
        :param x_t: (B, D)
        :param t: (B,)
        :param generator: Source of the candidates' randomness
        :return: Scalar loss (mean over the batch of the squared error), and the estimate with its diagnostics
        """
        result = self.estimator(log_prob, x_t, t, generator)
        target = getattr(result, self.field)
        return (model(x_t, t) - target.detach()).square().sum(-1).mean(), result


def value_and_gradient(log_prob: LogProb, x: Tensor) -> tuple[Tensor, Tensor]:
    """``log_prob`` and its gradient with respect to ``x`` alone; no gradient of any parameter is computed.

    :param x: (B, K, D)
    :return: (B, K) and (B, K, D)
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = log_prob(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def check_coefficient(coefficient: Coefficient) -> str | float | tuple[float, ...]:
    """Normalise and validate a control-variate coefficient.

    :raises ValueError: unless it is ``"optimal"``, a finite number or a sequence of finite numbers
    """
    if isinstance(coefficient, str):
        if coefficient != "optimal":
            raise ValueError(f"Unknown coefficient {coefficient!r}: expected 'optimal', a number or one number per dimension.")
        return coefficient
    try:
        numbers = torch.as_tensor(coefficient, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"coefficient must be 'optimal', a number or one number per dimension, got {coefficient!r}.") from error
    if numbers.dim() > 1 or numbers.numel() == 0 or not bool(torch.isfinite(numbers).all()):
        raise ValueError(f"coefficient must be 'optimal', a finite number or one per dimension, got {coefficient!r}.")
    return float(numbers) if numbers.dim() == 0 else tuple(numbers.tolist())


def _variance(weights: Tensor, values: Tensor) -> Tensor:
    """Delta-method variance of a self-normalised mean, summed over dimensions: (B, K), (B, K, D) → (B,)."""
    mean = (weights.unsqueeze(-1) * values).sum(1, keepdim=True)
    return (weights.square().unsqueeze(-1) * (values - mean).square()).sum((1, 2))


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf
