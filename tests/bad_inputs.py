"""Bad inputs, and what they are answered with.

    python tests/bad_inputs.py > docs/results/bad_inputs.txt

writes the table of the documentation; ``test_bad_inputs.py`` holds it to what the code does.
"""

import base64
import json
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.sac.policies import SACPolicy
from tiny import TINY
from torch.distributions import Exponential, Gumbel, Independent, Laplace, Normal

from sb3_rfm import DQS, QNE, QSM, RFM, RunCheckpoint
from sb3_rfm.checkpoint import VERSION
from sb3_rfm.policies import FlowPolicy

SMALL = TINY | {"learning_starts": 5, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}}
VECTOR, ACTION = spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,))
DICTIONARY = spaces.Dict({"a": VECTOR, "b": ACTION})
MAX_LENGTH = 400
THIS_VERSION = f'ion": {VERSION}'.encode()
NAN, INF = float("nan"), float("inf")


class Env(gym.Env):
    """Any spaces; ``answers`` replaces what is returned at first, or by the eighth step."""

    def __init__(self, observation_space: spaces.Space = VECTOR, action_space: spaces.Space = ACTION, **answers: Any) -> None:
        self.observation_space, self.action_space, self.answers = observation_space, action_space, answers
        self.observation_space.seed(0)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        return self.answers.get("first", self.observation_space.sample()), {}

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict]:
        self.steps += 1
        answers = self.answers if self.steps == 8 else {}
        observation = answers.get("observation", self.observation_space.sample())
        return observation, answers.get("reward", 0.0), answers.get("end", False), False, {}


def make(algorithm: Any = RFM, policy: Any = "MlpPolicy", env: Any = None, **arguments: Any) -> Any:
    return algorithm(policy, Env() if env is None else env, **(SMALL | arguments))


