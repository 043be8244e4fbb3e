"""One run, in a process of its own: ``python -m sb3_rfm.benchmark.worker FOLDER``.

The folder's ``config.json`` says what to do. A run that is already finished, or that another process is doing, is left
alone.
"""

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecEnv

from sb3_rfm.benchmark.records import Evaluation, RunFolder, RunSpec
from sb3_rfm.benchmark.suites import Setting, env_maker, get_algorithm, get_setting
from sb3_rfm.flow_actor_critic import FlowActorCritic

BUSY = 75
"""Exit status where another process is doing the run."""

STATUS_INTERVAL = 3.0
"""Seconds between two writings of the status."""


class Evaluator:
    """Evaluates a policy by a number of episodes at once, each in an environment of its own.

    The episodes depend on the run's seed and on the step alone: not on training, and not on whether the run was resumed.

    :param spec: The run
    :param particles: Particles to choose among, where that differs from acting
    """

    def __init__(self, spec: RunSpec, particles: int | None = None) -> None:
        self.spec = spec
        self.particles = particles
        self.env: VecEnv = make_vec_env(env_maker(spec.env_id), n_envs=spec.eval_episodes)

    def __call__(self, model: BaseAlgorithm, step: int) -> list[float]:
        """Returns of the deterministic policy.

        :param model: Model with the policy
        :param step: Environment steps learned from
        """
        # Mixed by a hash, so that no evaluation shares its episodes with training or with another run.
        self.env.seed(int(np.random.SeedSequence([self.spec.seed, step]).generate_state(1)[0]) % 2**31)
        n_particles = self._set_particles(model, self.particles)
        with torch.random.fork_rng(devices=[]):
            returns, _ = evaluate_policy(model, self.env, self.spec.eval_episodes, return_episode_rewards=True)
        self._set_particles(model, n_particles)
        return np.asarray(returns, dtype=float).tolist()

    @staticmethod
    def _set_particles(model: BaseAlgorithm, n_particles: int | None) -> int | None:
        """Have the policy choose among ``n_particles``; the number it chose among before is returned."""
        if n_particles is None or not isinstance(model, FlowActorCritic):
            return None
        before = model.policy.n_particles
        model.policy.configure_sampling(model.path, model.sampler, model.integration_steps, n_particles, model.t_min)
        return before


class Recorder(BaseCallback):
    """Evaluates while a model learns, and records how far it is.

    :param folder: Folder of the run
    :param evaluator: How to evaluate
    """

    def __init__(self, folder: RunFolder, evaluator: Evaluator) -> None:
        super().__init__()
        self.folder = folder
        self.spec = folder.spec
        self.evaluate = evaluator
        self.evaluations: list[Evaluation] = []
        self.wall_clock = 0.0  # of earlier processes
        self.evaluation_seconds = 0.0
        self.started = time.monotonic()
        self.last_status = 0.0

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken."""
        return self.wall_clock + time.monotonic() - self.started

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

    def _on_training_start(self) -> None:
        if not self.evaluations:
            self.record(self.model)

    def _on_step(self) -> bool:
        step = self.num_timesteps
        if step % self.spec.eval_every == 0 or step == self.spec.steps:
            self.record(self.model)
        elif time.monotonic() - self.last_status > STATUS_INTERVAL:
            self.write_status(step)
        return True


def build_model(spec: RunSpec, setting: Setting) -> BaseAlgorithm:
    """A model with nothing learned."""
    env = make_vec_env(env_maker(spec.env_id), seed=spec.seed)
    arguments: dict[str, Any] = dict(setting.arguments)
    if isinstance(arguments.get("action_noise"), (int, float)):
        size = env.action_space.shape
        assert size is not None
        arguments["action_noise"] = NormalActionNoise(np.zeros(size), np.full(size, arguments["action_noise"]))
    # A buffer that never fills up behaves like any larger one, and is not worth its memory.
    arguments["buffer_size"] = min(arguments.get("buffer_size", 1_000_000), spec.steps)
    algorithm = get_algorithm(spec.algo.partition(":")[0])
    return algorithm("MlpPolicy", env, seed=spec.seed, **arguments)


def run(path: Path) -> None:
    """Do the run of a folder.

    :param path: Folder with the ``config.json``
    :raises Timeout: if another process is doing it
    """
    folder = RunFolder(path)
    with FileLock(path / ".lock", timeout=0):
        if folder.finished:
            return
        spec = folder.spec
        setting = get_setting(spec.algo, spec.arguments)
        folder.describe(setting.arguments)
        folder.set_status(state="starting", step=0, wall_clock=0.0, last_return=None)
        model = build_model(spec, setting)
        model.set_logger(configure(str(path / "training"), ["csv"]))
        recorder = Recorder(folder, Evaluator(spec, setting.evaluation_particles))
        model.learn(spec.steps, callback=recorder, log_interval=4)
        recorder.write_status(model.num_timesteps, "finished")


def main(path: Path) -> int:
    """Do the run of a folder and return the exit status."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore", DeprecationWarning)  # dm_control asks for those of every library
    try:
        run(path)
    except Timeout:
        return BUSY
    except Exception:
        RunFolder(path).set_status(state="failed")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
