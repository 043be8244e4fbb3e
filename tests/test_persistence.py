"""Saving, loading and resuming: the same policy comes back, no code of the file runs, and a killed run goes on."""

import base64
import contextlib
import io
import itertools
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import uuid
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize
from tiny import TINY
from torch.distributions import Categorical, Laplace, MixtureSameFamily, Normal, StudentT

from sb3_rfm import DQS, QNE, QSM, RFM, Rewindable, RunCheckpoint, execution, safe_pickle
from sb3_rfm.actors import FlowActor
from sb3_rfm.checkpoint import checkpoints
from sb3_rfm.critics import QCritic
from sb3_rfm.policies import FlowPolicy
from sb3_rfm.safe_pickle import RefusedError
from sb3_rfm.sources import DistributionSource, GaussianSource

ALGORITHMS = [RFM, QNE, DQS, QSM]
OBSERVATIONS = np.random.default_rng(0).uniform(-1, 1, (16, 3)).astype(np.float32)


def state(model: Any) -> bytes:
    buffer = model.replay_buffer
    tensors = [*model.policy.state_dict().values()]
    tensors += [v for o in (model.actor.optimizer, model.critic.optimizer) for s in o.state.values() for v in s.values()]
    arrays = [buffer.actions, buffer.rewards, *(tensor.numpy() for tensor in tensors)]
    return b"".join(array.tobytes() for array in arrays)


# Saving and loading


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_loaded_model_acts_and_learns_as_the_saved_one(algorithm: Any, tmp_path: Path) -> None:
    model = algorithm("MlpPolicy", "Pendulum-v1", **TINY, path="cosine", sampler="sde", t_min=0.02).learn(30)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=model.get_env(), tau=0.5)
    assert (loaded.path, loaded.sampler, loaded.t_min, loaded.tau) == ("cosine", "sde", 0.02, 0.5)
    before, after = (m.predict(OBSERVATIONS, deterministic=True)[0] for m in (model, loaded))
    np.testing.assert_array_equal(before, after)
    assert loaded.policy.temperature == model.policy.temperature
    loaded.learn(20)
    assert os.path.getsize(tmp_path / "model.zip") < 200_000


@pytest.mark.parametrize("how", ["argument", "custom object"])
def test_a_temperature_given_to_load_counts(how: str, tmp_path: Path) -> None:
    for saved in (0.02, "auto"):
        RFM("MlpPolicy", "Pendulum-v1", **TINY, temperature=saved).learn(20).save(tmp_path / "model")
        given: Any = {"temperature": 0.5} if how == "argument" else {"custom_objects": {"temperature": 0.5}}
        loaded = RFM.load(tmp_path / "model", env=gym.make("Pendulum-v1"), **given).learn(20)
        assert loaded.policy.temperature.item() == 0.5


def test_the_window_of_statistics_can_be_given_to_load(tmp_path: Path) -> None:
    RFM("MlpPolicy", "Pendulum-v1", **TINY).save(tmp_path / "model")
    model = RFM.load(tmp_path / "model", env=gym.make("Pendulum-v1"), stats_window_size=5).learn(10)
    assert model.ep_info_buffer.maxlen == 5


@pytest.mark.parametrize(
    "source",
    [
        Laplace(0.0, 1.0),
        StudentT(5.0),
        MixtureSameFamily(Categorical(th.ones(2)), Normal(th.tensor([-1.0, 1.0]), 0.5)),
        DistributionSource(Laplace(0.0, 1.0)),
        GaussianSource(),
    ],
    ids=["laplace", "student", "mixture", "own class", "gaussian"],
)
def test_the_source_comes_back(source: Any, tmp_path: Path) -> None:
    model = RFM("MlpPolicy", "Pendulum-v1", **TINY, source=source).learn(20)
    model.save(tmp_path / "model")
    model.policy.save(str(tmp_path / "policy"))
    model.actor.save(str(tmp_path / "actor"))
    loaded = RFM.load(tmp_path / "model", env=model.get_env())
    assert type(loaded.source) is type(source)
    pairs = [(model, loaded), (model.policy, FlowPolicy.load(str(tmp_path / "policy")))]
    pairs.append((model.actor, FlowActor.load(str(tmp_path / "actor"))))
    for deterministic in (True, False):
        for saved, read in pairs:
            actions = []
            for network in (saved, read):
                th.manual_seed(0)
                actions.append(network.predict(OBSERVATIONS, deterministic=deterministic)[0])
            np.testing.assert_array_equal(*actions)
    loaded.learn(20)


class OwnSource(GaussianSource):
    """A source that somebody defined in their own code."""


def test_own_sources_need_trust(tmp_path: Path) -> None:
    RFM("MlpPolicy", "Pendulum-v1", **TINY, source=OwnSource()).save(tmp_path / "model")
    with pytest.raises(RefusedError, match=r"'source'.*OwnSource"):
        RFM.load(tmp_path / "model")
    assert isinstance(RFM.load(tmp_path / "model", trusted=True).source, OwnSource)
    replaced = RFM.load(tmp_path / "model", custom_objects={"source": "gaussian"})
    assert replaced.actor.source == "gaussian"


def test_parameters_can_be_read_and_written(tmp_path: Path) -> None:
    first, second = (RFM("MlpPolicy", "Pendulum-v1", **(TINY | {"seed": seed})) for seed in (0, 1))
    second.set_parameters(first.get_parameters())
    np.testing.assert_array_equal(*(m.predict(OBSERVATIONS, deterministic=True)[0] for m in (first, second)))
    first.save(tmp_path / "model")
    RFM("MlpPolicy", "Pendulum-v1", **(TINY | {"seed": 2})).set_parameters(str(tmp_path / "model"))


def test_networks_can_be_saved_alone(tmp_path: Path) -> None:
    model = RFM("MlpPolicy", "Pendulum-v1", **TINY).learn(20)
    model.policy.save(str(tmp_path / "policy"))
    model.actor.save(str(tmp_path / "actor"))
    policy, actor = FlowPolicy.load(str(tmp_path / "policy")), FlowActor.load(str(tmp_path / "actor"))
    for saved, loaded in ((model.policy, policy), (model.actor, actor)):
        before, after = (network.predict(OBSERVATIONS, deterministic=True)[0] for network in (saved, loaded))
        np.testing.assert_array_equal(before, after)
    file = io.BytesIO()
    model.policy.save(file)
    np.testing.assert_array_equal(
        FlowPolicy.load(file).predict(OBSERVATIONS, deterministic=True)[0], policy.predict(OBSERVATIONS, deterministic=True)[0]
    )
    model.critic.save(str(tmp_path / "critic"))
    critic, obs = QCritic.load(str(tmp_path / "critic")), th.as_tensor(OBSERVATIONS)
    for before, after in zip(model.critic(obs, obs[:, :1]), critic(obs, obs[:, :1]), strict=True):
        th.testing.assert_close(before, after, rtol=0, atol=0)


def from_gpu(content: bytes) -> bytes:
    """A file of ``torch.save`` as a machine with a GPU would have written it."""
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result := io.BytesIO(), "w") as new:
        for info in old.infolist():
            member = old.read(info)
            if info.filename.endswith("data.pkl"):
                # Each tensor says where it was: "cpu", with its length in front.
                assert b"X\x03\x00\x00\x00cpu" in member
                member = member.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(info, member)
    return result.getvalue()


def test_models_of_a_gpu_are_loaded_on_the_cpu(tmp_path: Path) -> None:
    model = RFM("MlpPolicy", "Pendulum-v1", **TINY).learn(20)
    model.save(tmp_path / "cpu.zip")
    model.policy.save(str(tmp_path / "policy"))
    (tmp_path / "policy").write_bytes(from_gpu((tmp_path / "policy").read_bytes()))
    with zipfile.ZipFile(tmp_path / "cpu.zip") as old, zipfile.ZipFile(tmp_path / "gpu.zip", "w") as new:
        for name in old.namelist():
            tensors = name.endswith(".pth") and b"cpu" in old.read(name)
            new.writestr(name, from_gpu(old.read(name)) if tensors else old.read(name))
        assert {name for name in new.namelist() if b"cuda:0" in new.read(name)} >= {"policy.pth", "actor.optimizer.pth"}
    if not th.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            th.load(io.BytesIO((tmp_path / "policy").read_bytes()), pickle_module=safe_pickle, weights_only=False)
    loaded = RFM.load(tmp_path / "gpu.zip", env=model.get_env(), device="cpu")
    for other in (loaded, FlowPolicy.load(str(tmp_path / "policy"), device="cpu")):
        np.testing.assert_array_equal(*(m.predict(OBSERVATIONS, deterministic=True)[0] for m in (model, other)))
    loaded.learn(20)


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04 truncated"])
def test_other_files_are_not_models(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.zip"
    path.write_bytes(content)
    for load in (RFM.load, RFM.resume, FlowPolicy.load):
        with pytest.raises(ValueError, match=r"file.zip (is not|was not)"):
            load(str(path))


# Files that bring code


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def replace_member(path: Path, member: str, value: object) -> None:
    """Put a pickled object into the JSON of a saved model."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(members["data"])
    data[member] = {":type:": "?", ":serialized:": base64.b64encode(pickle.dumps(value)).decode()}
    members["data"] = json.dumps(data).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_a_malicious_model_runs_nothing(tmp_path: Path) -> None:
    path, target = tmp_path / "model.zip", tmp_path / "boom"
    RFM("MlpPolicy", "Pendulum-v1", **TINY).save(path)
    replace_member(path, "learning_rate", Bomb(target))
    with pytest.raises(RefusedError, match=r"learning_rate.*(posix|nt)\.system"):
        RFM.load(path)
    assert not target.exists()
    # What the caller replaces is not read, and what the caller trusts is.
    assert RFM.load(path, custom_objects={"learning_rate": 1e-3}).learning_rate == 1e-3
    assert not target.exists()
    RFM.load(path, trusted=True)
    assert target.exists()


def test_members_of_a_model_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was checked is what is used: another reader might see something else in the same bytes."""
    model = RFM("MlpPolicy", "Pendulum-v1", learning_rate=LinearSchedule(1e-3, 1e-4, 1.0), **TINY).learn(20)
    model.save(tmp_path / "model.zip")

    def refuse(content: bytes) -> Any:
        raise AssertionError("unpickled without a check")

    monkeypatch.setattr("stable_baselines3.common.save_util.cloudpickle.loads", refuse)
    loaded = RFM.load(tmp_path / "model.zip")
    assert loaded.lr_schedule(0.5) == model.lr_schedule(0.5) == 5.5e-4
    with pytest.raises(AssertionError, match="without a check"):
        RFM.load(tmp_path / "model.zip", trusted=True)


def test_a_model_imports_no_environment(tmp_path: Path) -> None:
    RFM("MlpPolicy", "Pendulum-v1", **TINY).save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip", "a") as archive:
        data = json.loads(archive.read("data")) | {"env": "any_module:Env-v0"}
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("data", json.dumps(data))
    with pytest.raises(RefusedError, match="any_module"):
        RFM.load(tmp_path / "model.zip")


@pytest.mark.parametrize("member", ["state.pkl", "replay_buffer.pkl"])
def test_a_malicious_checkpoint_runs_nothing(member: str, tmp_path: Path) -> None:
    target = tmp_path / "boom"
    RFM("MlpPolicy", "Pendulum-v1", **TINY).learn(20, callback=RunCheckpoint(10, tmp_path))
    (path,) = checkpoints(tmp_path)[-1:]
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[member] = pickle.dumps(Bomb(target))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(RefusedError, match=rf"{member}.*system"):
        RFM.resume(path)
    assert not target.exists()


def test_a_malicious_policy_or_buffer_runs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "boom"
    model = RFM("MlpPolicy", "Pendulum-v1", **TINY)
    th.save({"state_dict": {}, "data": Bomb(target)}, tmp_path / "policy")
    with pytest.raises(RefusedError, match="system"):
        FlowPolicy.load(str(tmp_path / "policy"))
    (tmp_path / "buffer.pkl").write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(RefusedError, match="system"):
        model.load_replay_buffer(tmp_path / "buffer.pkl")
    assert not target.exists()


class Script(th.nn.Module):
    """A file is written when it is loaded."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def forward(self) -> None:
        pass

    @th.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.target, self.training

    @th.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.target, self.training = state
        th.save(th.zeros(1), self.target)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_is_not_run(tmp_path: Path) -> None:
    target, path = tmp_path / "boom", tmp_path / "policy"
    th.jit.save(th.jit.script(Script(str(target))), str(path))
    with pytest.raises(ValueError, match="does not hold a network"):
        FlowPolicy.load(str(path))
    assert not target.exists()


def test_a_script_in_disguise_is_not_run(tmp_path: Path) -> None:
    """An archive with two directories: Python reads the one at its end, PyTorch the one that its last record names."""
    target = tmp_path / "boom"
    file = io.BytesIO()
    with pytest.warns(DeprecationWarning):
        th.jit.save(th.jit.script(Script(str(target))), file)
    content = file.getvalue()
    end = content.rindex(b"PK\x05\x06")
    size, start = struct.unpack("<II", content[end + 12 : end + 20])
    directory = content[start : start + size]
    # PyTorch's end is in the 64-bit format, of which this has no need.
    last = b"PK\x05\x06" + content[end + 4 : end + 12] + struct.pack("<IIH", size, start, 0)
    disguised = directory.replace(b"constants.pkl", b"something.pkl")
    (tmp_path / "policy").write_bytes(content[:start] + directory + disguised + last)
    names = zipfile.ZipFile(tmp_path / "policy").namelist()
    assert not any(name.endswith("constants.pkl") for name in names)
    with pytest.raises(ValueError, match="policy was not written by"):
        FlowPolicy.load(str(tmp_path / "policy"))
    assert not target.exists()
    with pytest.warns(UserWarning, match="TorchScript"), contextlib.suppress(Exception):
        th.load(tmp_path / "policy", weights_only=False)
    assert target.exists(), "PyTorch runs it"


def test_a_malicious_tensor_runs_nothing(tmp_path: Path) -> None:
    """PyTorch pickles the numbers of a tensor as a file inside the file, which it would read without any check."""
    target = tmp_path / "boom"
    for zipped in (True, False):
        inner = io.BytesIO()
        th.save(Bomb(target), inner, _use_new_zipfile_serialization=zipped)

        class Tensor:
            def __reduce__(self, content: bytes = inner.getvalue()) -> tuple[Any, ...]:
                return th.storage._load_from_bytes, (content,)

        with pytest.raises(ValueError, match="system"):
            safe_pickle.load(io.BytesIO(pickle.dumps(Tensor())))
    assert not target.exists()
    numbers = th.arange(6.0).reshape(2, 3)
    assert th.equal(safe_pickle.load(io.BytesIO(pickle.dumps(numbers))), numbers)


@pytest.mark.parametrize(
    "reference",
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("os", "system"),
        ("subprocess", "Popen"),
        ("importlib", "import_module"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("cloudpickle.cloudpickle", "_make_function"),
        ("numpy", "load"),
        ("numpy", "memmap"),
        ("torch", "load"),
        ("torch", "compile"),
        ("torch.nn.modules.module", "partial"),
        ("torch.optim.optimizer", "Callable"),
        ("torch.hub", "load"),
        ("stable_baselines3.common.buffers", "np.load"),
        ("stable_baselines3.common.save_util", "load_from_pkl"),
        ("sb3_rfm.rfm", "RFM"),
        ("sb3_rfm.policies", "FlowPolicy.load"),
        ("sb3_rfm.safe_pickle", "AllowListUnpickler"),
        ("module_that_does_not_exist", "anything"),
    ],
)
def test_everything_that_is_not_data_is_refused(reference: tuple[str, str]) -> None:
    with pytest.raises(RefusedError):
        safe_pickle.resolve(*reference)


class Forged:
    """Pickled as the call of a function with some arguments, and a state for what it returns."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        # The state of a class, and not of an object of it.
        (b"cstable_baselines3.common.buffers\nReplayBuffer\nN}Vsample\ncbuiltins\nfloat\ns\x86b.", "a change of ReplayBuffer"),
        (b"csb3_rfm.checkpoint\npadded\nN}V__defaults__\n)s\x86b.", "a change of padded"),
        # Arrays of objects out of any bytes: reading them would follow an address from the file.
        (pickle.dumps(Forged(np.ndarray, ((1,), np.dtype(object), bytearray(8)))), "a call of numpy.ndarray"),
        (b"\x80\x04cnumpy\nndarray\n(K\x01\x85\x8c\x01OC\x08AAAAAAAAt\x81.", "a call of numpy.ndarray"),  # by __new__
        (pickle.dumps(Forged(np.dtype, ([("a", "O")],))), "the dtype"),
        (
            pickle.dumps(Forged(np.dtype, ("V8",), (3, "|", None, ("a",), {"a": (np.dtype(object), 0)}, 8, 1, 0))),
            "a change of the dtype",
        ),
        (pickle.dumps(Forged(np.dtype, ("f8",), (3, "<", None, None, None, -1, -1, 63))), "a change of the dtype"),
        (pickle.dumps(Forged(np.dtype, ("V8",), (3, "|", None, None, None, 800, 1, 0))), "a change of the dtype"),
        # A value that every model in the process shares.
        (pickle.dumps(Forged(TrainFrequencyUnit, ("step",), {"_value_": "episode"})), "a change of TrainFrequencyUnit.STEP"),
    ],
)
def test_a_file_changes_nothing_but_what_it_builds(content: bytes, refused: str) -> None:
    with pytest.raises(RefusedError, match=f"refers to {refused}"):
        safe_pickle.load(io.BytesIO(content))


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3),
        np.array([{"a": 1}, None], object),
        np.array(["some", "text"]),
        np.array([], np.uint8),
        np.array(["2026-01-01"], "datetime64[D]"),
        np.array([True]),
        np.float32(1.5),
        np.arange(4, dtype=">i4"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_are_read_as_they_were(value: Any, protocol: int) -> None:
    read = safe_pickle.load(io.BytesIO(pickle.dumps(value, protocol)))
    assert read.dtype == pickle.loads(pickle.dumps(value, protocol)).dtype  # protocol 2 loses the byte order
    np.testing.assert_array_equal(read, value)


def test_own_functions_need_trust(tmp_path: Path) -> None:
    RFM("MlpPolicy", "Pendulum-v1", **TINY, learning_rate=lambda progress: 1e-3 * progress).save(tmp_path / "model")
    with pytest.raises(RefusedError, match=r"learning_rate|lr_schedule"):
        RFM.load(tmp_path / "model")
    assert RFM.load(tmp_path / "model", trusted=True).learning_rate(0.5) == 5e-4


@pytest.mark.parametrize(
    "arguments",
    [
        {"learning_rate": LinearSchedule(1e-3, 1e-4, 0.5)},
        {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))},
        {"action_noise": VectorizedActionNoise(NormalActionNoise(np.zeros(1), np.ones(1)), 1)},
        {"policy_kwargs": {"net_arch": [8], "activation_fn": th.nn.SiLU, "optimizer_class": th.optim.RMSprop}},
        {"train_freq": (1, "episode"), "coefficient": [0.5], "n_steps": 3},
    ],
)
def test_what_users_pass_is_read_without_trust(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = RFM("MlpPolicy", "Pendulum-v1", **(TINY | arguments))
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    RFM.load(tmp_path / "model", env=model.get_env()).load_replay_buffer(tmp_path / "buffer")


def test_schedules_of_the_zoo_are_read_without_trust(tmp_path: Path) -> None:
    schedule = pytest.importorskip("rl_zoo3.utils").SimpleLinearSchedule(1e-3)
    RFM("MlpPolicy", "Pendulum-v1", **TINY, learning_rate=schedule).save(tmp_path / "model")
    assert RFM.load(tmp_path / "model").learning_rate(0.5) == 5e-4


# Resuming


def same_after_resume(make_env: Any, folder: Path, policy: str = "MlpPolicy", steps: int = 60, **arguments: Any) -> None:
    model = RFM(policy, make_env(), **(TINY | arguments))
    model.learn(steps, callback=RunCheckpoint(17, folder, keep_last=None))
    middle = checkpoints(folder)[0]
    assert model.num_timesteps > 0
    resumed = RFM.resume(middle, env=make_env())
    assert resumed.num_timesteps < model.num_timesteps
    resumed.learn(resumed.remaining_timesteps, reset_num_timesteps=False)
    assert resumed.num_timesteps == model.num_timesteps
    assert state(resumed) == state(model)


def test_resume_vectorised_normalised_stacked(tmp_path: Path) -> None:
    def make_env() -> VecNormalize:
        return VecNormalize(VecFrameStack(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2), 2))

    same_after_resume(make_env, tmp_path, steps=120, action_noise=OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1)))


def test_resume_environments_in_processes(tmp_path: Path) -> None:
    def make_env() -> SubprocVecEnv:
        return SubprocVecEnv([lambda: Rewindable(gym.make("Pendulum-v1"))] * 2)

    same_after_resume(make_env, tmp_path, steps=120)


class Own(gym.Wrapper):
    """An environment that knows its own state."""

    def get_run_state(self) -> np.ndarray:
        return self.unwrapped.state

    def set_run_state(self, state: np.ndarray) -> None:
        self.unwrapped.state = state


def test_resume_sources_of_chance_that_callbacks_share(tmp_path: Path) -> None:
    """Python's and NumPy's generators belong to the run, too: what callbacks draw from them goes on."""
    drawn: dict[int, tuple[float, float]] = {}

    class Draw(BaseCallback):
        def _on_step(self) -> bool:
            drawn[self.num_timesteps] = random.random(), np.random.rand()  # noqa: NPY002
            return True

    RFM("MlpPolicy", "Pendulum-v1", **TINY).learn(30, callback=[RunCheckpoint(20, tmp_path), Draw()])
    expected = dict(drawn)
    resumed = RFM.resume(tmp_path / "checkpoint_20_steps.zip", env=gym.make("Pendulum-v1"))
    resumed.learn(resumed.remaining_timesteps, callback=Draw(), reset_num_timesteps=False)
    assert drawn == expected


@pytest.mark.parametrize(
    "make_env",
    [
        lambda: Rewindable(gym.make("Pendulum-v1")),
        lambda: gym.wrappers.TimeLimit(Rewindable(gym.make("Pendulum-v1")), 25),
        lambda: gym.wrappers.FrameStackObservation(Rewindable(gym.make("Pendulum-v1")), 3),
        lambda: Own(gym.make("Pendulum-v1")),
        lambda: gym.wrappers.TimeLimit(Own(gym.make("Pendulum-v1")), 25),
        lambda: SubprocVecEnv([lambda: Monitor(Rewindable(gym.make("Pendulum-v1")))] * 2),
    ],
    ids=["beneath SB3's monitor", "time limit", "frame stack", "own state", "own state, time limit", "processes"],
)
def test_resume_wrapped_environments(make_env: Any, tmp_path: Path) -> None:
    same_after_resume(make_env, tmp_path, steps=70)


def test_resume_without_a_state_begins_an_episode(tmp_path: Path) -> None:
    def make_env() -> SubprocVecEnv:
        return SubprocVecEnv([lambda: gym.make("Pendulum-v1")] * 2)

    with pytest.warns(UserWarning, match="begin a new episode"):
        RFM("MlpPolicy", make_env(), **TINY).learn(60, callback=RunCheckpoint(20, tmp_path))
    resumed = RFM.resume(tmp_path, env=make_env())
    resumed.learn(20, reset_num_timesteps=False)
    assert resumed.num_timesteps == 80
    dones, timeouts = resumed.replay_buffer.dones[:40], resumed.replay_buffer.timeouts[:40]
    assert dones[29].all() and timeouts[29].all() and dones.sum() == 2
    rewindable = DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2)
    RFM("MlpPolicy", rewindable, **TINY).learn(20, callback=RunCheckpoint(20, tmp_path / "rewindable"))
    with pytest.raises(ValueError, match="wrap them in Rewindable"):
        RFM.resume(tmp_path / "rewindable", env=make_env())


def test_a_checkpoint_in_the_middle_of_a_run_ends_the_episode(tmp_path: Path) -> None:
    """The environment is wrapped, and reset for it."""
    env = gym.wrappers.TimeLimit(BitFlippingEnv(n_bits=8, continuous=True, max_steps=100), 7)
    model = RFM("MultiInputPolicy", env, **TINY, replay_buffer_class=HerReplayBuffer).learn(24)
    model.learn(20, reset_num_timesteps=False, callback=RunCheckpoint(50, tmp_path))
    assert model.replay_buffer.ep_length.max() <= 7


def test_resume_n_step_returns_and_episodes(tmp_path: Path) -> None:
    def make_env() -> gym.Env:
        return gym.make("Pendulum-v1", max_episode_steps=20)

    same_after_resume(make_env, tmp_path, n_steps=3, gradient_steps=-1, train_freq=(1, "episode"), steps=100)
    same_after_resume(
        make_env,
        tmp_path / "optimized",
        optimize_memory_usage=True,
        buffer_size=40,
        replay_buffer_kwargs={"handle_timeout_termination": False},
    )


def test_resume_goals(tmp_path: Path) -> None:
    def make_env() -> gym.Env:
        return gym.wrappers.TimeLimit(BitFlippingEnv(n_bits=4, continuous=True), 10)

    same_after_resume(make_env, tmp_path, "MultiInputPolicy", replay_buffer_class=HerReplayBuffer)


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "dm_control/cartpole-swingup-v0"])
def test_resume_mujoco(env_id: str, tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    if env_id.startswith("dm_control"):
        pytest.importorskip("shimmy")
    same_after_resume(lambda: gym.make(env_id), tmp_path, "MultiInputPolicy" if "dm" in env_id else "MlpPolicy")


def test_resume_makes_plain_environments_itself(tmp_path: Path) -> None:
    model = RFM("MlpPolicy", "Pendulum-v1", **TINY)
    model.learn(40, callback=RunCheckpoint(20, tmp_path, keep_last=None))
    resumed = RFM.resume(checkpoints(tmp_path)[0])
    resumed.learn(resumed.remaining_timesteps, reset_num_timesteps=False)
    assert state(resumed) == state(model)
    with pytest.raises(ValueError, match="RFM, not of QNE"):
        QNE.resume(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        RFM.resume(tmp_path.parent)


def test_what_auto_stood_for_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version may have another default; the run goes on with its own."""
    model = RFM("MlpPolicy", "Pendulum-v1", **TINY)
    model.learn(40, callback=RunCheckpoint(20, tmp_path, keep_last=None))
    monkeypatch.setattr("sb3_rfm.arguments.AUTO_TEMPERATURE", 3.0)
    resumed = RFM.resume(checkpoints(tmp_path)[0])
    resumed.learn(resumed.remaining_timesteps, reset_num_timesteps=False)
    assert state(resumed) == state(model)
    other = RFM.resume(tmp_path, custom_objects={"temperature": 0.5})
    assert other.temperature == other.policy.temperature.item() == 0.5


def test_plain_environments_are_what_they_were(tmp_path: Path) -> None:
    class Count(gym.Env):  # has no render_mode
        observation_space, action_space = gym.spaces.Box(0, 99, (1,)), gym.spaces.Box(-1, 1, (1,))

        def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
            super().reset(**kwargs)
            return np.zeros(1, np.float32), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            return np.ones(1, np.float32), 0.0, False, False, {}

    gym.register("Count-v0", Count, max_episode_steps=9)
    try:
        RFM("MlpPolicy", "Count-v0", **TINY).learn(20, callback=RunCheckpoint(20, tmp_path / "plain"))
        assert RFM.resume(tmp_path / "plain").num_timesteps == 20
    finally:
        del gym.registry["Count-v0"]
    shorter = gym.make("Pendulum-v1", max_episode_steps=15)
    RFM("MlpPolicy", shorter, **TINY).learn(20, callback=RunCheckpoint(20, tmp_path / "shorter"))
    with pytest.raises(ValueError, match="pass env="):
        RFM.resume(tmp_path / "shorter")


def test_training_that_a_callback_ends_leaves_no_half_step(tmp_path: Path) -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 25

    RFM("MlpPolicy", "Pendulum-v1", **TINY).learn(60, callback=[RunCheckpoint(20, tmp_path), Stop()])
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint_20_steps.zip"]


def test_resume_finds_checkpoints_of_any_name(tmp_path: Path) -> None:
    model = RFM("MlpPolicy", "Pendulum-v1", **TINY)
    model.learn(20, callback=[RunCheckpoint(20, tmp_path, "mine"), CheckpointCallback(15, str(tmp_path))])
    model.save(tmp_path / "other_99_steps.zip")
    assert RFM.resume(tmp_path).num_timesteps == 20


def test_resume_tells_runs_in_a_folder_apart(tmp_path: Path) -> None:
    for name, steps in (("a", 20), ("a_2", 40)):
        RFM("MlpPolicy", "Pendulum-v1", **TINY).learn(steps, callback=RunCheckpoint(20, tmp_path, name))
    with pytest.raises(ValueError, match=r"several runs.*\['a', 'a_2'\]"):
        RFM.resume(tmp_path)
    assert [RFM.resume(tmp_path, name_prefix=name).num_timesteps for name in ("a", "a_2")] == [20, 40]
    with pytest.raises(FileNotFoundError, match="no checkpoint of 'b'"):
        RFM.resume(tmp_path, name_prefix="b")


def test_checkpoints_that_were_not_finished_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A process that was killed leaves its own; another run's may be under way.
    left_over, others = (tmp_path / f".{uuid.uuid4().hex}.{name}_10_steps.zip" for name in ("a", "a_2"))
    left_over.touch()
    others.touch()
    RFM("MlpPolicy", "Pendulum-v1", **TINY).learn(20, callback=RunCheckpoint(20, tmp_path, "a"))
    assert set(tmp_path.iterdir()) == {others, tmp_path / "a_20_steps.zip"}

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("sb3_rfm.checkpoint._BufferPickler.dump", full)
    with pytest.raises(OSError, match="No space"):
        RFM("MlpPolicy", "Pendulum-v1", **TINY).learn(20, callback=RunCheckpoint(20, tmp_path, "b"))
    assert set(tmp_path.iterdir()) == {others, tmp_path / "a_20_steps.zip"}


def test_action_noise_is_made_for_more_environments(tmp_path: Path) -> None:
    noise = NormalActionNoise(np.zeros(1), np.ones(1))
    RFM("MlpPolicy", "Pendulum-v1", **TINY, action_noise=noise).learn(20).save(tmp_path / "m")
    env = DummyVecEnv([lambda: gym.make("Pendulum-v1", max_episode_steps=5)] * 3)
    RFM.load(tmp_path / "m", env=env).learn(40, reset_num_timesteps=False)


def test_action_noise_begins_anew_where_the_episode_does() -> None:
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))
    model = RFM("MlpPolicy", "Pendulum-v1", **TINY, action_noise=noise).learn(20)
    assert model.action_noise.noise_prev != 0
    model.set_env(gym.make("Pendulum-v1"))
    model.learn(0, reset_num_timesteps=False)
    assert model.action_noise.noise_prev == 0


def test_action_noise_stays_the_object_that_was_given() -> None:
    """So that it can be changed between two calls of ``learn``."""
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1))
    model = RFM("MlpPolicy", "Pendulum-v1", **TINY, action_noise=noise).learn(20)
    before = noise.noise_prev
    model.learn(0, reset_num_timesteps=False)
    assert model.action_noise is noise and noise.noise_prev == before != 0


def test_n_step_returns_follow_the_discount_of_now(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    RFM("MlpPolicy", "Pendulum-v1", **TINY, n_steps=3).save(tmp_path / "m")
    model = RFM.load(tmp_path / "m", gamma=0.5)
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = RFM.load(tmp_path / "m", gamma=0.7, n_steps=5)
    loaded.load_replay_buffer(tmp_path / "buffer")
    for buffer, expected in ((model.replay_buffer, (3, 0.5)), (loaded.replay_buffer, (5, 0.7))):
        assert (type(buffer), buffer.n_steps, buffer.gamma) == (NStepReplayBuffer, *expected)
    assert type(RFM.load(tmp_path / "m", n_steps=1).replay_buffer) is ReplayBuffer
    RFM("MlpPolicy", "Pendulum-v1", **TINY).save(tmp_path / "single")
    assert type(RFM.load(tmp_path / "single", n_steps=3).replay_buffer) is NStepReplayBuffer
    assert not [warning for warning in recwarn if "n_steps" in str(warning.message)]
    own = {"n_steps": 3, "gamma": 0.5}
    with pytest.warns(UserWarning, match="is ignored"):  # SB3's, of the argument n_steps
        named = RFM(
            "MlpPolicy", "Pendulum-v1", **TINY, n_steps=5, replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=own
        ).replay_buffer
    assert (named.n_steps, named.gamma) == (3, 0.5)


@pytest.mark.parametrize("trusted", [False, True])
def test_n_step_returns_are_those_of_the_model(tmp_path: Path, trusted: bool) -> None:
    three = RFM("MlpPolicy", "Pendulum-v1", **TINY, n_steps=3, gamma=0.9)
    three.save_replay_buffer(tmp_path / "three")
    one = RFM("MlpPolicy", "Pendulum-v1", **TINY, gamma=0.5)
    one.save_replay_buffer(tmp_path / "one")
    del one.replay_buffer  # as SB3's own tests do
    one.load_replay_buffer(tmp_path / "three", trusted=trusted)
    assert (one.replay_buffer.n_steps, one.replay_buffer.gamma) == (1, 0.5)
    with pytest.raises(ValueError, match="n_steps=3"):
        three.load_replay_buffer(tmp_path / "one", trusted=trusted)


def test_n_step_returns_end_where_the_environment_is_reset() -> None:
    model = RFM("MlpPolicy", "Pendulum-v1", **(TINY | {"learning_starts": 100}), n_steps=3)
    model.learn(12)
    model.learn(12, reset_num_timesteps=False)  # goes on in the same episode
    model.learn(12)
    buffer = model.replay_buffer
    batch = buffer._get_samples(np.array([11, 23]))
    assert not th.equal(batch.next_observations[0], th.tensor(buffer.next_observations[11, 0]))
    th.testing.assert_close(batch.next_observations[1], th.tensor(buffer.next_observations[23, 0]))
    assert batch.rewards[1].item() == pytest.approx(buffer.rewards[23, 0])
    assert batch.discounts[1].item() == pytest.approx(model.gamma) and not batch.dones[1]  # its value goes on


@pytest.mark.parametrize("optimize_memory_usage", [True, False])
def test_a_buffer_that_reads_ahead_is_told_where_the_environment_was_reset(optimize_memory_usage: bool) -> None:
    """It takes the next observation from the next transition. Another buffer, with no word for a time limit, is left alone."""
    kwargs = {"handle_timeout_termination": False}
    arguments = TINY | {"optimize_memory_usage": optimize_memory_usage, "replay_buffer_kwargs": kwargs}
    model = RFM("MlpPolicy", "Pendulum-v1", **arguments).learn(15)
    model.set_env(gym.make("Pendulum-v1"))
    model.learn(5, reset_num_timesteps=False)
    assert model.replay_buffer.dones[:20].flatten().nonzero()[0].tolist() == ([14] if optimize_memory_usage else [])


def test_goals_come_from_the_episode_before_the_environment_is_reset() -> None:
    env = BitFlippingEnv(n_bits=3, continuous=True, max_steps=8)
    model = RFM("MultiInputPolicy", env, **(TINY | {"learning_starts": 100}), replay_buffer_class=HerReplayBuffer)
    model.learn(5)
    model.learn(20)
    starts, lengths = model.replay_buffer.ep_start[:, 0], model.replay_buffer.ep_length[:, 0]
    assert starts[4] + lengths[4] == 5 == starts[5]


@pytest.mark.parametrize("n_envs", [1, 3])
def test_noise_of_other_numbers_of_environments(tmp_path: Path, n_envs: int) -> None:
    def envs(n: int) -> DummyVecEnv:
        return DummyVecEnv([lambda: gym.make("Pendulum-v1")] * n)

    noise = NormalActionNoise(np.zeros(1), np.ones(1))
    RFM("MlpPolicy", envs(2), **TINY, action_noise=noise).learn(20).save(tmp_path / "m")
    model = RFM.load(tmp_path / "m", env=envs(n_envs)).learn(12)
    assert len(getattr(model.action_noise, "noises", [model.action_noise])) == n_envs


class LoggedRFM(RFM):
    """A user's own."""


def test_files_of_another_algorithm_are_refused(tmp_path: Path) -> None:
    for algorithm, other in itertools.permutations((RFM, QNE, DQS, QSM), 2):
        algorithm("MlpPolicy", "Pendulum-v1", **TINY).save(tmp_path / "m")
        with pytest.raises(ValueError, match=f"saved by {algorithm.__name__}, not by {other.__name__}"):
            other.load(tmp_path / "m")
    LoggedRFM("MlpPolicy", "Pendulum-v1", **TINY).save(tmp_path / "m")
    RFM.load(tmp_path / "m").save(tmp_path / "m")
    LoggedRFM.load(tmp_path / "m")
    with pytest.raises(ValueError, match="saved by RFM, not by DQS"):
        DQS.load(tmp_path / "m")


def test_a_resumed_run_that_goes_on_for_long_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "has_compiler", lambda: True)
    arguments = TINY | {"execution": "auto"}
    RFM("MlpPolicy", "Pendulum-v1", **arguments).learn(20, callback=RunCheckpoint(10, tmp_path))
    model = RFM.resume(tmp_path)
    model._setup_learn(execution.MIN_UPDATES_TO_COMPILE + 100, None, False)
    assert model._learner.executor.mode == "compile"


def test_replay_buffer_of_other_environments_is_refused(tmp_path: Path) -> None:
    env = DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2)
    RFM("MlpPolicy", env, **TINY).learn(20).save_replay_buffer(tmp_path / "buffer")
    model = RFM("MlpPolicy", "Pendulum-v1", **TINY)
    with pytest.raises(ValueError, match="filled by 2 environments, the model has 1"):
        model.load_replay_buffer(tmp_path / "buffer")


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for steps in (1000, 90, 100):
        (tmp_path / f"checkpoint_{steps}_steps.zip").touch()
    assert [path.name.split("_")[1] for path in checkpoints(tmp_path)] == ["90", "100", "1000"]


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    RFM("MlpPolicy", "Pendulum-v1", **TINY).learn(50, callback=RunCheckpoint(10, tmp_path, keep_last=3))
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint_{n}_steps.zip" for n in (30, 40, 50)]
    assert len(list(tmp_path.iterdir())) == 3


