"""Behaviour of the four algorithms, from outside."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from scipy import stats
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tiny import TINY
from torch import Tensor
from torch.distributions import Distribution, Laplace, MultivariateNormal, Normal, StudentT

from sb3_rfm import DQS, QNE, QSM, RFM, learner, posterior
from sb3_rfm.actors import LATENT_BOUND
from sb3_rfm.flow_actor_critic import FlowActorCritic
from sb3_rfm.paths import get_path
from sb3_rfm.policies import FlowPolicy

ALGORITHMS = [RFM, QNE, DQS, QSM]


class ConstantReward(gym.Env):
    """A reward at each step; episodes of ``length`` steps that end in termination or truncation."""

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Box(-1, 1, (2,))

    def __init__(self, reward: float = 1.0, length: int = 8, terminates: bool = False, bad: dict[int, str] | None = None):
        self.reward, self.length, self.terminates, self.bad = reward, length, terminates, bad or {}
        self.total_steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        self.total_steps += 1
        end = self.steps == self.length
        what = self.bad.get(self.total_steps)
        obs = np.full(1, np.nan if what == "observation" else 0.0, np.float32)
        reward = np.inf if what == "reward" else self.reward
        return obs, reward, end and self.terminates, end and not self.terminates, {}


class Spring(gym.Env):
    """A point on a spring, with a reward in any unit."""

    observation_space = spaces.Box(-10, 10, (2,))
    action_space = spaces.Box(-2, 1, (2,))

    def __init__(self, unit: float = 1.0):
        self.unit = unit

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        self.steps = 0
        return self.state, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.state = np.float32(0.9) * self.state + np.float32(0.1) * action
        self.steps += 1
        return self.state, -self.unit * float(np.square(self.state).sum()), False, self.steps >= 20, {}


def weights(model: FlowActorCritic) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in model.policy.state_dict().values()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(th.equal(a, b) for a, b in zip(first, second, strict=True))


# Signature


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_arguments_are_sacs_then_ours(algorithm: type[FlowActorCritic]) -> None:
    ours = list(inspect.signature(algorithm.__init__).parameters)
    sacs = [name for name in inspect.signature(SAC.__init__).parameters if "sde" not in name]
    sacs = [name for name in sacs if name not in ("ent_coef", "target_entropy", "target_update_interval")]
    assert [name for name in ours if name in sacs] == sacs
    first_of_ours, last_of_ours = ours.index("temperature"), ours.index("stats_window_size") - 1
    assert ours[first_of_ours - 1] == "n_steps"
    required = {"temperature", "n_candidates", "coefficient", "path", "integration_steps", "proposal", "weighting"}
    required |= {"n_particles", "n_exploration_particles", "n_target_particles", "t_min", "max_grad_norm"}
    assert required <= set(ours[first_of_ours : last_of_ours + 1])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_attributes_are_named_like_arguments(algorithm: type[FlowActorCritic]) -> None:
    model = algorithm("MlpPolicy", Spring(), **TINY)
    for name in list(inspect.signature(algorithm.__init__).parameters)[1:]:
        if name not in ("policy", "env", "stats_window_size", "_init_setup_model"):
            assert hasattr(model, name), name
    for name in (
        "batch_size",
        "n_candidates",
        "n_particles",
        "n_exploration_particles",
        "integration_steps",
        "learning_starts",
        "seed",
    ):
        assert getattr(model, name) == TINY[name]


# Learning


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_seed_gives_one_result(algorithm: type[FlowActorCritic]) -> None:
    first, second = (algorithm("MlpPolicy", Spring(), **TINY).learn(40) for _ in range(2))
    other = algorithm("MlpPolicy", Spring(), **(TINY | {"seed": 1})).learn(40)
    assert equal(weights(first), weights(second))
    assert not equal(weights(first), weights(other))


@pytest.mark.parametrize(("algorithm", "coefficient"), [(QNE, 0.0), (DQS, 1.0)])
def test_endpoints_are_rfm_with_that_coefficient(algorithm: type[FlowActorCritic], coefficient: float) -> None:
    endpoint = algorithm("MlpPolicy", Spring(), **TINY).learn(40)
    rfm = RFM("MlpPolicy", Spring(), **TINY, coefficient=coefficient).learn(40)
    assert equal(weights(endpoint), weights(rfm))
    assert not equal(weights(endpoint), weights(RFM("MlpPolicy", Spring(), **TINY, coefficient=0.5).learn(40)))


def test_qne_asks_for_no_gradient_of_q(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a gradient was computed")

    for module in (posterior, learner):
        monkeypatch.setattr(module, "value_and_gradient", refuse)
    QNE("MlpPolicy", "Reacher-v5", **TINY).learn(20)
    for algorithm, weighting in ((RFM, "uniform"), (QNE, "gradient")):
        with pytest.raises(AssertionError, match="gradient"):
            algorithm("MlpPolicy", "Reacher-v5", **TINY, weighting=weighting).learn(20)


def test_one_dimension_has_no_weights() -> None:
    weighted, uniform = (RFM("MlpPolicy", "Pendulum-v1", **TINY, weighting=w).learn(40) for w in ("gradient", "uniform"))
    assert equal(weights(weighted), weights(uniform))


def test_qsm_draws_no_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("candidates were drawn")

    monkeypatch.setattr(posterior.PosteriorMeanEstimator, "draw", refuse)
    QSM("MlpPolicy", Spring(), **TINY).learn(20)
    with pytest.raises(AssertionError, match="candidates"):
        RFM("MlpPolicy", Spring(), **TINY).learn(20)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("unit", [2.0**-7, 2.0**7])
def test_the_unit_of_the_reward_does_not_matter(algorithm: type[FlowActorCritic], unit: float) -> None:
    reference = algorithm("MlpPolicy", Spring(), **TINY).learn(40)
    scaled = algorithm("MlpPolicy", Spring(unit), **TINY).learn(40)
    for a, b in zip(reference.actor.parameters(), scaled.actor.parameters(), strict=True):
        th.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert scaled.policy.temperature.item() == pytest.approx(unit * reference.policy.temperature.item(), rel=1e-3)


def test_a_long_time_without_reward_changes_no_unit() -> None:
    model = RFM("MlpPolicy", ConstantReward(reward=0.0), **TINY).learn(100)
    assert model.critic.scale == 1.0


def test_without_reward_actions_become_uniform() -> None:
    """With nothing to go by, a policy must not follow what its critics began with: it would never find a reward."""
    network = {"net_arch": [64, 64]}
    arguments = TINY | {"policy_kwargs": network, "n_exploration_particles": 1, "integration_steps": 5, "learning_rate": 3e-3}
    model = RFM("MlpPolicy", ConstantReward(reward=0.0), **arguments).learn(600)
    with th.no_grad():
        actions = model.policy._predict(th.zeros(4000, 1))
    assert abs(actions.mean()) < 0.05 and actions.std() == pytest.approx(1 / 3**0.5, rel=0.15), "U(-1, 1)"


def test_truncation_bootstraps_and_termination_does_not() -> None:
    arguments = TINY | {"learning_rate": 0.01, "tau": 0.1, "policy_kwargs": {"net_arch": [16], "n_critics": 1}}

    def value(terminates: bool, length: int, gamma: float, steps: int) -> float:
        env = ConstantReward(length=length, terminates=terminates)
        model = RFM("MlpPolicy", env, gamma=gamma, **arguments).learn(steps)
        obs = th.zeros(1, 1)
        return float(model.critic(obs, model.actor(obs))[0])

    assert value(terminates=True, length=1, gamma=0.9, steps=400) == pytest.approx(1.0, abs=0.1)
    assert value(terminates=False, length=8, gamma=0.9, steps=600) == pytest.approx(10.0, abs=0.5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_everything_promised_is_logged(algorithm: type[FlowActorCritic]) -> None:
    model = algorithm("MlpPolicy", Spring(), **TINY)
    model.learn(30)
    logged = model.logger.name_to_value
    names = {"actor_loss", "critic_loss", "ess", "coefficient", "q_mean", "temperature", "n_updates", "learning_rate"}
    for name in names | {"variance_ratio", "latent_max", "saturation"}:
        assert np.isfinite(logged[f"train/{name}"]), name
    assert logged["train/n_updates"] == 20


def test_learning_rate_schedules_reach_both_optimizers() -> None:
    model = RFM("MlpPolicy", Spring(), **TINY, learning_rate=LinearSchedule(1e-3, 1e-4, 1.0)).learn(40)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (model.actor.optimizer, model.critic.optimizer)]
    assert rates[0] == rates[1] == pytest.approx(1e-4, rel=0.3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"proposal": "replay", "n_target_particles": 2},
        {"sampler": "sde", "path": "cosine"},
        {"sampler": "langevin", "path": "ve"},
        {"temperature": 0.02, "max_grad_norm": 10.0},
        {"coefficient": [0.1, 0.9]},
        {"source": StudentT(5.0)},
        {"source": MultivariateNormal(th.ones(2), th.tensor([[2.0, 0.5], [0.5, 1.0]])), "path": "linear_vp"},
        {"gradient_steps": -1, "train_freq": 4},
        {"train_freq": (1, "episode")},
        {"n_steps": 3},
        {"weighting": "gradient"},
        {"n_particles": 1, "n_target_particles": 1},
        {"precision": "bfloat16"},
    ],
)
def test_every_choice_learns(arguments: dict[str, Any]) -> None:
    model = RFM("MlpPolicy", Spring(), **(TINY | arguments)).learn(44)
    assert model._n_updates > 0
    assert all(bool(th.isfinite(tensor).all()) for tensor in weights(model))


@pytest.mark.parametrize(
    ("bad", "culprit"),
    [({15: "reward"}, "reward"), ({15: "observation"}, "observation"), ({16: "observation"}, "observation")],
)
def test_nothing_is_learned_from_numbers_that_are_not_finite(bad: dict[int, str], culprit: str) -> None:
    # Step 16 is the last of an episode: its observation reaches the buffer by another way.
    model = RFM("MlpPolicy", ConstantReward(bad=bad), **TINY)
    model.learn(min(bad) - 1)
    before, position = weights(model), model.replay_buffer.pos
    with pytest.raises(ValueError, match=f"{culprit}.*not finite"):
        model.learn(10, reset_num_timesteps=False)
    assert equal(weights(model), before)
    assert model.replay_buffer.pos == position


def test_after_a_number_that_is_not_finite_an_episode_begins() -> None:
    class Counting(ConstantReward):
        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            _, *rest = super().step(action)
            return np.full(1, 0.1 * self.steps, np.float32), *rest

    model = RFM("MlpPolicy", Counting(bad={10: "reward"}), **(TINY | {"learning_starts": 100})).learn(5)
    with pytest.raises(ValueError, match="reward is not finite"):
        model.learn(10, reset_num_timesteps=False)
    model.learn(3, reset_num_timesteps=False)
    assert model.replay_buffer.pos == 12, "the step with the number is the one that is missing"
    np.testing.assert_allclose(model.replay_buffer.observations[8:12, 0, 0], [0.0, 0.0, 0.1, 0.2], rtol=1e-6)


def test_lost_statistics_are_named() -> None:
    env = VecNormalize(DummyVecEnv([lambda: ConstantReward(bad={10: "reward"})]))
    model = RFM("MlpPolicy", env, **TINY)
    for _ in range(2):  # the second time, the environment returns nothing but numbers
        with pytest.raises(ValueError, match=r"reward is not finite.*VecNormalize.*lost"):
            model.learn(20)


def test_qsm_is_regressed_on_tweedies_formula() -> None:
    """Of the score at the noisy point itself, N(0.9, 0.6^2)."""
    model = QSM("MlpPolicy", "Pendulum-v1", **TINY)
    x_t, t = th.randn(6, 1), th.linspace(0.2, 0.8, 6)
    result = model._posterior_mean(lambda u: -0.5 * ((u - 0.9) / 0.6).square().sum(-1), x_t, t, th.zeros(6, 1))
    score, alpha, sigma = -(x_t - 0.9) / 0.36, t[:, None], 1 - t[:, None]
    th.testing.assert_close(result.score, score)
    th.testing.assert_close(result.x1, (x_t + sigma**2 * score) / alpha)


def test_what_is_learned_is_normalised() -> None:
    env = VecNormalize(DummyVecEnv([lambda: Spring(100.0)]))
    model = RFM("MlpPolicy", env, **TINY).learn(30)
    buffer, seen, update = model.replay_buffer, [], model._learner.run_update
    model._learner.run_update = lambda batch, *rest: seen.append(batch) or update(batch, *rest)
    model.train(1, 16)
    (batch,) = seen
    rows = [int(np.abs(buffer.actions[:30, 0] - action).sum(-1).argmin()) for action in batch.actions.numpy()]
    observations = (buffer.observations[rows, 0] - env.obs_rms.mean) / np.sqrt(env.obs_rms.var + env.epsilon)
    np.testing.assert_allclose(batch.observations, observations, rtol=1e-4, atol=1e-5)
    rewards = buffer.rewards[rows, 0] / np.sqrt(env.ret_rms.var + env.epsilon)
    np.testing.assert_allclose(batch.rewards[:, 0], rewards, rtol=1e-4)


def test_actions_of_lopsided_boxes_are_scaled() -> None:
    policy = FlowPolicy(spaces.Box(-1, 1, (2,)), spaces.Box(-0.3, 1.7, (1,)), lambda _: 1e-3, net_arch=[4])
    scaled = policy.scale_action(np.array([[-0.3], [0.2], [0.7], [1.7]], np.float32))
    np.testing.assert_allclose(scaled, [[-1], [-0.5], [0], [1]], atol=1e-6)


def test_frozen_networks_stay_as_they_are() -> None:
    model = RFM("MlpPolicy", ConstantReward(), **TINY)
    for frozen, trained in ((model.actor, model.critic), (model.critic, model.actor)):
        before = [[p.clone() for p in network.parameters()] for network in (frozen, trained)]
        frozen.requires_grad_(False)
        model.learn(30)
        frozen.requires_grad_(True)
        after = [list(network.parameters()) for network in (frozen, trained)]
        assert all(map(th.equal, before[0], after[0]))
        assert not any(map(th.equal, before[1], after[1]))


def test_arguments_of_no_replay_buffer_are_refused() -> None:
    with pytest.raises(TypeError, match="n_steps"):
        RFM("MlpPolicy", ConstantReward(), **TINY, replay_buffer_kwargs={"n_steps": 3, "gamma": 0.9})


def test_the_first_observation_must_be_finite_too() -> None:
    class Broken(ConstantReward):
        is_broken = True

        def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
            observation, info = super().reset(**kwargs)
            return (np.full(1, np.inf, np.float32) if self.is_broken else observation), info

    env = Broken()
    model = RFM("MlpPolicy", env, **TINY)
    with pytest.raises(ValueError, match=r"observation.*not finite"):
        model.learn(5)
    env.is_broken = False
    assert model.learn(5, reset_num_timesteps=False).num_timesteps == 5, "another episode begins"


def test_nothing_is_learned_from_goals_with_infinite_rewards() -> None:
    class Distance(BitFlippingEnv):
        def compute_reward(self, achieved: Any, desired: Any, info: Any) -> Any:
            with np.errstate(divide="ignore"):
                distance = -np.log(np.abs(np.asarray(achieved) - desired).sum(-1))
            return np.where(np.isfinite(distance) | (np.ndim(distance) > 0), distance, 0.0).astype(np.float32)

    model = RFM("MultiInputPolicy", Distance(n_bits=3, continuous=True), **TINY, replay_buffer_class=HerReplayBuffer)
    with pytest.raises(ValueError, match=r"(?s)reward is not finite.*HerReplayBuffer"):
        model.learn(40)
    assert all(bool(th.isfinite(tensor).all()) for tensor in weights(model))


def test_what_single_precision_cannot_hold_is_not_finite() -> None:
    class Huge(ConstantReward):
        observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            _, *rest = super().step(action)
            return np.array([1e39]), *rest

    with pytest.raises(ValueError, match=r"observation is not finite.*1\.e\+39"):
        RFM("MlpPolicy", Huge(), **TINY).learn(5)


def test_weights_that_are_lost_are_noticed() -> None:
    model = RFM("MlpPolicy", Spring(), **TINY).learn(20)
    with th.no_grad():
        model.actor.network.output_layer.bias.fill_(th.nan)
    with pytest.raises(RuntimeError, match=r"loss is nan\. The weights are lost"):
        model.train(1, 8)
    with pytest.raises(ValueError, match=r"action is not finite.*The weights are lost"):
        model.predict(np.zeros(2, np.float32))


def test_arguments_may_be_shared_with_sac() -> None:
    """Which writes into ``policy_kwargs``."""
    shared: dict[str, Any] = {"net_arch": [8]}
    SAC("MlpPolicy", Spring(), policy_kwargs=shared)
    assert RFM("MlpPolicy", Spring(), policy_kwargs=shared).policy.net_arch == [8]


@pytest.mark.parametrize("coefficient", [1.0, np.zeros(2), [0.0, 0.0]], ids=str)
def test_a_fixed_coefficient_is_no_argument(coefficient: Any) -> None:
    with pytest.raises(ValueError, match=r"coefficient must be left out: QNE fixes it at 0\.0"):
        QNE("MlpPolicy", Spring(), coefficient=coefficient)


def test_each_state_asks_one_of_the_critics_about_its_candidates() -> None:
    """So that an average over the batch is one over the critics; three of them do not divide seven states."""
    model = RFM("MlpPolicy", Spring(), **TINY | {"policy_kwargs": {"net_arch": [8], "n_critics": 3}})
    encoded = model.critic.encode(model.critic.features(th.randn(7, 2)))
    actions = 2 * th.rand(7, 4, 2) - 1
    asked = th.tensor([0, 1, 2, 0, 1, 2, 0])
    expected = model.critic.q_values(encoded, actions)[asked, th.arange(7)]
    th.testing.assert_close(model.critic.split_q(encoded, actions), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_copy_learns_as_the_original(algorithm: type[FlowActorCritic], copied: Callable[[Any], Any]) -> None:
    model = algorithm("MlpPolicy", "Pendulum-v1", **TINY).learn(20)
    other = copied(model)
    assert other.policy is not model.policy
    for each in (model, other):
        th.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        each.train(10, 16)
    for name, tensor in model.policy.state_dict().items():
        th.testing.assert_close(other.policy.state_dict()[name], tensor, rtol=0, atol=0)


def test_the_target_critic_follows_replaced_parameters() -> None:
    model = RFM("MlpPolicy", "Pendulum-v1", **TINY, tau=0.5).learn(20)
    model.policy.load_from_vector(model.policy.parameters_to_vector() + 1.0)
    online, target = (critic.q_networks[0].output_layer.weight.detach() for critic in (model.critic, model.critic_target))
    online += 2.0
    expected = (online + target) / 2
    model._learner.update_target_critic(model.tau)
    th.testing.assert_close(target, expected)


def predicts_gaussian(actor: Any, mean: float, variance: float) -> Any:
    """The exact ``predict_data`` where latents are Gaussian."""

    def predict(encoded: Any, x: Tensor, t: Tensor, reduced: bool = False) -> Tensor:
        alpha, sigma = actor.probability_path.alpha(t), actor.probability_path.sigma(t)
        return mean + alpha * variance * (x - alpha * mean) / (alpha**2 * variance + sigma**2)

    return predict


@pytest.mark.parametrize("path", ["cond_ot", "cosine"])
@pytest.mark.parametrize("sampler", ["ode", "euler", "sde", "langevin"])
def test_sampling_starts_from_noise_whatever_the_first_training_time(sampler: str, path: str) -> None:
    """With the exact prediction for a Gaussian target, its mean and spread; a start at ``t_min`` without the target's share
    has a smaller mean."""
    actor = RFM("MlpPolicy", "Pendulum-v1", path=path, sampler=sampler, t_min=0.1, integration_steps=100).policy.actor
    mean, variance, asked = 2.0, 0.25, []

    predict = predicts_gaussian(actor, mean, variance)
    actor.predict_data = lambda encoded, x, t, reduced: asked.append(float(t)) or predict(encoded, x, t)
    th.manual_seed(0)
    latents = actor.sample_latents(th.zeros(1, 3), th.randn(1, 20_000, 1))
    assert min(asked) == pytest.approx(0.1)
    assert latents.mean().item() == pytest.approx(mean, abs=0.02)
    assert latents.std().item() == pytest.approx(variance**0.5, abs=0.02)


def test_euler_takes_even_steps_of_first_order() -> None:
    actor = RFM("MlpPolicy", "Pendulum-v1", sampler="euler", integration_steps=5).policy.actor
    actor.predict_data = predict = predicts_gaussian(actor, 0.8, 0.25)
    x = noise = th.randn(1, 50, 1)
    for t in (0.0, 0.2, 0.4, 0.6, 0.8):
        x = x + 0.2 * (predict(None, x, th.tensor(max(t, 0.01))) - x) / (1 - t)
    th.testing.assert_close(actor.sample_latents(th.zeros(1, 3), noise), x.clamp(-4, 4), rtol=1e-4, atol=1e-5)


def test_langevin_corrects_at_the_last_noise_level() -> None:
    """In closed form: a step from noise to t = 3/4, a Langevin step of size sigma^2 / 2 there, and the prediction."""
    actor = RFM("MlpPolicy", "Pendulum-v1", sampler="langevin", integration_steps=2).policy.actor
    actor.predict_data = predict = predicts_gaussian(actor, 2.0, 0.25)
    th.manual_seed(0)
    latents = actor.sample_latents(th.zeros(1, 3), th.randn(1, 400_000, 1))
    alpha, sigma = 0.75, 0.25
    variance, step = alpha**2 * 0.25 + sigma**2, 0.5 * sigma**2
    first, second = (predict(None, th.tensor(x), th.tensor(0.01)).item() for x in (0.0, 1.0))
    mean_0, variance_0 = alpha * first, (alpha * (second - first) + sigma) ** 2
    mean_1 = 2 * alpha + (1 - step / variance) * (mean_0 - 2 * alpha)
    variance_1 = (1 - step / variance) ** 2 * variance_0 + 2 * step
    gain = alpha * 0.25 / variance
    assert latents.mean().item() == pytest.approx(2 + gain * (mean_1 - 2 * alpha), abs=0.004)
    assert latents.std().item() == pytest.approx(gain * variance_1**0.5, rel=0.01)


@pytest.mark.parametrize("sampler", ["ode", "euler", "sde", "langevin"])
def test_deterministic_actions_draw_nothing(sampler: str) -> None:
    model, before = RFM("MlpPolicy", "Pendulum-v1", **TINY, sampler=sampler), th.get_rng_state()
    model.predict(np.zeros((3, 3), np.float32), deterministic=True)
    assert th.equal(before, th.get_rng_state())


# Source


def test_every_draw_of_noise_comes_from_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Acting, the critic's target and x_t, by Kolmogorov and Smirnov's test against SciPy's distribution."""
    drawn: dict[str, Tensor] = {}
    arguments = TINY | {"batch_size": 2_000, "learning_starts": 50, "proposal": "replay"}
    model = RFM("MlpPolicy", Spring(), **arguments, source=Laplace(0.5, 1.0))
    model.learn(50)
    sample_latents, posterior_mean = model.actor.sample_latents, model._learner.posterior_mean

    def record_noise(features: Tensor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        drawn["acting" if len(features) == 999 else "critic's target"] = noise.flatten()
        return sample_latents(features, noise, *args, **kwargs)

    def record_point(log_prob: Any, x_t: Tensor, t: Tensor, guess: Tensor) -> posterior.PosteriorMean:
        drawn["x_t"] = (x_t / get_path(model.path).sigma(t)[:, None]).flatten()  # replayed actions are 0
        return posterior_mean(log_prob, x_t, t, guess)

    monkeypatch.setattr(model.actor, "sample_latents", record_noise)
    monkeypatch.setattr(model._learner, "posterior_mean", record_point)
    model.replay_buffer.actions[:] = 0
    model.train(1, 2_000)
    model.predict(np.zeros((999, 2), np.float32))
    assert set(drawn) == {"acting", "critic's target", "x_t"}
    for name, noise in drawn.items():
        assert stats.kstest(noise.numpy(), stats.laplace(0.5).cdf).pvalue > 1e-4, name
        assert stats.kstest(noise.numpy(), stats.norm.cdf).pvalue < 1e-6, name
    assert model.estimator.source.score(th.tensor([[3.0, -3.0]])).tolist() == [[-1.0, 1.0]]


@pytest.mark.parametrize(("source", "points"), [(Laplace(0.0, 1.0), "antithetic"), (StudentT(5.0), "independent")], ids=str)
def test_candidates_are_antithetic_where_the_source_has_quantiles(source: Distribution, points: str) -> None:
    assert RFM("MlpPolicy", Spring(), **TINY, source=source).learn(30).estimator.points == points


def test_the_gaussian_by_any_name_learns_the_same() -> None:
    """Two ways to the same source draw the same noise and give the same targets, up to rounding."""
    ours, theirs = (RFM("MlpPolicy", Spring(), **TINY, source=s).learn(40) for s in ("gaussian", Normal(0.0, 1.0)))
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        th.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_deterministic_actor_starts_from_the_centre_of_its_source() -> None:
    model = RFM("MlpPolicy", Spring(), **(TINY | {"n_particles": 1}), source=Laplace(0.5, 1.0))
    features = model.actor.features(th.zeros(1, 2))
    expected = th.tanh(model.actor.sample_latents(features, th.full((1, 1, 2), 0.5), deterministic=True)[0])
    for policy in (model.policy, model.actor):
        th.testing.assert_close(policy._predict(th.zeros(1, 2), deterministic=True), expected)


# Acting


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_deterministic_policy_is_a_function_of_the_observation(algorithm: type[FlowActorCritic]) -> None:
    model = algorithm("MlpPolicy", Spring(), **TINY).learn(30)
    observations = np.random.default_rng(0).uniform(-2, 2, (32, 2)).astype(np.float32)
    state = th.get_rng_state()
    actions, _ = model.predict(observations, deterministic=True)
    assert th.equal(state, th.get_rng_state())
    np.testing.assert_array_equal(model.predict(observations, deterministic=True)[0], actions)
    alone = np.stack([model.predict(observation, deterministic=True)[0] for observation in observations])
    np.testing.assert_allclose(alone, actions, rtol=1e-4, atol=1e-5)
    shuffled = np.random.default_rng(1).permutation(32)
    np.testing.assert_allclose(model.predict(observations[shuffled], deterministic=True)[0], actions[shuffled], atol=1e-5)
    explored = [model.predict(observations)[0] for _ in range(2)]
    assert not np.array_equal(*explored)


@pytest.mark.parametrize("path", ["cond_ot", "cosine", "linear_vp", "ve"])
@pytest.mark.parametrize("sampler", ["ode", "euler", "sde", "langevin"])
def test_no_weights_can_make_the_flow_diverge(path: str, sampler: str) -> None:
    model = RFM("MlpPolicy", Spring(), **TINY, path=path, sampler=sampler)
    generator = th.Generator().manual_seed(0)
    with th.no_grad():
        for parameter in model.actor.parameters():
            parameter.copy_(1e6 * th.randn(parameter.shape, generator=generator))
    noise = th.randn(64, 8, 2, generator=generator)
    for deterministic in (True, False):
        latents = model.actor.sample_latents(th.ones(64, 2), noise, deterministic)
        assert latents.abs().max() <= LATENT_BOUND
    actions, _ = model.predict(np.ones((64, 2), np.float32))
    assert all(model.action_space.contains(action) for action in actions)


def test_exploration_prefers_better_particles() -> None:
    model = RFM("MlpPolicy", Spring(), **TINY, temperature=0.5)
    q = th.tensor([[0.0, 1.0, 0.5]]).expand(20_000, 3)
    th.manual_seed(0)
    counts = th.bincount(model.policy.choose_index(q).flatten(), minlength=3) / len(q)
    # Four standard errors of a frequency.
    th.testing.assert_close(counts, th.softmax(q[0] / 0.5, 0), rtol=0, atol=4 * 0.5 / len(q) ** 0.5)
    assert model.policy.choose_index(q[:1], deterministic=True).item() == 1
