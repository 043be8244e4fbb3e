"""Targets whose posterior means are known: what the estimator is measured on.

The posterior mean of the data end of the conditional-OT path comes from a closed form or quadrature; for critics in more than
one dimension from two passes of 4096 localised candidates, whose own error is known.

Sources: Midgley et al., Flow annealed importance sampling bootstrap (arXiv 2208.01893), for the 40-mode mixture and
many-well; Rezende & Mohamed (arXiv 1505.05770), for the two moons.
"""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sb3_rfm.actors import boltzmann_log_prob
from sb3_rfm.control_variates import weighted_mean
from sb3_rfm.files import replacing
from sb3_rfm.paths import CondOTPath
from sb3_rfm.posterior import PosteriorMeanEstimator

PATH = CondOTPath()


def stream(purpose: str, seed: int) -> torch.Generator:
    """Random numbers independent of those of other purposes and seeds; of a seed, torch looks at the lower 32 bits only."""
    return torch.Generator().manual_seed(zlib.crc32(f"{purpose} {seed}".encode()))


class Points(NamedTuple):
    """Points of the path, and what is known there."""

    x_t: Tensor
    """(n, D)"""
    mean: Tensor
    """True data mean, (n, D)"""
    guess: Tensor
    """A guess of it, (n, D)"""
    error: float
    """Mean squared error of the velocity that follows from ``mean``"""


class Density(ABC):
    """A target with samples and posterior means that are known.

    :param name: For tables
    :param dim: D
    """

    data_scale = 1.0
    expensive = False  # to know the truth of
    reference_error = 0.0

    def __init__(self, name: str, dim: int) -> None:
        self.name, self.dim = name, dim
        self._time, self._points = math.nan, dict[tuple[int, int], Points]()

    def points(self, t: float, n: int, seed: int) -> "Points":
        """Points of the path at time ``t``; they are kept until another time is asked for."""
        if t != self._time:
            self._time, self._points = t, {}
        if (n, seed) not in self._points:
            generator = stream("points", seed)
            x_1 = self.sample(n, generator)
            x_t = t * x_1 + (1 - t) * torch.randn(x_1.shape, generator=generator)
            mean = self.data_mean(x_t, t)
            self._points[n, seed] = Points(x_t, mean, self.guess(x_t, t, mean.float(), generator), self.reference_error)
        return self._points[n, seed]

    def guess(self, x_t: Tensor, t: float, mean: Tensor, generator: torch.Generator) -> Tensor:
        """A rough guess of the data mean: off by half the width of the target in each dimension."""
        return mean + 0.5 * self.data_scale * torch.randn(mean.shape, generator=generator)

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """(..., D) → (...)."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D)."""

    @abstractmethod
    def data_mean(self, x_t: Tensor, t: float) -> Tensor:
        """``E[x_1 | x_t]``, (B, D)."""


class Gaussian(Density):
    """A Gaussian with variances spread over [1 / condition, 1] along random axes."""

    def __init__(self, dim: int, condition: float) -> None:
        super().__init__(f"Gaussian, {dim}-D, condition {condition:g}", dim)
        generator = torch.Generator().manual_seed(dim)
        self.axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
        self.variances = torch.logspace(0, -math.log10(condition), dim, dtype=torch.float64)
        self.precision = ((self.axes / self.variances) @ self.axes.T).float()

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * (((x - 0.5) @ self.precision) * (x - 0.5)).sum(-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        return (0.5 + (z * self.variances.sqrt()) @ self.axes.T).float()

    def data_mean(self, x_t: Tensor, t: float) -> Tensor:
        gain = t * self.variances / (t**2 * self.variances + (1 - t) ** 2)
        return 0.5 + (((x_t.double() - 0.5 * t) @ self.axes) * gain) @ self.axes.T


class Mixture(Density):
    """An equal mixture of isotropic Gaussians."""

    def __init__(self, name: str, means: Tensor, std: float) -> None:
        super().__init__(name, means.shape[1])
        self.means, self.std = means, std
        self.data_scale = float(means.std())

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.logsumexp(-0.5 * torch.cdist(x.flatten(0, -2), self.means).square() / self.std**2, -1).view(x.shape[:-1])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(self.means), (n,), generator=generator)
        return self.means[index] + self.std * torch.randn(n, self.dim, generator=generator)

    def data_mean(self, x_t: Tensor, t: float) -> Tensor:
        variance = t**2 * self.std**2 + (1 - t) ** 2
        offset = x_t.double()[:, None] - t * self.means.double()
        share = torch.softmax(-0.5 * offset.square().sum(-1) / variance, -1)
        return weighted_mean(share, self.means.double() + t * self.std**2 / variance * offset)


