"""The sampling examples run on a small budget, and learn something."""

import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sb3_rfm.benchmark import densities, estimator, estimator_errors, estimator_in_use, sample_quality

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import bayes_32d
import boltzmann_2d


def test_boltzmann_2d(tmp_path: Path) -> None:
    common = ["--densities", "moons", "--samples", "200", "--runs", str(tmp_path)]
    _, untrained = boltzmann_2d.main([*common, "--updates", "1", "--coefficients", "optimal"])
    rows = boltzmann_2d.main([*common, "--updates", "60"])
    by_coefficient = {row["coefficient"]: row for row in rows}
    assert set(by_coefficient) == {"(exact)", "noise", "gradient", "optimal"}
    assert by_coefficient["optimal"]["W2"] < 0.6 * untrained["W2"]
    assert by_coefficient["optimal"]["ESS"] > 2 * untrained["ESS"]
    assert (tmp_path / "boltzmann_2d_moons.png").stat().st_size > 10_000
    assert len((tmp_path / "boltzmann_2d.csv").read_text().splitlines()) == 5


def test_the_forty_modes_are_a_mixture_of_gaussians() -> None:
    """Against torch's own mixture, everywhere up to one constant."""
    target = boltzmann_2d.forty_modes()
    components = torch.distributions.Independent(torch.distributions.Normal(target.modes, 1.31 / 25), 1)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(40)), components)
    x = torch.cat([target.samples[:200], 2 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))])
    difference = target.log_prob(x) - mixture.log_prob(x)
    assert (difference - difference.median()).abs().max() < 1e-2


def test_most_of_the_forty_modes_are_found_in_a_few_steps() -> None:
    torch.manual_seed(0)
    target = boltzmann_2d.forty_modes()
    samples, log_q, _ = boltzmann_2d.sample(boltzmann_2d.fit(target, "optimal", 150), 1000, n_steps=30)
    result = boltzmann_2d.assess(target, samples, log_q)
    assert result["modes"] > 0.85 and result["W2"] < 0.4
    everywhere = 1.6 * (2 * torch.rand(1000, 2) - 1)
    assert boltzmann_2d.assess(target, everywhere, torch.zeros(1000))["modes"] < 0.6, "noise finds few of them"


def test_densities_of_flows_and_distances_are_right() -> None:
    """The flow to N(0.3, 0.5^2) in closed form: samples, log-densities, and an effective sample size near 1."""

    class Exact(boltzmann_2d.DataMean):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            a, s = t[:, None], 1 - t[:, None]
            return 0.3 + a * 0.25 / (a**2 * 0.25 + s**2) * (x_t - a * 0.3)

    torch.manual_seed(0)
    samples, log_q, trajectories = boltzmann_2d.sample(Exact(1.0), 500)
    target = boltzmann_2d.Target(
        lambda x: -0.5 * ((x - 0.3) / 0.5).square().sum(-1),
        0.3 + 0.5 * torch.randn(500, 2),
        torch.tensor([[0.3, 0.3]]),
        math.inf,
        2.0,
        1,
    )
    result = boltzmann_2d.assess(target, samples, log_q)
    assert result["ESS"] > 0.99 and result["modes"] == 1
    assert result["W2"] < 0.2 and abs(result["MMD^2"]) < 0.02
    normalised = -0.5 * ((samples - 0.3) / 0.5).square().sum(-1) - math.log(2 * math.pi * 0.25)
    assert (log_q - normalised).abs().mean() < 0.05
    assert trajectories.shape == (121, 500, 2)


