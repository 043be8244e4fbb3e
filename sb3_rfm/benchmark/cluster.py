"""Runs on a cluster, by `Ray <https://docs.ray.io>`_ (extra ``[cluster]``).

Ray decides where each run goes, and does it again elsewhere when its machine or process dies: it then goes on from its
checkpoint. The results folder has to be on a file system that all machines share.
"""

import contextlib
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from sb3_rfm.benchmark import worker
from sb3_rfm.benchmark.records import RunFolder
from sb3_rfm.benchmark.runner import MAX_KILLS


def run(path: str, options: Sequence[str]) -> int:
    """Do a run in a process of Ray's; see :mod:`sb3_rfm.benchmark.worker`."""
    with (Path(path) / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            return worker.main([path, *options])
        except Exception:
            traceback.print_exc()  # to the log, as the interpreter does it where a run has a process of its own
            raise


class RayEngine:
    """Runs wherever Ray has room for them.

    :param threads: Cores of a run
    :param gpus: GPUs of a run, which may be a fraction
    :param options: Command-line options of :mod:`sb3_rfm.benchmark.worker`
    :param jobs: Most runs at once; None for as many as there is room for

    The cluster is that of ``RAY_ADDRESS``, else this machine alone.
    """

    def __init__(self, threads: int = 1, gpus: float = 0.0, options: Sequence[str] = (), jobs: int | None = None) -> None:
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        self.threads = threads
        self.gpus = gpus
        self.options = list(options)
        self.jobs = jobs or 1_000_000  # all at once: Ray has the queue, and an autoscaler sees what is wanted
        # A process for each run, which returns all its memory; OMP_NUM_THREADS is set by Ray to the cores of the task.
        self.task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=MAX_KILLS, max_calls=1)(run)

    @property
    def slots(self) -> int:
        """Runs that the cluster does at once, as it is now."""
        there = ray.cluster_resources()
        slots = there.get("CPU", 1) // self.threads
        if self.gpus:
            slots = min(slots, there.get("GPU", 0) // self.gpus)
        return max(1, min(int(slots), self.jobs))

    def start(self, folder: RunFolder) -> "RayJob":
        """Hand the run of a folder to Ray."""
        return RayJob(self.task.remote(str(folder.path.resolve()), self.options), folder)


class RayJob:
    """A run that was handed to Ray."""

    def __init__(self, reference: Any, folder: RunFolder) -> None:
        self.reference = reference
        self.folder = folder

    def poll(self) -> int | None:
        ready, _ = ray.wait([self.reference], timeout=0)
        if not ready:
            return None
        try:
            return int(ray.get(self.reference))
        except ray.exceptions.RayTaskError:  # what the run raised is in its log
            return 1
        except ray.exceptions.RayError as error:  # its process or its machine was lost, too often
            with (self.folder.path / "log.txt").open("a") as log:
                print(" ".join(str(error).split()), file=log)
            return 1

    def request_stop(self) -> None:
        ray.cancel(self.reference)

    def wait(self) -> None:
        ray.wait([self.reference], timeout=60)
