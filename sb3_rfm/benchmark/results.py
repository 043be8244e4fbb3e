"""Results as tables: read from run folders, and kept in two CSV files that can be committed.

``runs.csv`` has a row for each run: what it was, on what it ran, how long it took. ``evaluations.csv`` has a row for each
evaluation of each run.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sb3_rfm.benchmark.records import find_runs

RUN = ["env_id", "algo", "seed"]

SCORE_RANGES = {"dm_control/": (0.0, 1000.0), "Pendulum-v1": (-1600.0, 0.0)}
"""Returns that count as 0 and 1, by the beginning of the environment's id."""


@dataclass
class Results:
    """Runs and their evaluations.

    :param runs: One row for each run
    :param evaluations: One row for each evaluation, with ``returns`` separated by spaces
    """

    runs: pd.DataFrame
    evaluations: pd.DataFrame

    @classmethod
    def load(cls, root: Path) -> "Results":
        """Read a results folder, or one that :meth:`save` wrote.

        :raises ValueError: if there are no runs
        """
        if (root / "runs.csv").exists():
            return cls(pd.read_csv(root / "runs.csv"), pd.read_csv(root / "evaluations.csv"))
        runs, evaluations = [], []
        for folder in find_runs(root):
            config, spec = folder.config, folder.spec
            key = {"env_id": spec.env_id, "algo": spec.algo, "seed": spec.seed}
            rows = [
                key
                | {"step": e.step, "mean": e.mean, "wall_clock": e.wall_clock, "training_seconds": e.training_seconds}
                | {"returns": " ".join(f"{value:.2f}" for value in e.returns)}
                for e in folder.read_evaluations()
            ]
            if not rows:
                continue
            evaluations += rows
            runs.append(
                key
                | {"state": "finished" if folder.finished else "unfinished", "steps": rows[-1]["step"]}
                | {name: rows[-1][name] for name in ("wall_clock", "training_seconds")}
                | {"final_return": rows[-1]["mean"], "eval_every": spec.eval_every, "eval_episodes": spec.eval_episodes}
                | {"commit": config.get("commit"), "started": (config.get("sessions") or [None])[0]}
                | {"interruptions": len(config.get("sessions", [None])) - 1}
                | {name: json.dumps(config.get(name, {})) for name in ("arguments", "versions", "machine")}
                | {"evaluation_particles": config.get("evaluation_particles")}
            )
        if not runs:
            raise ValueError(f"There are no evaluated runs in {root}.")
        return cls(pd.DataFrame(runs), pd.DataFrame(evaluations))

    def save(self, folder: Path) -> None:
        """Write ``runs.csv`` and ``evaluations.csv``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.runs.to_csv(folder / "runs.csv", index=False)
        self.evaluations.to_csv(folder / "evaluations.csv", index=False, float_format="%.6g")

    def of(self, algos: Sequence[str]) -> "Results":
        """The results of some algorithms.

        :raises ValueError: if one of them was not run
        """
        if unknown := set(algos) - set(self.algos):
            raise ValueError(f"There are no runs of {sorted(unknown)}, only of {self.algos}.")
        return self._only(self.runs[self.runs["algo"].isin(algos)], self.evaluations)

    def at(self, steps: int | None) -> "Results":
        """The results as they were after a number of steps, of the runs that got there.

        :param steps: Environment steps; None for the runs that are finished, as they ended
        """
        if steps is None:
            chosen = self.runs[self.runs["state"] == "finished"]
            return self._only(chosen, self.evaluations)
        there = self.evaluations[self.evaluations["step"] <= steps]
        reached = there.groupby(RUN)["step"].max()
        chosen = self.runs[[reached.get(tuple(key), -1) == steps for key in self.runs[RUN].itertuples(index=False)]]
        return self._only(chosen, there)

    def _only(self, runs: pd.DataFrame, evaluations: pd.DataFrame) -> "Results":
        if runs.empty:
            common = self.evaluations.groupby(RUN)["step"].max().min()
            raise ValueError(f"No run is that far. All {len(self.runs)} have reached step {common}: --at-step {common}.")
        return Results(runs.reset_index(drop=True), evaluations.merge(runs[RUN], on=RUN).reset_index(drop=True))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(self.runs["env_id"]))

    @property
    def algos(self) -> list[str]:
        """Algorithms, the flow policies first."""
        order = ["rfm", "qne", "dqs", "qsm"]
        names = dict.fromkeys(self.runs["algo"])
        return sorted(names, key=lambda a: (order.index(a.split(":")[0]) if a.split(":")[0] in order else len(order), a))

    def curve(self, task: str, algo: str) -> pd.DataFrame:
        """Mean return of each seed (columns) at each step (rows) that all of them have reached."""
        rows = self.evaluations.query("env_id == @task and algo == @algo")
        return rows.pivot_table(index="step", columns="seed", values="mean").dropna()

    def final(self, task: str, algo: str) -> np.ndarray:
        """Mean return of each seed at the last step, (N,)."""
        curve = self.curve(task, algo)
        return curve.iloc[-1].to_numpy() if len(curve) else np.empty(0)

    def score_range(self, task: str) -> tuple[float, float]:
        """Returns that count as 0 and 1.

        Where they are not known beforehand: the mean of the untrained policies, and the best mean of any algorithm.
        """
        for prefix, known in SCORE_RANGES.items():
            if task.startswith(prefix):
                return known
        rows = self.evaluations[(self.evaluations["env_id"] == task) & (self.evaluations["step"] == 0)]
        best = max(float(np.mean(final)) for algo in self.algos if len(final := self.final(task, algo)))
        low = float(rows["mean"].mean()) if len(rows) else best - 1.0
        return low, max(best, low + 1e-12)

    def scores(self, algo: str, tasks: Sequence[str]) -> list[np.ndarray]:
        """Final returns, scaled to the range of each task: one array for each task."""
        result = []
        for task in tasks:
            low, high = self.score_range(task)
            result.append((self.final(task, algo) - low) / (high - low))
        return result

    def tasks_of(self, algos: Sequence[str]) -> list[str]:
        """Tasks on which all of these algorithms were run."""
        return [task for task in self.tasks if all(len(self.final(task, algo)) for algo in algos)]
