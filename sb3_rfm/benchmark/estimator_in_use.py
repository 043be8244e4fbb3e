"""The estimator at replayed states of a trained model: as what a flow is regressed on, against the clock, and in bfloat16."""

import itertools
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sb3_rfm.actors import LATENT_SCALE, boltzmann_log_prob, clip_latents, squash, unsquash
from sb3_rfm.benchmark.densities import PATH, temperatures
from sb3_rfm.benchmark.estimator_errors import KINDS, PLAIN, plain_curves, worth
from sb3_rfm.benchmark.tables import Row
from sb3_rfm.control_variates import Coefficient
from sb3_rfm.posterior import PosteriorMeanEstimator
from sb3_rfm.rfm import RFM


class Replayed:
    """A batch of replayed states of a trained model, with points of the path at them.

    :param model: Trained model
    :param n_states: Size of the batch
    """

    def __init__(self, model: Any, n_states: int) -> None:
        batch = model.replay_buffer.sample(n_states)
        self.model = model
        with torch.no_grad():
            self.encoded = model.critic.encode(model.critic.features(batch.observations))
            self.encoded_actor = model.actor.network.encode(model.actor.features(batch.observations))
        self.latents = unsquash(batch.actions)

    def points(self, t: Tensor) -> Tensor:
        """Points ``x_t`` from noise to the replayed actions, (B, D)."""
        return PATH.interpolate(torch.randn_like(self.latents), self.latents, t)

    @torch.no_grad()
    def guess(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The flow's own prediction, (B, D)."""
        return clip_latents(self.model.actor.predict_data(self.encoded_actor, x_t, t))

    def log_prob(self, u: Tensor, temperature: float, reduced: bool = False) -> Tensor:
        """Log-density of the Boltzmann policy, (B, K, D) → (B, K).

        :param u: Latents
        :param temperature: λ
        :param reduced: Evaluate the critics in bfloat16
        """
        q: Tensor = self.model.critic.split_q(self.encoded, squash(u), reduced)
        return boltzmann_log_prob(u, q, temperature)

    def targets(
        self, estimator: PosteriorMeanEstimator, x_t: Tensor, t: Tensor, temperature: float, n_draws: int
    ) -> tuple[Tensor, Tensor]:
        """What the flow is regressed on: mean over several draws of the candidates, and variance of one, (B, D) each."""
        guess, log_prob = self.guess(x_t, t), partial(self.log_prob, temperature=temperature)
        draws = (estimator.draw(x_t, t, guess=guess) for _ in range(n_draws))
        targets = torch.stack([clip_latents(estimator.estimate(log_prob, x_t, t, drawn).x1) for drawn in draws])
        return targets.mean(0), targets.var(0)


def in_use(n_candidates: int, coefficient: Coefficient = RFM.default_coefficient) -> PosteriorMeanEstimator:
    """The estimator as RFM has it at its defaults, but for the number of candidates, or the coefficient."""
    return PosteriorMeanEstimator(PATH, n_candidates, coefficient, data_scale=LATENT_SCALE, points="antithetic")


def regression(
    model: Any,
    ways: Sequence[tuple[Coefficient, int]] = ((0.0, 4), (1.0, 4), ("optimal", 4), ("scalar", 4), ("optimal", 16)),
    times: Sequence[float] = (0.36, 0.64, 0.84, 0.96),
    n_states: int = 128,
    n_draws: int = 60,
) -> list[Row]:
    """The estimate as what a flow is regressed on: a flow averages over the candidates, so that of the error of a single
    estimate the variance goes, and the bias stays.

    :param model: Trained model
    :param ways: Coefficients and numbers K of candidates
    :param times: t
    :param n_states: States at which it is estimated
    :param n_draws: Draws of candidates at each of them; a tenth as many of 2,000 candidates are taken for the truth
    :return: For each temperature, way and t: the squared distance from the flow's prediction to the true data mean, squared
        bias and variance of the regression target, means over the states; and how far the mean target goes that way, 1 for
        one without bias
    """
    states, rows = Replayed(model, n_states), []
    for temperature, value in itertools.product(temperatures(model), times):
        t = torch.full((n_states,), value)
        x_t = states.points(t)
        targets = partial(states.targets, x_t=x_t, t=t, temperature=temperature)
        n_truths = max(2, n_draws // 10)
        truth, truth_variance = targets(in_use(2_000), n_draws=n_truths)
        guess = states.guess(x_t, t)
        gap = truth - guess
        for coefficient, n in ways:
            mean, variance = targets(in_use(n, coefficient), n_draws=n_draws)
            noise = variance / n_draws + truth_variance / n_truths
            rows.append(
                {"temperature": temperature, "coefficient": coefficient, "K": n, "t": value}
                | {"squared distance": gap.square().sum(-1).mean().item()}
                | {"squared bias": ((mean - truth).square() - noise).sum(-1).mean().item()}
                | {"variance": variance.sum(-1).mean().item()}
                | {"share of the way": (((mean - guess) * gap).sum() / gap.square().sum()).item()}
            )
    return rows


def rounding(
    model: Any, candidates: Sequence[int] = (4, 32), times: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9), n_states: int = 256
) -> list[Row]:
    """What bfloat16 does to the estimate, as the algorithms make it, beside what the number of candidates does.

    :param model: Trained model
    :param candidates: Numbers K of candidates
    :param times: t
    :param n_states: States at which it is estimated
    :return: For each temperature, K and t, the mean squared error of the data mean in float32 (against 2,000 candidates),
        and the mean squared difference that evaluating the same candidates in bfloat16 makes
    """
    states, rows = Replayed(model, n_states), []
    for temperature, n, value in itertools.product(temperatures(model), candidates, times):
        t = torch.full((n_states,), value)
        x_t = states.points(t)
        guess = states.guess(x_t, t)
        estimator, many = in_use(n), in_use(2_000)
        drawn = estimator.draw(x_t, t, guess=guess)
        log_prob = partial(states.log_prob, temperature=temperature)
        exact = estimator.estimate(log_prob, x_t, t, drawn).x1
        rounded = estimator.estimate(partial(log_prob, reduced=True), x_t, t, drawn).x1
        truth = many.estimate(log_prob, x_t, t, many.draw(x_t, t, guess=guess)).x1
        error, difference = ((x - exact).square().sum(-1).mean().item() for x in (truth, rounded))
        rows.append({"temperature": temperature, "K": n, "t": value, "mse": error, "squared difference": difference})
    return rows


def seconds(model: Any, contenders: Sequence[tuple[str, int, Any]], n_states: int = 256, n_rounds: int = 9) -> list[float]:
    """Time of one estimate for a batch of replayed states, the median of rounds in which all contenders take turns.

    :param model: Trained model
    :param contenders: Kind of candidates, K and coefficient
    :param n_states: Size of the batch
    :param n_rounds: Number of rounds
    """
    states, t = Replayed(model, n_states), torch.linspace(0.05, 0.95, n_states)
    x_t, log_prob = states.points(t), partial(states.log_prob, temperature=float(model.policy.temperature))

    def once(kind: str, n: int, coefficient: Any) -> float:
        data_scale, points = 1.0 if KINDS[kind].localised else None, KINDS[kind].points
        estimator = PosteriorMeanEstimator(PATH, n, coefficient, data_scale=data_scale, points=points)
        began = time.perf_counter()
        guess = states.guess(x_t, t) if KINDS[kind].guess else None
        estimator.estimate(log_prob, x_t, t, estimator.draw(x_t, t, guess=guess))
        return time.perf_counter() - began

    rounds = [[once(*contender) for contender in contenders] for _ in range(n_rounds + 1)]
    return [sorted(times)[n_rounds // 2] for times in zip(*rounds[1:], strict=True)]  # the first warms up


def race(model: Any, rows: list[Row]) -> list[Row]:
    """Plain samples and the coefficient ``"optimal"`` in the same time, and to the same error, on a trained critic.

    :param model: Trained model
    :param rows: Errors, among others those of its critic
    :return: One row for each way, temperature and t
    """
    plain = [n for n in PLAIN if n <= 500]
    ways = [("source", 32), ("localised", 32), ("guess, Sobol", 32), ("guess, antithetic", 32), ("guess, antithetic", 8)]
    measured = seconds(model, [("source", n, 0.0) for n in plain] + [(kind, n, "optimal") for kind, n in ways])
    clock, own = list(zip(plain, measured, strict=False)), dict(zip(ways, measured[len(plain) :], strict=True))

    curves, result = plain_curves(rows), []
    for row in rows:
        way = (row["candidates"], row["K"])
        if row["rule"] != "optimal" or way not in own or model.env_name not in row["density"]:
            continue
        curve = curves[row["density"], row["t"]]
        affordable = max(1.0, along([(time, n) for n, time in clock], own[way]))
        same_time = math.exp(along([(math.log(n), math.log(mse)) for n, mse in curve], math.log(affordable)))
        needed = worth(curve, row["mse"])
        result.append(
            {key: row[key] for key in ("density", "candidates", "K", "t")}
            | {"seconds": own[way], "affordable plain samples": affordable, "error gain": same_time / row["mse"]}
            | {"plain samples for the same error": needed, "time gain": along(clock, needed) / own[way]}
        )
    return result


def along(points: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear interpolation, with the first and last pieces extended."""
    i = max(1, min(sum(x_i < x for x_i, _ in points), len(points) - 1))
    (x_0, y_0), (x_1, y_1) = points[i - 1 : i + 1]
    return y_0 + (y_1 - y_0) * (x - x_0) / (x_1 - x_0)
