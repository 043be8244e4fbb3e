"""Samplers on Gaussian targets, where fields and marginals are known in closed form."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_paths import Polynomial
from torch import Tensor
from torch.distributions import Laplace

from sb3_rfm.paths import PATHS, CondOTPath, Path, get_path
from sb3_rfm.posterior import PosteriorMeanEstimator
from sb3_rfm.samplers import denoise, integrate_ode, integrate_sde, langevin, noise_grid, time_grid

MEAN, STD = 0.8, 0.5
N = 20_000


def data_prediction(path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """``E[x_1 | x_t]`` for p1 = N(MEAN, STD^2) and a standard Gaussian source."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = path.alpha(t), path.sigma(t)
        return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)

    return predict


def velocity(path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    def field(x: Tensor, t: Tensor) -> Tensor:
        return path.convert(data_prediction(path)(x, t), x, t.expand(len(x)), source="data", target="velocity")

    return field


def start(path: Path, times: Tensor) -> Tensor:
    """Exact samples at the first time."""
    generator = torch.Generator().manual_seed(0)
    x_0, x_1 = torch.randn(2, N, 1, dtype=torch.float64, generator=generator)
    return path.interpolate(x_0, MEAN + STD * x_1, times[0].expand(N))


def assert_target(x: Tensor, path: Path, t: Tensor, bias: float = 0.0) -> None:
    """Mean and standard deviation are those of the marginal at ``t``, to 4.5 standard errors plus ``bias``."""
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    std = math.sqrt(alpha**2 * STD**2 + sigma**2)
    assert abs(float(x.mean()) - alpha * MEAN) < 4.5 * std / math.sqrt(N) + bias
    assert abs(float(x.std()) - std) < 4.5 * std / math.sqrt(2 * N) + bias


@pytest.mark.parametrize("name", [*sorted(PATHS), "own"])
@pytest.mark.parametrize("method", ["midpoint", "heun"])
def test_the_ode_carries_noise_to_data(name: str, method: str) -> None:
    path = Polynomial() if name == "own" else get_path(name)
    times = time_grid(60, 0.02, 0.98).double()
    x = integrate_ode(velocity(path), start(path, times), times, method=method)  # type: ignore[arg-type]
    assert_target(x, path, times[-1], bias=5e-3)


def test_orders_of_convergence() -> None:
    """Halving the step divides Euler's error by 2, and that of midpoint and Heun by 4 (or better, as midpoint does here)."""
    path = CondOTPath()
    x = torch.tensor([[-1.0], [2.0]], dtype=torch.float64)

    def solve(method: str, n_steps: int) -> Tensor:
        return integrate_ode(velocity(path), x, time_grid(n_steps, 0.1, 0.9).double(), method=method)  # type: ignore[arg-type]

    exact = solve("heun", 2000)
    ratio = {}
    for method in ("euler", "midpoint", "heun"):
        coarse, fine = ((solve(method, n) - exact).abs().max() for n in (40, 80))
        ratio[method] = float(coarse / fine)
    assert ratio["euler"] == pytest.approx(2.0, rel=0.1)
    assert ratio["heun"] == pytest.approx(4.0, rel=0.1)
    assert ratio["midpoint"] > 3.6


@pytest.mark.parametrize("name", [*sorted(PATHS), "own"])
@pytest.mark.parametrize("noise_scale", [0.0, 0.5, 1.0])
def test_one_denoiser_is_ode_and_reverse_sde(name: str, noise_scale: float) -> None:
    path = Polynomial() if name == "own" else get_path(name)
    times = time_grid(150, 0.02, 0.98).double()
    generator = torch.Generator().manual_seed(1)
    x = denoise(data_prediction(path), start(path, times), times, path, noise_scale, generator)
    assert_target(x, path, times[-1], bias=2e-2)


@pytest.mark.parametrize("name", ["cosine", "linear_vp"])
def test_a_noisy_step_is_that_of_ddpm(name: str) -> None:
    """Ho et al. (arXiv 2006.11239), eq. 7, whose alpha-bar is our alpha^2 and whose steps go from t to t - 1."""
    path, times = get_path(name), torch.tensor([0.5, 0.6], dtype=torch.float64)
    before, after = path.alpha(times) ** 2  # of the noisier and of the cleaner state
    beta = 1 - before / after

    def step(x: float, x_1: float) -> Tensor:
        state = torch.full((50, 1), x, dtype=torch.float64)
        return denoise(lambda *_: torch.full_like(state, x_1), state, times, path, 1.0, torch.Generator().manual_seed(0))

    noise = torch.randn(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = after.sqrt() * beta / (1 - before) * 0.7 + (1 - beta).sqrt() * (1 - after) / (1 - before) * -1.3
    variance = (1 - after) / (1 - before) * beta
    torch.testing.assert_close(step(-1.3, 0.7), mean + variance.sqrt() * noise)


def test_denoising_without_noise_is_euler_on_the_straight_path() -> None:
    path, times = CondOTPath(), time_grid(7, 0.01, 0.99).double()
    x = start(path, times)[:50]
    torch.testing.assert_close(
        denoise(data_prediction(path), x, times, path, order=1),
        integrate_ode(velocity(path), x, times),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("name", sorted(PATHS))
@pytest.mark.parametrize(("order", "factor"), [(1, 2.0), (2, 4.0)])
def test_order_of_denoising(name: str, order: Any, factor: float) -> None:
    """Halving the step divides the error by 2 or 4."""
    path, x = get_path(name), torch.tensor([[-1.0], [2.0]], dtype=torch.float64)

    def solve(n_steps: int) -> Tensor:
        return denoise(data_prediction(path), x, time_grid(n_steps, 0.1, 0.9).double(), path, order=order)

    exact = integrate_ode(velocity(path), x, time_grid(8000, 0.1, 0.9).double(), method="heun")
    coarse, fine = ((solve(n) - exact).abs().max() for n in (300, 600))
    assert float(coarse / fine) == pytest.approx(factor, rel=0.15)


@pytest.mark.parametrize("name", sorted(PATHS))
def test_a_noise_grid_takes_the_noise_away_by_squares(name: str) -> None:
    path, times = get_path(name), noise_grid(get_path(name), 5)
    share = path.sigma(times) / (path.alpha(times) + path.sigma(times))
    assert (times[0], times[-1]) == (0, 1)
    remaining = (share - share[-1]) / (share[0] - share[-1])
    torch.testing.assert_close(remaining, torch.tensor([1, 0.64, 0.36, 0.16, 0.04, 0]), rtol=0, atol=1e-3)
    if name == "cond_ot":
        torch.testing.assert_close(times, torch.tensor([0, 0.36, 0.64, 0.84, 0.96, 1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(PATHS))
def test_long_noise_grids_are_as_exact_as_short_ones(name: str) -> None:
    path, times = get_path(name), noise_grid(get_path(name), 2000, dtype=torch.float64)
    assert times.dtype == torch.float64 and bool((times.diff() > 0).all())
    share = path.sigma(times) / (path.alpha(times) + path.sigma(times))
    remaining = (share - share[-1]) / (share[0] - share[-1])
    torch.testing.assert_close(
        remaining[1:-1], (1 - torch.arange(1, 2000, dtype=torch.float64) / 2000) ** 2, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("std", [0.1, 0.3, 0.9])
def test_five_steps_of_second_order_keep_the_spread(std: float) -> None:
    """Of a Gaussian, where the exact data prediction is known; even steps of first order lose a fifth and more."""
    path = CondOTPath()

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return t * std**2 / (t**2 * std**2 + (1 - t) ** 2) * x

    def spread(times: Tensor, order: Any) -> float:
        return float(denoise(exact, torch.ones(1, 1), times, path, order=order)) / std

    assert 0.75 < spread(noise_grid(path, 5), 2) < 1.05
    assert spread(noise_grid(path, 20), 2) == pytest.approx(1.0, abs=0.07)
    assert spread(time_grid(5), 1) < 0.8


def test_denoising_ends_at_the_last_prediction_and_stays_within_bounded_ones() -> None:
    path, times = CondOTPath(), time_grid(5, 0.01, 1.0)
    x = denoise(lambda x, t: torch.sign(x), 50 * torch.randn(100, 2), times, path)
    assert (x.abs() == 1).all()


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_the_sde_has_the_marginals_of_the_ode(size: float) -> None:
    path, times = CondOTPath(), time_grid(300, 0.02, 0.98).double()

    def score(x: Tensor, t: Tensor) -> Tensor:
        return path.convert(data_prediction(path)(x, t), x, t.expand(len(x)), source="data", target="score")

    generator = torch.Generator().manual_seed(2)
    x = integrate_sde(velocity(path), score, start(path, times), times, lambda t: size * (1 - t).sqrt(), generator)
    assert_target(x, path, times[-1], bias=1e-2)


def test_a_laplace_source_is_carried_to_the_target_by_estimated_fields() -> None:
    """Velocity and score of a source that is not Gaussian come from the estimator itself (reverse score matching)."""
    source = Laplace(torch.tensor(0.0, dtype=torch.float64), 1.0)
    estimator = PosteriorMeanEstimator("cond_ot", 32, "optimal", source=source, data_scale=1.0)
    generator = torch.Generator().manual_seed(3)

    def fields(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        result = estimator(lambda y: -0.5 * ((y - MEAN) / STD).square().sum(-1), x, t.expand(len(x)), generator)
        return result.velocity, result.score

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        x = source.sample((1000, 1))
    times = time_grid(25, 0.03, 0.97).double()
    x = integrate_sde(
        lambda x, t: fields(x, t)[0], lambda x, t: fields(x, t)[1], x, times, lambda t: (1 - t).sqrt(), generator
    )
    assert float(x.mean()) == pytest.approx(0.97 * MEAN, abs=0.06)
    assert float(x.std()) == pytest.approx(0.97 * STD, abs=0.06)


def test_langevin_dynamics_sample_their_score() -> None:
    x = torch.zeros(5000, 1, dtype=torch.float64)
    x = langevin(lambda x: -(x - MEAN) / STD**2, x, 0.01, 300, torch.Generator().manual_seed(4))
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.04)
    assert float(x.std()) == pytest.approx(STD, abs=0.03)


def test_grids_have_the_precision_of_the_state() -> None:
    x = integrate_ode(
        lambda x, t: x * t, torch.ones(1, 1, dtype=torch.float64), time_grid(10_000, dtype=torch.float64), "heun"
    )
    assert x.dtype == torch.float64 and float(x) == pytest.approx(math.exp(0.5), rel=1e-8)


def test_decreasing_times_lead_back() -> None:
    there = integrate_ode(lambda x, t: x * t, torch.ones(1, 1), time_grid(100), "heun")
    back = integrate_ode(lambda x, t: x * t, there, time_grid(100).flip(0), "heun")
    assert float(back) == pytest.approx(1.0, abs=1e-4)


def test_bad_arguments_are_named() -> None:
    for n_steps in (0, 2.5):
        with pytest.raises(ValueError, match=f"n_steps.*got {n_steps}"):
            time_grid(n_steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"n_steps.*got -3"):
        langevin(lambda x: x, torch.zeros(1, 1), 0.1, -3)
    with pytest.raises(ValueError, match="t_min < t_max"):
        time_grid(5, 0.9, 0.1)
    with pytest.raises(ValueError, match="'rk4'"):
        integrate_ode(lambda x, t: x, torch.zeros(1, 1), time_grid(2), method="rk4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"increasing times, got \[1.0, 0.5, 0.0\]"):
        integrate_sde(lambda x, t: x, lambda x, t: x, torch.zeros(1, 1), time_grid(2).flip(0), lambda t: t)
    with pytest.raises(ValueError, match=r"noise_scale.*got 2.0"):
        denoise(lambda x, t: x, torch.zeros(1, 1), time_grid(2, 0.1, 0.9), CondOTPath(), noise_scale=2.0)
    with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
        denoise(lambda x, t: x, torch.zeros(1, 1), time_grid(2, 0.1, 0.9), CondOTPath(), order=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"increasing times, got \[1.0, 0.5, 0.0\]"):
        denoise(lambda x, t: x, torch.zeros(1, 1), time_grid(2).flip(0), CondOTPath())


@pytest.mark.parametrize(
    "sample",
    [
        lambda field, x: integrate_ode(field, x, time_grid(2)),
        lambda field, x: integrate_ode(lambda x, t: field(x, t) if t == 0.25 else x, x, time_grid(2), "midpoint"),
        lambda field, x: integrate_ode(lambda x, t: field(x, t) if t == 0.5 else x, x, time_grid(1, 0.0, 0.5), "heun"),
        lambda field, x: integrate_sde(field, lambda x, t: x, x, time_grid(2), lambda t: t),
        lambda field, x: integrate_sde(lambda x, t: x, field, x, time_grid(2), lambda t: t),
        lambda field, x: denoise(field, x, time_grid(2, 0.1, 0.9), CondOTPath()),
        lambda field, x: langevin(lambda x: field(x, torch.zeros(())), x, 0.1, 2),
    ],
    ids=["ode", "middle of a step", "end of a step", "velocity of the sde", "score of the sde", "denoise", "langevin"],
)
def test_a_field_that_would_broadcast_is_refused(sample: Any) -> None:
    """As that of a network whose last dimension was squeezed away."""
    with pytest.raises(ValueError, match=r"the shape of its argument, \(4, 1\), got \(4,\)"):
        sample(lambda x, t: x.squeeze(-1), torch.zeros(4, 1))
