"""RL Zoo with our algorithms: its commands one after the other, the files of hyperparameters, and the search."""

import importlib.util
import inspect
import itertools
import pickle
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import imageio
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import optuna
import pytest
import rl_zoo3
import yaml
from gymnasium import spaces
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rl_zoo3 import ALGOS
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_rfm import RFM
from sb3_rfm.safe_pickle import RefusedError
from sb3_rfm.zoo import ALGORITHMS, HYPERPARAMS, register
from sb3_rfm.zoo.__main__ import main

TINY = [
    "-params",
    "execution:'eager'",
    "batch_size:32",
    "n_candidates:4",
    "n_particles:1",
    "learning_starts:350",
    "learning_rate:'lin_1e-3'",
]
TASKS = {algo: yaml.safe_load((HYPERPARAMS / f"{algo}.yml").read_text()) for algo in ALGORITHMS}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; RL Zoo reads its arguments from ``sys.argv``, which is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(plt, "show", plt.show)
    yield tmp_path
    plt.close("all")


def saved(path: Path) -> dict[str, object]:
    """Attributes of a saved model."""
    data, _, _ = load_from_zip_file(path)
    assert data is not None
    return data


def test_round_trip(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = Path("logs/rfm/Pendulum-v1_1"), Path("logs/rfm/Pendulum-v1_2")
    task = ["--algo", "rfm", "--env", "Pendulum-v1", "-f", "logs"]
    budget = ["-n", "400", "--eval-freq", "200", "--eval-episodes", "2"]

    main(["train", *task, *budget, "--save-replay-buffer", *TINY])
    assert str(HYPERPARAMS / "rfm.yml") in capsys.readouterr().out
    main(["enjoy", *task, "-n", "200", "--no-render"])
    assert "1 Episodes" in capsys.readouterr().out

    main(["train", *task, *budget, "-i", str(first / "Pendulum-v1.zip"), *TINY])
    assert "Loading replay buffer" in capsys.readouterr().out
    before, after = saved(first / "Pendulum-v1.zip"), saved(second / "Pendulum-v1.zip")
    assert before["n_candidates"] == after["n_candidates"] == 4
    assert 0 < before["_n_updates"] < after["_n_updates"]  # type: ignore[operator]

    main(["plot-train", "-a", "rfm", "-e", "Pendulum-v1", "-f", "logs", "-w", "2"])
    assert len(plt.gcf().axes[0].lines) == 2
    assert plt.imread("Training-Episodic-Reward.png").std() > 0
    main(["all-plots", "-a", "rfm", "-e", "Pendulum-v1", "-f", "logs", "-o", "results"])
    table = capsys.readouterr().out
    assert "|Pendulum-v1 |" in table and "0.0 +/- 0.0" not in table
    results = pickle.loads(Path("results.pkl").read_bytes())
    assert len(results["Pendulum-v1"]["RFM-logs"]["last_evals"]) == 2
    assert plt.imread("Results-Pendulum-v1.png").std() > 0
    main(["plot-from-file", "-i", "results.pkl", "-o", "scores.png", "--format", "png"])
    assert plt.imread("scores.png").std() > 0

    main(["record-video", *task, "-n", "5"])
    (video,) = (second / "videos").glob("*.mp4")
    frames = imageio.mimread(video)
    assert len(frames) == 5 and all(frame.std() > 0 for frame in frames)


def test_own_checkout() -> None:
    """The two lines of the documentation in a checkout of RL Zoo, which has hyperparameters of its own for QSM."""
    package = Path(rl_zoo3.__file__).parent
    shutil.copytree(package, "rl_zoo3", ignore=shutil.ignore_patterns("hyperparams", "__pycache__"))
    Path("hyperparams").mkdir()
    Path("hyperparams/qsm.yml").write_text("Pendulum-v1: {n_timesteps: 3, policy: MlpPolicy, n_particles: 3}")
    for name in ("train", "enjoy"):
        Path(f"{name}.py").write_text(
            "from sb3_rfm import zoo\nzoo.register()\n"
            f"from rl_zoo3.{name} import {name}\nif __name__ == '__main__':\n    {name}()\n"
        )

    def run(*command: str) -> str:
        return subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout

    for algo, file in (("qsm", Path("hyperparams/qsm.yml").resolve()), ("rfm", HYPERPARAMS / "rfm.yml")):
        output = run("train.py", "--algo", algo, "--env", "Pendulum-v1", "-n", "3", "--eval-freq", "-1")
        assert f"Loading hyperparameters from: {file}" in output
    assert saved(Path("logs/qsm/Pendulum-v1_1/Pendulum-v1.zip"))["n_particles"] == 3
    output = run("enjoy.py", "--algo", "qsm", "--env", "Pendulum-v1", "-f", "logs", "-n", "200", "--no-render")
    assert "1 Episodes" in output


class OwnExtractor(FlattenExtractor):
    """A class that no allow-list knows."""


class OwnBuffer(ReplayBuffer):
    """Another."""


def test_files_with_classes_of_ones_own_are_loaded_where_they_are_trusted() -> None:
    own = {"policy_kwargs": {"features_extractor_class": OwnExtractor}, "replay_buffer_class": OwnBuffer}
    model = RFM("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu", **own)  # type: ignore[arg-type]
    model.learn(3)
    model.save("model")
    model.save_replay_buffer("buffer")
    try:
        register(trusted=True)
        loaded = ALGOS["rfm"].load("model")
        loaded.load_replay_buffer("buffer")  # type: ignore[attr-defined]
        assert isinstance(loaded, RFM) and type(loaded).__name__ == "RFM"
        assert isinstance(loaded.actor.features_extractor, OwnExtractor)
    finally:
        register()
    with pytest.raises(RefusedError, match="Own"):
        ALGOS["rfm"].load("model")
    with pytest.raises(RefusedError, match="OwnBuffer"):
        model.load_replay_buffer("buffer")


def test_missing_file_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"typo\.yml"):
        main(["train", "--algo", "rfm", "--env", "Pendulum-v1", "--conf-file", "typo.yml"])


