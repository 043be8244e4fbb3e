"""Results as tables: read from run folders, and kept in two CSV files that can be committed.

``runs.csv`` has a row for each run: what it was, on what it ran, how long it took. ``evaluations.csv`` has a row for each
evaluation of each run.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from sb3_rfm.benchmark.records import find_runs
from sb3_rfm.files import write_text

RUN = ["env_id", "algo", "seed"]
"""What tells runs apart."""

UNKNOWN = "unknown"
"""Stands for a commit that was not recorded: the package was installed, or used from a copy."""

AT_THE_END = ["steps", "wall_clock", "training_seconds", "final_return"]
"""What the last evaluation of a run says."""

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

        :raises ValueError: if there are no runs, if two folders hold the same one, if one of the two tables is missing, or if
            there are both tables and folders of runs
        """
        if (root / "runs.csv").exists():
            if not (root / "evaluations.csv").exists():
                raise ValueError(f"{root} has a runs.csv, but no evaluations.csv, which belongs to it.")
            if folder := next(find_runs(root), None):
                raise ValueError(
                    f"{root} has a runs.csv, as reports have, and folders of runs, such as {folder.path}. A report takes one "
                    "or the other: move the two tables or the runs out of this folder."
                )
            runs, evaluations = pd.read_csv(root / "runs.csv"), pd.read_csv(root / "evaluations.csv")
            return cls(runs if "settings" in runs else runs.assign(settings="{}"), evaluations)  # older ones do not say
        runs, evaluations = [], []
        places: dict[tuple[str, str, int], Path] = {}
        for folder in find_runs(root):
            config, spec = folder.config, folder.spec
            starts = config.get("starts") or [{}]
            place = places.setdefault((spec.env_id, spec.algo, spec.seed), folder.path)
            if place != folder.path:
                raise ValueError(
                    f"{place} and {folder.path} both hold {spec.algo} on {spec.env_id} with seed {spec.seed}. "
                    "A report takes one of them: move the other out of the results folder."
                )
            key = {"env_id": spec.env_id, "algo": spec.algo, "seed": spec.seed}
            rows = [
                key
                | {
                    "step": e.step,
                    "mean": e.mean if math.isfinite(e.mean) else math.nan,
                    "wall_clock": e.wall_clock,
                    "training_seconds": e.training_seconds,
                }
                | {"returns": " ".join(f"{value:.6g}" for value in e.returns)}
                for e in folder.read_evaluations()
            ]
            evaluations += rows
            last = rows[-1] if rows else {"step": 0}
            state = "finished" if folder.finished else "failed" if folder.status["state"] == "failed" else "unfinished"
            runs.append(
                key
                | {"state": state, "steps": last["step"]}
                | {name: last.get(name) for name in ("wall_clock", "training_seconds")}
                | {"final_return": last.get("mean"), "eval_every": spec.eval_every, "eval_episodes": spec.eval_episodes}
                | {"commit": " ".join(dict.fromkeys(start.get("commit") or UNKNOWN for start in starts))}
                | {"started": starts[0].get("at"), "interruptions": len(starts) - 1}
                | {name: json.dumps(config.get(name, {})) for name in ("arguments", "settings", "versions", "machine")}
            )
        if not evaluations:
            raise ValueError(f"There are no evaluated runs in {root}.")
        return cls(pd.DataFrame(runs), pd.DataFrame(evaluations))

    def save(self, folder: Path) -> None:
        """Write ``runs.csv`` and ``evaluations.csv``."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "runs.csv", self.runs.to_csv(index=False))
        write_text(folder / "evaluations.csv", self.evaluations.to_csv(index=False, float_format="%.6g"))

    def of(self, algos: Sequence[str]) -> "Results":
        """The results of some algorithms.

        :raises ValueError: if one of them was not run
        """
        if unknown := set(algos) - set(self.algos):
            raise ValueError(f"There are no runs of {sorted(unknown)}, only of {self.algos}.")
        return Results(*(table[table["algo"].isin(algos)].reset_index(drop=True) for table in (self.runs, self.evaluations)))

    def at(self, steps: int | None) -> "Results":
        """The results as they were after a number of steps, of the runs that got there.

        :param steps: Environment steps; None for the runs that are finished, as they were in each task at the last step that
            all of them were evaluated at: the end, where they ended at the same
        """
        if steps is None:
            finished = self.runs[self.runs["state"] == "finished"]
            there = self.evaluations.merge(finished[RUN], on=RUN)
            last = {}
            for task, rows in there.groupby("env_id"):
                last[task] = last_common_step(rows)
                if last[task] == 0 < rows["step"].max():
                    raise ValueError(
                        f"The finished runs of {task} were never evaluated at the same step, but for the untrained ones: "
                        "--algos compares some of them."
                    )
            return self._only(finished, there[there["step"] <= there["env_id"].map(last)])
        there = self.evaluations[self.evaluations["step"] <= steps]
        reached = there.groupby(RUN)["step"].max()
        chosen = self.runs[[reached.get(tuple(key), -1) == steps for key in self.runs[RUN].itertuples(index=False)]]
        if chosen.empty:
            raise ValueError(
                f"No run was evaluated at step {steps:,}. The last step at which all runs were evaluated is "
                f"{self.common_step:,} (--at-step {self.common_step})."
            )
        return self._only(chosen, there)

    @property
    def common_step(self) -> int:
        """The last step that all runs were evaluated at, but for those that have not learned yet."""
        return last_common_step(self.evaluations[self.evaluations.groupby(RUN)["step"].transform("max") > 0])

    def _only(self, runs: pd.DataFrame, evaluations: pd.DataFrame) -> "Results":
        """Some runs, as they were at the last of these evaluations."""
        evaluations = evaluations.merge(runs[RUN], on=RUN)
        last = evaluations.sort_values("step").drop_duplicates(RUN, keep="last")
        last = last.rename(columns={"step": "steps", "mean": "final_return"})[[*RUN, *AT_THE_END]]
        return Results(runs.drop(columns=AT_THE_END).merge(last, on=RUN)[runs.columns], evaluations)

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
        """Mean return of each seed (columns) at each step (rows) that all of them have reached; NaN where it diverged."""
        return self._curves.get((task, algo), pd.DataFrame())

    @cached_property
    def _curves(self) -> dict[tuple[str, str], pd.DataFrame]:
        return {
            (task, algo): rows[rows.groupby("step")["seed"].transform("size") == rows["seed"].nunique()].pivot(
                index="step", columns="seed", values="mean"
            )
            for (task, algo), rows in self.evaluations.groupby(["env_id", "algo"])
        }

    def final(self, task: str, algo: str) -> np.ndarray:
        """Mean return of each seed at the last step, (N,)."""
        curve = self.curve(task, algo)
        return curve.iloc[-1].to_numpy() if len(curve) else np.empty(0)

    def mean_return(self, task: str, algo: str) -> float:
        """Mean final return of the seeds that have not diverged; -inf where there are none."""
        final = self.final(task, algo)
        return float(np.nanmean(final)) if np.isfinite(final).any() else -math.inf

    def score_range(self, task: str) -> tuple[float, float]:
        """Returns that count as 0 and 1.

        Where they are not known beforehand: the mean of the untrained policies, and the best mean of any algorithm. There are
        no scores if that is not the larger one, see :attr:`scored_tasks`.
        """
        if known := known_score_range(task):
            return known
        rows = self.evaluations[(self.evaluations["env_id"] == task) & (self.evaluations["step"] == 0)]
        best = max(self.mean_return(task, algo) for algo in self.algos)
        return (float(rows["mean"].mean()) if rows["mean"].notna().any() else best - 1.0), best

    @property
    def scored_tasks(self) -> list[str]:
        """Tasks with a range of scores: in the others, no algorithm ends above the untrained policies."""
        return [task for task in self.tasks if np.less(*self.score_range(task))]

    def scores(self, algo: str, tasks: Sequence[str]) -> list[np.ndarray]:
        """Final returns, scaled to the range of each task: one array for each task."""
        return [self.scaled(task, self.final(task, algo)) for task in tasks]

    def scaled(self, task: str, returns: np.ndarray) -> np.ndarray:
        """Returns scaled to the range of a task, or in no unit where it has none, which leaves their order.

        One that diverged counts as the worst final return of any run, or as 0 if that is worse.
        """
        low, high = self.score_range(task)
        worst = np.nanmin(np.concatenate([[low], *(self.final(task, algo) for algo in self.algos)]))
        return (np.where(np.isnan(returns), worst, returns) - low) / (high - low if high > low else 1.0)

    def tasks_of(self, algos: Sequence[str]) -> list[str]:
        """Tasks on which all of these algorithms were run."""
        return [task for task in self.tasks if all(len(self.final(task, algo)) for algo in algos)]

    def comparisons(self) -> list[tuple[list[str], list[str]]]:
        """Algorithms with the tasks that they are compared on: two algorithms at least, or the only one, on two tasks or more.

        First the algorithms that were run on every task; then all of them, where these are more, on the tasks they share.
        Only tasks with scores count.
        """
        fewest = min(2, len(self.algos))
        scored = self.scored_tasks
        everywhere = [algo for algo in self.algos if all(len(self.final(task, algo)) for task in scored)]
        groups = [(everywhere, scored), (self.algos, [task for task in self.tasks_of(self.algos) if task in scored])]
        enough = [group for group in groups if len(group[0]) >= fewest and len(group[1]) > 1]
        return [group for i, group in enumerate(enough) if group not in enough[:i]]


def known_score_range(task: str) -> tuple[float, float] | None:
    """Returns that count as 0 and 1 in a task whatever its runs are; None where these have to say."""
    return next((known for prefix, known in SCORE_RANGES.items() if task.startswith(prefix)), None)


def last_common_step(evaluations: pd.DataFrame) -> int:
    """The largest step at which all runs with these evaluations were evaluated; 0 if there is none."""
    steps = [set(rows["step"]) for _, rows in evaluations.groupby(RUN)]
    return int(max(set.intersection(*steps), default=0)) if steps else 0
