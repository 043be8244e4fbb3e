"""Environments whose state is data: the seed of the current episode and the actions since.

An environment is restored by playing them again. That is exact for every environment whose episodes are functions of
``reset(seed=...)`` and the actions, as Gymnasium's interface promises.
"""

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv


class Rewindable(gym.Wrapper):
    """An environment whose state is data: the seed of its episode, and the actions since.

    Every episode is reset with a seed of its own, drawn from a generator that the first seed starts. An environment that
    has ``get_run_state`` and ``set_run_state`` of its own needs no wrapper.

    :param env: An environment that honours ``reset(seed=...)``
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._generator: np.random.Generator | None = None
        self._episode: dict[str, Any] = {"seed": None, "options": None}
        self._actions: list[Any] = []
        self._observation: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._generator = np.random.default_rng(seed)
        elif self._generator is None:
            # The environment may have been seeded before it was wrapped; then this, too, follows from that seed.
            self._generator = np.random.default_rng(int.from_bytes(self.unwrapped.np_random.bytes(8), "little"))
        if seed is None:
            seed = int(self._generator.integers(2**31))
        self._episode, self._actions = {"seed": seed, "options": options}, []
        self._observation, info = self.env.reset(seed=seed, options=options)
        return self._observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self._actions.append(np.array(action))
        self._observation, reward, terminated, truncated, info = self.env.step(action)
        return self._observation, reward, terminated, truncated, info

    def get_run_state(self) -> dict[str, Any]:
        """What :meth:`set_run_state` needs to bring another instance into this state."""
        assert self._generator is not None, "reset the environment first"
        return {
            "generator": self._generator.bit_generator.state,
            "episode": self._episode,
            "actions": self._actions,
            "observation": self._observation,
        }

    def set_run_state(self, state: dict[str, Any]) -> None:
        """Play the episode of ``state`` again, up to where it was."""
        self.reset(**state["episode"])
        for action in state["actions"]:
            self.step(action)
        self._generator = np.random.default_rng()
        self._generator.bit_generator.state = state["generator"]
        if not _equal(self._observation, state["observation"]):
            warnings.warn(
                "Played again from the same seed, the environment came to another observation: it is not deterministic. "
                "The run goes on, but not exactly as it would have.",
                stacklevel=2,
            )


def make_rewindable(env: VecEnv) -> bool:
    """Wrap each environment of a ``DummyVecEnv`` in :class:`Rewindable`, unless that is its outermost wrapper already, or it
    has ``get_run_state`` and ``set_run_state`` of its own and no wrapper but SB3's ``Monitor`` and those of ``gym.make``.

    :param env: Vectorised environment
    :return: Whether any was wrapped; they must then be reset
    """
    base = env.unwrapped
    if not isinstance(base, DummyVecEnv):
        return False
    missing = [i for i, inner in enumerate(base.envs) if not _keeps_its_state(inner)]
    for i in missing:
        base.envs[i] = Rewindable(base.envs[i])
    return bool(missing)


def _keeps_its_state(env: gym.Env) -> bool:
    """Whether what the environment returns as its state is complete. Other wrappers may have a state of their own, which it
    would miss; SB3's ``Monitor`` and the checks that ``gym.make`` adds need nothing but a reset."""
    if isinstance(env, Rewindable):
        return True
    while isinstance(env, (Monitor, OrderEnforcing, PassiveEnvChecker)):
        env = env.env
    return not isinstance(env, Rewindable) and hasattr(type(env), "get_run_state") and hasattr(type(env), "set_run_state")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return np.array_equal(a, b, equal_nan=np.issubdtype(np.asarray(a).dtype, np.inexact))