class OnGrid(Density):
    """A density in one or two dimensions, by quadrature on a grid.

    :param log_prob: (..., D) → (...)
    :param axis: Grid points in each dimension
    """

    def __init__(
        self, name: str, dim: int, log_prob: Callable[[Tensor], Tensor], axis: Tensor, data_scale: float = 1.0
    ) -> None:
        super().__init__(name, dim)
        self._log_prob, self.data_scale = log_prob, data_scale
        grid = axis[:, None] if dim == 1 else torch.cartesian_prod(axis, axis)
        log_mass = torch.log_softmax(log_prob(grid.float()).double(), 0)
        kept = log_mass > log_mass.max() - 30
        self.grid, self.log_mass, self.step = grid[kept], log_mass[kept], float(axis[1] - axis[0])

    def log_prob(self, x: Tensor) -> Tensor:
        return self._log_prob(x)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        index = torch.multinomial(self.log_mass.exp(), n, replacement=True, generator=generator)
        within = torch.rand(n, self.dim, generator=generator, dtype=torch.float64) - 0.5
        return (self.grid[index] + self.step * within).float()

    def data_mean(self, x_t: Tensor, t: float) -> Tensor:
        rows = x_t.double().split(64)
        log_source = (-0.5 * torch.cdist(x, t * self.grid).square() / (1 - t) ** 2 for x in rows)
        return torch.cat([torch.softmax(self.log_mass + log_p, -1) @ self.grid for log_p in log_source])


