"""Checkpoints from which a run continues as if it had never been interrupted.

A checkpoint is one file: the model as ``save`` writes it (weights, optimizers, counters, last observation), the replay buffer,
the statistics of ``VecNormalize`` and its like, the state of the random generators (of Python, NumPy, and PyTorch on CPU and
CUDA), and the state of the environments (:mod:`sb3_rfm.rewindable`). It is taken between two rollouts, where all of these are
consistent, and written under another name first, so that a process killed at any moment leaves the checkpoints it had.
"""

import io
import json
import pickle
import random
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from sb3_rfm import safe_pickle
from sb3_rfm.files import remove_unfinished, replacing
from sb3_rfm.rewindable import Rewindable, make_rewindable

FORMAT = "sb3_rfm checkpoint"
VERSION = 2


class RunCheckpoint(BaseCallback):
    """Write a checkpoint every ``save_freq`` calls of ``env.step()``, from which ``resume`` continues the run exactly.

    Environments in a ``DummyVecEnv`` are wrapped in :class:`~sb3_rfm.rewindable.Rewindable` when training starts. In a
    ``SubprocVecEnv`` the wrapper has to be given when it is made, ``make_vec_env(..., wrapper_class=Rewindable)``.

    :param save_freq: Calls of ``env.step()`` between checkpoints; each steps all environments
    :param save_path: Folder of the checkpoints
    :param name_prefix: Their name before the number of steps
    :param keep_last: How many to keep; None for all
    :param verbose: 2 → say when a checkpoint is written
    :raises ValueError: for arguments out of range, and when training starts: for algorithms of others, and in a folder that
        has checkpoints of a later step, which are another run's
    """

    def __init__(
        self,
        save_freq: int,
        save_path: str | Path,
        name_prefix: str = "checkpoint",
        keep_last: int | None = 2,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if save_freq < 1:
            raise ValueError(f"save_freq must be at least 1, got {save_freq}.")
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last must be None or at least 1, got {keep_last}.")
        self.save_freq = save_freq
        self.save_path = Path(save_path)
        self.name_prefix = name_prefix
        self.keep_last = keep_last
        self._last_save = 0
        self._is_between_rollouts = True

    def _init_callback(self) -> None:
        if not hasattr(self.model, "resume"):
            raise ValueError(
                f"RunCheckpoint writes runs of sb3_rfm's algorithms, and {type(self.model).__name__} could not resume one: "
                "use SB3's CheckpointCallback."
            )
        self.save_path.mkdir(parents=True, exist_ok=True)
        for path in checkpoints(self.save_path, self.name_prefix):
            if steps_of(path) > self.model.num_timesteps:
                raise ValueError(
                    f"{path} is a checkpoint of another run, since this one is at step {self.model.num_timesteps}: "
                    "resume that run, or choose another folder."
                )
        remove_unfinished(self.save_path, _pattern(self.name_prefix))
        self._last_save = self.n_calls
        if make_rewindable(self.training_env):
            # The wrappers must see the beginning of the first episode. One that was under way ends here.
            assert isinstance(self.model, OffPolicyAlgorithm) and self.model.replay_buffer is not None
            end_trajectories(self.model.replay_buffer)
            if self.model.action_noise is not None:
                self.model.action_noise.reset()
            self.model._last_obs = self.training_env.reset()  # type: ignore[assignment]
            if self.model._vec_normalize_env is not None:
                self.model._last_original_obs = self.model._vec_normalize_env.get_original_obs()
        if not all(self.training_env.has_attr(name) for name in ("get_run_state", "set_run_state")):
            warnings.warn(
                "The state of these environments cannot be saved: a resumed run will begin a new episode. "
                "Wrap each of them in sb3_rfm.Rewindable, for instance by make_vec_env(..., wrapper_class=Rewindable).",
                stacklevel=2,
            )

    def _on_step(self) -> bool:
        self._is_between_rollouts = False  # a transition is on its way to the buffer
        return True

    def _on_rollout_end(self) -> None:
        self._is_between_rollouts = True

    def _on_rollout_start(self) -> None:
        if self.n_calls - self._last_save >= self.save_freq:
            self._save()

    def _on_training_end(self) -> None:
        if self._is_between_rollouts:  # else a callback has ended training in the middle of a step
            self._save()

    def _save(self) -> None:
        self._last_save = self.n_calls
        path = self.save_path / f"{self.name_prefix}_{self.num_timesteps}_steps.zip"
        assert isinstance(self.model, OffPolicyAlgorithm)
        save_run(self.model, path)
        if self.verbose >= 2:
            print(f"Saved a checkpoint to {path}")
        if self.keep_last is not None:
            for old in checkpoints(self.save_path, self.name_prefix)[: -self.keep_last]:
                old.unlink()


def checkpoints(folder: str | Path, name_prefix: str | None = "checkpoint") -> list[Path]:
    """Checkpoints in a folder, the oldest first.

    :param folder: Folder
    :param name_prefix: As given to :class:`RunCheckpoint`; None for any
    """
    found = [path for path in Path(folder).iterdir() if re.fullmatch(_pattern(name_prefix), path.name)]
    return sorted(filter(_has_description, found) if name_prefix is None else found, key=steps_of)


def last_checkpoint(folder: Path, name_prefix: str | None = None) -> Path:
    """The last checkpoint of the run in a folder.

    :param folder: Folder
    :param name_prefix: As given to :class:`RunCheckpoint`; None where only one run has checkpoints there
    :raises FileNotFoundError: where there is none
    :raises ValueError: where there are several runs', and no prefix
    """
    found = checkpoints(folder, name_prefix)
    if not found:
        raise FileNotFoundError(f"There is no checkpoint{f' of {name_prefix!r}' if name_prefix else ''} in {folder}.")
    prefixes = sorted({path.name.rsplit("_", 2)[0] for path in found})
    if len(prefixes) > 1:
        raise ValueError(f"{folder} has checkpoints of several runs: pass name_prefix, which is one of {prefixes}.")
    return found[-1]


def _pattern(name_prefix: str | None) -> str:
    """Regular expression of checkpoints' names."""
    return (".+" if name_prefix is None else re.escape(name_prefix)) + r"_\d+_steps\.zip"


def steps_of(path: Path) -> int:
    """Environment steps of a checkpoint, by its name."""
    return int(path.name.split("_")[-2])


def _has_description(path: Path) -> bool:
    """Whether a file is a checkpoint, and not a model that SB3's ``CheckpointCallback`` saved."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "run.json" in archive.namelist()


def save_run(model: OffPolicyAlgorithm, path: Path) -> None:
    """Write everything that the run needs to continue; the file appears complete or not at all.

    :param model: The algorithm, between two rollouts
    :param path: The file
    """
    env = model.get_env()
    assert env is not None and model.replay_buffer is not None
    content = io.BytesIO()
    model.save(content)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "algorithm": type(model).__name__,
        "num_timesteps": model.num_timesteps,
        "env_id": _plain_env_id(env),
        "n_envs": env.num_envs,
        "arguments": model.settled_arguments(),  # type: ignore[attr-defined]
    }
    state = {
        "random": random_state(model),
        "vec_env": [_statistics(layer) for layer in _layers(env)],
        "envs": env.env_method("get_run_state") if env.has_attr("get_run_state") else None,
    }
    with replacing(path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        archive.writestr("run.json", json.dumps(description, indent=1))
        archive.writestr("model.zip", content.getvalue())
        archive.writestr("state.pkl", pickle.dumps(state))
        with archive.open("replay_buffer.pkl", "w", force_zip64=True) as member:
            _BufferPickler(member, model.replay_buffer).dump(model.replay_buffer)


def read_description(archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
    """Check that an archive is a checkpoint that this version can read.

    :param archive: The open archive
    :param name: Its name, for errors
    :return: What ``save_run`` wrote about the run
    :raises ValueError: where it is not
    """
    if "run.json" not in archive.namelist():
        raise ValueError(
            f"{name} is not a checkpoint, or it is truncated: the archive has no 'run.json'. (Saved models are read by load.)"
        )
    damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{name} is damaged: the checksum of '{damaged}' does not match.")
    description: dict[str, Any] = json.loads(archive.read("run.json"))
    if description.get("format") != FORMAT:
        raise ValueError(f"{name} is not a checkpoint of sb3_rfm: its format is {description.get('format')!r}.")
    if description.get("version") != VERSION:
        raise ValueError(
            f"{name} has checkpoint format {description.get('version')}; this version of sb3_rfm reads {VERSION}. "
            "Resume with the version that wrote it."
        )
    return description


def plain_env(description: dict[str, Any], name: str) -> VecEnv:
    """The environments of a checkpoint made anew, where they are registered and have no arguments or wrappers.

    :param description: See :func:`read_description`
    :param name: Name of the checkpoint, for errors
    :raises ValueError: where they cannot be made without the caller's help
    """
    env_id = description["env_id"]
    if env_id not in gym.registry:
        reason = f"'{env_id}' is not registered" if env_id else "they have arguments or wrappers"
        raise ValueError(f"The environments of {name} cannot be made from the file alone ({reason}): pass env=...")

    def make() -> gym.Env:
        try:  # as SB3 makes an environment of its name
            return Monitor(gym.make(env_id, render_mode="rgb_array"))
        except TypeError:
            return Monitor(gym.make(env_id))

    return DummyVecEnv([make] * description["n_envs"])


def restore_env(env: VecEnv, state: dict[str, Any]) -> None:
    """Bring vectorised environments to where they were.

    :param env: Environments made in the same way as those of the checkpoint
    :param state: Member ``state.pkl`` of the checkpoint
    :raises ValueError: where the wrappers differ from those of the checkpoint
    """
    layers = _layers(env)
    if len(layers) != len(state["vec_env"]):
        raise ValueError(f"The run had {len(state['vec_env'])} wrappers around its environments, these have {len(layers)}.")
    for layer, statistics in zip(layers, state["vec_env"], strict=True):
        vars(layer).update(statistics)
    if state["envs"] is None:
        return
    make_rewindable(env)
    if not env.has_attr("set_run_state"):
        raise ValueError(
            "The run's environments could be restored; these have no set_run_state: wrap them in Rewindable, too."
        )
    base = env.unwrapped
    if not (isinstance(base, DummyVecEnv) and all(isinstance(inner, Rewindable) for inner in base.envs)):
        base.reset()  # for the wrappers around what is restored
    for i, env_state in enumerate(state["envs"]):
        env.env_method("set_run_state", env_state, indices=i)


def end_trajectories(buffer: ReplayBuffer) -> None:
    """Have the last transition of each environment be its episode's last: what is stored next is another episode.

    :param buffer: Replay buffer
    """
    if isinstance(buffer, HerReplayBuffer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SB3's, for those who did not mean to
            buffer.truncate_last_trajectory()
    elif buffer.size() > 0 and (buffer.handle_timeout_termination or _reads_ahead(buffer)):
        last = (buffer.pos - 1) % buffer.buffer_size
        under_way = buffer.dones[last] == 0
        buffer.dones[last][under_way] = 1
        if buffer.handle_timeout_termination:  # it is none of the environment's own: values go on
            buffer.timeouts[last][under_way] = 1


def _reads_ahead(buffer: ReplayBuffer) -> bool:
    """Whether what is stored next changes what is read of a transition. Where it does not, one whose end cannot be told from
    the environment's own had better stay as it is."""
    return isinstance(buffer, NStepReplayBuffer) or buffer.optimize_memory_usage


def random_state(model: OffPolicyAlgorithm) -> dict[str, Any]:
    """State of all random generators of a run."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 (the generator SB3 samples with)
        "torch": th.get_rng_state().numpy(),
        "cuda": [state.numpy() for state in th.cuda.get_rng_state_all()] if th.cuda.is_available() else [],
        "action_space": model.action_space.np_random.bit_generator.state,
    }


def set_random_state(model: OffPolicyAlgorithm, state: dict[str, Any]) -> None:
    """Inverse of :func:`random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    th.set_rng_state(th.from_numpy(state["torch"]))
    if len(state["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all([th.from_numpy(cuda) for cuda in state["cuda"]])
    model.action_space.np_random.bit_generator.state = state["action_space"]


class _BufferPickler(pickle.Pickler):
    """Pickles a replay buffer without the part of its arrays that is still empty."""

    def __init__(self, file: IO[bytes], buffer: Any) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.n_rows = buffer.buffer_size
        self.n_filled = buffer.size() + 1  # one more with `optimize_memory_usage`

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is np.ndarray and obj.ndim and len(obj) == self.n_rows > self.n_filled and not obj[self.n_filled :].any():
            return padded, (obj[: self.n_filled], self.n_rows)
        return NotImplemented


def padded(rows: np.ndarray, n_rows: int) -> np.ndarray:
    """``rows`` followed by zeros, ``n_rows`` in all."""
    array = np.zeros((n_rows, *rows.shape[1:]), rows.dtype)
    array[: len(rows)] = rows
    return array


def read_state(archive: zipfile.ZipFile, member: str, name: str, trusted: bool) -> Any:
    """Unpickle a member of a checkpoint.

    :param archive: The open archive
    :param member: Its member
    :param name: Name of the checkpoint, for errors
    :param trusted: Read everything, instead of known data types
    """
    with archive.open(member) as file:
        return pickle.load(file) if trusted else safe_pickle.load(file, f"member '{member}' of {name}")


def _layers(env: VecEnv) -> list[VecEnvWrapper]:
    layers = []
    while isinstance(env, VecEnvWrapper):
        layers.append(env)
        env = env.venv
    return layers


def _statistics(layer: VecEnvWrapper) -> dict[str, Any]:
    """What a wrapper has learned or collected: arrays, moments and frame stacks."""

    def is_data(value: object) -> bool:
        if isinstance(value, dict):
            return bool(value) and all(map(is_data, value.values()))
        return isinstance(value, (np.ndarray, RunningMeanStd, StackedObservations))

    return {name: value for name, value in vars(layer).items() if is_data(value)}


def _plain_env_id(env: VecEnv) -> str | None:
    """Registered name of the environments, where it is all that is needed to make them again."""
    base = env.unwrapped
    if not isinstance(base, DummyVecEnv) or any(_statistics(layer) for layer in _layers(env)):
        return None
    specs = [inner.spec for inner in base.envs]
    if any(spec is None or spec.kwargs.keys() - {"render_mode"} or spec.id != specs[0].id for spec in specs):  # type: ignore[union-attr]
        return None
    registered = gym.registry.get(specs[0].id)  # type: ignore[union-attr]
    if registered is None or any(spec.max_episode_steps != registered.max_episode_steps for spec in specs):  # type: ignore[union-attr]
        return None
    wrappers = {wrapper.name for spec in specs for wrapper in spec.additional_wrappers}  # type: ignore[union-attr]
    return specs[0].id if wrappers <= {Monitor.__name__, Rewindable.__name__} else None  # type: ignore[union-attr]
