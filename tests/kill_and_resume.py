"""Kill training processes at random moments, resume them, and compare the result with a run that was never interrupted.

    python tests/kill_and_resume.py --kills 100

Each training run is a process of its own that is ended by SIGKILL after a random time and started again from its last
checkpoint, until it reaches the last step. Weights, optimizers, replay buffer and random states must then equal, bit for bit,
those of the reference run. The test-suite calls this with a few kills.
"""

import argparse
import hashlib
import multiprocessing
import pickle
import random
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

import sb3_rfm
from sb3_rfm import RunCheckpoint
from sb3_rfm.checkpoint import checkpoints, random_state
from sb3_rfm.flow_actor_critic import FlowActorCritic


def train(options: argparse.Namespace, folder: Path) -> None:
    """Start a run in ``folder``, or continue the one that is there; write its digest at the end."""
    th.set_num_threads(1)
    algorithm = getattr(sb3_rfm, options.algo)
    folder.mkdir(exist_ok=True)
    if checkpoints(folder):
        model = algorithm.resume(folder, env=make_env(options))
        remaining = model.remaining_timesteps
    else:
        model = algorithm(
            "MlpPolicy",
            make_env(options),
            learning_starts=50,
            batch_size=16,
            buffer_size=2_000,
            learning_rate=LinearSchedule(1e-3, 1e-4, 1.0),
            n_candidates=4,
            n_particles=2,
            policy_kwargs={"net_arch": [16]},
            execution=options.execution,
            seed=0,
        )
        remaining = options.steps
    callback = RunCheckpoint(options.save_freq, folder)
    model.learn(remaining, callback=callback, reset_num_timesteps=model.num_timesteps == 0)
    (folder / "digest").write_text(digest(model))


def make_env(options: argparse.Namespace) -> VecNormalize:
    """The environment, with moving statistics around it."""
    return VecNormalize(make_vec_env(options.env, n_envs=options.n_envs))


def digest(model: FlowActorCritic) -> str:
    """Fingerprint of everything that a run has learned and will depend on."""
    buffer = model.replay_buffer
    content = [
        *(tensor.cpu().numpy().tobytes() for tensor in model.policy.state_dict().values()),
        *(pickle.dumps(sorted_state(optimizer)) for optimizer in (model.actor.optimizer, model.critic.optimizer)),
        *(array.tobytes() for array in (buffer.observations, buffer.actions, buffer.rewards, buffer.dones)),
        model.env.obs_rms.mean.tobytes(),
        model._last_obs.tobytes(),
        random_state(model)["torch"].tobytes(),
        random_state(model)["numpy"][1].tobytes(),
    ]
    return hashlib.sha256(b"".join(content)).hexdigest()


def sorted_state(optimizer: th.optim.Optimizer) -> list[bytes]:
    return [value.cpu().numpy().tobytes() for state in optimizer.state_dict()["state"].values() for value in state.values()]


def run(options: argparse.Namespace) -> bool:
    """Kill and resume as often as asked; report, and say whether all results were equal."""
    random.seed(options.seed)
    # Forked processes need not import everything again, so that most of their time is training.
    context = multiprocessing.get_context("fork")
    kills = resumed = unfinished = completed = equal = 0
    with tempfile.TemporaryDirectory() as temporary:
        reference_folder = Path(temporary) / "reference"
        process = context.Process(target=train, args=(options, reference_folder))
        process.start()
        process.join()
        reference = (reference_folder / "digest").read_text()

        while kills < options.kills or completed == 0:
            folder = Path(temporary) / f"run_{completed}"
            while not (folder / "digest").exists():
                resumed += folder.exists() and bool(checkpoints(folder))
                process = context.Process(target=train, args=(options, folder))
                process.start()
                if kills < options.kills:
                    wait_for_a_random_moment(process, folder)
                else:
                    process.join()
                if process.is_alive():
                    process.kill()
                    process.join()
                    kills += 1
                    unfinished += any(folder.glob(".*.zip"))
                elif process.exitcode != 0:
                    print(f"A run failed with exit code {process.exitcode}.")
                    return False
            completed += 1
            equal += (folder / "digest").read_text() == reference
    print(
        f"{options.algo} on {options.env}: {kills} kills, {unfinished} of them while a checkpoint was written; resumed "
        f"{resumed} times; {completed} runs completed, {equal} of them equal to the uninterrupted run bit for bit."
    )
    return equal == completed


def wait_for_a_random_moment(process: BaseProcess, folder: Path) -> None:
    """Wait for a random number of checkpoints, and then for a part of the time between two, however busy the machine is.

    One time in three, wait for the next checkpoint to be begun instead, so that it is cut off.
    """
    target = random.randint(0, 5)
    seen = {path.name for path in checkpoints(folder)} if folder.exists() else set()
    n_before, last, interval = len(seen), time.monotonic(), 0.0
    while process.is_alive() and len(seen) - n_before < target:
        time.sleep(0.001)
        now = {path.name for path in checkpoints(folder)} if folder.exists() else set()
        if now - seen:
            seen |= now
            last, interval = time.monotonic(), time.monotonic() - last
    if random.random() < 1 / 3:
        while process.is_alive() and not any(folder.glob(".*.zip")):
            time.sleep(0.0001)
    else:
        time.sleep(random.uniform(0, interval))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--algo", default="RFM", choices=["RFM", "QNE", "DQS", "QSM"])
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--n-envs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save-freq", type=int, default=10)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--execution", default="eager", choices=["eager", "compile"])
    parser.add_argument("--seed", type=int, default=0)
    return 0 if run(parser.parse_args(arguments)) else 1


if __name__ == "__main__":
    sys.exit(main())