def test_wasserstein_is_that_of_a_shift() -> None:
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    assert sample_quality.wasserstein_2(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(5.0, rel=1e-5)
    with pytest.raises(ValueError, match=r"\(100, 2\) and \(50, 2\)"):
        sample_quality.wasserstein_2(x, x[:50])


def test_mmd_of_gaussians_in_closed_form() -> None:
    """With a Gaussian kernel, that of two Gaussians a shift apart is an integral of Gaussians."""
    generator, shift, width = torch.Generator().manual_seed(0), 1.0, 0.8
    x, y = (torch.randn(4000, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    variance = 2 + width**2
    exact = 2 * width / math.sqrt(variance) * (1 - math.exp(-0.5 * shift**2 / variance))
    assert sample_quality.squared_mmd(x, y + shift, width) == pytest.approx(exact, abs=0.02)
    assert abs(sample_quality.squared_mmd(x, y, width)) < 2e-3


def test_effective_share_of_known_weights() -> None:
    """Weights 1, 1, 2 are worth 16 / 6 samples; one that is not finite counts as none."""
    log_weights = torch.tensor([0.0, 0.0, math.log(2)])
    assert sample_quality.effective_share(log_weights + 5, torch.zeros(3)) == pytest.approx(16 / 6 / 3)
    assert sample_quality.effective_share(torch.zeros(2), torch.tensor([0.0, math.nan])) == pytest.approx(0.5)


def test_bayes_32d(tmp_path: Path) -> None:
    rows = {
        row["coefficient"]: row for row in bayes_32d.main(["--updates", "60", "--samples", "120", "--runs", str(tmp_path)])
    }
    exact, optimal = rows["(exact)"], rows["optimal"]
    prior = torch.randn(120, 32, generator=torch.Generator().manual_seed(0))
    target = bayes_32d.LogisticRegression()
    truth = target.exact_samples(120, n_steps=50)
    assert exact["W2"] < optimal["W2"] < 0.7 * sample_quality.wasserstein_2(prior, truth)
    assert (tmp_path / "bayes_32d.png").stat().st_size > 10_000


def test_the_reference_in_32_dimensions_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hamiltonian Monte Carlo of a Gaussian that is not the prior; chains are independent, so standard errors are known."""
    target = bayes_32d.LogisticRegression()
    monkeypatch.setattr(target, "log_prob", lambda x: -0.5 * ((x - 1.0) / 0.5).square().sum(-1))
    torch.manual_seed(0)
    samples = target.exact_samples(500, n_steps=60)
    assert ((samples.mean(0) - 1.0) / 0.5 * 500**0.5).abs().max() < 4.5
    assert ((samples.var(0) / 0.25 - 1) * (500 / 2) ** 0.5).abs().max() < 4.5


def test_the_estimator_benchmark(tmp_path: Path) -> None:
    arguments = ["--rows", "24", "--candidates", "16", "32", "--times", "0.2", "0.8", "--output", str(tmp_path)]
    rows = estimator.main(["--densities", "gaussian-6-1", "critic-1-0.1", *arguments])
    optimal = [row for row in rows if row["rule"] == "optimal"]
    assert len(optimal) == 32 and all(math.isfinite(row["mse"]) for row in rows)
    exact = [r for r in optimal if r["density"].startswith("Gaussian") and r["candidates"] == "localised"]
    assert all(row["mse"] < 1e-2 * row["mean squared velocity"] for row in exact)
    # Cells whose verdict is uncertain were measured again.
    for row in optimal:
        assert row["rows"] == 24 * 64 or (row["ratio"] + 2 * row["ratio error"] < 1.05 and row["rows"] in (24, 24 * 8))
    for name in ("errors.csv", "equivalence.csv", "rules.txt", "equivalence.txt", "errors.png"):
        assert (tmp_path / name).stat().st_size > 100
    updated = estimator.main(["--densities", "gaussian-1-1", "--update", *arguments])
    assert {row["density"] for row in updated} == {row["density"] for row in rows} | {"Gaussian, 1-D, condition 1"}


def test_the_estimator_benchmark_on_a_trained_critic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the model is kept under runs/
    for module in (estimator, estimator_errors, estimator_in_use):
        monkeypatch.setattr(module, "PLAIN", (16, 64))
    monkeypatch.setattr(densities.Critic, "reference", (32, 64))
    monkeypatch.setattr(estimator_in_use, "seconds", partial(estimator_in_use.seconds, n_states=8, n_rounds=1))
    monkeypatch.setattr(estimator, "rounding", partial(estimator_in_use.rounding, n_states=64))
    arguments = ["--critic", "Pendulum-v1", "--critic-steps", "130", "--critic-states", "2", "--output", str(tmp_path)]
    arguments += ["--densities", "--rows", "2", "--candidates", "8", "32", "--times", "0.5", "0.9"]
    rows = estimator.main(arguments)
    assert len({row["density"] for row in rows}) == 2
    estimator.main([*arguments, "--clock"])  # the model is loaded now
    assert len((tmp_path / "race.csv").read_text().splitlines()) == 1 + 2 * 2 * 5
    assert "| guess, antithetic | 8 |" in (tmp_path / "race.txt").read_text()
    rounded = estimator.main([*arguments, "--rounding"])
    assert all(0 < row["squared difference"] < row["mse"] for row in rounded)
    assert "| 32 |" in (tmp_path / "rounding.txt").read_text()
    monkeypatch.setattr(estimator, "regression", partial(estimator_in_use.regression, n_states=64, n_draws=20))
    rows = [row for row in estimator.main([*arguments, "--regression"]) if row["t"] == 0.36]
    gradient, few, many = (
        [r for r in rows if (r["coefficient"], r["K"]) == way] for way in ((1.0, 4), ("optimal", 4), ("optimal", 16))
    )
    for alone, a, b in zip(gradient, few, many, strict=True):  # at each of two temperatures
        assert b["squared bias"] < a["squared bias"] and a["share of the way"] < b["share of the way"] < 1
        assert a["variance"] < a["squared bias"] and alone["squared bias"] < alone["variance"]
    model = densities.trained_model("Pendulum-v1", 130)
    for row in estimator_in_use.regression(model, [("optimal", 2_000)], times=[0.36], n_states=64, n_draws=20):
        assert row["share of the way"] == pytest.approx(1, abs=0.05)
        assert abs(row["squared bias"]) < 0.02 * row["squared distance"]
    assert "| scalar | 4 |" in (tmp_path / "regression.txt").read_text()


def test_plain_samples_are_counted_by_interpolation() -> None:
    curve = [(n, 8 / n) for n in (16, 64, 256)]
    assert estimator_errors.worth(curve, 8 / 100) == pytest.approx(100)
    assert estimator_errors.worth(curve, 1.0) == 16 and estimator_errors.worth(curve, 1e-3) == math.inf


def test_candidates_and_points_do_not_share_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One generator for both would make the candidates depend on the point that they are for."""
    drawn = []

    class Recorded(densities.Gaussian):
        def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
            drawn.append(torch.randn(n, self.dim, generator=generator))
            return drawn[-1]

    def rule(sample: estimator_errors.Sample) -> torch.Tensor:
        drawn.append(sample.values)
        return torch.zeros(len(sample.values))

    monkeypatch.setitem(estimator_errors.RULES, "recorded", rule)
    estimator_errors.measure_cell([Recorded(2, 1)], 0.5, 4, "source", 8, 0, ("noise (0)", "recorded"))
    points, candidates = drawn
    assert not torch.isin(points, candidates).any()
    purposes = ((purpose, seed) for purpose in ("points", "candidates", "truth") for seed in range(20))
    assert len({float(torch.rand((), generator=densities.stream(*each))) for each in purposes}) == 60


def test_a_race_compares_at_the_same_time_and_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain samples cost 1 ms and K / 10 ms, with error 8 / K; the other ways cost 11 ms, with an error of 0.02."""

    def seconds(model: object, contenders: list[tuple[str, int, object]]) -> list[float]:
        return [1e-3 * (1 + n / 10) if coefficient == 0 else 11e-3 for _, n, coefficient in contenders]

    monkeypatch.setattr(estimator_in_use, "seconds", seconds)
    cell = {"density": "critic of somewhere", "t": 0.5}
    rows = [cell | {"candidates": "source", "K": n, "rule": "noise (0)", "mse": 8 / n} for n in estimator_errors.PLAIN]
    rows += [cell | {"candidates": "guess, antithetic", "K": 8, "rule": "optimal", "mse": 0.02}]
    (result,) = estimator_in_use.race(SimpleNamespace(env_name="somewhere"), rows)
    assert result["affordable plain samples"] == pytest.approx(100)
    assert result["error gain"] == pytest.approx(8 / 100 / 0.02)
    assert result["plain samples for the same error"] == pytest.approx(400)
    assert result["time gain"] == pytest.approx(41 / 11)


@pytest.mark.parametrize("name", ["crescents", "forty-modes", "many-well", "gaussian-8-10"])
def test_the_benchmark_knows_the_truth(name: str) -> None:
    """Posterior means against averages over exact samples of the density, weighted by p(x_t | x_1)."""
    density = densities.densities()[name]()
    generator = torch.Generator().manual_seed(0)
    t = 0.15
    pool = density.sample(40_000, generator).double()
    x_t = t * density.sample(8, generator) + (1 - t) * torch.randn(8, density.dim, generator=generator)
    log_weights = -0.5 * torch.cdist(x_t.double(), t * pool).square() / (1 - t) ** 2
    weights = torch.softmax(log_weights, 1)
    mean = weights @ pool
    error = (
        weights.square() @ pool.square() - 2 * mean * (weights.square() @ pool) + mean**2 * weights.square().sum(1)[:, None]
    ).sqrt()
    z = (density.data_mean(x_t, t) - mean) / error
    assert z.abs().max() < 5.5  # the largest of up to 256
