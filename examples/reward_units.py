"""The unit of the reward does not matter: the same call learns the same when all rewards are multiplied by a number.

    python examples/reward_units.py --factors 0.01 1 100 --steps 10000

trains RFM at its defaults on Pendulum-v1 once for each factor, and writes ``runs/reward-units/returns.csv`` with the mean
evaluation return, in the task's own unit, at equal intervals.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import torch
from gymnasium.wrappers import TransformReward
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_rfm import RFM


class Evaluation(BaseCallback):
    """Evaluate at equal intervals, in the task's own unit."""

    def __init__(self, every: int, seed: int) -> None:
        super().__init__()
        self.every, self.seed = every, seed
        self.returns: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            env = Monitor(gym.make("Pendulum-v1"))
            env.reset(seed=self.seed)
            mean, _ = evaluate_policy(self.model, env, n_eval_episodes=10)
            self.returns.append((self.num_timesteps, float(mean)))  # type: ignore[arg-type]
        return True


def learn(factor: float, steps: int, evaluations: int, seed: int) -> list[tuple[int, float]]:
    """Learn with rewards times ``factor``.

    :return: Steps, and mean return of ten deterministic episodes in the task's own unit
    """
    env = TransformReward(gym.make("Pendulum-v1"), lambda reward: factor * float(reward))
    evaluation = Evaluation(max(steps // evaluations, 1), seed=1000 + seed)
    RFM("MlpPolicy", env, seed=seed, device="cpu").learn(steps, callback=evaluation)
    return evaluation.returns


def main(argv: Sequence[str] | None = None) -> Path:
    """Learn with each factor and write the returns.

    :param argv: Arguments; those of the process by default
    :return: Path of the CSV file
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--factors", type=float, nargs="+", default=[0.01, 1.0, 100.0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--evaluations", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/reward-units"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    rows = []
    for factor in args.factors:
        for step, value in learn(factor, args.steps, args.evaluations, args.seed):
            print(f"rewards x {factor:g}, step {step:,}: return {value:.1f}", flush=True)
            rows.append({"factor": factor, "step": step, "return": round(value, 2)})
    args.out.mkdir(parents=True, exist_ok=True)
    path: Path = args.out / "returns.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["factor", "step", "return"])
        writer.writeheader()
        writer.writerows(rows)
    return path


if __name__ == "__main__":
    main()
