"""One run, in a process of its own: ``python -m sb3_rfm.benchmark.worker FOLDER``.

The folder's ``config.json`` says what to do, and its checkpoint, if there is one, where to go on: exactly as if the run had
not been interrupted. A run that is already finished, or that another process is doing, is left alone.
"""

import argparse
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from filelock import Timeout
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnv

from sb3_rfm.benchmark.records import Evaluation, RunFolder, RunSpec
from sb3_rfm.benchmark.suites import constructor_arguments, env_maker, get_algorithm, get_parameters, get_setting
from sb3_rfm.checkpoint import save_run
from sb3_rfm.files import remove_unfinished
from sb3_rfm.persistence import PersistentAlgorithm
from sb3_rfm.rewindable import Rewindable

BUSY = 75
"""Exit status where another process is doing the run."""

STOPPED = 76
"""Exit status where the run was asked to stop; it wrote a checkpoint."""

NO_SETTING = {"tensorboard_log", "verbose", "device", "stats_window_size", "execution"}
"""Arguments that change nothing that is learned, but for rounding."""

STATUS_INTERVAL = 3.0
"""Seconds between two writings of the status."""


class Evaluator:
    """Evaluates a policy by a number of episodes at once, each in an environment of its own.

    The episodes depend on the run's seed and on the step alone: not on training, and not on whether the run was resumed.

    :param spec: The run
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        # Any seed, since every evaluation sets its own; without one, a random number would be taken from training.
        self.env: VecEnv = make_vec_env(env_maker(spec.env_id), n_envs=spec.eval_episodes, seed=0)

    def __call__(self, model: BaseAlgorithm, step: int) -> list[float]:
        """Returns of the deterministic policy.

        :param model: Model with the policy
        :param step: Environment steps learned from
        """
        # Mixed by a hash, so that no evaluation shares its episodes with training or with that of another seed or step.
        # Algorithms share them at the same seed and step, so that they are compared on the same episodes.
        self.env.seed(int(np.random.SeedSequence([self.spec.seed, step]).generate_state(1)[0]) % 2**31)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            returns, _ = evaluate_policy(model, self.env, self.spec.eval_episodes, return_episode_rewards=True)
        return np.asarray(returns, dtype=float).tolist()


class Stopped(Exception):
    """The run was asked to stop, and can be resumed."""


class Recorder(BaseCallback):
    """Evaluates while a model learns, records how far it is, and writes checkpoints.

    :param folder: Folder of the run
    :param evaluator: How to evaluate
    :param checkpoint_every: Environment steps between checkpoints
    """

    def __init__(self, folder: RunFolder, evaluator: Evaluator, checkpoint_every: int) -> None:
        super().__init__()
        self.folder = folder
        self.spec = folder.spec
        self.evaluate = evaluator
        self.checkpoint_every = checkpoint_every
        self.evaluations: list[Evaluation] = []
        self.seconds_before = 0.0
        self.evaluation_seconds = 0.0
        self.started = time.monotonic()
        self.last_status = 0.0
        self.last_checkpoint = 0
        self.stop = False

    def continue_from(self, step: int) -> None:
        """Go on with the record of a run that was interrupted.

        :param step: Environment steps at its checkpoint
        """
        if step == 0:
            return
        done = self.folder.read_evaluations()
        self.evaluations = [e for e in done if e.step <= step]
        if done:  # the time of evaluations that are repeated counts as well, as does that of repeated training
            self.evaluation_seconds = done[-1].wall_clock - done[-1].training_seconds
        self.seconds_before = self.folder.status["wall_clock"]
        self.last_checkpoint = step

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken since it began, those that it went through again from a checkpoint included."""
        return self.seconds_before + time.monotonic() - self.started

    def record(self, model: BaseAlgorithm) -> None:
        """Evaluate the model as it is now."""
        before = self.seconds
        returns = self.evaluate(model, model.num_timesteps)
        seconds = self.seconds
        self.evaluations.append(Evaluation(model.num_timesteps, seconds, before - self.evaluation_seconds, returns))
        self.evaluation_seconds += seconds - before
        self.folder.write_evaluations(self.evaluations)
        self.write_status(model.num_timesteps)

    def write_status(self, step: int, state: str = "running") -> None:
        """Write how far the run is."""
        last = self.evaluations[-1].mean if self.evaluations else None
        self.folder.set_status(state=state, step=step, wall_clock=round(self.seconds, 1), last_return=last)
        self.last_status = time.monotonic()

    def write_checkpoint(self) -> None:
        """Write what is needed to go on from here."""
        assert isinstance(self.model, PersistentAlgorithm)
        save_run(self.model, self.folder.checkpoint)
        self.last_checkpoint = self.num_timesteps
        self.write_status(self.num_timesteps)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal: stop where the run can be resumed exactly."""
        self.stop = True

    def _on_training_start(self) -> None:
        if not self.evaluations:
            self.record(self.model)

    def _on_rollout_start(self) -> None:
        # Here no transition is on its way to the buffer.
        if self.stop or self.num_timesteps - self.last_checkpoint >= self.checkpoint_every:
            self.write_checkpoint()
        if self.stop:
            self.write_status(self.num_timesteps, "stopped")
            raise Stopped

    def _on_step(self) -> bool:
        step = self.num_timesteps
        # Where updates come once an episode, the last of them goes on for a while.
        if step <= self.spec.steps and (step % self.spec.eval_every == 0 or step == self.spec.steps):
            self.record(self.model)
        elif time.monotonic() - self.last_status > STATUS_INTERVAL:
            self.write_status(step)
        return True


def resumable(algorithm: type[BaseAlgorithm]) -> type[PersistentAlgorithm]:
    """The algorithm with checkpoints: Stable-Baselines3's own have none, and are otherwise as they were."""
    if issubclass(algorithm, PersistentAlgorithm):
        return algorithm
    return type(algorithm.__name__, (PersistentAlgorithm, algorithm), {})


