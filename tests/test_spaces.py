"""Observation and action spaces: what is taken, what is refused, and that actions never leave their box."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from tiny import TINY

from sb3_rfm import RFM

SMALL = TINY | {"learning_starts": 8, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}}
FLOAT32_MAX = float(np.finfo(np.float32).max)


class RandomEnv(gym.Env):
    """Random observations of any space, for any actions in the space."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        observation_space.seed(0)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.steps += 1
        return self.observation_space.sample(), 1.0, False, self.steps == 5, {}


VECTOR = spaces.Box(-1, 1, (3,))
ACTION = spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(
    "box",
    [
        spaces.Box(-0.3, 1.7, (3,)),
        spaces.Box(np.array([-1e-8, 5.0], np.float32), np.array([3e-8, 5.1], np.float32)),
        spaces.Box(-1e30, 2e30, (2,)),
        spaces.Box(-FLOAT32_MAX, FLOAT32_MAX, (2,)),
        spaces.Box(-0.1, 0.7, (2,), np.float64),
        spaces.Box(-1e300, 1.7e308, (1,), np.float64),
        spaces.Box(-0.1, 0.7, (2,), np.float16),
        spaces.Box(0.1, 0.3, (2, 3)),
        spaces.Box(np.array([0.0, 2.0], np.float32), np.array([1.0, 2.0], np.float32)),
    ],
    ids=["asymmetric", "tiny", "huge", "largest", "float64", "largest float64", "float16", "two-dimensional", "degenerate"],
)
def test_actions_lie_in_their_box(box: spaces.Box) -> None:
    model = RFM("MlpPolicy", RandomEnv(VECTOR, box), **SMALL)
    model.learn(20)
    assert np.abs(model.replay_buffer.actions[:20]).max() <= 1
    assert all(bool(th.isfinite(p).all()) for p in model.policy.parameters())
    observation = VECTOR.sample()
    for sign in (-1, 1):
        # Latents at the end of their range: tanh is then so near to 1 that rounding decides.
        with th.no_grad():
            model.actor.network.output_layer.bias.fill_(sign * 1e6)
        for deterministic in (True, False):
            action, _ = model.predict(observation, deterministic=deterministic)
            assert action.dtype == box.dtype
            assert box.contains(action), action
    edges = np.stack([np.full(box.shape, sign, np.float32) for sign in (-1, 1)])
    assert all(box.contains(action) for action in model.policy.unscale_action(edges))


DICTIONARY = spaces.Dict(
    {
        "scalar": spaces.Box(-1, 1, ()),
        "vector": VECTOR,
        "discrete": spaces.Discrete(3),
        "image": spaces.Box(0, 255, (1, 36, 36), np.uint8),
    }
)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_dictionaries_with_scalars_and_images(n_envs: int, normalize: bool) -> None:
    env = DummyVecEnv([lambda: RandomEnv(DICTIONARY, ACTION)] * n_envs)
    keys = ["scalar", "vector"]
    model = RFM("MultiInputPolicy", VecNormalize(env, norm_obs_keys=keys) if normalize else env, **SMALL).learn(30)
    assert model.replay_buffer.observations["scalar"].shape[1:] == (n_envs, 1)
    observation = DICTIONARY.sample()
    action, _ = model.predict(observation, deterministic=True)
    batch = {key: np.stack([value] * 2) for key, value in observation.items()}
    np.testing.assert_allclose(model.predict(batch, deterministic=True)[0], [action] * 2, atol=1e-5)


def test_scalars_are_stored_as_they_came() -> None:
    space = spaces.Dict({"scalar": spaces.Box(-100, 100, ()), "vector": VECTOR})
    env = DummyVecEnv([lambda: RandomEnv(space, ACTION)] * 2)
    model = RFM("MultiInputPolicy", env, **SMALL)
    seen = []
    model.learn(8, callback=lambda local, _: seen.append(local["new_obs"]["scalar"].copy()) or True)
    np.testing.assert_array_equal(model.replay_buffer.observations["scalar"][1:4, :, 0], np.stack(seen)[:3])


def control_suite() -> list[str]:
    """All tasks but quadruped-escape, which sends its terrain to a renderer, and so needs one."""
    pytest.importorskip("shimmy")
    from dm_control import suite

    tasks = [f"dm_control/{domain}-{task}-v0" for domain, task in suite.ALL_TASKS]
    return [task for task in tasks if task != "dm_control/quadruped-escape-v0"]


def test_every_task_of_the_control_suite_as_it_is() -> None:
    with_scalars = 0
    for task in control_suite():
        model = RFM("MultiInputPolicy", task, **SMALL).learn(12)
        assert isinstance(model.observation_space, spaces.Dict)
        with_scalars += any(space.shape == () for space in model.observation_space.spaces.values())
        observations = model.get_env().reset()
        actions, _ = model.predict(observations, deterministic=True)
        assert model.action_space.contains(actions[0]), task
        model.get_env().close()
    assert with_scalars >= 15


def test_images() -> None:
    space = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    arguments = SMALL | {"policy_kwargs": {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 8}}}
    env = VecFrameStack(DummyVecEnv([lambda: RandomEnv(space, ACTION)]), n_stack=2)
    RFM("CnnPolicy", env, **arguments).learn(12)
    unscaled = SMALL | {"policy_kwargs": {"net_arch": [8], "normalize_images": False}}
    RFM("MlpPolicy", RandomEnv(spaces.Box(0, 1, (4, 4, 1)), ACTION), **unscaled).learn(12)


@pytest.mark.parametrize("shared", [False, True])
def test_own_features_extractors(shared: bool) -> None:
    class Extractor(BaseFeaturesExtractor):
        def __init__(self, observation_space: spaces.Box) -> None:
            super().__init__(observation_space, 6)
            layers = [th.nn.Linear(3, 6), th.nn.LayerNorm(6), th.nn.BatchNorm1d(6), th.nn.Dropout(0.1), th.nn.ReLU()]
            self.layers = th.nn.Sequential(*layers)

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return self.layers(observations)

    kwargs = {"net_arch": {"pi": [8], "qf": [4, 4]}, "share_features_extractor": shared, "optimizer_class": th.optim.RMSprop}
    kwargs |= {"features_extractor_class": Extractor, "activation_fn": th.nn.GELU, "optimizer_kwargs": {"alpha": 0.9}}
    model = RFM("MlpPolicy", RandomEnv(VECTOR, ACTION), **(SMALL | {"policy_kwargs": kwargs}))
    before = model.actor.features_extractor.layers[0].weight.detach().clone()
    model.learn(20)
    assert not th.equal(before, model.actor.features_extractor.layers[0].weight)
    assert (model.actor.features_extractor is model.critic.features_extractor) == shared
    observation = VECTOR.sample()
    first, second = (model.predict(observation, deterministic=True)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_evaluation_on_bare_environments() -> None:
    model = RFM("MultiInputPolicy", RandomEnv(DICTIONARY, ACTION), **SMALL)
    mean, _ = evaluate_policy(model, RandomEnv(DICTIONARY, ACTION), n_eval_episodes=2, warn=False)
    assert mean == 5
    model.set_env(make_vec_env(lambda: RandomEnv(DICTIONARY, ACTION), n_envs=1))
    model.learn(10)
