"""Stein control variates: averages of zero mean that cancel the error of a weighted average.

Let candidates ``k`` carry normalised weights ``W_k``, values ``f_k`` and a *Stein score* ``s_k`` whose mean under the target
is known to be zero (Stein's identity with a constant test function). Then, for every coefficient ``c``,

    sum_k W_k f_k + c * sum_k W_k s_k

estimates the same expectation. This module chooses ``c``: by least asymptotic variance, which is

    c = - sum_k W_k^2 (f_k - m) . (s_k - g) / sum_k W_k^2 |s_k - g|^2,      m = sum W f,  g = sum W s,

and by the rule behind ``coefficient="optimal"``, which keeps to it only as far as the candidates support it. With few
candidates the first can be far off; yet on trained critics it has the smaller bias, and that is what a regression keeps of an
error.

Sources: Li, Tang & Azizan, Reverse Flow Matching (arXiv 2601.08136), section 4; Oates, Girolami & Chopin, Control functionals
(arXiv 1410.2392); Owen, Monte Carlo theory, methods and examples, chapter 9 (variance of self-normalised averages); Efron &
Stein, The jackknife estimate of variance (1981).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Coefficient = str | float | Sequence[float]
"""``"optimal"``, ``"scalar"``, ``"diagonal"``, a number, or one number for each dimension."""


def weighted_mean(weights: Tensor, values: Tensor) -> Tensor:
    """``sum_k W_k f_k``: (B, K), (B, K, D) → (B, D)."""
    return (weights.unsqueeze(-1) * values).sum(1)


def variance_of_mean(weights: Tensor, values: Tensor) -> Tensor:
    """Delta-method variance of a self-normalised mean, summed over dimensions: (B, K), (B, K, D) → (B,); Owen, eq. 9.10."""
    deviation = _deviation(weights, _from_heaviest(weights, values))
    return (weights.unsqueeze(-1) * deviation).square().sum((1, 2))


def check_coefficient(coefficient: Coefficient) -> str | float | tuple[float, ...]:
    """Normalise and validate a control-variate coefficient.

    :raises ValueError: unless it is ``"optimal"``, ``"scalar"``, ``"diagonal"``, a finite number or a sequence of such
    """
    if isinstance(coefficient, str):
        if coefficient not in ("optimal", "scalar", "diagonal"):
            raise ValueError(
                f"Unknown coefficient {coefficient!r}: expected 'optimal', 'scalar', 'diagonal', a number or a sequence."
            )
        return coefficient
    try:
        value = torch.as_tensor(coefficient, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"coefficient must be 'optimal', a number or one number per dimension, got {coefficient!r}."
        ) from error
    if value.dim() > 1 or value.numel() == 0 or not bool(torch.isfinite(value).all()):
        raise ValueError(f"coefficient must be 'optimal', a finite number or one per dimension, got {coefficient!r}.")
    return float(value) if value.dim() == 0 else tuple(value.tolist())


def fit(
    coefficient: str | float | tuple[float, ...],
    weights: Tensor,
    values: Tensor,
    stein: Tensor,
    valid: Tensor,
    upper: float | Tensor = 1.0,
) -> Tensor:
    """The coefficient that was asked for; one that is fitted is within [0, ``upper``].

    :param coefficient: Result of :func:`check_coefficient`
    :param weights: Normalised weights, (B, K)
    :param values: ``f``, (B, K, D)
    :param stein: ``s``, (B, K, D), with mean zero under the target
    :param valid: See :func:`fit_robust`
    :param upper: See :func:`fit_robust`
    :return: ``c``, (B, D)
    """
    if isinstance(coefficient, float):
        return torch.full_like(values[:, 0], coefficient)
    if isinstance(coefficient, tuple):
        return torch.tensor(coefficient, dtype=values.dtype, device=values.device).expand_as(values[:, 0])
    if coefficient == "optimal":
        return fit_robust(weights, values, stein, valid, upper)
    if coefficient == "scalar":
        return _between_ends(fit_scalar(weights, values, stein).unsqueeze(1).expand_as(values[:, 0]), upper)
    return _between_ends(fit_diagonal(weights, values, stein), upper)


def fit_scalar(weights: Tensor, values: Tensor, stein: Tensor) -> Tensor:
    """The scalar of least asymptotic variance.

    The weights enter squared: this is the variance of a self-normalised average. ``s`` is centred although its mean is known,
    which makes the fit exact, whatever the candidates, where ``f + c s`` is constant (isotropic Gaussian targets).

    :param weights: Normalised weights, (B, K)
    :param values: ``f``, (B, K, D)
    :param stein: ``s``, (B, K, D), with mean zero under the target
    :return: ``c``, (B,); 0 where the candidates carry no information about it
    """
    covariance, variance, _ = _second_moments(weights, _from_heaviest(weights, values), _from_heaviest(weights, stein))
    return _ratio(-covariance.sum(-1), variance.sum(-1))


def fit_diagonal(weights: Tensor, values: Tensor, stein: Tensor) -> Tensor:
    """The coefficient of least asymptotic variance in each dimension; shapes as in :func:`fit_scalar`.

    :return: ``c``, (B, D)
    """
    covariance, variance, _ = _second_moments(weights, _from_heaviest(weights, values), _from_heaviest(weights, stein))
    return _ratio(-covariance, variance)


def fit_robust(weights: Tensor, values: Tensor, stein: Tensor, valid: Tensor, upper: float | Tensor = 1.0) -> Tensor:
    """The diagonal behind ``coefficient="optimal"``: the smallest of three that each err in another way.

    1. The fit with the candidates' weights, shrunk: right where many candidates count, and noise where one or two do.
    2. The fit with equal weights, an ordinary regression of ``f`` on ``s`` over all candidates, shrunk likewise. It is small
       where the target is far from Gaussian on the scale on which the candidates lie, and there (1) extrapolates.
    3. A bound on the correction's length: the root of the candidates' weighted variance plus the jackknife variance of their
       mean, which is how far from the mean a further draw would be expected. It matters most where (1) and (2) agree by
       accident because all candidates lie on one side of the target.

    Shrinking multiplies a fit by its squared signal over squared signal plus squared standard error (:func:`_shrink`). All
    three allow the exact coefficient where the target is an isotropic Gaussian, for which one candidate knows as much as all,
    but for (3) wherever the mean happens to be off by more than that length: often, with few candidates or a target far from
    them. The result is within [0, ``upper``] and does not
    depend on the candidates' order.

    :param weights: Normalised weights, (B, K)
    :param values: ``f``, (B, K, D)
    :param stein: ``s``, (B, K, D), with mean zero under the target
    :param valid: Candidates with finite density and score, (B, K)
    :param upper: The coefficient that leaves nothing but gradients, a number or (D,); 1 in noise coordinates with a standard
        Gaussian source
    :return: ``c``, (B, D)
    """
    mean_stein = weighted_mean(weights, stein)
    values, stein = _from_heaviest(weights, values), _from_heaviest(weights, stein)
    equal = valid.to(weights) / valid.sum(1, keepdim=True).clamp(min=1)
    fitted = torch.minimum(_shrink(weights, values, stein, upper), _shrink(equal, values, stein, upper))

    # Leaving out candidate k moves the mean by W_k / (1 - W_k) times its deviation: if it is the only one that counts, to the
    # mean of the others, however little they weigh. Where they weigh nothing at all, it is as if there were no others: all
    # deviations that count are 0, the fit with these weights knows nothing, and the coefficient is 0.
    deviation, influence = _deviation(weights, values), weights / _positive(_others(weights))
    moved = influence.unsqueeze(-1) * deviation
    length = (weights * deviation.square().sum(-1) + moved.square().sum(-1)).sum(1).sqrt()
    correction = (fitted * mean_stein).square().sum(-1).sqrt()
    return fitted * torch.nan_to_num(length / _positive(correction), nan=0.0).clamp(max=1).unsqueeze(1)


def _shrink(weights: Tensor, values: Tensor, stein: Tensor, upper: float | Tensor) -> Tensor:
    """:func:`fit_scalar`, and then :func:`fit_diagonal` to what it leaves, within [0, upper], each shrunk by its uncertainty.

    Of the degrees of freedom, each effective candidate but the first brings one for each dimension, and each slope takes one;
    that which all dimensions have in common is already taken when they get one each. Candidates enter by ``W^2``, so their
    effective number is that of squared weights; two always count, the heaviest and the next.
    """
    squared, dim = weights.square(), values.shape[-1]
    covariance, variance, spread = _second_moments(weights, values, stein)
    n_effective = squared.sum(1, keepdim=True).square() / _positive(squared.square().sum(1, keepdim=True))
    n_free = (n_effective - 1).clamp(min=1)

    common = _shrunk_coefficient(
        covariance.sum(-1, keepdim=True), variance.sum(-1, keepdim=True), spread.sum(-1, keepdim=True), dim * n_free - 1
    )
    common = _between_ends(common, upper)
    # The same moments of f + common * s. A perfect fit to two candidates proves nothing, hence the last factor.
    covariance, spread = covariance + common * variance, spread + 2 * common * covariance + common.square() * variance
    freedom = (dim - 1) / dim * (n_free - 1)
    own = _shrunk_coefficient(covariance, variance, spread, freedom) * freedom / (1 + freedom)
    return _between_ends(common + own, upper)


def _shrunk_coefficient(covariance: Tensor, variance: Tensor, spread: Tensor, freedom: Tensor) -> Tensor:
    """Coefficient of least variance, minus the slope of a regression of ``f`` on ``s``, shrunk by its own uncertainty.

    A regression with coefficient of determination ``R^2`` and ``nu`` degrees of freedom knows its slope to a relative squared
    error of ``(1 - R^2) / (R^2 nu)``; the slope of least expected squared error is the fitted one over one plus that.

    :param covariance: Of ``f`` and ``s``
    :param variance: Of ``s``
    :param spread: Variance of ``f``
    :param freedom: ``nu``
    """
    # The ratio of one root at a time: the product of both variances may overflow.
    correlation = _ratio(_ratio(covariance, variance.sqrt()), spread.sqrt())
    determination = correlation.square().clamp(max=1)
    shrinkage = determination / _positive(determination + (1 - determination) / freedom.clamp(min=1e-3))
    return shrinkage * _ratio(-covariance, variance)


def _between_ends(coefficient: Tensor, upper: float | Tensor) -> Tensor:
    """A coefficient within [0, upper]: from values alone to gradients alone; (B, D) or (B, 1), and a number or (D,)."""
    if isinstance(upper, Tensor):
        return coefficient.clamp(torch.zeros_like(upper), upper)
    return coefficient.clamp(0.0, upper)


def _second_moments(weights: Tensor, values: Tensor, stein: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance of ``f`` and ``s``, variance of ``s`` and variance of ``f``, under squared weights, each (B, D).

    Weights are relative to those of all but the heaviest candidate, with whose squares the moments would vanish.
    """
    relative = (weights / _positive(_others(weights).amin(1, keepdim=True))).unsqueeze(-1)
    values, stein = relative * _deviation(weights, values), relative * _deviation(weights, stein)
    return (values * stein).sum(1), stein.square().sum(1), values.square().sum(1)


