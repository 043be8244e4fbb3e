"""Many runs, each in a process of its own, with a live table of how far they are.

The results folder is the state. A run that is finished is skipped, one that was killed is taken up again, and a run that
another process is doing is waited for, so that several machines may share a folder.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from filelock import Timeout
from rich.console import Console
from rich.live import Live
from rich.table import Table

from sb3_rfm.benchmark.records import RunFolder, RunSpec
from sb3_rfm.benchmark.suites import Task, short
from sb3_rfm.benchmark.worker import BUSY, STOPPED

POLL_SECONDS = 0.5
BUSY_RETRY_SECONDS = 10.0
MAX_KILLS = 3
"""Times a run may be killed, for instance for want of memory, before it counts as failed."""

LINE_SECONDS = 60.0
"""Time between two lines of progress where there is no terminal."""

RATE_SECONDS = 120.0
"""Time over which speed is measured: random steps, before learning starts, are fast and soon forgotten."""


def plan(
    tasks: Iterable[Task],
    labels: Sequence[str],
    seeds: Iterable[int],
    eval_every: int = RunSpec.eval_every,
    eval_episodes: int = RunSpec.eval_episodes,
    arguments: Mapping[str, dict[str, Any]] | None = None,
) -> list[RunSpec]:
    """All runs of an experiment, the first seed of every algorithm and task before the second of any.

    :param tasks: Tasks
    :param labels: Labels of algorithms
    :param seeds: Seeds
    :param eval_every: Environment steps between evaluations
    :param eval_episodes: Episodes of an evaluation
    :param arguments: Arguments that replace those of each label's setting
    :raises ValueError: if an environment is among the tasks with different steps
    """
    tasks, arguments = list(tasks), arguments or {}
    steps: dict[str, int] = {}
    for task in tasks:
        if steps.setdefault(task.env_id, task.steps) != task.steps:
            raise ValueError(
                f"{task.env_id} is asked for twice, with {steps[task.env_id]:,} and {task.steps:,} steps: "
                "name it once, or give --steps for all tasks."
            )
    return [
        RunSpec(label, task.env_id, seed, task.steps, eval_every, eval_episodes, arguments.get(label, {}))
        for seed in seeds
        for task in tasks
        for label in labels
    ]


class Job(Protocol):
    """A run that was started somewhere."""

    def poll(self) -> int | None:
        """Exit status, or None while it runs."""

    def request_stop(self) -> None:
        """Ask it to stop where it can be resumed."""

    def wait(self) -> None:
        """Return when it has stopped."""


class Engine(Protocol):
    """Something that runs jobs."""

    @property
    def jobs(self) -> int:
        """Jobs that may be handed to it at once."""

    @property
    def slots(self) -> int:
        """Jobs that it does at once."""

    def start(self, folder: RunFolder) -> Job:
        """Start the run of a folder."""


class LocalEngine:
    """Runs in processes on this machine.

    :param jobs: Processes at once
    :param threads: Threads of each
    :param options: Command-line options of :mod:`sb3_rfm.benchmark.worker`
    """

    def __init__(self, jobs: int = 1, threads: int = 1, options: Sequence[str] = ()) -> None:
        self.jobs = self.slots = jobs
        self.threads = threads
        self.options = options

    def start(self, folder: RunFolder) -> Job:
        """Start the run of a folder."""
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, str(self.threads))
        with (folder.path / "log.txt").open("a") as log:
            # A session of its own: Ctrl-C reaches this process alone, which then stops the others one by one.
            return LocalJob(
                subprocess.Popen(
                    [sys.executable, "-m", "sb3_rfm.benchmark.worker", str(folder.path), *self.options],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            )


class LocalJob:
    """A process on this machine."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process

    def poll(self) -> int | None:
        return self.process.poll()

    def request_stop(self) -> None:
        self.process.terminate()

    def wait(self) -> None:
        try:
            self.process.wait(timeout=120)  # an evaluation that has begun is brought to its end
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Sweep:
    """Runs and where they stand.

    :param folders: Folders of the runs
    :param engine: What runs them
    :param console: Where to show progress
    """

    folders: list[RunFolder]
    engine: Engine
    console: Console = field(default_factory=Console)

    def __post_init__(self) -> None:
        self.pending = [folder for folder in self.folders if not folder.finished]
        self.running: dict[Path, Job] = {}
        self.ended = [folder for folder in self.folders if folder not in self.pending]
        self.failed: list[RunFolder] = []
        self.killed_by: dict[Path, str] = {}
        self.retry_at: dict[Path, float] = {}
        self.elsewhere: set[Path] = set()
        self.kills: dict[Path, int] = {}
        self.progress: dict[Path, deque[tuple[float, int]]] = {}

    def run(self) -> list[RunFolder]:
        """Do all runs.

        :return: Those that failed
        """
        skipped = len(self.folders) - len(self.pending)
        self.console.print(f"{len(self.folders)} runs, {skipped} of them finished before.")
        live = (
            Live(console=self.console, refresh_per_second=2, get_renderable=self.table) if self.console.is_terminal else None
        )
        context: AbstractContextManager[Any] = live or nullcontext()
        last_line = time.monotonic()
        try:
            with context:
                while self.pending or self.running:
                    self._start()
                    self._collect()
                    if live is None and time.monotonic() - last_line > LINE_SECONDS:
                        last_line = time.monotonic()
                        self.console.print(self.summary())
                    time.sleep(POLL_SECONDS)
        finally:
            for job in self.running.values():
                job.request_stop()
            for job in self.running.values():
                job.wait()
        self.console.print(self.summary())
        for folder in self.failed:
            # Neither broken into lines nor read as markup: it is a path to copy.
            reason = self.killed_by.get(folder.path) or error_of(folder)
            self.console.print(f"failed: {folder.path / 'log.txt'}: {reason}", soft_wrap=True, markup=False)
        return self.failed

    def _start(self) -> None:
        for folder in list(self.pending):
            if len(self.running) >= self.engine.jobs:
                return
            if time.monotonic() < self.retry_at.get(folder.path, 0.0):
                continue
            if folder.is_busy:  # a process that finds that out takes seconds to start
                self._wait_for(folder)
                continue
            self.elsewhere.discard(folder.path)
            if folder.finished:
                self.pending.remove(folder)
                self.ended.append(folder)
                if not self.console.is_terminal:
                    self.console.print(self._line(folder, 0))
                continue
            self.pending.remove(folder)
            self.running[folder.path] = self.engine.start(folder)

    def _wait_for(self, folder: RunFolder) -> None:
        """Another process is doing the run: look again later."""
        self.elsewhere.add(folder.path)
        self.retry_at[folder.path] = time.monotonic() + BUSY_RETRY_SECONDS

    def _collect(self) -> None:
        for folder in self.folders:
            job = self.running.get(folder.path)
            status = None if job is None else job.poll()
            if status is None:
                continue
            del self.running[folder.path]
            if status == BUSY:
                self._wait_for(folder)
                self.pending.append(folder)
            elif (status < 0 or status == STOPPED) and self.kills.get(folder.path, 0) < MAX_KILLS:
                self.kills[folder.path] = self.kills.get(folder.path, 0) + 1
                self.pending.insert(0, folder)
                self.progress.pop(folder.path, None)  # its speed is measured anew
            elif status != 0:
                self.ended.append(folder)
                self.failed.append(folder)
                if status < 0:
                    name = signal.Signals(-status).name
                    self.killed_by[folder.path] = f"killed by {name}, {MAX_KILLS + 1} times; for want of memory?"
                if folder.status["state"] != "failed":  # it had no time to say so
                    with suppress(Timeout), folder.lock:  # unless another one has taken it up
                        folder.set_status(state="failed")
            elif not folder.finished:  # it was asked for more steps meanwhile
                self.pending.append(folder)
            else:
                self.ended.append(folder)
            if not self.console.is_terminal and status != BUSY:
                self.console.print(self._line(folder, status))

    # What is shown

    def _line(self, folder: RunFolder, status: int) -> str:
        spec, state = folder.spec, folder.status
        what = f"{short(spec.env_id)}  {spec.algo}  seed {spec.seed}"
        if status != 0:
            how = "stopped" if status == STOPPED else f"ended with exit status {status}"
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else how
            again = ", started again" if folder in self.pending else ""
            return f"{what}: {how} after {state['step']:,} steps{again}"
        return f"{what}: return {state['last_return']:.1f} after {state['step']:,} steps, {duration(state['wall_clock'])}"

    def rates(self) -> dict[Path, float]:
        """Environment steps per second of the runs that are being done, over the last :data:`RATE_SECONDS`."""
        now, result = time.monotonic(), {}
        for folder in self.folders:
            step = folder.status["step"]
            if step > 0 and (folder.path in self.running or folder.path in self.elsewhere):
                seen = self.progress.setdefault(folder.path, deque())
                if seen and step < seen[-1][1]:  # it has gone back to its checkpoint
                    seen.clear()
                if not seen or step > seen[-1][1]:
                    seen.append((now, step))
                while len(seen) > 2 and now - seen[1][0] >= RATE_SECONDS:  # two are left in an evaluation that takes longer
                    seen.popleft()
                start, first = seen[0]
                if step > first:
                    result[folder.path] = (step - first) / (now - start)
        return result

    def remaining(self, rates: dict[Path, float]) -> float | None:
        """Seconds to the end of all runs, or None as long as nothing is known.

        Runs that were not started yet take as long per step as those of the same algorithm and task, else as the others.
        """
        costs: dict[tuple[str, str], list[float]] = {}
        for folder in self.folders:
            spec, status = folder.spec, folder.status
            if folder.path in rates:
                costs.setdefault((spec.algo, spec.env_id), []).append(1 / rates[folder.path])
            elif folder.finished and status["step"]:
                costs.setdefault((spec.algo, spec.env_id), []).append(status["wall_clock"] / status["step"])
        if not costs:
            return None
        everything = [cost for values in costs.values() for cost in values]
        total, longest = 0.0, 0.0
        for folder in [*self.pending, *(f for f in self.folders if f.path in self.running)]:
            spec = folder.spec
            known = costs.get((spec.algo, spec.env_id), everything)
            seconds = (spec.steps - folder.status["step"]) * sum(known) / len(known)
            total, longest = total + seconds, max(longest, seconds)
        return max(total / self.engine.slots, longest)

    def summary(self) -> str:
        """One line: how many runs are where, and the remaining time."""
        n_finished = sum(folder.finished for folder in self.folders)
        # A cluster has more runs in its queue than it does.
        n_running = sum(folder.path in self.running and folder.status["state"] != "new" for folder in self.folders)
        parts = [f"{n_finished} of {len(self.folders)} finished", f"{n_running} running"]
        if n_elsewhere := sum(folder.path in self.elsewhere and not folder.finished for folder in self.folders):
            parts.append(f"{n_elsewhere} done by another process")
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        if self.running or self.pending:
            remaining = self.remaining(self.rates())
            parts.append(f"about {duration(remaining)} left" if remaining is not None else "remaining time unknown yet")
        return ", ".join(parts)

    def table(self) -> Table:
        """The runs that are being done, the last that ended, and the summary."""
        rates = self.rates()
        # In 80 columns, every row has room for one line.
        table = Table(caption=self.summary(), caption_justify="left", caption_style="bold", box=None, pad_edge=False)
        for name in ("task", "algo", "seed"):
            table.add_column(name)
        for name in ("step", "steps/s", "return", "left"):
            table.add_column(name, justify="right")
        under_way = self.running.keys() | self.elsewhere
        running = [f for f in self.folders if f.path in under_way and f.status["state"] != "new"]
        # Where not all fit, the summary below them does.
        for folder in [*self.ended[-8:], *running][-max(1, self.console.height - 4) :]:
            spec, status = folder.spec, folder.status
            rate = rates.get(folder.path)
            left = f"{duration((spec.steps - status['step']) / rate)}" if rate else ""
            table.add_row(
                short(spec.env_id),
                spec.algo,
                str(spec.seed),
                f"{status['step']:,} / {spec.steps:,}",
                f"{rate:.0f}" if rate else "",
                "" if status["last_return"] is None else f"{status['last_return']:.1f}",
                status["state"] if folder.path not in under_way else left or "starting",
                style={"finished": "green", "failed": "red"}.get(status["state"]) if folder.path not in under_way else None,
            )
        return table


def error_of(folder: RunFolder) -> str:
    """The error of a run that failed, by its log: what the last traceback ends with, else the last line."""
    log = folder.path / "log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    _, traceback, rest = text.rpartition("Traceback (most recent call last):\n")
    lines = [line for line in rest.split("\n") if line.strip()] or ["no output"]
    return next((line for line in lines if traceback and not line.startswith(" ")), lines[-1])


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
