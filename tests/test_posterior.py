"""The posterior-mean estimator against closed forms, quadrature and torch.distributions.

Algebra is checked in float64 to rounding; Monte Carlo by z-scores, |z| < 4.5, at fixed seeds.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from test_paths import Polynomial
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Categorical,
    Distribution,
    Gumbel,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    TransformedDistribution,
)

from sb3_rfm import control_variates
from sb3_rfm.benchmark import densities, estimator_errors
from sb3_rfm.candidates import Candidates, PointSet, draw_candidates
from sb3_rfm.control_variates import fit_diagonal, fit_robust, fit_scalar, weighted_mean
from sb3_rfm.monte_carlo import MCMC, SMC, _next_temper, effective_sample_size
from sb3_rfm.paths import PATHS, LinearVPPath, Path, get_path
from sb3_rfm.posterior import PosteriorMean, PosteriorMeanEstimator, ReverseFlowMatchingLoss
from sb3_rfm.sources import get_source

LogProb = Callable[[Tensor], Tensor]
COEFFICIENTS: list[str | float] = [0.0, 1.0, "optimal", "scalar", "diagonal"]
METHODS = ["snis", "mcmc", "smc"]


def gaussian(precision: float, mean: float) -> LogProb:
    return lambda x: -0.5 * precision * (x - mean).square().sum(-1)


def times(t: float, n: int) -> Tensor:
    return torch.full((n,), t, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Mixture:
    """A Gaussian mixture and its posterior means in closed form (Gaussian source)."""

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor) -> None:
        self.weights, self.means, self.stds = weights.double(), means.double(), stds.double()
        scale = self.stds[:, None].expand_as(self.means)
        self.distribution = MixtureSameFamily(Categorical(self.weights), Independent(Normal(self.means, scale), 1))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.distribution.log_prob(x)

    def data_mean(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        variance = alpha**2 * self.stds**2 + sigma**2
        offset = x_t[:, None] - alpha * self.means
        log_density = self.weights.log() - 0.5 * offset.square().sum(-1) / variance - 0.5 * x_t.shape[1] * variance.log()
        component = self.means + (alpha * self.stds**2 / variance)[:, None] * offset
        return weighted_mean(torch.softmax(log_density, 1), component)


MIXTURE = Mixture(
    torch.tensor([0.5, 0.2, 0.3]),
    torch.tensor([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]]),
    torch.tensor([0.4, 0.7, 0.5]),
)


def z_scores(errors: Tensor) -> Tensor:
    """Mean over standard error, in each dimension: (N, D) → (D,)."""
    return errors.mean(0) / (errors.std(0) / math.sqrt(len(errors)))


# Closed forms


@pytest.mark.parametrize("name", sorted(PATHS))
@pytest.mark.parametrize("coefficient", ["exact", "scalar", "diagonal"])
def test_gaussian_targets_leave_no_variance(name: str, coefficient: str) -> None:
    """THEORY: with Lambda = 1 / (1 + kappa sigma^2 / alpha^2) every candidate gives the posterior mean; the fits find it."""
    path, precision, mean = get_path(name), 2.3, 0.7
    x_t, t = normal(6, 3), times(0.8, 6)
    alpha, sigma = float(path.alpha(t[0])), float(path.sigma(t[0]))
    exact = 1 / (1 + precision * sigma**2 / alpha**2)
    estimator = PosteriorMeanEstimator(path, 2, exact if coefficient == "exact" else coefficient)
    result = estimator(gaussian(precision, mean), x_t, t, torch.Generator().manual_seed(1))
    posterior_precision = precision + alpha**2 / sigma**2
    expected = (precision * mean + alpha * x_t / sigma**2) / posterior_precision
    torch.testing.assert_close(result.x1, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(result.coefficient, torch.full_like(x_t, exact), rtol=1e-7, atol=1e-9)


def test_the_optimal_coefficient_is_exact_on_gaussians_with_enough_candidates() -> None:
    estimator = PosteriorMeanEstimator("cond_ot", 64, coefficient="optimal")
    x_t, t = normal(50, 3), times(0.8, 50)
    result = estimator(gaussian(2.0, 0.5), x_t, t, torch.Generator().manual_seed(1))
    torch.testing.assert_close(result.coefficient, torch.full_like(x_t, 1 / (1 + 2.0 * (0.2 / 0.8) ** 2)), rtol=1e-8, atol=0)


def test_it_is_exact_for_sources_of_another_variance_too() -> None:
    """The coefficient that leaves no noise grows with the source's variance v: v / (1 + kappa v sigma^2 / alpha^2) > 1."""
    x_t, t = normal(50, 3), times(0.8, 50)
    estimator = PosteriorMeanEstimator("cond_ot", 64, source=Normal(0.0, 2.0))
    result = estimator(gaussian(2.0, 0.5), x_t, t, torch.Generator().manual_seed(1))
    exact = 4 / (1 + 2.0 * 4 * (0.2 / 0.8) ** 2)
    score = -(x_t - 0.8 * 0.5) / (0.8**2 / 2.0 + 0.2**2 * 4)
    for value, truth in ((result.coefficient, exact), (result.score, score)):  # where the bound on the length allows it
        assert ((value - truth).abs() < 1e-8).double().mean() > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_chains_and_particles_are_exact_on_gaussians_too(method: str) -> None:
    estimator = PosteriorMeanEstimator("cosine", 4, "scalar", method=method)
    x_t, t = normal(5, 2), times(0.4, 5)
    result = estimator(gaussian(3.0, -0.5), x_t, t, torch.Generator().manual_seed(1))
    path = get_path("cosine")
    alpha, sigma = float(path.alpha(t[0])), float(path.sigma(t[0]))
    expected = (3.0 * -0.5 + alpha * x_t / sigma**2) / (3.0 + alpha**2 / sigma**2)
    torch.testing.assert_close(result.x1, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", sorted(PATHS))
@pytest.mark.parametrize("coefficient", [0.0, 1.0, "optimal", (0.3, 0.8), "scalar", "diagonal"], ids=str)
def test_all_coefficients_share_the_closed_form_expectation(name: str, coefficient: object) -> None:
    path = get_path(name)
    t_value = 0.8 if name == "linear_vp" else 0.6
    x_t = torch.tensor([[0.3, -0.4]], dtype=torch.float64).expand(200, 2)
    t = times(t_value, 200)
    alpha, sigma = float(path.alpha(t[0])), float(path.sigma(t[0]))
    truth = MIXTURE.data_mean(x_t[:1], alpha, sigma)
    estimator = PosteriorMeanEstimator(path, 1000, coefficient)  # type: ignore[arg-type]
    result = estimator(MIXTURE.log_prob, x_t, t, torch.Generator().manual_seed(2))
    assert (z_scores(result.x1 - truth).abs() < 4.5).all()


@pytest.mark.parametrize(
    "method", [MCMC(n_steps=80), MCMC(n_steps=40, n_leapfrog=5), SMC(n_moves=8)], ids=["mala", "hmc", "smc"]
)
@pytest.mark.parametrize("coefficient", [0.0, 1.0, (0.3, 0.8), "scalar", "diagonal", "optimal"], ids=str)
def test_chains_and_particles_share_it_as_well(method: MCMC | SMC, coefficient: str | float | tuple[float, ...]) -> None:
    x_t, t = torch.tensor([[0.3, -0.4]], dtype=torch.float64).expand(60, 2), times(0.6, 60)
    truth = MIXTURE.data_mean(x_t[:1], 0.6, 0.4)
    estimator = PosteriorMeanEstimator("cond_ot", 64, coefficient, method=method)
    result = estimator(MIXTURE.log_prob, x_t, t, torch.Generator().manual_seed(3))
    assert (z_scores(result.x1 - truth).abs() < 4.5).all()
    assert (result.x1 - truth).square().mean() < 0.01
    assert ((result.ess >= 1) & (result.ess <= 64 * 40)).all()


def test_particles_reach_in_steps_what_weights_alone_do_not() -> None:
    """A target far narrower than the candidates: a few of them carry all the weight, and tempering takes several steps."""
    narrow = Mixture(torch.tensor([0.6, 0.4]), torch.tensor([[0.2, 0.1, -0.3], [-0.1, 0.1, 0.2]]), torch.tensor([0.1, 0.15]))
    x_t, t = torch.tensor([[0.1, 0.2, -0.1]]).double().expand(60, 3), times(0.3, 60)
    truth = narrow.data_mean(x_t[:1], 0.3, 0.7)
    weights, particles = (
        PosteriorMeanEstimator("cond_ot", 256, 0.0, method=method)(narrow.log_prob, x_t, t, torch.Generator().manual_seed(0))
        for method in ("snis", SMC(n_moves=8))
    )
    assert weights.ess.median() < 8  # less than half of 256, a step of tempering, by far
    assert (z_scores(particles.x1 - truth).abs() < 4.5).all()
    assert (particles.x1 - truth).square().mean() < 0.5 * (weights.x1 - truth).square().mean()


def test_chains_start_where_the_posterior_is_and_not_where_candidates_are() -> None:
    """Chains do not cross between modes this far apart: their shares are those of the weights, whatever the guess."""
    apart = Mixture(torch.tensor([0.8, 0.2]), torch.tensor([[-4.0], [4.0]]), torch.tensor([0.3, 0.3]))
    x_t, t = torch.zeros(60, 1, dtype=torch.float64), times(0.2, 60)
    truth = apart.data_mean(x_t[:1], 0.2, 0.8)
    estimator = PosteriorMeanEstimator("cond_ot", 128, 0.0, data_scale=4.0, method=MCMC(n_steps=6))
    result = estimator(apart.log_prob, x_t, t, torch.Generator().manual_seed(0), guess=torch.full_like(x_t, 4.0))
    assert z_scores(result.x1 - truth).abs() < 4.5
    assert (result.x1 - truth).abs().mean() < 1


@pytest.mark.parametrize(
    "kwargs", [{"data_scale": 1.0}, {"data_scale": 2.0}, {"points": "antithetic"}, {"points": "sobol"}], ids=str
)
def test_all_candidates_share_it_as_well(kwargs: dict[str, object]) -> None:
    x_t, t = torch.tensor([[0.3, -0.4]], dtype=torch.float64).expand(200, 2), times(0.5, 200)
    truth = MIXTURE.data_mean(x_t[:1], 0.5, 0.5)
    estimator = PosteriorMeanEstimator("cond_ot", 1000, 0.0, **kwargs)  # type: ignore[arg-type]
    result = estimator(MIXTURE.log_prob, x_t, t, torch.Generator().manual_seed(2))
    assert (z_scores(result.x1 - truth).abs() < 4.5).all()


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("spread", [0.3, 1.0])
@pytest.mark.parametrize("points", ["independent", "antithetic", "sobol"])
def test_a_guess_good_or_bad_moves_no_expectation(offset: float, spread: float, points: PointSet) -> None:
    x_t, t = torch.tensor([[0.3, -0.4]], dtype=torch.float64).expand(200, 2), times(0.3, 200)
    truth = MIXTURE.data_mean(x_t[:1], 0.3, 0.7)
    estimator = PosteriorMeanEstimator("cond_ot", 1500, 0.0, data_scale=1.0, guess_spread=spread, points=points)
    result = estimator(MIXTURE.log_prob, x_t, t, torch.Generator().manual_seed(2), guess=(truth + offset).expand(200, 2))
    assert (z_scores(result.x1 - truth).abs() < 4.5).all()


def test_localised_candidates_find_what_the_source_misses() -> None:
    narrow = Mixture(torch.ones(1), torch.tensor([[0.3, -0.5, 0.8, 0.1]]), torch.tensor([0.1]))
    x_t = 0.1 * narrow.means + 0.9 * normal(100, 4)
    t = times(0.1, 100)
    truth = narrow.data_mean(x_t, 0.1, 0.9)

    def error(data_scale: float | None, guess: Tensor | None) -> float:
        estimator = PosteriorMeanEstimator("cond_ot", 16, 0.0, data_scale=data_scale, guess_spread=0.3)
        result = estimator(narrow.log_prob, x_t, t, torch.Generator().manual_seed(0), guess)
        return float((result.x1 - truth).square().sum(-1).mean())

    assert error(1.0, None) < 0.1 * error(None, None)
    assert error(1.0, truth + 0.1 * normal(100, 4, seed=1)) < 0.5 * error(1.0, None)


@pytest.mark.parametrize("points", ["independent", "antithetic", "sobol"])
def test_localised_candidates_are_draws_of_a_gaussian_posterior(points: str) -> None:
    """Where source and target are Gaussian, whatever their means and variances, all weights are equal."""
    x_t, t = normal(6, 3), torch.linspace(0.1, 0.95, 6, dtype=torch.float64)
    estimator = PosteriorMeanEstimator(
        "cosine",
        16,
        0.0,
        source=Normal(1.5, 2.0),
        data_scale=0.7,
        points=points,  # type: ignore[arg-type]
    )
    result = estimator(gaussian(0.7**-2, 0.0), x_t, t, torch.Generator().manual_seed(0))
    torch.testing.assert_close(result.ess, torch.full_like(t, 16.0), rtol=1e-6, atol=0)


# Sources that are not Gaussian: quadrature in one dimension

SOURCES = {
    "laplace": Laplace(0.0, 1.0),
    "student": StudentT(5.0),
    "mixture": MixtureSameFamily(Categorical(torch.ones(2)), Normal(torch.tensor([-1.0, 1.5]), torch.tensor([0.6, 0.9]))),
}


@pytest.mark.parametrize("source", sorted(SOURCES))
@pytest.mark.parametrize("coefficient", [0.0, 1.0, "optimal"])
@pytest.mark.parametrize("t_value", [0.3, 0.7])
def test_any_source_by_quadrature(source: str, coefficient: str | float, t_value: float) -> None:
    """Mean of the noise, and the score of the path as the numerical derivative of its log-density (reverse score matching)."""
    p0, alpha, sigma = SOURCES[source], t_value, 1 - t_value

    def log_p1(x: Tensor) -> Tensor:
        return -(x**4) / 4 + x**2 + 0.3 * x

    grid = torch.linspace(-14, 14, 40_001, dtype=torch.float64)

    def moments(x_t: float) -> tuple[Tensor, Tensor]:
        log_q = p0.log_prob(grid) + log_p1((x_t - sigma * grid) / alpha)
        return log_q.logsumexp(0), (torch.softmax(log_q, 0) * grid).sum()

    h, at = 1e-4, 0.4
    score = (moments(at + h)[0] - moments(at - h)[0]) / (2 * h)
    x_t, t = torch.full((150, 1), at, dtype=torch.float64), times(t_value, 150)
    estimator = PosteriorMeanEstimator("cond_ot", 1500, coefficient, source=p0)
    result = estimator(lambda x: log_p1(x).sum(-1), x_t, t, torch.Generator().manual_seed(4))
    assert z_scores(result.x0 - moments(at)[1]).abs() < 4.5
    assert z_scores(result.score - score).abs() < 4.5
    assert (result.x0 - moments(at)[1]).abs().mean() < 0.2
    local = PosteriorMeanEstimator("cond_ot", 1500, coefficient, source=p0, data_scale=1.2)
    result = local(lambda x: log_p1(x).sum(-1), x_t, t, torch.Generator().manual_seed(4), guess=torch.full_like(x_t, 0.5))
    assert z_scores(result.x0 - moments(at)[1]).abs() < 4.5


def two_wells(x: Tensor) -> Tensor:
    """Log-density in one dimension, (..., 1) → (...)."""
    return (-(x**4) / 4 + x**2 + 0.3 * x).sum(-1)


@pytest.mark.parametrize("path", [*(cls() for cls in PATHS.values()), Polynomial()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("source", [Normal(0.0, 1.0), *SOURCES.values()], ids=["gaussian", *SOURCES])
def test_every_field_of_every_path_and_source_is_that_of_the_path_s_law(path: Path, source: Distribution) -> None:
    """With candidates on a grid, importance sampling is quadrature, and nothing is random.

    The truth knows nothing of posteriors. With F_0 that of the source, the law of x_t has the distribution function
    F(x, t) = E[F_0((x - alpha x_1) / sigma)]; from it, score = F'' / F', and velocity = -(dF/dt) / F' by the continuity
    equation. Data and noise means solve the path's two equations for position and velocity.
    """
    t_value = 0.75 if isinstance(path, LinearVPPath) else 0.6
    x_1 = torch.linspace(-5, 5, 20_001, dtype=torch.float64)
    p_1 = torch.softmax(two_wells(x_1[:, None]), 0)

    def distribution_function(x: float, t: float) -> float:
        at = torch.tensor(t, dtype=torch.float64)
        x_0 = (x - path.alpha(at) * x_1) / path.sigma(at)
        f_0 = torch.as_tensor(stats.t(5.0).cdf(x_0)) if isinstance(source, StudentT) else source.cdf(x_0)
        return float((p_1 * f_0).sum())

    x, h = 0.4, 1e-3
    f = {i: distribution_function(x + i * h, t_value) for i in (-2, -1, 0, 1, 2)}  # differences of fourth order
    density = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)
    slope = (16 * (f[1] + f[-1]) - (f[2] + f[-2]) - 30 * f[0]) / (12 * h**2)
    later, before = (distribution_function(x, t_value + d) for d in (1e-5, -1e-5))
    velocity = -(later - before) / 2e-5 / density

    x_t, t = torch.full((1, 1), x, dtype=torch.float64), times(t_value, 1)
    reach = float((abs(x) + 5 * path.alpha(t)) / path.sigma(t))  # covers x_1 from -5 to 5
    # Zero, where scores jump, is one of the nodes.
    x_0 = (torch.arange(-20_000, 20_001, dtype=torch.float64) / 20_000 * reach).view(1, -1, 1)
    p0, tolerance = get_source(source), 2e-5
    for coefficient in (0.0, 0.4, 1.0, (0.3,), "scalar", "diagonal", "optimal"):
        estimator = PosteriorMeanEstimator(path, source=p0, coefficient=coefficient)  # type: ignore[arg-type]
        result = estimator.estimate(two_wells, x_t, t, Candidates(x_0, p0.log_prob(x_0)))
        assert float(result.score) == pytest.approx(slope / density, rel=tolerance, abs=tolerance), coefficient
        assert float(result.velocity) == pytest.approx(velocity, rel=tolerance, abs=tolerance), coefficient
        for target, mean in (("data", result.x1), ("noise", result.x0)):
            known = path.convert(torch.full_like(x_t, velocity), x_t, t, source="velocity", target=target)  # type: ignore[arg-type]
            assert float(mean) == pytest.approx(float(known), rel=tolerance, abs=5 * tolerance), (coefficient, target)


@pytest.mark.parametrize("source", [Laplace(0.0, 1.0), SOURCES["mixture"]], ids=["laplace", "mixture"])
@pytest.mark.parametrize("method", [MCMC(n_steps=80), SMC(n_moves=8)], ids=["mcmc", "smc"])
@pytest.mark.parametrize("coefficient", [0.0, 1.0, "optimal"])
def test_chains_and_particles_know_any_source(source: Distribution, method: MCMC | SMC, coefficient: str | float) -> None:
    """Noise mean and score of the path, on a path that is not straight; for chains, with localised candidates too."""
    path, at, n = get_path("cosine"), 0.4, 100
    alpha, sigma = (float(f(torch.tensor(0.5))) for f in (path.alpha, path.sigma))
    grid = torch.linspace(-14, 14, 40_001, dtype=torch.float64)
    q = torch.softmax(source.log_prob(grid) + two_wells((at - sigma * grid[:, None]) / alpha), 0)
    score = (q * get_source(source).score(grid[:, None]).squeeze(1)).sum() / sigma
    x_t, t = torch.full((n, 1), at, dtype=torch.float64), times(0.5, n)
    for local in (False, True) if isinstance(method, MCMC) else (False,):
        estimator = PosteriorMeanEstimator(
            path, 64, coefficient, source=source, data_scale=0.8 if local else None, method=method
        )
        guess = torch.full_like(x_t, -2.0) if local else None
        result = estimator(two_wells, x_t, t, torch.Generator().manual_seed(3), guess)
        assert z_scores(result.x0 - (q * grid).sum()).abs() < 4.5
        assert z_scores(result.score - score).abs() < 4.5
        assert (result.x0 - (q * grid).sum()).abs().mean() < 0.25


@pytest.mark.parametrize("n_candidates", [2, 3, 7])
@pytest.mark.parametrize("points", ["independent", "antithetic"])
@pytest.mark.parametrize("source", [Normal(0.0, 1.0), *SOURCES.values()], ids=["gaussian", *SOURCES])
def test_candidates_around_a_guess_have_the_density_they_claim(
    source: Distribution, points: PointSet, n_candidates: int
) -> None:
    """``E_r[p0/r f] = E_p0[f]`` for each K, however the candidates are shared out; and p0/r is bounded (Hesterberg)."""
    p0, n = get_source(source), 20_000
    if points == "antithetic" and not p0.has_quantiles:
        pytest.skip("antithetic draws need quantiles")
    x_t, guess, t = torch.tensor([[0.3, -0.4]]).double().expand(n, 2), torch.tensor([[0.9, 0.2]]).double(), times(0.5, n)
    x_0, log_ratio = draw_candidates(
        get_path("cosine"),
        p0,
        n_candidates,
        x_t,
        t,
        guess=guess.expand(n, 2),
        guess_spread=0.6,
        points=points,
        generator=torch.Generator().manual_seed(0),
    )
    assert log_ratio is not None
    ratio = log_ratio.exp()
    n_near = n_candidates // 2 - (n_candidates // 2 % 2 if points == "antithetic" else 0)
    assert ratio.max() <= n_candidates / (n_candidates - n_near) + 1e-9
    inside = (x_0.abs() < 1).all(-1)
    # Near and far candidates have different densities, so that the mean over a row is what is unbiased.
    assert z_scores((ratio - 1).mean(1, keepdim=True)).abs() < 4.5 or ratio.sub(1).abs().max() < 1e-9
    one = stats.t(5.0) if isinstance(source, StudentT) else None
    edges = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    lower, upper = (float(f) for f in (one.cdf(edges) if one else source.cdf(edges)))
    assert z_scores((ratio * inside).mean(1, keepdim=True) - (upper - lower) ** 2).abs() < 4.5


@pytest.mark.parametrize("coefficient", [0.0, 1.0, "optimal", "diagonal"])
@pytest.mark.parametrize("data_scale", [None, 0.8])
def test_a_correlated_source_in_closed_form(coefficient: str | float, data_scale: float | None) -> None:
    """A Gaussian target under a correlated Gaussian source that is off centre: data mean and score of the path."""
    m, cov = torch.tensor([0.5, -0.3]).double(), torch.tensor([[0.8, 0.3], [0.3, 0.5]]).double()
    b, spread = torch.tensor([0.4, 1.0]).double(), torch.tensor([[1.5, -0.6], [-0.6, 0.7]]).double()
    alpha, sigma = 0.6, 0.4
    x_t, t = torch.tensor([[0.3, 0.2]]).double().expand(200, 2), times(0.6, 200)
    noise_precision = alpha * (sigma**2 * spread).inverse()
    precision = cov.inverse() + alpha * noise_precision
    data_mean = torch.linalg.solve(precision, cov.inverse() @ m + noise_precision @ (x_t[0] - sigma * b))
    score = -torch.linalg.solve(alpha**2 * cov + sigma**2 * spread, x_t[0] - alpha * m - sigma * b)

    target = MultivariateNormal(m, cov)
    estimator = PosteriorMeanEstimator(
        "cond_ot", 1000, coefficient, source=MultivariateNormal(b, spread), data_scale=data_scale
    )
    result = estimator(target.log_prob, x_t, t, torch.Generator().manual_seed(8))
    assert (z_scores(result.x1 - data_mean).abs() < 4.5).all()
    assert (z_scores(result.score - score).abs() < 4.5).all()
    assert (result.x1 - data_mean).abs().mean() < 0.05


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("source", "mean", "std", "least"),
    [
        (Normal(torch.zeros(2), torch.tensor([0.5, 3.0])), [0.0, 0.0], [0.5, 3.0], 1.0),
        # Torch does not know the moments of this one.
        (TransformedDistribution(Normal(torch.zeros(2), 1.0), AffineTransform(5.0, 2.0)), [5.0, 5.0], [2.0, 2.0], 0.98),
    ],
)
def test_localised_candidates_of_a_gaussian_are_draws_from_the_posterior(
    source: Distribution, mean: list[float], std: list[float], least: float, t: float
) -> None:
    """Of a standard Gaussian target, whatever the source's width is in each dimension: all weights are equal. The control
    variate then takes nearly all of the error, though its coefficient is above the variance of most dimensions."""
    x_t, noise_mean, noise_variance = normal(50, 2, seed=3).float(), torch.tensor(mean), torch.tensor(std).square()
    gain = t / (t**2 + (1 - t) ** 2 * noise_variance)
    data_mean = gain * (x_t - (1 - t) * noise_mean)
    errors = []
    for coefficient in (0.0, "optimal"):
        estimator = PosteriorMeanEstimator("cond_ot", 64, coefficient, source=source, data_scale=1.0)
        result = estimator(gaussian(1.0, 0.0), x_t, times(t, 50).float(), torch.Generator().manual_seed(4))
        assert result.ess.min() > least * 64 - 0.1
        errors.append((result.x1 - data_mean).square().mean(0))
    if least == 1.0:
        assert (errors[1] < 0.05 * errors[0]).all()


def test_a_candidate_without_density_leaves_the_score_finite() -> None:
    source = Gumbel(0.0, 1.0)  # its density rounds to 0 far below
    estimator = PosteriorMeanEstimator("cond_ot", 32, source=source, data_scale=1.0)
    x_t = normal(4, 1, seed=5).float()
    result = estimator(gaussian(1.0, 0.0), x_t, torch.full((4,), 0.98), torch.Generator().manual_seed(0), guess=x_t + 10)
    assert all(torch.isfinite(value).all() for value in result)


@pytest.mark.parametrize("method", ["snis", "mcmc", "smc"])
def test_densities_of_another_precision(method: str) -> None:
    """As of a float32 network and a float64 prior, which does not take float64 itself."""
    net = torch.nn.Linear(2, 1)
    estimator = PosteriorMeanEstimator("cond_ot", 8, method=method)
    result = estimator(lambda x: net(x).squeeze(-1) - x.double().square().sum(-1), normal(3, 2).float(), torch.full((3,), 0.5))
    assert {value.dtype for value in result} == {torch.float32}


def test_the_best_combination_of_scores_beats_both() -> None:
    """Reverse score matching: from E[grad log p0] / sigma to E[grad log p1] / alpha, at the source's variance, which is 2."""
    log_prob = gaussian(1.0, 0.5)
    x_t, t = normal(400, 2), times(0.5, 400)
    errors = {}
    reference = PosteriorMeanEstimator("cond_ot", 4000, "scalar", source=Laplace(0.0, 1.0))
    truth = reference(log_prob, x_t, t, torch.Generator().manual_seed(9)).score
    for coefficient in (0.0, 2.0, "optimal"):
        estimator = PosteriorMeanEstimator("cond_ot", 64, coefficient, source=Laplace(0.0, 1.0))
        result = estimator(log_prob, x_t, t, torch.Generator().manual_seed(5))
        errors[coefficient] = float((result.score - truth).square().sum(-1).mean())
    assert errors["optimal"] < 0.9 * min(errors[0.0], errors[2.0])


@pytest.mark.parametrize("coefficient", [0.0, 1.0, 4.0, (0.5, 2.0)], ids=str)
def test_noise_mean_and_score_of_a_gaussian_source_are_one_estimate(coefficient: float | tuple[float, float]) -> None:
    """``grad log p0(x_0) = -(x_0 - m) / v`` is linear in ``x_0``."""
    estimator = PosteriorMeanEstimator("cond_ot", 16, coefficient, source=Normal(0.5, 2.0))
    x_t, t = normal(20, 2), times(0.7, 20)
    result = estimator(gaussian(1.0, 0.5), x_t, t, torch.Generator().manual_seed(2))
    torch.testing.assert_close(result.score, -(result.x0 - 0.5) / 4.0 / 0.3)


def test_the_effective_size_of_chains_is_that_of_as_many_independent_draws() -> None:
    """The variance of the noise mean over repetitions, against that of one draw of a Gaussian posterior."""
    x_t, t = torch.zeros(400, 1, dtype=torch.float64), times(0.5, 400)
    variance = 1 / (1 + 4.0)  # of x_0 = -x_1 where x_t = 0
    for n_steps in (8, 64):
        estimator = PosteriorMeanEstimator("cond_ot", 16, 0.0, method=MCMC(n_steps=n_steps))
        result = estimator(gaussian(4.0, 0.0), x_t, t, torch.Generator().manual_seed(4))
        realised = variance / float(result.x0.var())
        assert float(result.ess.median()) == pytest.approx(realised, rel=0.35)
        assert realised > (20 if n_steps == 8 else 100)


# Laws


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Candidates]:
    x_t, t = normal(5, 2), torch.linspace(0.2, 0.9, 5, dtype=torch.float64)
    estimator = PosteriorMeanEstimator("cosine", 9, data_scale=1.0)
    return x_t, t, estimator.draw(x_t, t, torch.Generator().manual_seed(0), guess=torch.zeros_like(x_t))