def _from_heaviest(weights: Tensor, values: Tensor) -> Tensor:
    """Values measured from those of the heaviest candidate: (B, K), (B, K, D) → (B, K, D).

    Where it has nearly all the weight, the mean differs from it by less than rounding. No deviation depends on where values
    are measured from.
    """
    return values - torch.take_along_dim(values, weights.argmax(1)[:, None, None], 1)


def _deviation(weights: Tensor, values: Tensor) -> Tensor:
    """``f_k - sum_j W_j f_j`` of values :func:`_from_heaviest`: (B, K), (B, K, D) → (B, K, D)."""
    return values - weighted_mean(weights, values).unsqueeze(1)


def _others(weights: Tensor) -> Tensor:
    """``1 - W_k``, what all others weigh, also where ``W_k`` rounds to 1: (B, K) → (B, K)."""
    has_most = _has_most(weights)
    return torch.where(has_most, weights.masked_fill(has_most, 0.0).sum(1, keepdim=True), 1 - weights)


def _has_most(weights: Tensor) -> Tensor:
    """Which candidate, at most one of a row, outweighs all others together: (B, K) → (B, K)."""
    return weights > 0.5


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """A ratio that is 0 where it is undefined, through lack of information or overflow."""
    return torch.nan_to_num(numerator / _positive(denominator), nan=0.0, posinf=0.0, neginf=0.0)


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)
