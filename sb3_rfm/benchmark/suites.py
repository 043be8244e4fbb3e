"""What is compared on what: tasks with their budgets, and algorithms with their settings.

An algorithm is named ``algo`` for its defaults or ``algo:setting`` for a named setting of it, as in ``qne:paper``. The
``paper`` settings are those of the experiment in Li, Tang & Azizan (arXiv 2601.08136), as far as the classes here have
the choice. They keep one learning rate for actor and critic, and the control variate is this library's. By default,
all of them act with one particle; in the paper, RFM alone chooses among several while training. ``qne:paper-particles``,
``dqs:paper-particles`` and ``qsm:paper-particles`` are the paper's settings of these with that choice of RFM's.
"""

import ast
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise

from sb3_rfm.paths import LinearVPPath, VEPath


@dataclass(frozen=True)
class Task:
    """An environment and the steps to learn in it."""

    env_id: str
    steps: int


DMC8 = (
    "cheetah-run",
    "cartpole-swingup",
    "fish-swim",
    "fish-upright",
    "walker-walk",
    "walker-run",
    "finger-spin",
    "finger-turn_hard",
)

SUITES: dict[str, tuple[Task, ...]] = {
    "dmc8": tuple(Task(f"dm_control/{name}-v0", 250_000) for name in DMC8),
    "classic": (Task("dm_control/cartpole-swingup-v0", 50_000), Task("Pendulum-v1", 10_000)),
}

GIVEN = {"policy", "env", "seed"}
"""Arguments of the algorithms that are the run's, and no part of a setting."""

DEFAULT_STEPS = 100_000
"""Steps in an environment that is named by its id."""

_PAPER: dict[str, Any] = {"buffer_size": 250_000, "learning_starts": 10_000}
_PAPER_FLOW: dict[str, Any] = {**_PAPER, "policy_kwargs": {"layer_norm": False}}
_PAPER_PARTICLES: dict[str, Any] = {"n_particles": 32, "n_exploration_particles": 32, "n_target_particles": 32}
"""Particles among which RFM chooses in the paper: in evaluations, when exploring and in the critic's target."""

SETTINGS: dict[str, dict[str, Any]] = {
    "rfm:paper": {
        **_PAPER,
        "temperature": 0.02,
        "n_candidates": 100,
        "integration_steps": 10,
        "sampler": "euler",
        **_PAPER_PARTICLES,
        "max_grad_norm": 10.0,
        "policy_kwargs": {"net_arch": {"pi": [256, 256, 256], "qf": [256, 256]}, "layer_norm": False},
    },
    "qne:paper": {
        **_PAPER_FLOW,
        "path": "cosine",
        "temperature": 0.02,
        "n_candidates": 500,
        "integration_steps": 20,
        "sampler": "euler",
        "n_particles": 32,
    },
    "dqs:paper": {
        **_PAPER_FLOW,
        "path": VEPath(1e-5, 1.0),
        "temperature": 0.05,
        "n_candidates": 1000,
        "integration_steps": 20,
        "sampler": "euler",
    },
    "qsm:paper": {
        **_PAPER_FLOW,
        "path": LinearVPPath(),
        "temperature": 1 / 50,
        "sampler": "sde",
        "integration_steps": 20,
        "action_noise": 0.1,
    },
    "sac:paper": dict(_PAPER),
}
SETTINGS |= {f"{algo}:paper-particles": SETTINGS[f"{algo}:paper"] | _PAPER_PARTICLES for algo in ("qne", "dqs", "qsm")}
"""Keyword arguments of the named settings; ``action_noise`` may be the standard deviation of Gaussian noise."""


def get_algorithm(name: str) -> type[BaseAlgorithm]:
    """Class of an algorithm.

    :param name: ``rfm``, ``qne``, ``dqs``, ``qsm``; SB3's ``sac`` and ``td3``; sb3-contrib's ``tqc`` where installed
    :raises ValueError: for an unknown name, or for one that is not installed
    """
    import stable_baselines3

    import sb3_rfm

    classes: dict[str, type[BaseAlgorithm]] = {
        "rfm": sb3_rfm.RFM,
        "qne": sb3_rfm.QNE,
        "dqs": sb3_rfm.DQS,
        "qsm": sb3_rfm.QSM,
        "sac": stable_baselines3.SAC,
        "td3": stable_baselines3.TD3,
    }
    if name == "tqc":
        try:
            from sb3_contrib import TQC
        except ModuleNotFoundError as error:
            raise ValueError("tqc is sb3-contrib's: pip install sb3-contrib.") from error
        return TQC
    if name not in classes:
        raise ValueError(f"Unknown algorithm {name!r}: expected one of {sorted([*classes, 'tqc'])}.")
    return classes[name]


def get_parameters(label: str) -> set[str]:
    """Names of the arguments of a label's algorithm that a setting may have."""
    return inspect.signature(get_algorithm(label.partition(":")[0])).parameters.keys() - GIVEN