def test_files_say_the_same_and_no_default_again() -> None:
    """RL Zoo wants a file for each algorithm. They are alike, as long as no algorithm has been tuned apart from the others."""
    of_zoo = {"n_timesteps", "env_wrapper", "policy"}
    for algo, tasks in TASKS.items():
        assert tasks == TASKS["rfm"]
        parameters = inspect.signature(ALGORITHMS[algo]).parameters
        for name, task in tasks.items():
            arguments = {key: value for key, value in task.items() if key not in of_zoo}
            assert arguments.keys() <= parameters.keys(), name
            assert {key for key, value in arguments.items() if value == parameters[key].default} == set(), name


@pytest.mark.parametrize(
    ("algo", "env_id"),
    list(zip(itertools.cycle(ALGORITHMS), (name for name in TASKS["rfm"] if name != "default"), strict=False)),
)
def test_every_task_trains(algo: str, env_id: str) -> None:
    if env_id.startswith(("LunarLander", "BipedalWalker")) and importlib.util.find_spec("Box2D") is None:
        pytest.skip("Box2D has no wheel for this Python")
    update = ["buffer_size:2", "learning_starts:0", "train_freq:1", "gradient_steps:1", "batch_size:2", "execution:'eager'"]
    main(["train", "--algo", algo, "--env", env_id, "-n", "2", "--eval-freq", "-1", "-params", *update])
    (model,) = Path("logs", algo).glob("*_1/*.zip")
    assert saved(model)["_n_updates"] == 2
    observation_space = saved(model)["observation_space"]
    assert isinstance(observation_space, spaces.Box)
    assert observation_space.shape is not None and len(observation_space.shape) == 1


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_search_space(algo: str) -> None:
    register()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(10):
        trial = study.ask()
        arguments = HYPERPARAMS_SAMPLER[algo](trial, 1, 1, {"using_her_replay_buffer": False})
        # What is stored of a trial gives the same arguments again: `--trial-id` relies on it.
        assert HYPERPARAMS_CONVERTER[algo](trial.params) == arguments
        ALGORITHMS[algo](env="Pendulum-v1", policy="MlpPolicy", buffer_size=1, **arguments)


def test_search_goes_on_when_a_process_is_killed(workplace: Path) -> None:
    """Two processes on one study; one is killed in the middle of a trial, the other finishes the study.

    The trials act for about a second and are evaluated, but end before the first update: what is tested is the study, and some
    of the batches in the search space are large.
    """
    task = ["--algo", "rfm", "--env", "Pendulum-v1"]
    study = ["--storage", "study.log", "--study-name", "study"]
    command = [sys.executable, "-m", "sb3_rfm.zoo", "train", *task, "-optimize", *study, "--max-total-trials", "4"]
    command += ["-n", "5000", "--n-evaluations", "1", "--eval-episodes", "1", "--sampler", "random", "--pruner", "none"]
    command += ["--no-optim-plots", "-params", "execution:'eager'", "learning_starts:10000"]

    def trials() -> list[optuna.trial.FrozenTrial]:
        storage = JournalStorage(JournalFileBackend("study.log"))
        return storage.get_all_trials(0) if storage.get_all_studies() else []

    def acting() -> list[optuna.trial.FrozenTrial]:
        # "n_candidates" is drawn last. Killed while drawing, a process leaves the journal's lock behind, for half a minute.
        return [trial for trial in trials() if trial.state == TrialState.RUNNING and "n_candidates" in trial.params]

    workers = [subprocess.Popen([*command, "--seed", seed]) for seed in ("1", "2")]
    try:
        deadline = time.monotonic() + 600
        while len(acting()) < 2:
            assert all(worker.poll() is None for worker in workers) and time.monotonic() < deadline
            time.sleep(0.1)
        workers[0].kill()
        workers[0].wait()
        assert workers[1].wait(timeout=600) == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()

    # The trial of the killed process stays as it was.
    assert Counter(trial.state for trial in trials()) == {TrialState.COMPLETE: 3, TrialState.RUNNING: 1}

    main(["train", *task, *study, "--trial-id", "1", "-n", "2", "--eval-freq", "-1"])
    (model,) = Path("logs/rfm").glob("*/Pendulum-v1.zip")
    for name in (
        "n_candidates",
        "n_particles",
        "n_exploration_particles",
        "path",
        "proposal",
        "temperature",
        "tau",
        "weighting",
    ):
        assert saved(model)[name] == trials()[1].params[name]
