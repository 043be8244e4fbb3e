"""Kill a run of a benchmark and then the whole benchmark, give its command again, and compare with runs left alone.

    python tests/kill_a_sweep.py --out results/sweep

First the process of one run is ended by SIGKILL, which the benchmark has to notice; later, as when a machine goes down, the
benchmark itself and every run at once. The same command then has to skip what is finished and to go on with the rest. At the
end, the runs that were killed are done once more without interruption: their evaluations have to be equal. The test-suite
calls this with a few steps.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import psutil

from sb3_rfm.benchmark.records import RunFolder, find_runs


def command(options: argparse.Namespace, out: Path, algos: list[str], first_seed: int, n_seeds: int) -> list[str]:
    """The benchmark's command line."""
    arguments = {
        "--suite": [options.env],
        "--algos": algos,
        "--seeds": [n_seeds],
        "--first-seed": [first_seed],
        "--steps": [options.steps],
        "--eval-every": [options.steps // 4],
        "--eval-episodes": [options.eval_episodes],
        "--checkpoint-every": [options.steps // 20],
        "--jobs": [options.jobs],
        "--set": options.set,
        "--out": [out],
    }
    words = [word for name, values in arguments.items() if values for word in (name, *map(str, values))]
    return [sys.executable, "-m", "sb3_rfm.benchmark", "run", *words]


def start(words: list[str]) -> subprocess.Popen:
    """Start a command, and print it as one would type it."""
    print("$ python", *words[1:], flush=True)
    return subprocess.Popen(words)


def interrupt(sweep: subprocess.Popen, out: Path, n_runs: int) -> dict[str, RunFolder]:
    """Kill a run when a quarter of the runs are finished, and everything when a half of them are.

    :return: The runs that were killed, by name
    """
    killed: dict[str, RunFolder] = {}

    def processes() -> list[psutil.Process]:
        return psutil.Process(sweep.pid).children()

    def wait_for(n_finished: int) -> psutil.Process:
        """The process of a run that learns and has a checkpoint to go on from, once so many are finished."""
        while True:
            assert sweep.poll() is None, f"The benchmark ended too early, with exit status {sweep.returncode}."
            folders, running = list(find_runs(out)), {process.pid: process for process in processes()}
            enough = sum(folder.finished for folder in folders) >= n_finished
            for folder in folders:
                status = folder.status
                middle = 0.3 < status["step"] / folder.spec.steps < 0.9 and folder.checkpoint.exists()
                if enough and middle and status.get("pid") in running and status["state"] == "running":
                    return running[status["pid"]]
            time.sleep(0.2)

    def kill(process: psutil.Process) -> None:
        process.kill()
        process.wait()
        for folder in find_runs(out):
            if folder.status.get("pid") == process.pid:
                killed[folder.spec.name] = folder
                print(f"-- killed {folder.spec.name} at step {folder.status['step']:,}", flush=True)

    try:
        kill(wait_for(n_runs // 4))
        wait_for(n_runs // 2)
    finally:
        running = processes()
        sweep.kill()
        sweep.wait()
        print("-- killed the benchmark", flush=True)
        for process in running:
            kill(process)
    return killed


def run(options: argparse.Namespace) -> int:
    """Do it all, print what happens, and return the number of runs that ended otherwise than undisturbed ones."""
    out, n_runs = options.out / "killed", len(options.algos) * options.seeds
    words = command(options, out, options.algos, 0, options.seeds)
    killed = interrupt(start(words), out, n_runs)
    finished = {folder.path: folder.status for folder in find_runs(out) if folder.finished}

    assert start(words).wait() == 0
    runs = list(find_runs(out))
    assert len(runs) == n_runs and all(folder.finished for folder in runs)
    assert all(folder.status == finished.get(folder.path, folder.status) for folder in runs), "A finished run was done again."

    differing = 0
    for name, folder in killed.items():
        spec = folder.spec
        assert start(command(options, options.out / "undisturbed", [spec.algo], spec.seed, 1)).wait() == 0
        undisturbed = RunFolder(options.out / "undisturbed" / name)
        got, expected = ([(e.step, e.returns) for e in f.read_evaluations()] for f in (folder, undisturbed))
        differing += got != expected
        steps = sorted(int(log.name.rpartition("-")[2]) for log in (folder.path / "training").iterdir())
        same = "evaluations equal to" if got == expected else "evaluations DIFFER from"
        print(f"-- {name}: started at steps {steps}, {same} those of the undisturbed run", flush=True)
    return differing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--algos", nargs="+", default=["rfm", "qne", "dqs", "qsm"])
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--eval-episodes", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--set", nargs="+", default=[], help="passed on to the benchmark")
    parser.add_argument("--out", type=Path, required=True, help="empty folder for the results")
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
