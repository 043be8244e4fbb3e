"""Sources: scores against finite differences, quantiles, seeding, and errors."""

import copy
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch.distributions import (
    AffineTransform,
    Categorical,
    Distribution,
    Exponential,
    Gumbel,
    Independent,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    SigmoidTransform,
    StudentT,
    TransformedDistribution,
    Uniform,
    VonMises,
)

from sb3_rfm.candidates import draw_candidates
from sb3_rfm.paths import get_path
from sb3_rfm.sources import DistributionSource, GaussianSource, Source, get_source

MIXTURE = MixtureSameFamily(Categorical(torch.tensor([0.3, 0.7])), Normal(torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 1.0])))
CORRELATED = MultivariateNormal(torch.zeros(2).double(), torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double())
SOURCES: list[Source] = [
    GaussianSource(),
    DistributionSource(Laplace(0.0, 1.0)),
    DistributionSource(StudentT(4.0)),
    DistributionSource(MIXTURE),
    DistributionSource(CORRELATED),
    DistributionSource(Independent(Laplace(torch.zeros(2), torch.tensor([1.0, 3.0])), 1)),
]
NAMES = ["gaussian", "laplace", "student", "mixture", "correlated", "independent"]


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_the_score_is_the_gradient_of_the_log_density(source: Source) -> None:
    x = torch.tensor([[0.3, -1.2], [2.0, 0.7]], dtype=torch.float64)
    h = 1e-5
    expected = torch.stack(
        [(source.log_prob(x + h * e) - source.log_prob(x - h * e)) / (2 * h) for e in torch.eye(2, dtype=torch.float64)], -1
    )
    torch.testing.assert_close(source.score(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_a_source_of_double_precision_serves_single_precision(source: Source) -> None:
    if isinstance(source, DistributionSource):
        source = DistributionSource(_in_double(source.distribution))
    x = torch.tensor([[0.3, 0.8], [0.2, 0.7]])
    functions = [source.log_prob, source.score] + [source.opposite, source.from_uniform] * source.has_quantiles
    assert all(function(x).dtype == torch.float32 for function in functions)
    candidates = draw_candidates(get_path("cosine"), source, 4, x, torch.full((2,), 0.5), data_scale=1.0, guess=x)
    assert candidates.x_0.dtype == torch.float32
    assert candidates.log_ratio is not None and candidates.log_ratio.dtype == torch.float32


def _in_double(part: Any) -> Any:
    """A distribution with parameters in double precision."""
    if isinstance(part, Distribution):
        part = copy.copy(part)
        vars(part).update({name: _in_double(value) for name, value in vars(part).items()})
    return part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_a_source_moves_with_all_its_parameters(source: Source) -> None:
    """To a device that any machine has: it knows shapes only, and refuses numbers of another device."""
    moved = source.to("meta")
    x = torch.zeros(3, 2, dtype=torch.float64, device="meta")
    assert moved.log_prob(x).shape == (3,) and moved.score(x).shape == (3, 2)
    assert source.log_prob(torch.zeros(3, 2, dtype=torch.float64)).device.type == "cpu"


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_stein_identity_holds_for_the_samples(source: Source) -> None:
    """E[score] = 0 and E[x . score] = -D: ties samples, density and score together."""
    generator = torch.Generator().manual_seed(0)
    x = source.sample((200_000, 2), torch.zeros(1, dtype=torch.float64), generator)
    score = source.score(x)
    for values, mean in ((score[:, 0], 0.0), ((x * score).sum(-1), -2.0)):
        z = (values.mean() - mean) / (values.std() / math.sqrt(len(values)))
        assert abs(z) < 4.5


def test_the_gaussian_agrees_with_torch_distributions() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(GaussianSource().log_prob(x), Normal(0.0, 1.0).log_prob(x).sum(-1))


@pytest.mark.parametrize("source", [SOURCES[0], SOURCES[1]], ids=["gaussian", "laplace"])
def test_quantiles(source: Source) -> None:
    u = torch.tensor([[0.1, 0.5, 0.8]], dtype=torch.float64)
    x = source.from_uniform(u)
    assert abs(float(x[0, 1])) < 1e-12
    torch.testing.assert_close(source.opposite(x), source.from_uniform(1 - u))
    scipy_s = stats.laplace if isinstance(source, DistributionSource) else stats.norm
    torch.testing.assert_close(x, torch.as_tensor(scipy_s.ppf(u)))


@pytest.mark.parametrize(
    ("source", "scipy_s"),
    [(SOURCES[0], stats.norm), (SOURCES[1], stats.laplace), (SOURCES[2], stats.t(4.0))],
    ids=["gaussian", "laplace", "student"],
)
def test_densities_are_those_of_scipy(source: Source, scipy_s: Any) -> None:
    x = torch.linspace(-6, 6, 14, dtype=torch.float64).view(7, 2)
    torch.testing.assert_close(source.log_prob(x), torch.as_tensor(scipy_s.logpdf(x)).sum(-1))


def test_opposites_of_the_farthest_draws_are_finite() -> None:
    """In single precision the quantile of a far draw is 0 or 1."""
    far = torch.tensor([[-30.0, -8.0, 8.0, 30.0]])
    for source in (SOURCES[0], SOURCES[1]):
        opposite = source.opposite(far)
        assert torch.isfinite(opposite).all() and (opposite.sign() == -far.sign()).all()


def test_samples_follow_the_generator_and_leave_the_global_one_alone() -> None:
    source = DistributionSource(Laplace(0.0, 1.0))
    like = torch.zeros(1)
    before = torch.random.get_rng_state()
    a = source.sample((4, 2), like, torch.Generator().manual_seed(3))
    b = source.sample((4, 2), like, torch.Generator().manual_seed(3))
    c = source.sample((4, 2), like, torch.Generator().manual_seed(4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_variance_is_that_of_one_dimension() -> None:
    assert float(DistributionSource(Laplace(0.0, 2.0)).variance) == pytest.approx(8.0)
    heavy = DistributionSource(StudentT(2.0, 5.0, 3.0))  # no variance: its inner two thirds stand for it
    assert float(heavy.mean) == 5.0
    assert float(heavy.variance) == pytest.approx((3.0 * stats.t(2.0).ppf(stats.norm.cdf(1.0))) ** 2, rel=0.1)
    shifted = DistributionSource(TransformedDistribution(Normal(0.0, 2.0), AffineTransform(5.0, 1.0)))  # torch knows neither
    assert float(shifted.mean) == pytest.approx(5.0, abs=0.1)
    assert float(shifted.variance) == pytest.approx(4.0, rel=0.1)


def test_the_centre_is_a_mode_where_one_is_known_and_else_a_fixed_sample() -> None:
    like = torch.empty(3, 1, 2)
    assert torch.equal(GaussianSource().centre(like), torch.zeros(3, 1, 2))
    assert torch.equal(DistributionSource(Laplace(2.0, 1.0)).centre(like), torch.full((3, 1, 2), 2.0))
    before = torch.random.get_rng_state()
    first, second = (DistributionSource(MIXTURE).centre(like) for _ in range(2))
    assert torch.equal(first, second) and first.shape == like.shape
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "distribution",
    [
        Uniform(-1.0, 1.0),
        Exponential(1.0),
        Poisson(3.0),
        VonMises(0.0, 1.0),
        TransformedDistribution(Uniform(0.0, 1.0), AffineTransform(-1.0, 2.0)),  # torch calls its support real
        TransformedDistribution(LogNormal(0.0, 1.0), AffineTransform(5.0, 1.0)),
    ],
    ids=lambda d: type(d).__name__,
)
def test_sources_that_leave_something_out_are_refused(distribution: Distribution) -> None:
    with pytest.raises(ValueError, match=rf"all of R\^D; {type(distribution).__name__}, with support"):
        get_source(distribution)


@pytest.mark.parametrize(
    "distribution",
    [
        Normal(1e4, 0.1),
        Laplace(-1e4, 0.5),
        Normal(0.0, 1e5),
        Gumbel(0.0, 1.0),
        StudentT(0.5),
        TransformedDistribution(Uniform(0.0, 1.0), SigmoidTransform().inv),
    ],
    ids=str,
)
def test_where_a_source_lies_and_how_wide_it_is_does_not_matter(distribution: Distribution) -> None:
    assert torch.isfinite(DistributionSource(distribution).log_prob(torch.zeros(1, 2))).all()


def test_moments_that_are_known_are_not_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thousand dimensions, a sample of thousands takes minutes."""
    drawn = []
    sample = MultivariateNormal.rsample
    monkeypatch.setattr(MultivariateNormal, "rsample", lambda self, shape: drawn.append(shape.numel()) or sample(self, shape))
    source = DistributionSource(MultivariateNormal(torch.tensor([1.0, 2.0]), torch.diag(torch.tensor([3.0, 4.0]))))
    assert torch.equal(torch.as_tensor(source.mean), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(source.variance, torch.tensor([3.0, 4.0]))
    assert sum(drawn) < 100


def test_bad_sources_are_named() -> None:
    with pytest.raises(ValueError, match="'uniform'"):
        get_source("uniform")
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        get_source(Normal(torch.zeros(2, 3), 1.0))
    with pytest.raises(ValueError, match="dimension 2"):
        DistributionSource(CORRELATED).sample((4, 3), torch.zeros(1))
    assert not DistributionSource(CORRELATED).has_quantiles and not DistributionSource(StudentT(3.0)).has_quantiles
    with pytest.raises(ValueError, match="quantile"):
        DistributionSource(CORRELATED).opposite(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="StudentT"):
        DistributionSource(StudentT(3.0)).from_uniform(torch.full((1, 2), 0.5))
