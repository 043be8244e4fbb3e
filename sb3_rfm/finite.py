"""Checks of the numbers that environments return and users predict from: one that is not finite would destroy the weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

WEIGHTS_LOST = (
    "The weights are lost: numbers too large for the networks have come from the environment, or the learning rate is far too "
    "high. Go on from a model that was saved before."
)
NOT_LEARNED = (
    "The environment returned it. Nothing was learned from it: the weights and the replay buffer are as before this step."
)
RELABELLED = (
    "HerReplayBuffer computed it for another goal. Nothing was learned from it: the weights are as before this update."
)
STATISTICS_LOST = (
    "VecNormalize averages all that it sees, and its statistics are lost with the first such number, now or before: go on "
    "with a new one, or with what VecNormalize.load reads."
)


def check_observation(observation: Any, space: spaces.Space) -> None:
    """Check an observation that a policy is to act on, as far as SB3 does not.

    :param observation: One observation or a batch
    :param space: Observation space of the policy
    :raises ValueError: for other entries of a dictionary, and for numbers that are not finite
    """
    if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], Mapping):
        return  # what `reset` of Gymnasium returns; SB3 explains it
    if isinstance(space, spaces.Dict):
        keys = set(observation) if isinstance(observation, Mapping) else {type(observation).__name__}
        if keys != set(space.spaces):
            raise ValueError(f"The observation must be a dictionary of {sorted(space.spaces)}, got {sorted(keys)}.")
    check_finite("observation", observation, "No action follows from it.")


def check_step(reward: np.ndarray, observation: Any, infos: list[dict[str, Any]], is_normalized: bool) -> None:
    """Check what a step of the environments returned, for what would destroy the weights.

    :param reward: (n_envs,)
    :param observation: What follows, an array (n_envs, ...) or a dictionary of arrays
    :param infos: One for each environment, with the last observation of an episode
    :param is_normalized: Whether it came through ``VecNormalize``
    :raises ValueError: for numbers that are not finite
    """
    note = f"{NOT_LEARNED} {STATISTICS_LOST}" if is_normalized else NOT_LEARNED
    check_finite("reward", reward, note)
    check_finite("observation", observation, note)
    for info in infos:
        check_finite("observation", info.get("terminal_observation", 0.0), note)


def check_finite(name: str, values: Any, note: str) -> None:
    """Check that numbers are finite.

    :param name: What they are
    :param values: An array or a dictionary of arrays; anything but floating-point numbers passes
    :param note: What to add to the error
    :raises ValueError: where they are not
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            check_finite(f"{name} {key!r}", value, note)
        return
    values = np.asarray(values)
    # Networks compute in single precision, and what it cannot hold is infinite to them.
    if np.issubdtype(values.dtype, np.floating) and not (np.abs(values) <= np.finfo(np.float32).max).all():
        raise ValueError(f"The {name} is not finite: {values}. {note}")
