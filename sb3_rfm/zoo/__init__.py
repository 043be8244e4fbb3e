"""RL Zoo with the four algorithms of this package.

Training, tuning, recording and plotting are RL Zoo's own commands (``python -m sb3_rfm.zoo --help``). What is added here is
what it has to know of an algorithm: the class, its hyperparameters and a search space.

Source: https://github.com/DLR-RM/rl-baselines3-zoo
"""

from pathlib import Path
from typing import Any

import optuna
import shimmy  # noqa: F401  (registers the DeepMind Control Suite with Gymnasium)
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER, convert_offpolicy_params, sample_sac_params

from sb3_rfm import DQS, QNE, QSM, RFM
from sb3_rfm.flow_actor_critic import FlowActorCritic

ALGORITHMS: dict[str, type[FlowActorCritic]] = {"rfm": RFM, "qne": QNE, "dqs": DQS, "qsm": QSM}

HYPERPARAMS = Path(__file__).parent / "hyperparams"
"""Folder with one file of hyperparameters for each algorithm."""

_read_hyperparameters = ExperimentManager.read_hyperparameters


def register(trusted: bool = False) -> None:
    """Make the algorithms known to RL Zoo, for this process.

    Their hyperparameters are those of :data:`HYPERPARAMS`, unless the zoo has a file of that name or ``--conf-file`` gives
    another.

    :param trusted: Whether models and replay buffers are loaded as SB3 does it, running whatever code they contain: needed
        for those with classes of your own
    """
    ALGOS.update({name: _trusting(algorithm) if trusted else algorithm for name, algorithm in ALGORITHMS.items()})
    HYPERPARAMS_SAMPLER.update(
        rfm=sample_rfm_params, qne=sample_candidate_params, dqs=sample_candidate_params, qsm=sample_qsm_params
    )
    # The parameters of the flow have the names of the arguments: only SAC's need converting.
    HYPERPARAMS_CONVERTER.update(dict.fromkeys(ALGORITHMS, convert_offpolicy_params))
    ExperimentManager.read_hyperparameters = _read_hyperparameters_of_package  # type: ignore[method-assign]


def _trusting(algorithm: type[FlowActorCritic]) -> type[FlowActorCritic]:
    """The algorithm, whose files are trusted."""

    class Trusting(algorithm):  # type: ignore[valid-type, misc]
        @classmethod
        def load(cls, *args: Any, **kwargs: Any) -> Any:
            return super().load(*args, trusted=True, **kwargs)

        def load_replay_buffer(self, *args: Any, **kwargs: Any) -> None:
            super().load_replay_buffer(*args, trusted=True, **kwargs)

    Trusting.__name__ = algorithm.__name__
    return Trusting


def sample_flow_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Search space of all four algorithms: SAC's, and what concerns the flow.

    :param trial: Trial to draw for
    :param n_actions: Dimension of the actions
    :param n_envs: Number of environments
    :param additional_args: RL Zoo's arguments for hindsight experience replay
    :return: Arguments of the algorithm
    """
    return sample_sac_params(trial, n_actions, n_envs, additional_args) | {
        "temperature": trial.suggest_categorical("temperature", ["auto_0.0125", "auto_0.025", "auto", "auto_0.1", "auto_0.2"]),
        "path": trial.suggest_categorical("path", ["cond_ot", "cosine", "linear_vp", "ve"]),
        "proposal": trial.suggest_categorical("proposal", ["replay", "policy"]),
        "weighting": trial.suggest_categorical("weighting", ["uniform", "gradient"]),
        "integration_steps": trial.suggest_int("integration_steps", 2, 20, log=True),
        "n_particles": trial.suggest_int("n_particles", 1, 32, log=True),
        "n_exploration_particles": trial.suggest_int("n_exploration_particles", 1, 32, log=True),
        "n_target_particles": trial.suggest_int("n_target_particles", 1, 32, log=True),
    }


def sample_candidate_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Search space of QNE and DQS, and of RFM but for its coefficient; see :func:`sample_flow_params`."""
    return sample_flow_params(trial, n_actions, n_envs, additional_args) | {
        "n_candidates": trial.suggest_int("n_candidates", 4, 64, log=True),
    }


def sample_rfm_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Search space of RFM; see :func:`sample_flow_params`."""
    return sample_candidate_params(trial, n_actions, n_envs, additional_args) | {
        "coefficient": trial.suggest_categorical("coefficient", ["optimal", "scalar"]),
    }


def sample_qsm_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Search space of QSM; see :func:`sample_flow_params`."""
    return sample_flow_params(trial, n_actions, n_envs, additional_args) | {
        "sampler": trial.suggest_categorical("sampler", ["ode", "euler", "sde", "langevin"]),
    }


def _read_hyperparameters_of_package(self: ExperimentManager) -> tuple[dict[str, Any], dict[str, Any]]:
    """``ExperimentManager.read_hyperparameters``, with a file of ours where RL Zoo has none."""
    if self.algo in ALGORITHMS and self.args.conf_file is None and not Path(self.config).exists():
        self.config = str(HYPERPARAMS / f"{self.algo}.yml")
    return _read_hyperparameters(self)