def assert_same(a: PosteriorMean, b: PosteriorMean, tolerance: float = 1e-9) -> None:
    for name, x, y in zip(a._fields, a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_the_order_of_candidates_means_nothing(problem: tuple[Tensor, Tensor, Candidates], coefficient: str | float) -> None:
    x_t, t, candidates = problem
    estimator = PosteriorMeanEstimator("cosine", 9, coefficient)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert candidates.log_ratio is not None
    permuted = Candidates(candidates.x_0[:, order], candidates.log_ratio[:, order])
    assert_same(
        estimator.estimate(MIXTURE.log_prob, x_t, t, candidates), estimator.estimate(MIXTURE.log_prob, x_t, t, permuted)
    )


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_the_normalising_constant_means_nothing(problem: tuple[Tensor, Tensor, Candidates], coefficient: str | float) -> None:
    x_t, t, candidates = problem
    estimator = PosteriorMeanEstimator("cosine", 9, coefficient)
    shifted = estimator.estimate(lambda x: MIXTURE.log_prob(x) + 123.4, x_t, t, candidates)
    assert_same(estimator.estimate(MIXTURE.log_prob, x_t, t, candidates), shifted)


@pytest.mark.parametrize("method", ["mcmc", "smc"])
def test_it_means_nothing_to_chains_and_particles_either(method: str) -> None:
    x_t, t = normal(5, 2), times(0.6, 5)
    estimator = PosteriorMeanEstimator(n_candidates=8, method=method)
    a, b = (
        estimator(lambda x, c=c: MIXTURE.log_prob(x) + c, x_t, t, torch.Generator().manual_seed(0))  # type: ignore[misc]
        for c in (0.0, -123.4)
    )
    assert_same(a, b, 1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("coefficient", [*COEFFICIENTS, 0.4, (0.2, 0.9)], ids=str)
def test_every_way_of_estimating_gives_the_same_kind_of_result(method: str, coefficient: object) -> None:
    """Its fields are consistent with each other: the two means make ``x_t``, their rates the velocity, the noise the score."""
    x_t, t = normal(5, 2), torch.linspace(0.2, 0.8, 5, dtype=torch.float64)
    estimator = PosteriorMeanEstimator("cosine", 8, coefficient, method=method)  # type: ignore[arg-type]
    result = estimator(MIXTURE.log_prob, x_t, t, torch.Generator().manual_seed(0))
    assert {name: tuple(value.shape) for name, value in result._asdict().items()} == {
        **dict.fromkeys(("x0", "x1", "velocity", "score", "coefficient"), (5, 2)),
        **dict.fromkeys(("ess", "variance_ratio"), (5,)),
    }
    assert all(torch.isfinite(value).all() for value in result)
    angle = 0.5 * math.pi * t[:, None]
    torch.testing.assert_close(torch.sin(angle) * result.x1 + torch.cos(angle) * result.x0, x_t)
    rate = 0.5 * math.pi * (torch.cos(angle) * result.x1 - torch.sin(angle) * result.x0)
    torch.testing.assert_close(result.velocity, rate)
    torch.testing.assert_close(result.score, -result.x0 / torch.cos(angle))
    if not isinstance(coefficient, str):
        torch.testing.assert_close(result.coefficient, torch.tensor(coefficient, dtype=torch.float64).expand(5, 2))


def test_the_effective_sample_size_is_that_of_the_weights() -> None:
    """Weights 1, 1, 2 are worth 16 / 6 candidates; those that come from the source have the weights of the target."""
    candidates = Candidates(normal(1, 3, 2), None)
    log_p = torch.tensor([[0.0, 0.0, math.log(2)]], dtype=torch.float64)
    result = PosteriorMeanEstimator(coefficient=0.0).estimate(lambda x: log_p, normal(1, 2), times(0.5, 1), candidates)
    assert float(result.ess) == pytest.approx(16 / 6)


@pytest.mark.parametrize("coefficient", [0.5, 1.0])
def test_the_variance_ratio_is_that_of_repeated_estimates(coefficient: float) -> None:
    x_t, t = torch.tensor([[0.3, -0.4]], dtype=torch.float64).expand(3000, 2), times(0.8, 3000)
    variances = []
    for c in (coefficient, 0.0):
        estimator = PosteriorMeanEstimator("cond_ot", 200, c)
        result = estimator(MIXTURE.log_prob, x_t, t, torch.Generator().manual_seed(1))
        variances.append(float(result.x0.var(0).sum()))
        if c == coefficient:
            claimed = float(result.variance_ratio.median())
    # The standard error of a ratio of variances of 3000 estimates is below 4 %.
    assert claimed == pytest.approx(variances[0] / variances[1], rel=0.15)
    assert abs(claimed - 1) > 0.3


@pytest.mark.parametrize("name", sorted(PATHS))
def test_the_four_parametrisations_tell_the_same(name: str) -> None:
    x_t, t = normal(5, 2), torch.linspace(0.3, 0.9, 5, dtype=torch.float64)
    estimator = PosteriorMeanEstimator(name, 8)
    result = estimator(MIXTURE.log_prob, x_t, t, torch.Generator().manual_seed(0))
    path = estimator.path
    for source, value in (("velocity", result.velocity), ("noise", result.x0), ("data", result.x1), ("score", result.score)):
        for target, expected in (("velocity", result.velocity), ("data", result.x1)):
            converted = path.convert(value, x_t, t, source=source, target=target)  # type: ignore[arg-type]
            torch.testing.assert_close(converted, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("coefficient", [0.4, (0.2, 0.9)], ids=str)
def test_noise_and_data_posteriors_are_one(problem: tuple[Tensor, Tensor, Candidates], coefficient: object) -> None:
    """s_0 = -(sigma/alpha) s_1 and Lambda_0 = (alpha/sigma)^2 Lambda_1, here from the data posterior's own formulae."""
    x_t, t, candidates = problem
    estimator = PosteriorMeanEstimator("cosine", 9, coefficient)  # type: ignore[arg-type]
    result = estimator.estimate(MIXTURE.log_prob, x_t, t, candidates)
    alpha, sigma = (f(t)[:, None, None] for f in (estimator.path.alpha, estimator.path.sigma))
    x_1 = ((x_t[:, None] - sigma * candidates.x_0) / alpha).requires_grad_(True)
    # log q(x_1 | x_t) = log p1(x_1) + log p0((x_t - alpha x_1) / sigma)
    log_q = MIXTURE.log_prob(x_1) + Normal(0.0, 1.0).log_prob((x_t[:, None] - alpha * x_1) / sigma).sum(-1)
    (s_1,) = torch.autograd.grad(log_q.sum(), x_1)
    proposal = Normal(0.0, 1.0).log_prob(candidates.x_0).sum(-1) - candidates.log_ratio  # type: ignore[operator]
    weights = torch.softmax(log_q.detach() - proposal, 1)
    coefficient_1 = (sigma / alpha).squeeze(1) ** 2 * result.coefficient
    x_1_mean = weighted_mean(weights, x_1.detach() + coefficient_1[:, None] * s_1)
    torch.testing.assert_close(result.x1, x_1_mean)


def test_batches_are_made_of_independent_rows(problem: tuple[Tensor, Tensor, Candidates]) -> None:
    x_t, t, candidates = problem
    estimator = PosteriorMeanEstimator("cosine", 9)
    whole = estimator.estimate(MIXTURE.log_prob, x_t, t, candidates)
    assert candidates.log_ratio is not None
    one = estimator.estimate(MIXTURE.log_prob, x_t[2:3], t[2:3], Candidates(candidates.x_0[2:3], candidates.log_ratio[2:3]))
    torch.testing.assert_close(one.velocity[0], whole.velocity[2])


def test_generators_decide_everything() -> None:
    x_t, t = normal(3, 2), times(0.4, 3)
    for kwargs in ({}, {"points": "sobol"}, {"points": "antithetic"}, {"method": "mcmc"}, {"method": "smc"}):
        estimator = PosteriorMeanEstimator(n_candidates=8, **kwargs)  # type: ignore[arg-type]
        a, b, c = (estimator(MIXTURE.log_prob, x_t, t, torch.Generator().manual_seed(s)).x1 for s in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c), kwargs


def test_one_candidate_is_an_estimate_of_itself() -> None:
    x_t, t = normal(3, 2), times(0.4, 3)
    for coefficient in ("optimal", "scalar", "diagonal", 0.0):
        result = PosteriorMeanEstimator(n_candidates=1, coefficient=coefficient)(MIXTURE.log_prob, x_t, t)
        assert torch.isfinite(result.velocity).all()
        assert (result.coefficient == 0).all() and (result.ess == 1).all()


def test_antithetic_and_sobol_candidates_are_spread_evenly() -> None:
    x_t, t, generator = normal(200, 3), times(0.4, 200), torch.Generator().manual_seed(0)
    antithetic = PosteriorMeanEstimator(n_candidates=8, points="antithetic").draw(x_t, t, generator).x_0
    torch.testing.assert_close(antithetic.mean(1), torch.zeros_like(x_t), rtol=0, atol=1e-12)
    sobol = PosteriorMeanEstimator(n_candidates=64, points="sobol").draw(x_t, t, generator).x_0
    assert sobol.mean(1).square().mean() < 0.2 / 64  # the mean of 64 independent draws has a variance of 1/64
    assert not torch.allclose(sobol[0], sobol[1])


@pytest.mark.parametrize("n_candidates", [1, 2, 4, 6, 7, 8])
def test_antithetic_pairs_lie_on_both_sides_of_their_own_centre(n_candidates: int) -> None:
    """With a guess there are two centres: half of the pairs, rounded down, belong to the guess."""
    x_t, t, guess = normal(5, 3), times(0.6, 5), 3 + normal(5, 3, seed=1)
    estimator = PosteriorMeanEstimator(n_candidates=n_candidates, points="antithetic", data_scale=1.0)
    x_1 = (x_t[:, None] - 0.4 * estimator.draw(x_t, t, guess=guess).x_0) / 0.6
    pairs = x_1[:, : n_candidates // 2 * 2].unflatten(1, (-1, 2)).mean(2)
    n_near = n_candidates // 4
    broad = 0.6 * x_t / (0.6**2 + 0.4**2)  # posterior mean of a standard Gaussian target
    torch.testing.assert_close(pairs[:, :n_near], guess[:, None].expand(5, n_near, 3))
    torch.testing.assert_close(pairs[:, n_near:], broad[:, None].expand_as(pairs[:, n_near:]))


# The rule behind coefficient="optimal"


def test_fits_minimise_the_variance_they_claim_to() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.softmax(torch.randn(4, 12, dtype=torch.float64, generator=generator), 1)
    values, stein = torch.randn(2, 4, 12, 3, dtype=torch.float64, generator=generator)

    def variance(c: Tensor) -> Tensor:
        corrected = values + c[:, None] * stein
        deviation = corrected - weighted_mean(weights, corrected)[:, None]
        return (weights.square()[..., None] * deviation.square()).sum()

    for fit in (fit_scalar(weights, values, stein)[:, None].expand(4, 3), fit_diagonal(weights, values, stein)):
        c = fit.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(variance(c), c)
        torch.testing.assert_close(
            gradient.sum() if fit.stride(1) == 0 else gradient, torch.zeros_like(gradient.sum() if fit.stride(1) == 0 else c)
        )


@pytest.mark.parametrize("coefficient", ["scalar", "diagonal", "optimal"])
def test_fitted_coefficients_lie_between_values_and_gradients(coefficient: str) -> None:
    """Where the density is rough, least variance may ask for less than 0 or more than 1."""
    estimator = PosteriorMeanEstimator("cond_ot", 4, coefficient)
    generator = torch.Generator().manual_seed(0)
    result = estimator(lambda x: 20 * torch.sin(4 * x).sum(-1), normal(200, 1), times(0.6, 200), generator)
    assert result.coefficient.min() == 0 and result.coefficient.max() <= 1
    assert coefficient == "optimal" or result.coefficient.max() == 1  # where the fit is more than that


def test_the_robust_fit_is_bounded_and_its_correction_no_longer_than_the_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.softmax(5 * torch.randn(500, 12, dtype=torch.float64, generator=generator), 1)
    values = torch.randn(500, 12, 3, dtype=torch.float64, generator=generator)
    stein = 40 - values  # a log-linear density: every fit says 1, and the mean of the scores says that all weights are wrong
    valid = torch.ones_like(weights, dtype=torch.bool)
    assert (fit_scalar(weights, values, stein) > 1 - 1e-6).all()
    c = fit_robust(weights, values, stein, valid)
    assert ((c >= 0) & (c <= 0.2)).all()
    assert ((c * weighted_mean(weights, stein)).norm(dim=-1) < 12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gap", [0.0, 10.0, 17.0, 30.0, 80.0])
def test_the_bound_on_the_length_is_the_jackknife(gap: float, dtype: torch.dtype) -> None:
    """Candidates are left out one by one, one of them with a weight that rounds to 1."""
    log_weights, values = normal(200, 4), normal(200, 4, 3, seed=1)
    log_weights[:, 1] += gap
    weights = torch.softmax(log_weights, 1)
    mean = weighted_mean(weights, values)
    squared = (weights * (values - mean[:, None]).square().sum(-1)).sum(1)
    for k in range(4):
        kept = torch.arange(4) != k
        without = weighted_mean(torch.softmax(log_weights[:, kept], 1), values[:, kept])
        squared += (without - mean).square().sum(-1)

    values, weights = values.to(dtype), torch.softmax(log_weights.to(dtype), 1)
    stein = 40 - values  # every fit says 1, so that the bound decides
    c = fit_robust(weights, values, stein, torch.ones_like(weights, dtype=torch.bool))
    length = (c * weighted_mean(weights, stein)).norm(dim=-1)
    assert ((c > 0) & (c < 0.5)).all()
    torch.testing.assert_close(length, squared.sqrt().to(dtype), rtol=1e-3 if dtype == torch.float32 else 1e-8, atol=0)


@pytest.mark.parametrize("fit", [fit_scalar, fit_diagonal])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gap", [0.0, 10.0, 17.0, 40.0, 80.0])
def test_two_candidates_know_a_gaussian_whatever_their_weights(
    fit: Callable[..., Tensor], dtype: torch.dtype, gap: float
) -> None:
    weights = torch.softmax(torch.tensor([[0.0, -gap]], dtype=dtype), 1)
    values = torch.tensor([[[0.3, -1.1], [1.2, 0.4]]], dtype=dtype)
    c = fit(weights, values, 0.7 - 2 * values)
    torch.testing.assert_close(c, torch.full_like(c, 0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gap", [10.0, 17.0, 30.0, 80.0])
def test_single_precision_is_enough_for_the_robust_fit(gap: float) -> None:
    """The same weights, which single precision rounds to 1 and very little, in both precisions."""
    log_weights, values = normal(200, 5), normal(200, 5, 3, seed=1)
    log_weights[:, 2] += gap
    stein = 0.5 * normal(200, 5, 3, seed=2) - values
    valid = torch.ones_like(log_weights, dtype=torch.bool)
    single = fit_robust(torch.softmax(log_weights.float(), 1), values.float(), stein.float(), valid)
    double = fit_robust(torch.softmax(log_weights, 1), values, stein, valid)
    assert (double > 0.1).double().mean() > 0.3
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_others_that_weigh_nothing_are_as_good_as_none(dtype: torch.dtype) -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0]], dtype=dtype)
    values = normal(1, 3, 2).to(dtype)
    valid = torch.ones_like(weights, dtype=torch.bool)
    alone = fit_robust(weights[:, 1:2], values[:, 1:2], 1 - values[:, 1:2], valid[:, 1:2])
    assert torch.equal(fit_robust(weights, values, 1 - values, valid), alone) and (alone == 0).all()


def test_equally_heavy_candidates_have_no_order() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.4, 0.4, 0.2], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    values, stein = normal(3, 3, 2), normal(3, 3, 2, seed=1) - normal(3, 3, 2)
    valid = torch.ones_like(weights, dtype=torch.bool)
    first = fit_robust(weights, values, stein, valid)
    for order in ([1, 0, 2], [2, 1, 0], [1, 2, 0]):
        torch.testing.assert_close(fit_robust(weights[:, order], values[:, order], stein[:, order], valid), first)


def test_the_robust_fit_has_no_origin() -> None:
    """Values moved far away: all weights, the equal ones too, must be as precise as the values."""
    weights, values = torch.softmax(normal(50, 3), 1), normal(50, 3, 2, seed=1)
    stein = 0.1 * normal(50, 3, 2, seed=2) - values
    valid = torch.ones_like(weights, dtype=torch.bool)
    plain = fit_robust(weights, values, stein, valid)
    assert (plain > 0.1).double().mean() > 0.5
    torch.testing.assert_close(fit_robust(weights, values + 1e8, stein, valid), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e15])
def test_the_robust_fit_has_no_unit(scale: float) -> None:
    """In single precision, where the product of two variances would leave its range."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.softmax(torch.randn(50, 12, generator=generator), 1)
    values = torch.randn(50, 12, 3, generator=generator)
    stein = 0.5 * torch.randn(50, 12, 3, generator=generator) - values
    valid = torch.ones_like(weights, dtype=torch.bool)
    plain = fit_robust(weights, values, stein, valid)
    assert (plain > 0.1).double().mean() > 0.5
    torch.testing.assert_close(fit_robust(weights, scale * values, scale * stein, valid), plain, rtol=1e-3, atol=1e-4)


def test_the_robust_fit_tells_dimensions_apart() -> None:
    """A Gaussian of condition 100 along the axes has another exact coefficient in each dimension."""
    precision = torch.logspace(0, 2, 4, dtype=torch.float64)
    x_t, t = 0.9 * normal(200, 4) / precision.sqrt() + 0.1 * normal(200, 4, seed=1), times(0.9, 200)
    truth = 0.9 * x_t / (0.9**2 + precision * 0.1**2)

    def error(coefficient: str) -> float:
        estimator = PosteriorMeanEstimator("cond_ot", 32, coefficient)
        result = estimator(lambda x: -0.5 * (precision * x.square()).sum(-1), x_t, t, torch.Generator().manual_seed(0))
        return float((result.x1 - truth).square().sum(-1).mean())

    assert error("optimal") < 0.1 * error("scalar")


def saturating(u: Tensor) -> Tensor:
    """A wavy Q in a tanh latent, (B, K, 1) → (B, K); log sech^2 is linear in the tails."""
    a = torch.tanh(u)
    return (3 * torch.sin(2 * a) + 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))).sum(-1)


def rings(x: Tensor) -> Tensor:
    """Two crescents, (B, K, 2) → (B, K)."""
    radius = x.norm(dim=-1)
    sides = torch.stack([-0.5 * ((x[..., 0] - s) / 0.3) ** 2 for s in (-2.0, 2.0)])
    return -0.5 * ((radius - 2) / 0.2) ** 2 + sides.logsumexp(0)


@pytest.mark.parametrize(("log_prob", "dim"), [(saturating, 1), (rings, 2)], ids=["tanh latent", "crescents"])
@pytest.mark.parametrize("t_value", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_optimal_is_never_worse_than_the_better_of_noise_and_gradient(log_prob: LogProb, dim: int, t_value: float) -> None:
    """Mean squared error against quadrature, K = 16, at most 5 % above (errors below a thousandth of E|v|^2 are equal)."""
    axis = torch.linspace(-7, 7, 3001 if dim == 1 else 141, dtype=torch.float64)
    grid = axis[:, None] if dim == 1 else torch.cartesian_prod(axis, axis)
    log_p1 = log_prob(grid[None])[0]
    generator = torch.Generator().manual_seed(6)
    n, t = 1500, t_value
    x_1 = grid[torch.multinomial(log_p1.exp(), n, replacement=True, generator=generator)]
    x_t = t * x_1 + (1 - t) * torch.randn(n, dim, dtype=torch.float64, generator=generator)
    weights = torch.softmax(log_p1 - 0.5 * torch.cdist(x_t, t * grid).square() / (1 - t) ** 2, 1)
    velocity = (weights @ grid - x_t) / (1 - t)
    error = {}
    for coefficient in (0.0, 1.0, "optimal"):
        estimator = PosteriorMeanEstimator("cond_ot", 16, coefficient)
        result = estimator(log_prob, x_t, times(t, n), torch.Generator().manual_seed(7))
        mse = (result.velocity - velocity).square().sum(-1).mean()
        error[coefficient] = float(mse.clamp(min=1e-3 * velocity.square().sum(-1).mean()))
    assert error["optimal"] <= 1.05 * min(error[0.0], error[1.0]), error


@pytest.mark.parametrize("n_candidates", [16, 128])
def test_optimal_is_better_than_both_where_they_cross(n_candidates: int) -> None:
    n, t = 1000, 0.68
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        x_1 = MIXTURE.distribution.sample((n,))
    x_t = t * x_1 + (1 - t) * normal(n, 2)
    truth = MIXTURE.data_mean(x_t, t, 1 - t)
    noise, gradient, optimal = (
        float((estimate.x1 - truth).square().sum(-1).mean())
        for estimate in (
            PosteriorMeanEstimator("cond_ot", n_candidates, c)(MIXTURE.log_prob, x_t, times(t, n), generator)
            for c, generator in ((c, torch.Generator().manual_seed(2)) for c in (0.0, 1.0, "optimal"))
        )
    )
    assert 0.5 < noise / gradient < 2, "they do not cross here"
    assert optimal < 0.5 * min(noise, gradient)


# What is left of fit_robust without one of its three parts.


def without_shrinking(s: estimator_errors.Sample, patch: pytest.MonkeyPatch) -> Tensor:
    patch.setattr(
        control_variates,
        "_shrunk_coefficient",
        lambda covariance, variance, *_: control_variates._ratio(-covariance, variance),
    )
    return fit_robust(s.weights, s.values, s.stein, s.valid)


def without_equal_weights(s: estimator_errors.Sample, patch: pytest.MonkeyPatch) -> Tensor:
    fits = iter((control_variates._shrink(s.weights, s.values, s.stein, 1.0), torch.ones_like(s.values[:, 0])))
    patch.setattr(control_variates, "_shrink", lambda *_: next(fits))
    return fit_robust(s.weights, s.values, s.stein, s.valid)


def without_bound_on_the_length(s: estimator_errors.Sample, patch: pytest.MonkeyPatch) -> Tensor:
    equal = s.valid / s.valid.sum(1, keepdim=True)
    return torch.minimum(*(control_variates._shrink(w, s.values, s.stein, 1.0) for w in (s.weights, equal)))


@pytest.mark.parametrize(
    ("ablated", "name", "t", "n_candidates", "kind", "rows", "least"),
    [
        (without_shrinking, "critic-1-0.01", 0.7, 32, "source", 8192, 1.02),
        (without_equal_weights, "critic-1-0.01", 0.3, 32, "localised", 8192, 1.05),
        (without_bound_on_the_length, "critic-1-1", 0.02, 16, "source", 512, 1000.0),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_every_part_of_the_rule_is_needed(
    ablated: Callable[[estimator_errors.Sample, pytest.MonkeyPatch], Tensor],
    name: str,
    t: float,
    n_candidates: int,
    kind: str,
    rows: int,
    least: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without it the error is above the better of noise and gradient, beyond two standard errors; with it, not at all."""

    def rule(s: estimator_errors.Sample) -> Tensor:
        with monkeypatch.context() as patch:
            return ablated(s, patch)

    monkeypatch.setitem(estimator_errors.RULES, "ablated", rule)
    rules = ("noise (0)", "gradient (1)", "optimal", "ablated")
    cell = estimator_errors.measure_cell([densities.densities()[name]()], t, n_candidates, kind, rows, 0, rules)
    without, whole = ({row["rule"]: row for row in cell}[rule] for rule in ("ablated", "optimal"))
    print(f"\n{ablated.__name__}, {name}, t = {t}, K = {n_candidates}, {kind}:", end=" ")
    print(f"{without['ratio']:.3f} ± {without['ratio error']:.3f}, with it {whole['ratio']:.3f} ± {whole['ratio error']:.3f}")
    assert whole["ratio"] <= 1.001
    assert without["ratio"] > max(least, 1 + 2 * without["ratio error"])


# Execution


def test_no_gradient_is_taken_for_coefficient_zero() -> None:
    result = PosteriorMeanEstimator(coefficient=0)(lambda x: (x.detach() > 0).double().sum(-1), normal(3, 2), times(0.5, 3))
    assert torch.isfinite(result.velocity).all()
    assert not PosteriorMeanEstimator(coefficient=0).needs_gradient
    assert PosteriorMeanEstimator(coefficient=0, method="mcmc").needs_gradient


def test_no_gradient_reaches_parameters() -> None:
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    result = PosteriorMeanEstimator()(lambda x: -(scale * x).square().sum(-1), normal(3, 2), times(0.5, 3))
    assert not result.velocity.requires_grad and scale.grad is None


@pytest.mark.parametrize("coefficient", ["optimal", 0.0, 1.0])
def test_no_gradient_passes_through_the_estimate(coefficient: Any) -> None:
    """Whoever computes the guess by the network that is trained would train it to move its own target."""
    x_t = normal(3, 2).requires_grad_(True)
    result = PosteriorMeanEstimator(coefficient=coefficient)(MIXTURE.log_prob, x_t, times(0.5, 3), guess=2 * x_t)
    assert not any(value.requires_grad for value in result)


@pytest.mark.parametrize("source", ["gaussian", Laplace(0.0, 1.0)], ids=["gaussian", "laplace"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("coefficient", ["optimal", 0.0])
def test_the_gradients_it_needs_are_taken_in_inference_mode_too(
    coefficient: str | float, method: str, source: str | Distribution
) -> None:
    estimator = PosteriorMeanEstimator(n_candidates=8, coefficient=coefficient, method=method, source=source)
    x_t, t = normal(3, 2), times(0.5, 3)
    expected = estimator(MIXTURE.log_prob, x_t, t, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        result = estimator(MIXTURE.log_prob, x_t + 0, t + 0, torch.Generator().manual_seed(0))
    assert_same(result, expected)


@pytest.mark.parametrize("arguments", [{"n_candidates": 8}, {"n_candidates": 1}], ids=["eight", "one"])
def test_without_a_control_variate_the_variance_is_the_plain_one(arguments: dict[str, int]) -> None:
    """Also where one weight is 1, and nothing is known of the variance."""
    cold = lambda x: 1e4 * MIXTURE.log_prob(x)  # noqa: E731
    result = PosteriorMeanEstimator(coefficient=0.0, **arguments)(cold, normal(50, 2), times(0.5, 50))
    assert (result.ess < 1 + 1e-9).any() and (result.variance_ratio == 1).all()


def test_tempering_starts_as_slowly_as_it_must() -> None:
    """A narrow target seen through a wide posterior: the first useful step is about 1e-10 of the way."""
    log_p1 = -0.5 * (torch.linspace(0.1, 1, 256, dtype=torch.float64)[None] * 1e6).square()
    beta = _next_temper(log_p1, torch.zeros(1, dtype=torch.float64))
    weights = torch.softmax(beta[:, None] * log_p1, 1)
    assert 0 < beta < 1e-9 and effective_sample_size(weights).item() == pytest.approx(128, rel=0.01)


def test_the_hot_path_compiles_into_one_graph() -> None:
    import torch._dynamo as dynamo

    estimator = PosteriorMeanEstimator("cond_ot", 8, data_scale=1.0)
    x_t, t = normal(4, 2), times(0.5, 4)
    candidates = estimator.draw(x_t, t, torch.Generator().manual_seed(0), guess=torch.zeros_like(x_t))

    def estimate(x_t: Tensor, t: Tensor, x_0: Tensor, log_ratio: Tensor) -> PosteriorMean:
        return estimator.estimate(gaussian(2.0, 0.5), x_t, t, Candidates(x_0, log_ratio))

    assert candidates.log_ratio is not None
    with dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(estimate, fullgraph=True, backend="aot_eager")
        result = compiled(x_t, t, *candidates)
    assert_same(result, estimator.estimate(gaussian(2.0, 0.5), x_t, t, candidates))


# The loss


@pytest.mark.parametrize("method", ["snis", MCMC(n_steps=4), SMC()])
def test_a_constant_in_double_precision_costs_no_digits(method: Any) -> None:
    """A log-likelihood summed over many observations has a large one."""

    def estimate(constant: float) -> Tensor:
        def log_prob(x: Tensor) -> Tensor:
            return -0.5 * ((x.double() - 1) / 0.5).square().sum(-1) + constant

        generator = torch.Generator().manual_seed(0)
        x_t = torch.randn(4, 2, generator=generator)
        return PosteriorMeanEstimator(method=method)(log_prob, x_t, torch.full((4,), 0.5), generator).x1

    torch.testing.assert_close(estimate(1e8), estimate(0.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("returned", [lambda x: (x > 0).all(-1), lambda x: x.sum(-1).int()])
def test_a_log_prob_of_no_numbers_is_refused(returned: Any) -> None:
    with pytest.raises(ValueError, match="floating-point"):
        PosteriorMeanEstimator(coefficient=0)(returned, torch.zeros(2, 2), torch.full((2,), 0.5))


def test_the_loss_is_the_squared_error_to_the_estimate() -> None:
    estimator = PosteriorMeanEstimator(n_candidates=8, data_scale=1.0)  # whose candidates depend on the guess
    model = torch.nn.Linear(2, 2).double()
    x_t, t, guess = normal(6, 2), times(0.5, 6), normal(6, 2)
    estimate = estimator(MIXTURE.log_prob, x_t, t, torch.Generator().manual_seed(1), guess)
    for parametrisation, field in (("velocity", "velocity"), ("data", "x1"), ("noise", "x0"), ("score", "score")):
        loss_fn = ReverseFlowMatchingLoss(estimator, parametrisation)  # type: ignore[arg-type]
        loss, result = loss_fn(lambda x, t: model(x), MIXTURE.log_prob, x_t, t, torch.Generator().manual_seed(1), guess)
        assert_same(result, estimate)
        expected = (model(x_t) - getattr(estimate, field)).square().sum(1).mean()
        torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.weight.grad is not None
    with pytest.raises(ValueError, match="'flow'"):
        ReverseFlowMatchingLoss(estimator, "flow")  # type: ignore[arg-type]


# Bad input


@pytest.mark.parametrize("value", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_candidates_without_finite_density_count_for_nothing(value: float, coefficient: str | float) -> None:
    x_t, t = normal(5, 2), times(0.6, 5)
    estimator = PosteriorMeanEstimator(n_candidates=9, coefficient=coefficient)
    x_0 = estimator.draw(x_t, t, torch.Generator().manual_seed(0)).x_0
    broken = torch.zeros(5, 9, dtype=torch.bool)
    broken[:, [2, 7]] = True
    some = estimator.estimate(lambda x: MIXTURE.log_prob(x).masked_fill(broken, value), x_t, t, Candidates(x_0, None))
    kept = Candidates(x_0[:, [0, 1, 3, 4, 5, 6, 8]], None)
    assert_same(some, estimator.estimate(MIXTURE.log_prob, x_t, t, kept))


def test_candidates_without_finite_gradient_count_for_nothing() -> None:
    def log_prob(x: Tensor) -> Tensor:  # finite everywhere, with an infinite gradient at candidates that are cut to 0
        return MIXTURE.log_prob(x) - torch.where(x[..., 0] > 0, x[..., 0], 0 * x[..., 0]).sqrt()

    x_t = normal(5, 2).abs() + 0.3
    result = PosteriorMeanEstimator(n_candidates=32)(log_prob, x_t, times(0.6, 5), torch.Generator().manual_seed(0))
    assert torch.isfinite(result.velocity).all() and (result.ess < 31).all()


@pytest.mark.parametrize("method", METHODS)
def test_targets_may_have_density_zero_somewhere(method: str) -> None:
    """A Gaussian cut off at 0, where every method meets infinite log-densities, against quadrature."""

    def log_prob(x: Tensor) -> Tensor:
        return torch.where(x[..., 0] > 0, gaussian(1.0, 0.3)(x), -torch.inf)

    alpha, sigma, at = 0.5, 0.5, 0.1
    grid = torch.linspace(0, 8, 100_001, dtype=torch.float64)[1:]
    log_q = gaussian(1.0, 0.3)(grid[:, None]) - 0.5 * ((at - alpha * grid) / sigma) ** 2
    truth = (torch.softmax(log_q, 0) * grid).sum()
    x_t, t = torch.full((100, 1), at, dtype=torch.float64), times(0.5, 100)
    estimator = PosteriorMeanEstimator("cond_ot", 400, 0.0, method=method)
    result = estimator(log_prob, x_t, t, torch.Generator().manual_seed(5))
    assert z_scores(result.x1 - truth).abs() < 4.5
    assert (result.x1 - truth).abs().mean() < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_row_without_any_finite_density_is_an_error(method: str) -> None:
    def log_prob(x: Tensor) -> Tensor:
        log_p = MIXTURE.log_prob(x)
        return torch.where(torch.arange(4)[:, None] == 2, torch.nan, log_p)

    estimator = PosteriorMeanEstimator(n_candidates=8, method=method)
    with pytest.raises(ValueError, match=r"not finite at any of the 8 candidates of rows \[2\]"):
        estimator(log_prob, normal(4, 2), times(0.5, 4))


@pytest.mark.parametrize("coefficient", ["optimal", "scalar", "diagonal"])
def test_enormous_densities_and_gradients_stay_finite(coefficient: str) -> None:
    x_t, t = normal(20, 3).float(), torch.full((20,), 0.01)
    for scale in (1e6, 1e15):
        result = PosteriorMeanEstimator(n_candidates=16, coefficient=coefficient)(gaussian(scale, 0.0), x_t, t)
        assert torch.isfinite(result.velocity).all() and torch.isfinite(result.coefficient).all()


@pytest.mark.parametrize("dim", [1, 64])
@pytest.mark.parametrize("n_candidates", [1, 2, 16, 500])
def test_optimal_is_finite_at_any_scale_and_any_time(n_candidates: int, dim: int) -> None:
    """In single precision, with gradients whose squares overflow, at both ends of the path, and where nothing varies."""
    targets: list[LogProb] = [
        gaussian(1e30, 0.0),
        gaussian(1e-30, 0.0),
        lambda x: 1e30 * torch.sin(x).sum(-1),
        lambda x: 1e30 + 0 * x.sum(-1),
        lambda x: -1e10 * x.pow(4).sum(-1),
    ]
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(20, dim, generator=generator)
    for at in (1e-3, 0.5, 1 - 1e-3, 1 - 6e-8):
        for source in ("gaussian", Laplace(0.0, 1.0)):
            estimator = PosteriorMeanEstimator("cond_ot", n_candidates, source=source, data_scale=1.0)
            t = torch.full((20,), at)
            for i, log_prob in enumerate(targets):
                for name, value in estimator(log_prob, x_t, t, generator)._asdict().items():
                    assert torch.isfinite(value).all(), (name, at, source, i)
    same = Candidates(torch.ones(20, n_candidates, dim), None)
    result = PosteriorMeanEstimator(n_candidates=n_candidates).estimate(targets[0], x_t, torch.full((20,), 0.5), same)
    assert all(torch.isfinite(value).all() for value in result) and (result.coefficient == 0).all()


def test_shapes_are_checked_and_named() -> None:
    estimator = PosteriorMeanEstimator(n_candidates=8)
    x_t, t = normal(4, 2), times(0.5, 4)
    with pytest.raises(ValueError, match=r"t must have the dtype of x_t, torch.float64, got torch.float32"):
        estimator(MIXTURE.log_prob, x_t, t.float())
    with pytest.raises(ValueError, match="t must be on the device of x_t, cpu, got meta"):
        estimator(MIXTURE.log_prob, x_t, t.to("meta"))
    with pytest.raises(ValueError, match=r"x_t must have shape \(B, D\), got \(4, 2, 1\)"):
        estimator(MIXTURE.log_prob, x_t[..., None], t)
    with pytest.raises(ValueError, match=r"\(B,\) = \(4,\).*got \(3,\)"):
        estimator(MIXTURE.log_prob, x_t, t[:3])
    with pytest.raises(ValueError, match=r"\(4, 2\), got \(4, 3\)"):
        estimator(MIXTURE.log_prob, x_t, t, guess=torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"given \(4, 8, 2\) it returned \(4, 8, 2\)"):
        estimator(lambda x: -(x**2), x_t, t)
    with pytest.raises(ValueError, match=r"given \(4, 8, 2\) it returned float"):
        estimator(lambda x: 1.0, x_t, t)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"given \(4, 2\) and \(4,\) it returned \(4, 1\)"):  # would broadcast
        ReverseFlowMatchingLoss(estimator)(lambda x, t: x[:, :1], MIXTURE.log_prob, x_t, t)
    with pytest.raises(ValueError, match="3 entries, but x_t has dimension 2"):
        PosteriorMeanEstimator(coefficient=(0.1, 0.2, 0.3))(MIXTURE.log_prob, x_t, t)
    with pytest.raises(ValueError, match="guess must be None"):
        PosteriorMeanEstimator(method="smc")(MIXTURE.log_prob, x_t, t, guess=x_t)


def test_values_are_checked_and_named() -> None:
    estimator = PosteriorMeanEstimator(n_candidates=8)
    x_t, t = normal(4, 2), times(0.5, 4)
    broken = x_t.index_fill(0, torch.tensor([1, 3]), math.nan)
    with pytest.raises(ValueError, match=r"between 0 and 1.*got \[1.0\]"):
        estimator(MIXTURE.log_prob, x_t, torch.tensor([0.5, 0.5, 1.0, 0.5]))
    with pytest.raises(ValueError, match=r"x_t must be finite, but is not in rows \[1, 3\]"):
        estimator(MIXTURE.log_prob, broken, t)
    with pytest.raises(ValueError, match=r"guess must be finite, but is not in rows \[1, 3\]"):
        estimator(MIXTURE.log_prob, x_t, t, guess=broken)
    with pytest.raises(ValueError, match=r"t must be a tensor of floating-point numbers, got 0\.5"):
        estimator(MIXTURE.log_prob, x_t, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x_t must be a tensor of floating-point numbers, got one of torch\.int64"):
        estimator(MIXTURE.log_prob, torch.ones(4, 2, dtype=torch.int64), t)
    with pytest.raises(ValueError, match=r"differentiable.*coefficient=0"):
        estimator(lambda x: MIXTURE.log_prob(x.detach()), x_t, t)
    network = torch.nn.Linear(2, 1).double()  # the result carries a gradient, but none of x
    with pytest.raises(ValueError, match=r"differentiable.*coefficient=0"):
        estimator(lambda x: network(x.detach()).squeeze(-1), x_t, t)
    with pytest.raises(ValueError, match=r"candidates for the data lie between -.* and .*data_scale"):
        estimator(lambda x: -torch.inf * x.square().sum(-1), x_t, t)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"n_candidates": 0}, "n_candidates.*got 0"),
        ({"n_candidates": 1.5}, "n_candidates.*got 1.5"),
        ({"coefficient": "best"}, "'best'"),
        ({"coefficient": math.nan}, "finite"),
        ({"coefficient": ()}, "finite"),
        ({"coefficient": None}, "None"),
        ({"data_scale": -1.0}, "data_scale.*-1"),
        ({"data_scale": math.inf}, "data_scale.*inf"),
        ({"data_scale": "wide"}, "data_scale.*'wide'"),
        ({"guess_spread": 0.0}, "guess_spread.*0"),
        ({"guess_spread": None}, "guess_spread.*None"),
        ({"points": "halton"}, "'halton'"),
        ({"method": "gibbs"}, "'gibbs'"),
        ({"method": "smc", "data_scale": 1.0}, "data_scale must be None"),
        ({"path": "straight"}, "'straight'"),
        ({"source": "laplace"}, "'laplace'"),
    ],
    ids=str,
)
def test_arguments_are_checked_and_named(kwargs: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PosteriorMeanEstimator(**kwargs)  # type: ignore[arg-type]


def test_lengths_of_chains_are_checked() -> None:
    with pytest.raises(ValueError, match="n_steps"):
        MCMC(n_steps=1)
    with pytest.raises(ValueError, match="n_moves"):
        SMC(n_moves=0)