class ManyWell(Density):
    """Sixteen copies of a double well times a Gaussian: a product, so that quadrature is one-dimensional."""

    data_scale = 1.4

    def __init__(self) -> None:
        super().__init__("many-well, 32-D", 32)
        axis = torch.linspace(-3.5, 3.5, 2001, dtype=torch.float64)[:, None]
        self.well = OnGrid("well", 1, lambda x: (-(x**4) + 6 * x**2 + 0.5 * x).sum(-1), axis[:, 0])

    def log_prob(self, x: Tensor) -> Tensor:
        return self.well.log_prob(x[..., ::2].unsqueeze(-1)).sum(-1) - 0.5 * x[..., 1::2].square().sum(-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(n, 32, generator=generator)
        x[:, ::2] = self.well.sample(n * 16, generator).view(n, 16)
        return x

    def data_mean(self, x_t: Tensor, t: float) -> Tensor:
        mean = t / (t**2 + (1 - t) ** 2) * x_t.double()
        mean[:, ::2] = self.well.data_mean(x_t[:, ::2].reshape(-1, 1), t).view(-1, 16)
        return mean


class Critic(Density):
    """``Q(tanh u) / temperature + log sech^2 u``, with the truth from many localised candidates."""

    expensive = True
    reference = (1024, 4096)
    """Candidates of the two passes that find the truth"""

    def __init__(self, name: str, dim: int) -> None:
        super().__init__(name, dim)
        generator = torch.Generator().manual_seed(dim)
        self.pool = torch.atanh((2 * torch.rand(50_000, dim, generator=generator) - 1).clamp(-1 + 1e-6, 1 - 1e-6))
        log_q = torch.cat([self.q(torch.tanh(u)) for u in self.pool.split(2000)])
        self.chances = torch.softmax(log_q, 0)

    @abstractmethod
    def q(self, action: Tensor) -> Tensor:
        """Q over temperature, (..., D) → (...)."""

    def log_prob(self, x: Tensor) -> Tensor:
        return boltzmann_log_prob(x, self.q(torch.tanh(x)), temperature=1.0)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Resampled uniform actions: near p1, which is all that ``x_t`` needs."""
        return self.pool[torch.multinomial(self.chances, n, replacement=True, generator=generator)]

    def data_mean(self, x_t: Tensor, t: float) -> Tensor:
        first, second = (self._estimate(x_t, t, seed) for seed in (1, 2))
        self.reference_error = float((first - second).square().sum(-1).mean()) / 4 / (1 - t) ** 2
        return (0.5 * (first + second)).double()

    def _estimate(self, x_t: Tensor, t: float, seed: int) -> Tensor:
        first, second = (PosteriorMeanEstimator(PATH, n, data_scale=1.0) for n in self.reference)
        generator, means = stream("truth", seed), []
        for row in x_t.split(1):
            at = torch.full((1,), t)
            guess = first(self.log_prob, row, at, generator).x1
            means.append(second(self.log_prob, row, at, generator, guess).x1)
        return torch.cat(means)


class RandomCritic(Critic):
    """A random network Q with unit spread over uniform actions."""

    def __init__(self, dim: int, temperature: float) -> None:
        generator = torch.Generator().manual_seed(dim)
        self.layers = []
        for n_in, n_out in ((dim, 128), (128, 128), (128, 1)):
            weight = torch.randn(n_out, n_in, generator=generator) * math.sqrt(2 / n_in)
            self.layers.append((weight, 0.5 * torch.randn(n_out, generator=generator)))
        self.scale = 1.0
        self.scale = 1 / (float(self.q(2 * torch.rand(4000, dim, generator=generator) - 1).std()) * temperature)
        super().__init__(f"random critic, {dim}-D, temperature {temperature:g}", dim)

    def q(self, action: Tensor) -> Tensor:
        """(..., D) → (...)."""
        (w_1, b_1), (w_2, b_2), (w_3, _) = self.layers
        hidden = torch.relu(torch.relu(action @ w_1.T + b_1) @ w_2.T + b_2)
        return (hidden @ w_3.T).squeeze(-1) * self.scale


class TrainedCritic(Critic):
    """The first critic of a trained model at one observation.

    :param model: Trained RFM model
    :param observation: (1, ...)
    :param temperature: λ
    """

    def __init__(self, model: Any, observation: Any, temperature: float) -> None:
        self.critic, self.actor, self.temperature = model.critic, model.actor, temperature
        with torch.no_grad():
            self.encoded = self.critic.encode(self.critic.features(observation))
            self.encoded_actor = self.actor.network.encode(self.actor.features(observation))
        name = f"critic of {model.env_name}, temperature {temperature / float(model.policy.temperature):g} of its own"
        super().__init__(name, model.action_space.shape[0])

    def q(self, action: Tensor) -> Tensor:
        return self.critic.split_q(self.encoded, action.reshape(1, -1, self.dim)).view(action.shape[:-1]) / self.temperature

    @torch.no_grad()
    def guess(self, x_t: Tensor, t: float, mean: Tensor, generator: torch.Generator) -> Tensor:
        """What the algorithms use: the flow's own prediction."""
        return self.actor.predict_data(self.encoded_actor, x_t[None], torch.tensor(t))[0]


def trained_model(env_id: str, steps: int, folder: Path = Path("runs/critics")) -> Any:
    """RFM trained with a broad policy, and otherwise at its defaults, with its replay buffer; trained once, and kept.

    :param env_id: Environment, as in the benchmark
    :param steps: Environment steps
    :param folder: Where it is kept
    """
    from sb3_rfm import RFM
    from sb3_rfm.benchmark.suites import get_tasks, make_env

    env_id = get_tasks(env_id)[0].env_id
    file = folder / f"{env_id.split('/')[-1]}-{steps}"
    if not file.with_suffix(".zip").exists():
        trained = RFM("MlpPolicy", make_env(env_id), buffer_size=steps, temperature="auto_0.2", seed=0, device="cpu")
        trained.learn(steps)
        trained.save_replay_buffer(file.with_suffix(".pkl"))
        with replacing(file.with_suffix(".zip")) as unfinished:
            trained.save(unfinished)
    model: Any = RFM.load(file.with_suffix(".zip"), device="cpu")
    model.load_replay_buffer(file.with_suffix(".pkl"))
    model.env_name = f"{env_id.split('/')[-1]}, {steps:,} steps"
    model.policy.set_training_mode(False)
    model.policy.requires_grad_(False)
    model.set_random_seed(0)
    return model


def temperatures(model: Any) -> list[float]:
    """The temperature of a trained model, and a fifth of it, which is nearly the one that the algorithms' default gives."""
    own = float(model.policy.temperature)
    return [own, own / 5]


def trained_critics(model: Any, n_states: int) -> list[list[Density]]:
    """The critics of a trained model at states of its replay buffer.

    :return: For each of the :func:`temperatures`, one density for each state
    """
    states = [model.replay_buffer.sample(1).observations for _ in range(n_states)]
    return [[TrainedCritic(model, state, temperature) for state in states] for temperature in temperatures(model)]


def crescents(x: Tensor) -> Tensor:
    """Two moons facing each other, (..., 2) → (...)."""
    sides = torch.stack([-0.5 * ((x[..., 0] - s) / 0.3).square() for s in (-2.0, 2.0)])
    return sides.logsumexp(0) - 0.5 * ((x.norm(dim=-1) - 2) / 0.2).square()


def forty_modes() -> Mixture:
    """The 40-mode mixture on [-40, 40]^2."""
    means = 80 * torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) - 40
    return Mixture("40-mode mixture, 2-D", means, 1.31)


def densities() -> dict[str, Callable[[], Density]]:
    """What can be named on the command line."""
    table: dict[str, Callable[[], Density]] = {
        f"gaussian-{dim}-{condition}": lambda dim=dim, condition=condition: Gaussian(dim, condition)  # type: ignore[misc]
        for dim, condition in ((1, 1), (2, 1000), (6, 1), (8, 10), (8, 1000), (64, 1), (64, 10), (64, 1000))
    }
    table["forty-modes"] = forty_modes
    table["crescents"] = lambda: OnGrid("two moons, 2-D", 2, crescents, torch.linspace(-4, 4, 641, dtype=torch.float64), 1.5)
    table["many-well"] = ManyWell
    for temperature in (0.01, 0.1, 1.0, 10.0):

        def line(temperature: float = temperature) -> Density:
            critic = RandomCritic(1, temperature)
            return OnGrid(critic.name, 1, critic.log_prob, torch.linspace(-9, 9, 3001, dtype=torch.float64))

        table[f"critic-1-{temperature:g}"] = line
        table[f"critic-6-{temperature:g}"] = lambda temperature=temperature: RandomCritic(6, temperature)  # type: ignore[misc]
    return table
