"""Probability paths: derivatives against autograd, conversions against each other, ends at source and target."""

import pytest
import torch
from torch import Tensor

from sb3_rfm.paths import PATHS, CondOTPath, LinearVPPath, Path, VEPath, get_path


class Polynomial(Path):
    """A user's own path, given by nothing but its four functions."""

    def alpha(self, t: Tensor) -> Tensor:
        return t**2

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t**3

    def alpha_dot(self, t: Tensor) -> Tensor:
        return 2 * t

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -3 * t**2


ALL = [cls() for cls in PATHS.values()] + [Polynomial()]
PARAMETRISATIONS = ("velocity", "noise", "data", "score")


@pytest.fixture
def times() -> Tensor:
    return torch.linspace(0.02, 0.98, 25, dtype=torch.float64)


@pytest.mark.parametrize("path", ALL, ids=lambda p: type(p).__name__)
def test_derivatives_are_those_of_alpha_and_sigma(path: Path, times: Tensor) -> None:
    for function, derivative in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        t = times.clone().requires_grad_(True)
        value = function(t)
        (expected,) = torch.autograd.grad(value.sum(), t) if value.requires_grad else (torch.zeros_like(t),)
        torch.testing.assert_close(derivative(times), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", ALL, ids=lambda p: type(p).__name__)
def test_time_runs_from_noise_to_data(path: Path, times: Tensor) -> None:
    signal_to_noise = path.alpha(times) / path.sigma(times)
    assert (signal_to_noise.diff() > 0).all()


@pytest.mark.parametrize("name", ["cosine", "linear_vp"])
def test_variance_preserving_paths_preserve_variance(name: str, times: Tensor) -> None:
    path = get_path(name)
    torch.testing.assert_close(path.alpha(times) ** 2 + path.sigma(times) ** 2, torch.ones_like(times))


@pytest.mark.parametrize("path", ALL, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("source", PARAMETRISATIONS)
@pytest.mark.parametrize("target", PARAMETRISATIONS)
def test_conversions_agree_with_the_hidden_pair(path: Path, source: str, target: str, times: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, x_1 = torch.randn(2, 25, 3, dtype=torch.float64, generator=generator)
    x_t = path.interpolate(x_0, x_1, times)
    known = {
        "velocity": path.velocity(x_0, x_1, times),
        "noise": x_0,
        "data": x_1,
        "score": -x_0 / path.sigma(times)[:, None],
    }
    converted = path.convert(known[source], x_t, times, source=source, target=target)
    torch.testing.assert_close(converted, known[target], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", ALL, ids=lambda p: type(p).__name__)
def test_velocity_is_the_time_derivative_of_the_interpolation(path: Path, times: Tensor) -> None:
    x_0, x_1 = torch.ones(25, 1, dtype=torch.float64), torch.full((25, 1), -2.0, dtype=torch.float64)
    h = 1e-6
    difference = (path.interpolate(x_0, x_1, times + h) - path.interpolate(x_0, x_1, times - h)) / (2 * h)
    torch.testing.assert_close(path.velocity(x_0, x_1, times), difference, rtol=1e-6, atol=1e-6)


def test_interpolation_broadcasts_over_candidates() -> None:
    t = torch.tensor([0.25, 0.5])
    x = CondOTPath().interpolate(torch.zeros(2, 7, 3), torch.ones(2, 7, 3), t)
    assert x.shape == (2, 7, 3)
    torch.testing.assert_close(x[:, 0, 0], t)


def test_get_path_returns_paths_as_they_are_and_names_the_choices() -> None:
    path = LinearVPPath(beta_max=10.0)
    assert get_path(path) is path
    with pytest.raises(ValueError, match="cond_ot"):
        get_path("optimal_transport")
    with pytest.raises(ValueError, match="Path"):
        get_path(3)  # type: ignore[arg-type]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="sigma_min=2"):
        VEPath(sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ValueError, match="sigma_max=inf"):
        VEPath(sigma_max=float("inf"))
    with pytest.raises(ValueError, match="beta_min=-1"):
        LinearVPPath(beta_min=-1.0)
    with pytest.raises(ValueError, match="beta_max=inf"):
        LinearVPPath(beta_max=float("inf"))
    x, t = torch.zeros(1, 1), torch.full((1,), 0.5)
    with pytest.raises(ValueError, match="'flow'"):
        CondOTPath().convert(x, x, t, source="flow", target="data")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(1, 1\), got \(1, 3\)"):
        CondOTPath().convert(torch.zeros(1, 3), x, t, source="noise", target="data")
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3, 3, 2\)"):
        CondOTPath().interpolate(torch.zeros(3, 2), torch.zeros(3, 3, 2), torch.zeros(3))
