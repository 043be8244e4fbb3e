"""The results folder: one folder for each run, which holds everything there is to know about it.

.. code-block:: text

    results/<environment>/<algorithm>/seed-<n>/
        config.json        what was asked for, and on what it ran: versions, commit, machine
        evaluations.csv    step, wall_clock, training_seconds, mean, return_1, ..., return_n
        status.json        how far it is
        training/          SB3's log of training
        checkpoint.zip     while the run lasts: where to go on from
        log.txt            what the process printed

Files are replaced as a whole, so that a run killed at any moment leaves none half written.
"""

import csv
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sb3_rfm.files import read_json, write_json, write_text

PACKAGES = ("sb3_rfm", "torch", "numpy", "gymnasium", "stable_baselines3", "sb3_contrib", "mujoco", "dm_control", "shimmy")


@dataclass(frozen=True)
class RunSpec:
    """One run: what has to be equal for two runs to be the same run.

    :param algo: Label of the algorithm, see :mod:`sb3_rfm.benchmark.suites`
    :param env_id: Environment
    :param seed: Seed of training; those of evaluation are derived from it
    :param steps: Environment steps to learn
    :param eval_every: Environment steps between evaluations
    :param eval_episodes: Episodes of an evaluation
    :param arguments: Arguments that replace those of the algorithm's setting
    """

    algo: str
    env_id: str
    seed: int
    steps: int
    eval_every: int = 10_000
    eval_episodes: int = 25
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Path of the run's folder within the results folder."""
        return f"{self.env_id.replace('/', '-')}/{self.algo.replace(':', '-')}/seed-{self.seed}"


@dataclass(frozen=True)
class Evaluation:
    """Returns of the deterministic policy after a number of environment steps.

    :param step: Environment steps learned from
    :param wall_clock: Seconds that the run has taken so far
    :param training_seconds: The same without evaluations
    :param returns: Return of each episode
    """

    step: int
    wall_clock: float
    training_seconds: float
    returns: list[float]

    @property
    def mean(self) -> float:
        return sum(self.returns) / len(self.returns)