def test_environments_that_are_not_deterministic_are_noticed(tmp_path: Path) -> None:
    class Dice(gym.Env):
        observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

        def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
            return np.float32([int.from_bytes(os.urandom(4)) / 2**32]), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            return self.reset()[0], 0.0, False, False, {}

    RFM("MlpPolicy", Dice(), **TINY).learn(12, callback=RunCheckpoint(20, tmp_path))
    with pytest.warns(UserWarning, match="not deterministic"):
        RFM.resume(tmp_path, env=Dice())


def test_a_rewindable_environment_returns_to_its_state() -> None:
    first, second = (Rewindable(gym.make("Pendulum-v1")) for _ in range(2))
    first.reset(seed=3)
    for _ in range(2):
        for _ in range(5):
            first.step(first.action_space.sample())
        saved = pickle.loads(pickle.dumps(first.get_run_state()))
        second.set_run_state(saved)
        action = first.action_space.sample()
        np.testing.assert_array_equal(first.step(action)[0], second.step(action)[0])
        np.testing.assert_array_equal(first.reset()[0], second.reset()[0])


def test_killed_runs_end_as_if_never_killed() -> None:
    script = Path(__file__).parent / "kill_and_resume.py"
    command = [sys.executable, str(script), "--kills", "5", "--steps", "150", "--save-freq", "10"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "5 kills" in result.stdout


def test_buffers_are_stored_without_their_empty_part() -> None:
    from sb3_rfm.checkpoint import _BufferPickler

    model = RFM("MlpPolicy", "Pendulum-v1", **(TINY | {"buffer_size": 100_000})).learn(20)
    file = io.BytesIO()
    _BufferPickler(file, model.replay_buffer).dump(model.replay_buffer)
    assert file.tell() < 20_000
    file.seek(0)
    restored = safe_pickle.load(file)
    np.testing.assert_array_equal(restored.observations, model.replay_buffer.observations)
    assert restored.pos == 20
