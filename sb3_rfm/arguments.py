"""Checks of the algorithms' arguments: each error says what was wrong and what was expected."""

import copy
import inspect
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.preprocessing import get_action_dim

from sb3_rfm.actors import check_sampler
from sb3_rfm.checks import check_integer, is_number
from sb3_rfm.control_variates import check_coefficient
from sb3_rfm.dict_observations import scalar_keys
from sb3_rfm.execution import check_execution
from sb3_rfm.paths import get_path
from sb3_rfm.policies import FlowPolicy
from sb3_rfm.sources import Source, get_source

if TYPE_CHECKING:
    from sb3_rfm.flow_actor_critic import FlowActorCritic

AUTO_TEMPERATURE = 0.05
"""``temperature="auto"`` is ``"auto_0.05"``."""

OBSERVATIONS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Dict)


def check_share(name: str, value: object) -> None:
    """Check that an argument is a number in [0, 1]."""
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}.")


def check_algorithm(model: OffPolicyAlgorithm) -> None:
    """Check the arguments that Stable-Baselines3 takes as they come, and the spaces.

    :param model: The algorithm, before its networks are built
    :raises ValueError: for what SB3 would accept, and fail on later
    """
    if not (isinstance(model.policy_class, type) and issubclass(model.policy_class, FlowPolicy)):
        raise ValueError(f"{_expected_policy(model)}, got {model.policy_class!r}.")
    if getattr(model, "action_space", None) is None:
        raise ValueError(f"{type(model).__name__} needs an environment, or the name of a registered one, got None.")
    if not isinstance(model.observation_space, OBSERVATIONS):
        known = ", ".join(space.__name__ for space in OBSERVATIONS)
        raise ValueError(f"Observations must be one of {known}, got {model.observation_space}.")
    if isinstance(model.observation_space, spaces.Box) and not model.observation_space.shape:
        raise ValueError(f"Observations must be arrays: make a vector of length one of {model.observation_space}.")
    box = model.action_space
    assert isinstance(box, spaces.Box)  # SB3 has checked
    if not (np.issubdtype(box.dtype, np.floating) and np.prod(box.shape) > 0):
        raise ValueError(f"Actions must be a Box of at least one floating-point number, got {box}.")
    for name in ("batch_size", "buffer_size", "n_steps"):
        check_integer(name, getattr(model, name), 1)
    check_integer("learning_starts", model.learning_starts, 0)
    check_integer("gradient_steps", model.gradient_steps, -1)
    check_share("tau", model.tau)
    check_share("gamma", model.gamma)
    frequency: Any = model.train_freq
    if isinstance(frequency, tuple):
        if len(frequency) != 2:
            raise ValueError(f"train_freq must be a number of steps, or (number, 'step' or 'episode'), got {frequency!r}.")
        frequency = frequency[0]
    check_integer("The frequency of train_freq", frequency, 1)
    if not isinstance(model.action_noise, (ActionNoise, type(None))):
        raise ValueError(f"action_noise must be None or an ActionNoise of SB3, got {model.action_noise!r}.")
    buffer = model.replay_buffer_class
    if buffer is not None and not (isinstance(buffer, type) and issubclass(buffer, ReplayBuffer)):
        raise ValueError(f"replay_buffer_class must be None or a subclass of SB3's ReplayBuffer, got {buffer!r}.")
    scalars = scalar_keys(model.observation_space)
    if scalars and buffer is not None and (buffer is DictReplayBuffer or issubclass(buffer, HerReplayBuffer)):
        raise ValueError(f"{buffer.__name__} cannot store scalar entries; make vectors of length one of {scalars}.")


def check_flow(model: "FlowActorCritic") -> None:
    """Check the arguments that a flow policy adds to those of Stable-Baselines3.

    :param model: The algorithm, before its networks are built
    :raises ValueError: for arguments out of range
    """
    parse_auto_temperature(model.temperature)
    name, default = type(model).__name__, model.default_coefficient
    coefficient = None if model.coefficient is None else check_coefficient(model.coefficient)
    if model.coefficient_is_fixed and coefficient != default:
        fixed = "has no coefficient" if default is None else f"fixes it at {default}"
        raise ValueError(f"coefficient must be left out: {name} {fixed}, got {model.coefficient!r}; RFM lets you choose.")
    for count in ("n_candidates", "integration_steps", "n_particles", "n_exploration_particles", "n_target_particles"):
        check_integer(count, getattr(model, count), 1)
    if model.proposal not in ("replay", "policy"):
        raise ValueError(f"proposal must be 'replay' or 'policy', got {model.proposal!r}.")
    if model.weighting not in ("uniform", "gradient"):
        raise ValueError(f"weighting must be 'uniform' or 'gradient', got {model.weighting!r}.")
    if not (is_number(model.t_min) and 0 < model.t_min < 0.5):
        raise ValueError(f"t_min must lie strictly between 0 and 1/2, got {model.t_min!r}.")
    if model.max_grad_norm is not None and not (is_number(model.max_grad_norm) and model.max_grad_norm > 0):
        raise ValueError(f"max_grad_norm must be None or a positive number, got {model.max_grad_norm!r}.")
    sampling = inspect.signature(FlowPolicy.configure_sampling).parameters
    if misplaced := sorted(model.policy_kwargs.keys() & sampling.keys()):
        raise ValueError(f"policy_kwargs must not have {', '.join(misplaced)}: pass it to {name} itself.")
    get_path(model.path)
    source = get_source(model.source)
    check_sampler(model.sampler, source)
    check_source(source, get_action_dim(model.action_space))
    check_execution(model.execution, model.precision)


def check_source(source: Source, action_dim: int) -> None:
    """Check that a model can have a source: one that is copied with it, and saved.

    :param source: Where the flow starts
    :param action_dim: Dimension D of its samples
    :raises ValueError: if it has another dimension, or if copies of it do not work
    """
    try:
        copy.deepcopy(source).sample((1, action_dim), torch.empty(0), torch.Generator())
    except AssertionError as error:  # PyTorch's own, as copies of inverse transforms have lost what they are the inverse of
        what = getattr(source, "distribution", source)
        raise ValueError(f"source={what} cannot be copied, and no model with it could be saved ({error}).") from error


def check_policy_name(model: OffPolicyAlgorithm, name: str) -> None:
    """Check that a policy is known by this name."""
    if name not in model.policy_aliases:
        raise ValueError(f"{_expected_policy(model)}, got {name!r}.")


def _expected_policy(model: OffPolicyAlgorithm) -> str:
    names = ", ".join(map(repr, model.policy_aliases))
    return f"The policy of {type(model).__name__} must be {names} or a subclass of {FlowPolicy.__name__}"


def parse_auto_temperature(temperature: float | str) -> float | None:
    """The share in ``"auto"`` or ``"auto_<share>"``, or None for a fixed temperature.

    :raises ValueError: unless ``temperature`` is one of these, or a positive number
    """
    if isinstance(temperature, str):
        automatic = re.fullmatch(r"auto(?:_(\d*\.?\d+(?:[eE][-+]?\d+)?))?", temperature)
        share = float(automatic[1] or AUTO_TEMPERATURE) if automatic else 0.0
        if share > 0:
            return share
    elif is_number(temperature) and temperature > 0:
        return None
    raise ValueError(f"temperature must be 'auto', 'auto_<share>' or a positive number, got {temperature!r}.")