class Files:
    """Saved models and checkpoints in a folder, and what can befall them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make().learn(10, callback=RunCheckpoint(10, folder))
        self.checkpoint = folder / "checkpoint_10_steps.zip"
        (folder / "empty").mkdir()
        self.model.save(folder / "model.zip")
        self.model.save_replay_buffer(folder / "buffer.pkl")
        SAC("MlpPolicy", Env(), buffer_size=10).save(folder / "sac.zip")

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str, content: bytes) -> Path:
        (self / name).write_bytes(content)
        return self / name

    def archive(self, member: str) -> Path:
        with zipfile.ZipFile(self / "archive.zip", "w") as archive:
            archive.writestr(member, "")
        return self / "archive.zip"

    def truncated(self, path: Path) -> Path:
        return self.write("truncated.zip", path.read_bytes()[: path.stat().st_size // 2])

    def damaged(self, path: Path) -> Path:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        return self.write("damaged.zip", content)

    def with_member(self, path: Path, member: str, change: Callable[[bytes], bytes]) -> Path:
        """A copy of an archive with one member changed."""
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(self / "changed.zip", "w") as new:
            for name in old.namelist():
                new.writestr(name, change(old.read(name)) if name == member else old.read(name))
        return self / "changed.zip"

    def with_data(self, name: str, value: Any) -> Path:
        """A copy of the saved model with one entry of its data changed."""
        return self.with_member(self / "model.zip", "data", lambda data: json.dumps(json.loads(data) | {name: value}).encode())

    def malicious(self) -> bytes:
        """A pickle that creates a file when it is read."""
        return pickle.dumps(Bomb(self / "boom"))


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.target)!r}, 'w')",)


class Case(NamedTuple):
    """A bad input.

    :param title: How the table calls it, in Markdown
    :param do: What is tried
    :param says: What the error must contain
    :param error: Its type
    """

    title: str
    do: Callable[[Files], Any]
    says: str
    error: type[Exception] = ValueError


def argument(name: str, *values: Any, error: type[Exception] = ValueError, algorithm: Any = RFM) -> list[Case]:
    """Values that an argument of the constructor must not have."""
    prefix = "" if algorithm is RFM else f"{algorithm.__name__}: "
    return [
        Case(f"{prefix}`{name}={v!r}`", lambda _, v=v: make(algorithm, **{name: v}).learn(10), name, error) for v in values
    ]


def network(says: str, error: type[Exception] = ValueError, **kwargs: Any) -> Case:
    return Case(f"`policy_kwargs={kwargs}`", lambda _: make(policy_kwargs=kwargs), says, error)


ARGUMENTS = [
    *argument("temperature", -1, "hot", NAN, INF, "auto_0"),
    *argument("n_candidates", 0, 2.5, True, "8"),
    *argument("n_particles", 0),
    *argument("n_exploration_particles", 0),
    *argument("n_target_particles", 0),
    *argument("integration_steps", 0),
    *argument("coefficient", "best", INF, [0.1, 0.2, 0.3]),
    *argument("coefficient", 1.0, algorithm=QNE),
    *argument("coefficient", 0.5, algorithm=DQS),
    *argument("coefficient", 0.0, algorithm=QSM),
    *argument("path", "straight", 3),
    *argument("source", "laplace", Exponential(1.0), Independent(Normal(th.zeros(3), 1.0), 1)),
    Case("`source=Gumbel(0, 1)`, whose copies fail", lambda _: make(source=Gumbel(0.0, 1.0)), "cannot be copied"),
    Case("`sampler='sde', source=Laplace(0, 1)`", lambda _: make(sampler="sde", source=Laplace(0.0, 1.0)), "gaussian"),
    *argument("source", Laplace(0.0, 1.0), algorithm=QSM),
    *argument("sampler", "rk45"),
    *argument("proposal", "uniform"),
    *argument("weighting", "curvature"),
    *argument("t_min", 0, 0.5, "early"),
    *argument("max_grad_norm", 0),
    *argument("execution", "fast"),
    *argument("precision", "float8"),
    Case("`learning_rate=-1`", lambda _: make(learning_rate=-1), "learning rate"),
    Case("`learning_rate='fast'`", lambda _: make(learning_rate="fast"), "learning rate", AssertionError),
    *argument("batch_size", 0, 2.5),
    *argument("buffer_size", 0),
    *argument("learning_starts", -5),
    *argument("n_steps", 0),
    *argument("gradient_steps", -2, 1.5),
    *argument("train_freq", 0, (1,), (1, "epoch"), "often"),
    *argument("tau", -0.1, 2, NAN),
    *argument("gamma", -1, 1.5, NAN),
    *argument("action_noise", 0.1),
    *argument("replay_buffer_class", "large"),
    *argument("use_sde", True, error=TypeError),
    *argument("ent_coef", "auto", error=TypeError),
    network("net_arhc", TypeError, net_arhc=[8]),
    network("net_arch", net_arch=[0]),
    network("net_arch", net_arch=["wide"]),
    network("net_arch", net_arch=16),
    network("qf", AssertionError, net_arch={"pi": [8]}),
    network("n_critics", n_critics=0),
    network("layer_norm", layer_norm="yes"),
    network("activation_fn", activation_fn="relu"),
    network("optimizer_class", optimizer_class="adam"),
    network("pass it to RFM itself", n_particles=8),
    Case("policy `'Mlp'`", lambda _: make(policy="Mlp"), "'MlpPolicy', 'CnnPolicy', 'MultiInputPolicy'"),
    Case("policy `SACPolicy`", lambda _: make(policy=SACPolicy), "SACPolicy"),
    Case("policy `None`", lambda _: make(policy=None), "None"),
    Case("`RunCheckpoint(save_freq=0)`", lambda _: RunCheckpoint(0, "run"), "save_freq"),
    Case("`RunCheckpoint(keep_last=0)`", lambda _: RunCheckpoint(1, "run", keep_last=0), "keep_last"),
]


def actions(space: spaces.Space, says: str, error: type[Exception] = AssertionError) -> Case:
    return Case(f"actions in `{space}`", lambda _: make(env=Env(action_space=space)), says, error)


def observations(policy: str, space: spaces.Space, says: str, error: type[Exception] = ValueError, **arguments: Any) -> Case:
    title = f"`{policy}`, observations in `{space}`" + "".join(
        f", `{name}={getattr(value, '__name__', value)}`" for name, value in arguments.items()
    )
    return Case(title, lambda _: make(policy=policy, env=Env(space), **arguments), says, error)


GOALS = spaces.Dict({"observation": spaces.Box(-1, 1, ()), "achieved_goal": VECTOR, "desired_goal": VECTOR})

ENVIRONMENTS = [
    Case("environment `None`", lambda _: RFM("MlpPolicy", None), "needs an environment"),
    Case("environment `'NoSuchEnv-v0'`", lambda _: make(env="NoSuchEnv-v0"), "NoSuchEnv", gym.error.NameNotFound),
    Case("environment `object()`", lambda _: make(env=object()), "not a Gymnasium environment"),
    actions(spaces.Discrete(3), "Box"),
    actions(spaces.MultiDiscrete([2, 2]), "Box"),
    actions(spaces.MultiBinary(2), "Box"),
    actions(spaces.Dict({"a": ACTION}), "Box"),
    actions(spaces.Box(-np.inf, np.inf, (2,)), "finite"),
    actions(spaces.Box(0, np.inf, (2,)), "finite"),
    actions(spaces.Box(0, 9, (2,), np.int64), "floating-point", ValueError),
    actions(spaces.Box(-1, 1, (0,)), "at least one", ValueError),
    observations("MlpPolicy", DICTIONARY, "MultiInputPolicy"),
    observations("MultiInputPolicy", VECTOR, "MlpPolicy"),
    observations("CnnPolicy", VECTOR, "MlpPolicy", AssertionError),
    observations("MultiInputPolicy", spaces.Dict({"a": DICTIONARY}), "Nested", NotImplementedError),
    observations("MlpPolicy", spaces.Tuple([VECTOR]), "Tuple"),
    observations("MlpPolicy", spaces.Box(-1, 1, ()), "make a vector"),
    observations("MultiInputPolicy", DICTIONARY, "N-step", AssertionError, n_steps=3),
    observations("MultiInputPolicy", GOALS, "scalar", replay_buffer_class=HerReplayBuffer),
    Case("`set_env` with other observations", lambda files: files.model.set_env(Env(ACTION)), "Observation spaces"),
]


def returns(title: str, says: str, **answers: Any) -> Case:
    return Case(f"environment returns {title}", lambda _: make(env=Env(**answers)).learn(10), says)


BAD_VECTOR = np.array([0, NAN, 0], np.float32)

NUMBERS = [
    returns("reward NaN", "reward is not finite", reward=NAN),
    returns("reward infinite", "reward is not finite", reward=INF),
    returns("reward `'much'`", "much", reward="much"),
    returns("first observation with NaN", "observation is not finite", first=BAD_VECTOR),
    returns("observation with NaN", "observation is not finite", observation=BAD_VECTOR),
    returns("last observation with NaN", "observation is not finite", observation=BAD_VECTOR, end=True),
    returns("observation of shape (5,)", "shape (5,)", observation=np.zeros(5)),
]


def predict(
    title: str, observation: Any, says: str, space: spaces.Space = VECTOR, error: type[Exception] = ValueError
) -> Case:
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    return Case(f"`predict` on {title}", lambda _: make(policy=policy, env=Env(space)).predict(observation), says, error)


PREDICTIONS = [
    predict("shape (4,) instead of (3,)", np.zeros(4), "(4,)"),
    predict("shape (2, 4)", np.zeros((2, 4)), "(2, 4)"),
    predict("what `env.reset()` returns", (np.zeros(3), {}), "tuple"),
    predict("`None`", None, "shape ()"),
    predict("NaN", BAD_VECTOR, "not finite"),
    predict("NaN in a tuple", tuple(BAD_VECTOR.tolist()), "observation is not finite"),
    predict("infinity", np.full(3, INF), "not finite"),
    predict("a dictionary instead of an array", {"a": np.zeros(3)}, "dict", error=AssertionError),
    predict("an array instead of a dictionary", np.zeros(3), "dictionary of ['a', 'b']", DICTIONARY),
    predict("a dictionary without `b`", {"a": np.zeros(3)}, "['a', 'b'], got ['a']", DICTIONARY),
    predict("a dictionary with a `c`", {"a": np.zeros(3), "b": np.zeros(2), "c": 0}, "'c'", DICTIONARY),
    predict("a dictionary with NaN in `b`", {"a": np.zeros(3), "b": np.full(2, NAN)}, "'b' is not finite", DICTIONARY),
]


def load_buffer_of_another(files: Files) -> None:
    make(env=Env(ACTION)).load_replay_buffer(files / "buffer.pkl")


def load_single_steps(files: Files) -> None:
    make(n_steps=3).load_replay_buffer(files / "buffer.pkl")


def load_malicious_policy(files: Files) -> None:
    th.save({"state_dict": {}, "data": Bomb(files / "boom")}, files / "policy.pth")
    FlowPolicy.load(str(files / "policy.pth"))


def load_malicious_member(files: Files) -> None:
    serialized = base64.b64encode(files.malicious()).decode()
    RFM.load(files.with_data("learning_rate", {":type:": "?", ":serialized:": serialized}))


MODELS = [
    Case("`load` of no file", lambda files: RFM.load(files / "nothing"), "nothing", FileNotFoundError),
    Case("… an empty file", lambda files: RFM.load(files.write("empty.zip", b"")), "empty.zip is not a saved model"),
    Case("… a text", lambda files: RFM.load(files.write("letter.zip", b"Dear reader")), "letter.zip is not a saved model"),
    Case("… a checkpoint", lambda files: RFM.load(files.checkpoint), "not a saved model"),
    Case("… another archive", lambda files: RFM.load(files.archive("letter.txt")), "letter.txt"),
    Case("… half a model", lambda files: RFM.load(files.truncated(files / "model.zip")), "truncated.zip"),
    Case("… a model with one byte changed", lambda files: RFM.load(files.damaged(files / "model.zip")), "damaged.zip"),
    Case("… a model of SAC", lambda files: RFM.load(files / "sac.zip"), "another algorithm"),
    Case("`QNE.load` of a model of RFM", lambda files: QNE.load(files / "model.zip"), "saved by RFM"),
    Case("… a model with code", load_malicious_member, "refers to"),
    Case(
        "… a model with an environment to import",
        lambda files: RFM.load(files.with_data("env", "a_module:Env-v0")),
        "a_module",
    ),
    Case(
        "… a model of other weights",
        lambda files: RFM.load(files.with_data("policy_kwargs", {})),
        "size mismatch",
        RuntimeError,
    ),
    Case("`load` for other observations", lambda files: RFM.load(files / "model.zip", env=Env(ACTION)), "Observation spaces"),
    Case("`load` for other actions", lambda files: RFM.load(files / "model.zip", env=Env(VECTOR, VECTOR)), "Action spaces"),
    Case("`load(..., tau=7)`", lambda files: RFM.load(files / "model.zip", tau=7), "tau"),
    Case("`load(..., temprature=1)`", lambda files: RFM.load(files / "model.zip", temprature=1), "temprature"),
    Case("`load(..., policy='CnnPolicy')`", lambda files: RFM.load(files / "model.zip", policy="CnnPolicy"), "no policy"),
    Case(
        "`load` without environment, then `learn`", lambda files: RFM.load(files / "model.zip").learn(9), "set", AssertionError
    ),
    Case("`FlowPolicy.load` of a text", lambda files: FlowPolicy.load(str(files.write("letter", b"Dear"))), "letter"),
    Case("`FlowPolicy.load` of a model", lambda files: FlowPolicy.load(str(files / "model.zip")), "network"),
    Case("`FlowPolicy.load` of a file with code", load_malicious_policy, "refers to"),
    Case("`load_replay_buffer` of a text", lambda f: f.model.load_replay_buffer(f.write("letter", b"Dear")), "cannot be read"),
    Case("… a pickled dictionary", lambda f: f.model.load_replay_buffer(f.write("dict", pickle.dumps({}))), "dict"),
    Case("… a file with code", lambda f: f.model.load_replay_buffer(f.write("code", f.malicious())), "refers to"),
    Case("… a buffer of other observations", load_buffer_of_another, "observation_space"),
    Case("… a buffer of single steps, with `n_steps=3`", load_single_steps, "n_steps=3"),
    Case("`set_parameters` with an unknown name", lambda f: f.model.set_parameters({"polcy": {}}), "polcy"),
]

RUNS = [
    Case(
        "`RunCheckpoint` in the folder of another run",
        lambda files: make().learn(5, callback=RunCheckpoint(5, files.folder)),
        "another run",
    ),
    Case(
        "`RunCheckpoint` with SB3's SAC",
        lambda files: SAC("MlpPolicy", Env(), buffer_size=10).learn(5, callback=RunCheckpoint(5, files / "empty")),
        "CheckpointCallback",
    ),
    Case("`resume` of no folder", lambda files: RFM.resume(files / "nowhere"), "nowhere", FileNotFoundError),
    Case("… a folder without checkpoints", lambda files: RFM.resume(files / "empty"), "no checkpoint", FileNotFoundError),
    Case("… a text", lambda files: RFM.resume(files.write("letter.zip", b"Dear reader")), "letter.zip is not a checkpoint"),
    Case("… a saved model", lambda files: RFM.resume(files / "model.zip"), "read by load"),
    Case("… half a checkpoint", lambda files: RFM.resume(files.truncated(files.checkpoint)), "truncated.zip"),
    Case("… a checkpoint with one byte changed", lambda files: RFM.resume(files.damaged(files.checkpoint)), "damaged.zip"),
    Case(
        "… a checkpoint of a newer format",
        lambda f: RFM.resume(f.with_member(f.checkpoint, "run.json", lambda text: text.replace(THIS_VERSION, b'ion": 99'))),
        "format 99",
    ),
    Case(
        "… a checkpoint of another program",
        lambda f: RFM.resume(f.with_member(f.checkpoint, "run.json", lambda _: b'{"format": "a game"}')),
        "a game",
    ),
    Case("… a checkpoint of another algorithm", lambda files: QNE.resume(files.folder, env=Env()), "RFM, not of QNE"),
    Case(
        "… a checkpoint with code",
        lambda f: RFM.resume(f.with_member(f.checkpoint, "state.pkl", lambda _: f.malicious()), env=Env()),
        "refers to",
    ),
    Case("`resume` without an environment that has no name", lambda files: RFM.resume(files.folder), "pass env"),
    Case("`resume` for other observations", lambda files: RFM.resume(files.folder, env=Env(ACTION)), "Observation spaces"),
    Case("`resume` for two environments", lambda f: RFM.resume(f.folder, env=DummyVecEnv([Env] * 2)), "1 environments"),
    Case(
        "`resume` for another wrapper",
        lambda files: RFM.resume(files.folder, env=VecNormalize(DummyVecEnv([Env]))),
        "wrappers",
    ),
]

CASES = ARGUMENTS + ENVIRONMENTS + NUMBERS + PREDICTIONS + MODELS + RUNS


def message(case: Case, files: Files) -> str:
    """What the input is answered with, as the table has it.

    :param case: The input
    :param files: What it may use
    :raises AssertionError: where it is not refused
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.do(files)
    except Exception as error:
        text = " ".join(str(error).replace(f"{files.folder}{os.sep}", "").split())
        text = text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}…"
        quoted = f"`` {text} ``" if "`" in text else f"`{text}`"
        return f"`{type(error).__name__}`: {quoted}".replace("|", "\\|")
    raise AssertionError(f"{case.title} was not refused.")


def row(case: Case, files: Files) -> str:
    return f"| {case.title} | {message(case, files)} |"


def main() -> None:
    print("| input | answer |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder))
        for case in CASES:
            print(row(case, files))


if __name__ == "__main__":
    main()