def build_model(folder: RunFolder, spec: RunSpec, arguments: dict[str, Any]) -> PersistentAlgorithm:
    """The model of the run's checkpoint, or a new one."""
    algorithm = resumable(get_algorithm(spec.algo.partition(":")[0]))
    env = make_vec_env(env_maker(spec.env_id), seed=spec.seed, wrapper_class=Rewindable)
    if folder.checkpoint.exists():
        return algorithm.resume(folder.checkpoint, env=env, trusted=True)
    return algorithm("MlpPolicy", env, seed=spec.seed, **constructor_arguments(arguments, env.action_space))


def settings(model: PersistentAlgorithm, label: str) -> dict[str, Any]:
    """All arguments of a model's algorithm, as the model has them: what the defaults were is part of a result."""
    names = get_parameters(label) - NO_SETTING
    values = {name: getattr(model, name) for name in sorted(names) if hasattr(model, name)}
    return values | {name: value for name, value in model.settled_arguments().items() if name in names}


def run(path: Path, checkpoint_every: int = 10_000, keep_checkpoint: bool = False) -> None:
    """Do the run of a folder, from its checkpoint if there is one.

    :param path: Folder with the ``config.json``
    :param checkpoint_every: Environment steps between checkpoints
    :param keep_checkpoint: Whether to leave the last checkpoint, so that the run can be continued beyond its end
    :raises Timeout: if another process is doing it
    :raises Stopped: if the process was asked to stop
    """
    folder = RunFolder(path)
    with folder.lock:
        try:
            if not folder.finished:
                _learn(folder, checkpoint_every, keep_checkpoint)
        except Stopped:
            raise
        except Exception:
            folder.set_status(state="failed")
            raise


def _learn(folder: RunFolder, checkpoint_every: int, keep_checkpoint: bool) -> None:
    """Do the run of a folder that this process has locked; see :func:`run`."""
    spec = folder.spec
    remove_unfinished(folder.path, re.escape(folder.checkpoint.name))  # of a process that was killed
    arguments = get_setting(spec.algo, spec.arguments)
    model = build_model(folder, spec, arguments)
    folder.record_start(arguments=arguments, settings=settings(model, spec.algo))
    recorder = Recorder(folder, Evaluator(spec), checkpoint_every)
    recorder.continue_from(model.num_timesteps)
    recorder.write_status(model.num_timesteps, "starting")
    folder.set_status(pid=os.getpid())
    model.set_logger(configure(str(folder.path / "training" / f"from-step-{model.num_timesteps}"), ["csv"]))
    signal.signal(signal.SIGTERM, recorder.request_stop)
    model.learn(spec.steps - model.num_timesteps, callback=recorder, log_interval=4, reset_num_timesteps=False)
    if keep_checkpoint:
        recorder.write_checkpoint()
    recorder.write_status(model.num_timesteps, "finished")
    if not keep_checkpoint and RunFolder(folder.path).finished:  # it may have been asked for more steps meanwhile
        folder.checkpoint.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Do the run of a folder.

    :param argv: Arguments; those of the process by default
    :return: Exit status
    """
    parser = argparse.ArgumentParser(prog="python -m sb3_rfm.benchmark.worker")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint-every", type=int, default=10_000)
    parser.add_argument("--keep-checkpoint", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore", DeprecationWarning)  # dm_control asks for those of every library
    try:
        run(args.folder, args.checkpoint_every, args.keep_checkpoint)
    except Timeout:
        return BUSY
    except Stopped:
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
