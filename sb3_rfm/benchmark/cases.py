"""What :mod:`sb3_rfm.benchmark.speed` measures: algorithms on an environment that costs nothing.

``python -m sb3_rfm.benchmark.cases CASE`` learns for a moment and prints the peak memory of its process, in megabytes.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_rfm.benchmark.suites import SETTINGS, get_algorithm

OURS = ("rfm", "qne", "dqs", "qsm")
LONG_RUN = 1_000_000
"""Steps that ``learn`` is asked for, to be stopped long before: what depends on the length of a run is as in a long one."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the problem; those of cheetah-run by default.

    :param obs_dim: Observation dimensions
    :param action_dim: Action dimensions
    :param batch: Transitions in an update
    :param width: Width of the two hidden layers of every network
    """

    obs_dim: int = 17
    action_dim: int = 6
    batch: int = 256
    width: int = 256


class FreeEnv(gym.Env[np.ndarray, np.ndarray]):
    """An environment that takes no time to speak of: random observations, made beforehand.

    :param sizes: Its sizes
    """

    def __init__(self, sizes: Sizes) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (sizes.obs_dim,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (sizes.action_dim,), np.float32)
        self.observations = np.random.default_rng(0).standard_normal((1000, sizes.obs_dim)).astype(np.float32)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observations[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        observation = self.observations[self.steps % 1000]
        return observation, float(observation[0] - 0.1 * action[0]), False, self.steps == 1000, {}


class StopAfter(BaseCallback):
    """End ``learn`` after a number of steps.

    :param n_steps: Environment steps
    """

    def __init__(self, n_steps: int) -> None:
        super().__init__()
        self.n_steps = n_steps

    def _on_step(self) -> bool:
        return self.n_calls < self.n_steps


def available(paper: bool = False) -> list[str]:
    """Names of the cases that can be measured here.

    :param paper: With the settings of the paper
    """
    names = [*OURS, "sac", "td3"]
    names += ["tqc"] if find_spec("sb3_contrib") else []
    names += ["sbx-sac"] if find_spec("sbx") else []
    return names + ([f"{algo}:paper" for algo in OURS] + ["rfm:paper-eager"] if paper else [])


def build(case: str, sizes: Sizes, device: str = "auto", execution: str | None = None, **arguments: Any) -> OffPolicyAlgorithm:
    """A model of a case, with nothing learned.

    The paper's settings are those of :mod:`sb3_rfm.benchmark.suites` with the networks of all the others;
    ``rfm:paper-eager`` is the same as written, without compiler and reduced precision.

    :param case: One of :func:`available`
    :param sizes: Sizes of the problem
    :param device: Where the networks are
    :param execution: Replaces the default of our algorithms
    :param arguments: Keyword arguments of the algorithm
    """
    env = FreeEnv(sizes)
    policy_kwargs: dict[str, Any] = {"net_arch": [sizes.width, sizes.width]}
    if case == "sbx-sac":
        from sbx import SAC

        return SAC("MlpPolicy", env, batch_size=sizes.batch, policy_kwargs=policy_kwargs, seed=0, **arguments)
    algo, _, setting = case.partition(":")
    if setting:
        paper = dict(SETTINGS[case.removesuffix("-eager")])
        for name in ("buffer_size", "learning_starts", "policy_kwargs", "action_noise"):
            paper.pop(name, None)
        arguments = paper | arguments
    if execution and algo in OURS:
        arguments["execution"] = execution
    if setting.endswith("-eager"):
        arguments |= {"execution": "eager", "precision": "float32"}
    arguments |= {"batch_size": sizes.batch, "policy_kwargs": policy_kwargs}
    model = get_algorithm(algo)("MlpPolicy", env, seed=0, device=device, **arguments)
    assert isinstance(model, OffPolicyAlgorithm)
    return model


@contextmanager
def cores(n: int) -> Iterator[None]:
    """Keep this process, and whatever thread pools and processes it starts, to ``n`` cores."""
    threads = torch.get_num_threads()
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    torch.set_num_threads(n)
    if allowed:
        os.sched_setaffinity(0, sorted(allowed)[:n])
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if allowed:
            os.sched_setaffinity(0, allowed)


class PrintMemory(BaseCallback):
    """Print the memory of this process at equal intervals.

    :param every: Environment steps
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def _on_step(self) -> bool:
        if self.n_calls % self.every == 0:
            print(f"{self.n_calls} {memory('VmRSS'):.1f}", flush=True)
        return True


def memory(field: str) -> float:
    """Memory of this process in megabytes, by its name in Linux's ``/proc/self/status``: VmRSS → now, VmHWM → most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 2**10


def peak_memory() -> float:
    """Most memory that this process has had, in megabytes."""
    if Path("/proc/self/status").exists():  # getrusage includes, on Linux, the memory of the process that started this one
        return memory("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv: Sequence[str] | None = None) -> None:
    """Learn and print the peak memory in megabytes.

    ``--every N`` prints the memory every N steps as well, with a replay buffer that is full after the first N.

    :param argv: Arguments; those of the process by default
    """
    parser = argparse.ArgumentParser(prog="python -m sb3_rfm.benchmark.cases")
    parser.add_argument("case")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, help="print the memory every so many steps (Linux)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--execution")
    parser.add_argument("--sizes", type=int, nargs=4, default=astuple(Sizes()), metavar=tuple(asdict(Sizes())))
    args = parser.parse_args(argv)
    with cores(args.threads):
        arguments = {"buffer_size": args.every} if args.every else {}
        model = build(args.case, Sizes(*args.sizes), args.device, args.execution, **arguments)
        callbacks = [StopAfter(args.steps), *([PrintMemory(args.every)] if args.every else [])]
        model.learn(LONG_RUN, callback=callbacks)
    print(peak_memory())


if __name__ == "__main__":
    main()