def get_setting(label: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the algorithm in the setting that a label names, some of them replaced.

    :param label: ``algo`` or ``algo:setting``; a setting that is not in :data:`SETTINGS` is its overrides
    :param overrides: Arguments that take precedence
    :raises ValueError: for a setting that is neither known nor given by overrides, and for arguments that do not exist
    """
    if unknown := sorted(overrides.keys() - get_parameters(label)):
        raise ValueError(
            f"{label} has no argument {', '.join(unknown)}; --set algo.argument=value sets one of a single algorithm."
        )
    if ":" in label and label not in SETTINGS and not overrides:
        known = sorted(SETTINGS)
        raise ValueError(f"Unknown setting {label!r}: known are {known}; a new one needs --set {label}.argument=value.")
    return SETTINGS.get(label, {}) | overrides


def constructor_arguments(setting: dict[str, Any], action_space: spaces.Space) -> dict[str, Any]:
    """Keyword arguments as the constructor takes them, of a setting, which is JSON.

    :param setting: See :func:`get_setting`; a number as ``action_noise`` is the standard deviation of Gaussian noise
    :param action_space: Action space of the environment
    """
    arguments = dict(setting)
    noise, frequency = arguments.get("action_noise"), arguments.get("train_freq")
    if isinstance(noise, (int, float)):
        assert isinstance(action_space, spaces.Box)
        arguments["action_noise"] = NormalActionNoise(np.zeros(action_space.shape), np.full(action_space.shape, noise))
    if isinstance(frequency, list):
        arguments["train_freq"] = tuple(frequency)
    return arguments


def get_tasks(name: str, steps: int | None = None) -> list[Task]:
    """Tasks of a suite, or the one environment of that id.

    :param name: Name of a suite, or an environment id; ids of the Control Suite may leave out ``dm_control/`` and ``-v0``
    :param steps: Steps to learn; the suite's by default
    :raises ValueError: for a name that is neither
    """
    control_suite = f"dm_control/{name}-v0"
    if name in SUITES:
        tasks = SUITES[name]
    elif name in DMC8:
        tasks = (Task(control_suite, DEFAULT_STEPS),)
    elif env_id := next(filter(is_registered, (name, control_suite)), None):
        tasks = (Task(env_id, DEFAULT_STEPS),)
    else:
        raise ValueError(f"Unknown suite or environment {name!r}: expected one of {[*SUITES, *DMC8]} or an environment's id.")
    return [Task(task.env_id, steps or task.steps) for task in tasks]


def short(env_id: str) -> str:
    """Name of an environment in titles and tables."""
    return env_id.removeprefix("dm_control/").removesuffix("-v0")


def parse_overrides(items: Iterable[str], labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Arguments given on the command line, for each label.

    :param items: ``argument=value`` for all algorithms or ``label.argument=value`` for one, which takes precedence; values are
        Python literals, and strings where they are not
    :param labels: Labels of the algorithms
    :return: Nothing for a label of an unknown setting that no item describes: see :func:`get_setting`
    :raises ValueError: for an item that is not understood
    """
    common: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {label: {} for label in labels}
    for item in items:
        key, separator, text = item.partition("=")
        target, _, argument = key.rpartition(".")
        if not separator or not argument.isidentifier() or (target and target not in own):
            raise ValueError(f"--set expects argument=value or algo.argument=value with one of {list(own)}, got {item!r}.")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            if text.lower() in ("true", "false", "none"):
                raise ValueError(f"--set takes Python's literals: {text.capitalize()} instead of {text!r}.") from None
            value = text
        (own[target] if target else common)[argument] = value
    known = {label for label in own if ":" not in label or label in SETTINGS or own[label]}
    return {label: common | own[label] if label in known else {} for label in own}


def register_control_suite(env_id: str) -> None:
    """Have Gymnasium know the DeepMind Control Suite, if the environment is one of it: importing Shimmy does that."""
    if env_id.startswith("dm_control/"):
        import shimmy  # noqa: F401


def is_registered(env_id: str) -> bool:
    """Whether Gymnasium knows an environment, the Control Suite included; of ``module:id``, the module is left to say."""
    if ":" in env_id:
        return True
    register_control_suite(env_id)
    try:
        gym.spec(env_id)
    except gym.error.Error:
        return False
    return True


def make_env(env_id: str) -> gym.Env[Any, Any]:
    """Make an environment with a flat observation, as an MLP needs it.

    :param env_id: Registered id
    """
    register_control_suite(env_id)
    env = gym.make(env_id)
    return FlattenObservation(env) if isinstance(env.observation_space, spaces.Dict) else env


def env_maker(env_id: str) -> Callable[[], gym.Env[Any, Any]]:
    """:func:`make_env` without arguments, for SB3's vectorised environments."""
    return lambda: make_env(env_id)
