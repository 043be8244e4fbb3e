"""Posterior means of the two hidden ends of a probability path, with Stein control variates.

Given ``x_t = alpha x_1 + sigma x_0`` and an unnormalised target density ``p1``, the noise ``x_0`` has the posterior

    q(x_0 | x_t)  ∝  p0(x_0) p1((x_t - sigma x_0) / alpha),

and its score ``s_0 = grad log p0(x_0) - (sigma / alpha) grad log p1(x_1)`` has zero mean under it (Stein's identity with a
constant test function). Hence, for every diagonal ``Lambda``,

    E[x_0 | x_t] = E_q[x_0 + Lambda s_0].

``Lambda = 0`` is the noise-expectation family (QNE, MaxEntDP), ``Lambda = 1`` the gradient-expectation family (DQS, iDEM),
and the ``Lambda`` of least variance is reverse flow matching. The data mean, the marginal velocity and the score follow from
the noise mean. Where the parts are: candidates and their densities in :mod:`sb3_rfm.candidates`, averages over them in
:mod:`sb3_rfm.monte_carlo`, the choice of ``Lambda`` in :mod:`sb3_rfm.control_variates`.

Source: Li, Tang & Azizan, Reverse Flow Matching (arXiv 2601.08136), sections 3 and 4.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from sb3_rfm.candidates import Candidates, PointSet, draw_candidates
from sb3_rfm.checks import check_integer, check_points, is_number
from sb3_rfm.control_variates import Coefficient, check_coefficient, fit, variance_of_mean, weighted_mean
from sb3_rfm.monte_carlo import MCMC, SMC, Method, effective_sample_size, get_method, importance_weights, run_chains, run_smc
from sb3_rfm.paths import Parametrisation, Path, get_path
from sb3_rfm.sources import GaussianSource, Source, get_source

LogProb = Callable[[Tensor], Tensor]
"""Unnormalised log-density of the target, (B, K, D) → (B, K)."""

NOT_DIFFERENTIABLE = (
    "log_prob must be differentiable, but what it returned carries no gradient of its argument (detached, or computed outside "
    "of torch?); coefficient=0 with method='snis' needs none."
)


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
    """Effective sample size, (B,): ``1 / sum_k W_k^2``, between 1 and K, for importance sampling. For chains it can exceed K.
    Neither that of chains nor that of particles notices that they descend from the same few candidates: then it is far too
    large"""
    coefficient: Tensor
    """``Lambda`` in noise coordinates, (B, D): 0 is a plain posterior mean, the source's variance (1 for the Gaussian) a pure
    gradient estimate"""
    variance_ratio: Tensor
    """Estimated variance of the estimate over that without control variate, as if candidates were independent, (B,); 1 where a
    single candidate counts"""


class PosteriorMeanEstimator:
    """Estimate the posterior means of noise and data at ``x_t`` from an unnormalised log-density.

    .. code-block:: python

        estimator = PosteriorMeanEstimator(path="cond_ot", n_candidates=32)
        result = estimator(log_prob, x_t, t)  # result.x0, .x1, .velocity, .score, .ess, .coefficient

    :param path: ``"cond_ot"``, ``"cosine"``, ``"linear_vp"``, ``"ve"`` or a :class:`~sb3_rfm.paths.Path`
    :param n_candidates: Number K of candidates drawn for each ``x_t``
    :param coefficient: The control variate's ``Lambda`` in noise coordinates: ``"optimal"`` → RFM (see
        :func:`~sb3_rfm.control_variates.fit_robust`), 0 → QNE, 1 → DQS, any other number, or one number for each
        dimension; ``"scalar"`` and ``"diagonal"`` → the textbook fits of least asymptotic variance, between 0 and
        the source's variance as well, without the guards that keep ``"optimal"`` from being worse than 0 when few candidates
        count
    :param source: ``"gaussian"``, a ``torch.distributions`` distribution or a :class:`~sb3_rfm.sources.Source`
    :param data_scale: How far the data reaches from the origin: its root mean square in a dimension, roughly. Candidates
        then come from the posterior that a Gaussian p1 around the origin of that scale would have, instead of the source;
        that is what keeps them useful at small t. The weights account for it. Too small a scale shrinks estimates towards the
        origin, as candidates miss what is outside; too large a one leaves fewer that count. A target far from the origin is
        better moved there: ``lambda x: log_prob(x + centre)`` at ``x_t - alpha centre``, and ``centre`` added to ``x1``
    :param guess_spread: Spread of the candidates around a guess (see :meth:`__call__`), relative to the others
    :param points: ``"independent"``, ``"antithetic"`` or ``"sobol"`` candidates; antithetic ones gain most with few of them,
        Sobol points from 16 on, and either needs the source's quantile function
    :param method: ``"snis"`` → self-normalised importance sampling, ``"mcmc"`` → one Markov chain from each candidate,
        ``"smc"`` → tempered sequential Monte Carlo from the source; or :class:`~sb3_rfm.monte_carlo.MCMC` or
        :class:`~sb3_rfm.monte_carlo.SMC` for other than their defaults
    :raises ValueError: for arguments out of range

    The control variate needs a target whose log-density is finite and continuous on all of R^D. For one with an edge, such as
    a box, Stein's identity has boundary terms, and only ``coefficient=0`` gives the posterior means.
    """

    def __init__(
        self,
        path: str | Path = "cond_ot",
        n_candidates: int = 32,
        coefficient: Coefficient = "optimal",
        source: str | Source | Distribution = "gaussian",
        data_scale: float | None = None,
        guess_spread: float = 0.75,
        points: PointSet = "independent",
        method: str | Method = "snis",
    ) -> None:
        check_integer("n_candidates", n_candidates, 1)
        if data_scale is not None and not (is_number(data_scale) and data_scale > 0):
            raise ValueError(f"data_scale must be a positive number or None, got {data_scale!r}.")
        if not (is_number(guess_spread) and guess_spread > 0):
            raise ValueError(f"guess_spread must be a positive number, got {guess_spread!r}.")
        if points not in ("independent", "antithetic", "sobol"):
            raise ValueError(f"Unknown points {points!r}: expected 'independent', 'antithetic' or 'sobol'.")
        self.path = get_path(path)
        self.n_candidates = int(n_candidates)
        self.coefficient = check_coefficient(coefficient)
        self.source = get_source(source)
        self.data_scale = data_scale
        self.guess_spread = guess_spread
        self.points: PointSet = points
        self.method = get_method(method)
        if isinstance(self.method, SMC) and data_scale is not None:
            raise ValueError("Sequential Monte Carlo starts from the source: data_scale must be None with method='smc'.")

    @property
    def needs_gradient(self) -> bool:
        """Whether the estimate uses ``grad log p1`` at all."""
        return self.coefficient != 0.0 or self.method is not None

    def __call__(
        self,
        log_prob: LogProb,
        x_t: Tensor,
        t: Tensor,
        generator: torch.Generator | None = None,
        guess: Tensor | None = None,
    ) -> PosteriorMean:
        """Estimate at ``x_t``.

        :param log_prob: Unnormalised log p1, (B, K, D) → (B, K), each candidate's value depending on that candidate alone;
            differentiable, unless the coefficient is 0 and the method ``"snis"``. Its dtype may be wider than that of ``x_t``.
            A value that is not finite counts as a density of zero
        :param x_t: (B, D)
        :param t: (B,), strictly between 0 and 1
        :param generator: Source of the candidates' randomness
        :param guess: A guess of the data mean, (B, D), around which half of the candidates are drawn (antithetic ones in
            pairs: none of fewer than four)
        :return: :class:`PosteriorMean`; no gradient of anything passes through it
        :raises ValueError: for wrong shapes and values, or where no candidate of some row has a finite log-density and
            gradient
        """
        self._check_inputs(x_t, t, guess)
        constant: Tensor | None = None

        def checked_log_prob(x_1: Tensor) -> Tensor:
            nonlocal constant
            log_p: Any = log_prob(x_1)
            returned = tuple(log_p.shape) if isinstance(log_p, Tensor) else type(log_p).__name__
            if returned != x_1.shape[:2]:
                raise ValueError(f"log_prob must map (B, K, D) to (B, K): given {tuple(x_1.shape)} it returned {returned}.")
            if not log_p.is_floating_point():
                raise ValueError(f"log_prob must return floating-point numbers, got {log_p.dtype}.")
            if x_1.requires_grad and not log_p.requires_grad:
                raise ValueError(NOT_DIFFERENTIABLE)
            if constant is None:  # what is left is small, and loses no digits in the precision of x_t
                finite = log_p.detach().masked_fill(~torch.isfinite(log_p), -torch.inf).amax(1, keepdim=True)
                constant = torch.where(torch.isfinite(finite), finite, 0.0)
            return log_p - constant

        self.source = self.source.to(x_t.device)
        with torch.no_grad():
            candidates = self.draw(x_t, t, generator, guess)
            result = self.estimate(checked_log_prob, x_t, t, candidates, generator)
        hopeless = torch.isnan(result.ess)
        if hopeless.any():
            rows = hopeless.nonzero().flatten().tolist()
            what = "log_prob or its gradient" if self.needs_gradient else "log_prob"
            x_1 = self.path.data_from_noise(candidates.x_0, x_t[:, None], t)[rows]
            raise ValueError(
                f"{what} is not finite at any of the {self.n_candidates} candidates of rows {rows[:8]}. The candidates for "
                f"the data lie between {x_1.min():.3g} and {x_1.max():.3g} there; data_scale or a guess moves them."
            )
        return result

    def draw(
        self, x_t: Tensor, t: Tensor, generator: torch.Generator | None = None, guess: Tensor | None = None
    ) -> Candidates:
        """Draw candidates for the hidden noise.

        :param x_t: (B, D)
        :param t: (B,)
        :param generator: Source of randomness
        :param guess: (B, D), see :meth:`__call__`
        """
        return draw_candidates(
            self.path,
            self.source,
            self.n_candidates,
            x_t,
            t,
            data_scale=self.data_scale,
            guess=guess,
            guess_spread=self.guess_spread,
            points=self.points,
            generator=generator,
        )

    def estimate(
        self,
        log_prob: LogProb,
        x_t: Tensor,
        t: Tensor,
        candidates: Candidates,
        generator: torch.Generator | None = None,
    ) -> PosteriorMean:
        """The estimate from given candidates: the unchecked function behind :meth:`__call__`.

        With ``method="snis"`` it is a pure function that ``torch.compile(fullgraph=True)`` accepts; rows without a valid
        candidate come out as not-a-number.

        :param log_prob: (B, K, D) → (B, K)
        :param x_t: (B, D)
        :param t: (B,)
        :param candidates: Draws of the noise, with their density ratio
        :param generator: Source of the moves' randomness (MCMC and SMC)
        """
        average = self._average(log_prob, x_t, t, candidates, generator)
        _, variance_0 = self.source.moments(x_t)
        coefficient = self._coefficient(average, average.x_0, variance_0)
        corrected = average.x_0 + coefficient[:, None] * average.stein
        mean_0 = weighted_mean(average.weights, corrected)
        mean_1 = self.path.data_from_noise(mean_0, x_t, t)
        variance, plain_variance = (variance_of_mean(average.weights, values) for values in (corrected, average.x_0))
        return PosteriorMean(
            x0=mean_0,
            x1=mean_1,
            velocity=self.path.velocity(mean_0, mean_1, t),
            score=self._score(average, mean_0, t),
            ess=average.ess,
            coefficient=coefficient,
            variance_ratio=torch.where(plain_variance > 1e-30, variance / plain_variance, 1.0),
        )

    def _average(
        self, log_prob: LogProb, x_t: Tensor, t: Tensor, candidates: Candidates, generator: torch.Generator | None
    ) -> "_Average":
        """What is averaged, by the method of choice."""

        def likelihood(x_0: Tensor) -> tuple[Tensor, Tensor]:
            x_1 = self.path.data_from_noise(x_0, x_t[:, None], t)
            if not self.needs_gradient:
                with torch.no_grad():
                    return log_prob(x_1).to(x_1.dtype), torch.zeros_like(x_1)
            log_p1, score_1 = value_and_gradient(log_prob, x_1)
            return log_p1.to(x_1.dtype), -(self.path.sigma(t) / self.path.alpha(t))[:, None, None] * score_1

        def prior(x_0: Tensor) -> tuple[Tensor, Tensor]:
            return self.source.log_prob(x_0), self.source.score(x_0)

        def posterior(x_0: Tensor) -> tuple[Tensor, Tensor]:
            (log_p0, score_0), (log_p1, score_1) = prior(x_0), likelihood(x_0)
            return log_p0 + log_p1, score_0 + score_1

        x_0 = candidates.x_0
        log_ratio = torch.zeros_like(x_0[..., 0]) if candidates.log_ratio is None else candidates.log_ratio
        if isinstance(self.method, MCMC):
            log_r = self.source.log_prob(x_0) - log_ratio
            states, scores, ess = run_chains(self.method, posterior, x_0, log_r, generator)
            source_score = self.source.score(states).mean(0)
            weights = torch.full_like(log_ratio, 1 / log_ratio.shape[1])
            valid = torch.ones_like(weights, dtype=torch.bool)
            return _Average(weights, states.mean(0), source_score, scores.mean(0), valid, ess)
        if isinstance(self.method, SMC):
            x_0, weights = run_smc(self.method, prior, likelihood, x_0, generator)
            source_score, (_, score) = self.source.score(x_0), likelihood(x_0)
            valid = torch.ones_like(weights, dtype=torch.bool)
            return _Average(weights, x_0, source_score, source_score + score, valid, effective_sample_size(weights))
        log_p1, score = likelihood(x_0)
        weights, valid = importance_weights(log_p1 + log_ratio, score)
        invalid = ~valid.unsqueeze(-1)
        source_score = self.source.score(x_0).masked_fill(invalid, 0.0)
        stein = (source_score + score).masked_fill(invalid, 0.0)
        return _Average(weights, x_0, source_score, stein, valid, effective_sample_size(weights))

    def _coefficient(self, average: "_Average", values: Tensor, upper: float | Tensor = 1.0) -> Tensor:
        """Coefficient for the values ``f``, (B, K, D) → (B, D)."""
        return fit(self.coefficient, average.weights, values, average.stein, average.valid, upper)

    def _score(self, average: "_Average", mean_0: Tensor, t: Tensor) -> Tensor:
        """``grad log p_t = E[grad log p0(x_0) | x_t] / sigma``, with its own control variate (reverse score matching).

        ``grad log p0 - c s_0`` runs from ``grad log p0`` (c = 0) to ``(sigma / alpha) grad log p1`` (c = 1). A ``Lambda`` that
        is a number is the variance of the source at that end: with ``c = Lambda / variance``, noise mean and score of a
        Gaussian source are one estimate.
        """
        sigma = self.path.sigma(t)[:, None]
        if isinstance(self.source, GaussianSource):
            return -mean_0 / sigma
        values = -average.source_score
        _, variance_0 = self.source.moments(mean_0)
        if isinstance(self.coefficient, str):
            coefficient = self._coefficient(average, values, 1.0)
        else:
            coefficient = self._coefficient(average, values) / variance_0
        return -weighted_mean(average.weights, values + coefficient[:, None] * average.stein) / sigma

    def _check_inputs(self, x_t: Tensor, t: Tensor, guess: Tensor | None) -> None:
        check_points(x_t, t, guess)
        if isinstance(self.coefficient, tuple) and len(self.coefficient) != x_t.shape[1]:
            raise ValueError(
                f"coefficient has {len(self.coefficient)} entries, but x_t has dimension {x_t.shape[1]}; "
                "give one number, or one for each dimension."
            )
        if guess is not None and isinstance(self.method, SMC):
            raise ValueError("Sequential Monte Carlo starts from the source: guess must be None with method='smc'.")


class _Average(NamedTuple):
    """What is averaged: one value for each candidate, chain or particle."""

    weights: Tensor
    """Normalised, (B, K)"""
    x_0: Tensor
    """Noise, (B, K, D)"""
    source_score: Tensor
    """``grad log p0``, (B, K, D)"""
    stein: Tensor
    """Score of the noise posterior, whose mean is zero, (B, K, D)"""
    valid: Tensor
    """Whether density and score were finite, (B, K)"""
    ess: Tensor
    """Effective sample size, (B,)"""


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
        guess: Tensor | None = None,
    ) -> tuple[Tensor, PosteriorMean]:
        """The loss at ``x_t``.

        :param model: ``model(x_t, t)``, (B, D), (B,) → (B, D)
        :param log_prob: Unnormalised log p1, (B, K, D) → (B, K)
        :param x_t: (B, D)
        :param t: (B,)
        :param generator: Source of the candidates' randomness
        :param guess: A guess of the data mean, (B, D), see :meth:`PosteriorMeanEstimator.__call__`
        :return: Scalar loss (mean over the batch of the squared error), and the estimate with its diagnostics
        :raises ValueError: for a model whose output has another shape than ``x_t``, and as the estimator does
        """
        result = self.estimator(log_prob, x_t, t, generator, guess)
        target, prediction = getattr(result, self.field), model(x_t, t)
        if prediction.shape != target.shape:  # they might broadcast
            shapes = f"given {tuple(x_t.shape)} and {tuple(t.shape)} it returned {tuple(prediction.shape)}"
            raise ValueError(f"model must map (B, D) and (B,) to (B, D): {shapes}.")
        return (prediction - target.detach()).square().sum(-1).mean(), result


def value_and_gradient(log_prob: LogProb, x: Tensor) -> tuple[Tensor, Tensor]:
    """``log_prob`` and its gradient with respect to ``x`` alone; no gradient of any parameter is computed.

    :param x: (..., D)
    :return: (...) and (..., D)
    :raises ValueError: for a ``log_prob`` that does not depend on its argument
    """
    if torch.compiler.is_compiling():
        # The functional form may be compiled as a part of a loss; eager code takes the one that any log_prob supports.
        with torch.no_grad():
            value, pull_back, *_ = torch.func.vjp(log_prob, x.detach())
            (gradient,) = pull_back(torch.ones_like(value))
        return value, gradient
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_(True)  # a clone, as one made in inference mode cannot have a gradient
        value = log_prob(x)
        (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
    if gradient is None:
        raise ValueError(NOT_DIFFERENTIABLE)
    return value.detach(), gradient