class RunFolder:
    """Folder of one run.

    :param path: The folder
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, root: Path, spec: RunSpec) -> "RunFolder":
        """Folder of the run within a results folder; made if it is not there.

        Asked for with more steps than it has, a run goes on to the new end. It is never shortened. Asked for with other
        arguments before it has an evaluation or a checkpoint, it is the new run: nothing is lost.

        :raises ValueError: if the folder holds a run that was asked for with other arguments and has begun, or one that is
            finished and cannot go on, because its checkpoint was not kept
        """
        folder = cls(root / spec.name)
        config = folder.merged_with(spec)
        if config["run"] != folder.config.get("run"):
            folder.path.mkdir(parents=True, exist_ok=True)
            write_json(folder.path / "config.json", config)
        return folder

    def merged_with(self, spec: RunSpec) -> dict[str, Any]:
        """The configuration that the folder has once the run is wanted; nothing is written.

        :raises ValueError: see :meth:`create`
        """
        wanted = json.loads(json.dumps(asdict(spec), default=repr))
        config = self.config
        run = config.get("run")
        if run is None:
            return config | {"run": wanted}
        there = {key: value for key, value in run.items() if value != wanted[key] and key != "steps"}
        if there and not self.begun:
            return {"run": wanted}
        if there:
            raise ValueError(
                f"{self.path} holds a run with {there} instead of { {key: wanted[key] for key in there} }. "
                "Choose another results folder (--out) or another name for the setting (algo:name), or delete that folder."
            )
        steps = max(run["steps"], wanted["steps"])
        if steps > run["steps"] and self.finished and not self.checkpoint.exists():
            raise ValueError(
                f"{self.path} holds a run that was finished after {run['steps']:,} steps, and cannot go on to {steps:,}: "
                "its checkpoint was not kept (--keep-checkpoints). Choose another results folder (--out)."
            )
        return config | {"run": run | {"steps": steps}}

    @property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    @property
    def spec(self) -> RunSpec:
        return RunSpec(**self.config["run"])

    @property
    def status(self) -> dict[str, Any]:
        """``state``, ``step``, ``wall_clock`` and ``last_return``.

        ``state`` is "new" before the run starts, then "starting" and "running"; "finished", "failed", or "stopped" where it
        was asked to. A process that was killed leaves what was there.
        """
        return {"state": "new", "step": 0, "wall_clock": 0.0, "last_return": None} | read_json(self.path / "status.json")

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.zip"

    @property
    def begun(self) -> bool:
        """Whether there is anything to lose: a checkpoint, an evaluation or a process that is doing the run."""
        return self.checkpoint.exists() or self.status["step"] > 0 or bool(self.read_evaluations()) or self.is_busy

    @property
    def finished(self) -> bool:
        status = self.status
        return bool(status["state"] == "finished" and status["step"] >= self.spec.steps)

    @property
    def lock(self) -> FileLock:
        """What the process that does the run holds."""
        return FileLock(self.path / ".lock", timeout=0)

    @property
    def is_busy(self) -> bool:
        """Whether a process is doing the run."""
        try:
            with self.lock:
                return False
        except Timeout:
            return True

    def record_start(self, **what: Any) -> None:
        """Add to the configuration that the run is started, and what it is done with."""
        made_with = provenance()  # takes a while, in which the run may be asked for more steps
        config = self.config
        started = {
            "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": made_with["commit"],
            "sb3_rfm": made_with["versions"]["sb3_rfm"],
            "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
        }
        write_json(self.path / "config.json", config | what | made_with | {"starts": [*config.get("starts", []), started]})

    def set_status(self, **values: Any) -> None:
        write_json(self.path / "status.json", self.status | values)

    def read_evaluations(self) -> list[Evaluation]:
        """Evaluations that were done, in order."""
        try:
            with (self.path / "evaluations.csv").open(encoding="utf-8", newline="") as file:
                rows = list(csv.reader(file))[1:]
        except FileNotFoundError:
            return []
        return [Evaluation(int(r[0]), float(r[1]), float(r[2]), [float(value) for value in r[4:]]) for r in rows]

    def write_evaluations(self, evaluations: list[Evaluation]) -> None:
        """Replace the evaluations."""
        n_episodes = len(evaluations[0].returns) if evaluations else 0
        header = ["step", "wall_clock", "training_seconds", "mean", *(f"return_{i + 1}" for i in range(n_episodes))]
        lines = [",".join(header)]
        for e in evaluations:
            numbers = [f"{e.wall_clock:.1f}", f"{e.training_seconds:.1f}", f"{e.mean:.9g}", *(f"{r:.9g}" for r in e.returns)]
            lines.append(",".join([str(e.step), *numbers]))
        write_text(self.path / "evaluations.csv", "\n".join(lines) + "\n")


def find_runs(root: Path) -> Iterator[RunFolder]:
    """All runs below a folder, in the order of their names."""
    for file in sorted(root.rglob("config.json")):
        if "run" in read_json(file):
            yield RunFolder(file.parent)


def provenance() -> dict[str, Any]:
    """Versions, commit and machine."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name.replace("_", "-"))
        except metadata.PackageNotFoundError:
            continue
    if "sb3_rfm" not in versions:  # used from a checkout without installation
        import sb3_rfm

        versions["sb3_rfm"] = sb3_rfm.__version__
    return {"versions": versions, "commit": git_commit(), "machine": describe_machine()}


def git_commit() -> str | None:
    """Commit of this package's checkout, with ``+changes`` if files were changed since; None outside of one."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # installed, it may lie in somebody else's checkout
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_machine() -> dict[str, Any]:
    """Processor, cores, GPU and system."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    model = platform.processor()
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    machine = {"processor": model, "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine
