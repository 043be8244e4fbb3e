"""Loading saved models without running code that the file brings, and resuming interrupted runs."""

import contextlib
import copy
import inspect
import io
import pathlib
import zipfile
from typing import IO, Any, TypeVar

import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import ActionNoise, VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.save_util import load_from_pkl, open_path
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import get_device

from sb3_rfm import checkpoint, safe_pickle

SelfPersistent = TypeVar("SelfPersistent", bound="PersistentAlgorithm")
SelfModel = TypeVar("SelfModel", bound="PersistentModel")

FilePath = str | pathlib.Path | io.BufferedIOBase | IO[bytes]


class PersistentAlgorithm(OffPolicyAlgorithm):
    """An off-policy algorithm whose files are read through an allow-list, and whose runs can be resumed exactly.

    SB3's own ``load`` unpickles members of the file with ``cloudpickle``, which runs whatever code the file contains.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.algorithm = self._algorithm_name()  # what is saved says whose it is

    @classmethod
    def _algorithm_name(cls) -> str:
        """Name of this package's algorithm that a class is, or that a user's class is a kind of."""
        return next(base.__name__ for base in cls.__mro__ if base.__module__.startswith("sb3_rfm."))

    @classmethod
    def load(
        cls: type[SelfPersistent],
        path: FilePath,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        trusted: bool = False,
        **kwargs: Any,
    ) -> SelfPersistent:
        """Load a saved model; the parameters are those of SB3's ``BaseAlgorithm.load``, and one more.

        :param path: Path of the zip file, or a file-like
        :param env: The environment to continue on; None for prediction only
        :param device: Where to put the networks
        :param custom_objects: Members to use instead of those in the file, which are then not read
        :param print_system_info: Whether to print on what system the model was saved
        :param force_reset: Whether to reset the environment before training goes on
        :param trusted: Read everything, as SB3 does: this runs any code that the file contains
        :param kwargs: Attributes of the model to replace
        :raises ~sb3_rfm.safe_pickle.RefusedError: where the file refers to anything but known data types, unless ``trusted``
        :raises ValueError: where the file is not a saved model of this algorithm, or ``kwargs`` names no attribute that a
            model can be given
        """
        content, name = _read(path, suffix="zip")
        members, objects = safe_pickle.read_model(content, name, custom_objects or (), trusted)
        ours = cls._algorithm_name()
        theirs = members.get("algorithm", ours)  # older files do not say
        if theirs != ours:
            raise ValueError(f"{name} was saved by {theirs}, not by {ours}: load it with {theirs}.load.")
        if "stats_window_size" in kwargs:
            kwargs["_stats_window_size"] = kwargs.pop("stats_window_size")
        arguments = inspect.signature(cls.__init__).parameters.keys() - {"policy", "_init_setup_model"}
        unknown = kwargs.keys() - arguments - members.keys()
        if unknown:
            raise ValueError(f"{cls.__name__} has no {', '.join(sorted(unknown))} that load could replace.")
        content.seek(0)
        # SB3 unpickles no member that it is given.
        given = objects | (custom_objects or {})
        return super().load(content, env, device, given, print_system_info, force_reset, **kwargs)

    def load_replay_buffer(self, path: FilePath, truncate_last_traj: bool = True, trusted: bool = False) -> None:
        """Load a replay buffer; see SB3's ``OffPolicyAlgorithm.load_replay_buffer``.

        :param path: Path of the pickle, or a file-like
        :param truncate_last_traj: With ``HerReplayBuffer``: whether the last trajectory ends here
        :param trusted: Read everything, as SB3 does: this runs any code that the file contains
        :raises ~sb3_rfm.safe_pickle.RefusedError: where the file refers to anything but known data types, unless ``trusted``
        :raises ValueError: where the file is not a replay buffer that fits the model
        """
        if trusted:
            self._set_replay_buffer(load_from_pkl(path, self.verbose), truncate_last_traj)  # type: ignore[arg-type]
            return
        file = open_path(path, "r", verbose=self.verbose, suffix="pkl")  # type: ignore[arg-type]
        with contextlib.nullcontext(file) if file is path else file:
            self._set_replay_buffer(safe_pickle.load(file, "replay buffer"), truncate_last_traj)

    def _set_replay_buffer(self, buffer: ReplayBuffer, truncate_last_traj: bool) -> None:
        """Continue with another replay buffer, as SB3 does after loading one."""
        if not isinstance(buffer, ReplayBuffer):
            raise ValueError(f"The file holds a {type(buffer).__name__}, not a replay buffer.")
        for name in ("observation_space", "action_space"):
            theirs, ours = getattr(buffer, name), getattr(self, name)
            if theirs != ours:
                raise ValueError(f"The replay buffer has the {name} {theirs}, the model {ours}.")
        if buffer.n_envs != self.n_envs:
            raise ValueError(f"The replay buffer was filled by {buffer.n_envs} environments, the model has {self.n_envs}.")
        if isinstance(buffer, HerReplayBuffer):
            if self.env is None:
                raise ValueError("A HerReplayBuffer needs the environment: pass env=... when loading the model.")
            buffer.set_env(self.env)
            if truncate_last_traj:
                buffer.truncate_last_trajectory()
        ours = getattr(self, "replay_buffer", None)  # some delete theirs before they load another
        if isinstance(buffer, NStepReplayBuffer):
            # It holds single steps: how many make a return, and their discount, are the model's.
            returns = ours if isinstance(ours, NStepReplayBuffer) else self
            buffer.n_steps, buffer.gamma = returns.n_steps, returns.gamma
        elif isinstance(ours, NStepReplayBuffer):
            raise ValueError(
                f"The file holds a {type(buffer).__name__}, of single steps; the model has n_steps={ours.n_steps}."
            )
        buffer.device = self.device
        self.replay_buffer = buffer

    @classmethod
    def resume(
        cls: type[SelfPersistent],
        path: str | pathlib.Path,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        trusted: bool = False,
        name_prefix: str | None = None,
    ) -> SelfPersistent:
        """Continue an interrupted run from its checkpoint, exactly as it would have gone on.

        .. code-block:: python

            model = RFM.resume("checkpoints", env=env)
            model.learn(model.remaining_timesteps, callback=RunCheckpoint(10_000, "checkpoints"), reset_num_timesteps=False)

        :param path: A checkpoint written by :class:`~sb3_rfm.checkpoint.RunCheckpoint`, or a folder: its last checkpoint
        :param env: The environment, made and wrapped as it was; None where its registered name is enough to make it
        :param device: Where to put the networks
        :param custom_objects: Members of the saved model to replace, see :meth:`load`
        :param trusted: Read everything: this runs any code that the file contains
        :param name_prefix: Which run's checkpoints, in a folder of several
        :raises ~sb3_rfm.safe_pickle.RefusedError: where the file refers to anything but known data types, unless ``trusted``
        :raises ValueError: where the file is not a checkpoint of this class, the folder has checkpoints of several runs, or
            the environment is not as it was
        :raises FileNotFoundError: where there is no checkpoint
        """
        path = pathlib.Path(path)
        if path.is_dir():
            path = checkpoint.last_checkpoint(path, name_prefix)
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is not a checkpoint: it wasn't a zip-file, or it is truncated ({error}).") from error
        with archive:
            description = checkpoint.read_description(archive, str(path))
            if description["algorithm"] != cls.__name__:
                raise ValueError(f"{path} is a checkpoint of {description['algorithm']}, not of {cls.__name__}.")
            state = checkpoint.read_state(archive, "state.pkl", str(path), trusted)
            buffer = checkpoint.read_state(archive, "replay_buffer.pkl", str(path), trusted)
            model = cls.load(
                io.BytesIO(archive.read("model.zip")),
                checkpoint.plain_env(description, str(path)) if env is None else env,
                device,
                custom_objects,
                force_reset=False,
                trusted=trusted,
                **{name: value for name, value in description["arguments"].items() if name not in (custom_objects or {})},
            )
        vec_env = model.get_env()
        assert vec_env is not None
        if vec_env.num_envs != description["n_envs"]:
            raise ValueError(f"The run had {description['n_envs']} environments, env has {vec_env.num_envs}.")
        model._set_replay_buffer(buffer, truncate_last_traj=False)
        checkpoint.restore_env(vec_env, state)
        if state["envs"] is None:  # the next episode begins when learning does
            checkpoint.end_trajectories(buffer)
            model._last_obs = None
        checkpoint.set_random_state(model, state["random"])
        return model

    def settled_arguments(self) -> dict[str, Any]:
        """Arguments with which a run is resumed instead of the saved ones: what ``"auto"`` stood for in it."""
        return {}

    def _setup_learn(self, total_timesteps: int, *args: Any, **kwargs: Any) -> tuple[int, Any]:
        observation, noise = self._last_obs, self.action_noise
        if isinstance(noise, VectorizedActionNoise) and self.env is not None and noise.n_envs != self.env.num_envs:
            self.action_noise = noise.base_noise  # it was made for other environments; SB3 makes one for these
        states = [copy.deepcopy(vars(part)) for part in _parts(noise)]
        result = super()._setup_learn(total_timesteps, *args, **kwargs)
        is_reset = self._last_obs is not observation
        if is_reset and self.replay_buffer is not None:
            checkpoint.end_trajectories(self.replay_buffer)  # else returns and goals would come from another episode
        goes_on = observation is not None and not is_reset and self.num_timesteps > 0
        if goes_on and self.action_noise is noise:
            # Where the run goes on in the middle of an episode, so does the noise, which SB3 has just reset.
            for part, state in zip(_parts(noise), states, strict=True):
                vars(part).update(state)
        return result

    @property
    def remaining_timesteps(self) -> int:
        """Environment steps that are left of the last call of ``learn``."""
        return max(self._total_timesteps - self.num_timesteps, 0)


class PersistentModel(BaseModel):
    """A network with its own ``save`` and ``load``, the latter through the allow-list.

    What ``save`` writes of the constructors' arguments are the attributes of the same names.
    """

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = [
            vars(cls)["__init__"] for cls in type(self).__mro__ if issubclass(cls, PersistentModel) and "__init__" in vars(cls)
        ]
        names = [name for constructor in own for name in inspect.signature(constructor).parameters]
        return super()._get_constructor_parameters() | {name: getattr(self, name) for name in names if hasattr(self, name)}

    @classmethod
    def load(cls: type[SelfModel], path: FilePath, device: th.device | str = "auto", trusted: bool = False) -> SelfModel:
        """Load a network from the file that ``save`` wrote.

        :param path: Path of the file, or a file-like
        :param device: Where to put the network
        :param trusted: Read everything, as SB3 does: this runs any code that the file contains
        :raises ~sb3_rfm.safe_pickle.RefusedError: where the file refers to anything but known data types, unless ``trusted``
        """
        if trusted:
            return super().load(path, device)  # type: ignore[arg-type]
        device = get_device(device)
        content, name = _read(path, suffix="pth")
        archive = safe_pickle.repack_torch_file(content, name)
        try:
            saved = th.load(archive, map_location=device, weights_only=False, pickle_module=safe_pickle)
        except safe_pickle.RefusedError as error:
            raise safe_pickle.RefusedError(safe_pickle.refusal(f"network in {name}", str(error))) from None
        model = cls(**saved["data"])
        model.load_state_dict(saved["state_dict"])
        return model.to(device)


def _read(path: FilePath, suffix: str) -> tuple[io.BytesIO, str]:
    """All of a file, and what to call it in errors; ``suffix`` is added where there is no file without it."""
    file = open_path(path, "r", suffix=suffix)  # type: ignore[arg-type]
    if file is not path:
        with file:
            return io.BytesIO(file.read()), str(path)
    if file.seekable():  # it may have been written just now
        file.seek(0)
    return io.BytesIO(file.read()), str(getattr(file, "name", "the file"))


def _parts(noise: ActionNoise | None) -> list[ActionNoise]:
    """The noises of all environments, which are what has a state."""
    if isinstance(noise, VectorizedActionNoise):
        return noise.noises
    return [] if noise is None else [noise]
