"""Run Stable-Baselines3's own tests with its SAC or TD3 replaced by the algorithms of this package.

The tests come from SB3's source distribution, at the version that is installed; no copy of them is kept here. What is not
run, or not with the default arguments, is listed in ``exceptions.toml``, each with its reason.

    python tests/conformance/run.py                                # everything
    python tests/conformance/run.py --algos RFM --as SAC -k cnn    # a part
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ALGORITHMS = ["RFM", "QNE", "DQS", "QSM"]
ALIASES = ["SAC", "TD3"]
MODULES = [
    "test_save_load",
    "test_run",
    "test_predict",
    "test_deterministic",
    "test_spaces",
    "test_dict_env",
    "test_cnn",
    "test_her",
    "test_n_step_replay",
    "test_train_eval_mode",
    "test_callbacks",
    "test_custom_policy",
    "test_vec_normalize",
    "test_gae",
    "test_identity",
]
SUBSET = {
    ("RFM", "SAC"): MODULES,
    ("RFM", "TD3"): ["test_run"],
    ("QNE", "SAC"): ["test_deterministic", "test_custom_policy"],
    ("DQS", "SAC"): ["test_deterministic", "test_custom_policy"],
    ("QSM", "SAC"): ["test_deterministic", "test_custom_policy", "test_save_load"],
}


def fetch_tests() -> Path:
    """Directory with SB3's tests, downloaded once for each version.

    :return: The directory ``tests`` of the source distribution
    """
    version = importlib.metadata.version("stable-baselines3")
    directory = ROOT / "build" / "conformance" / f"stable_baselines3-{version}"
    if not (directory / "tests").is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*download, "--dest", temporary, f"stable-baselines3=={version}"], check=True)
            (archive,) = Path(temporary).glob("*.tar.gz")
            # Only the tests and their settings: the package itself must be the one that is installed.
            with tarfile.open(archive) as tar:
                wanted = [m for m in tar if m.name.split("/")[1:2] in (["tests"], ["pyproject.toml"])]
                safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in Python before 3.10.12 and 3.11.4
                tar.extractall(temporary, members=wanted, **safe)
            (unpacked,) = (path for path in Path(temporary).iterdir() if path.is_dir())
            unpacked.rename(directory)
    return directory / "tests"


def run_pass(tests: Path, algo: str, alias: str, modules: list[str], pytest_args: list[str]) -> dict[str, Any]:
    """Run the modules with one class in place of another.

    :param tests: Directory of SB3's tests
    :param algo: Class of this package
    :param alias: Class of SB3 that it replaces
    :param modules: Test modules
    :param pytest_args: Further arguments for pytest
    :return: Results by module, see ``plugin.py``
    """
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.json"
        environment = {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "CONFORMANCE_ALGO": algo,
            "CONFORMANCE_AS": alias,
            "CONFORMANCE_EXCEPTIONS": str(HERE / "exceptions.toml"),
            "CONFORMANCE_REPORT": str(report),
        }
        command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "--rootdir", str(tests.parent)]
        command += ["--quiet", "--tb=short", "-m", "not expensive", f"--basetemp={temporary}/pytest", *pytest_args]
        command += [str(tests / f"{module}.py") for module in modules]
        started = time.monotonic()
        result = subprocess.run(command, cwd=temporary, env=environment, capture_output=True, text=True)
        if not report.exists() or result.returncode not in (0, 1):  # tests passed, or failed; else they were not run
            raise RuntimeError(f"pytest did not run:\n{result.stdout}\n{result.stderr}")
        data: dict[str, Any] = json.loads(report.read_text())
    data["seconds"] = time.monotonic() - started
    failed = sum(len(module["failed"]) for module in data["modules"].values())
    print(f"{algo} as {alias}: {failed} failed, {data['seconds']:.0f} s", flush=True)
    if failed:
        print(result.stdout, flush=True)
    return data


OUTCOMES = ["passed", "failed", "skipped", "deselected"]


def markdown(results: dict[tuple[str, str], dict[str, Any]], modules: list[str]) -> str:
    """The table module × algorithm, and the reasons of what was not simply run and passed.

    :param results: Results of :func:`run_pass` by algorithm and replaced class
    :param modules: Test modules
    """
    seconds = sum(data["seconds"] for data in results.values())
    lines = [
        f"Stable-Baselines3 {importlib.metadata.version('stable-baselines3')}, {' / '.join(OUTCOMES)} "
        f"({seconds / 60:.0f} minutes of one core):",
        "",
        "| module | " + " | ".join(f"{algo} as {alias}" for algo, alias in results) + " |",
        "|---|" + "---|" * len(results),
    ]
    totals = {key: [0] * len(OUTCOMES) for key in results}
    for module in modules:
        cells = []
        for key, data in results.items():
            outcome = data["modules"].get(module)
            if outcome is None:
                cells.append("–")
                continue
            counts = [count(outcome[name]) for name in OUTCOMES]
            totals[key] = [a + b for a, b in zip(totals[key], counts, strict=True)]
            cells.append(" / ".join(map(str, counts)))
        lines.append(f"| `{module}` | " + " | ".join(cells) + " |")
    lines.append("| **total** | " + " | ".join(" / ".join(map(str, total)) for total in totals.values()) + " |")
    titles = {
        "failed": "Failed",
        "skipped": "Skipped by the tests themselves",
        "deselected": "Deselected",
    }
    for kind, title in titles.items():
        reasons: dict[tuple[str, str], list[str]] = {}
        for (algo, alias), data in results.items():
            for outcome in data["modules"].values():
                for name, reason in outcome[kind]:
                    reasons.setdefault((name.replace(algo, "{algo}"), reason), []).append(f"{algo} as {alias}")
        if reasons:
            lines += ["", f"{title}:", ""]
        for (name, reason), passes in sorted(reasons.items()):
            lines.append(f"- `{name}` ({summary(passes, list(results))}): {reason}")
    return "\n".join(lines) + "\n"


def count(outcome: int | list[Any]) -> int:
    return outcome if isinstance(outcome, int) else len(outcome)


def summary(passes: list[str], results: list[tuple[str, str]]) -> str:
    """``"as SAC"`` where every algorithm that was run in place of it is meant, else the passes."""
    named = []
    for alias in ALIASES:
        mine = [f"{algo} as {alias}" for algo, other in results if other == alias]
        here = [name for name in mine if name in passes]
        named += [f"as {alias}"] if here and here == mine else here
    return ", ".join(named)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--algos", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--as", nargs="+", choices=ALIASES, default=ALIASES, dest="aliases")
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=MODULES)
    parser.add_argument("--subset", action="store_true", help="RFM as SAC, and what the algorithms do not share: for CI")
    parser.add_argument("--jobs", type=int, default=2, help="passes at the same time")
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file")
    options, pytest_args = parser.parse_known_args(arguments)

    tests = fetch_tests()
    passes = {(algo, alias): options.modules for alias in options.aliases for algo in options.algos}
    if options.subset:
        passes = SUBSET
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(lambda item: run_pass(tests, *item[0], item[1], pytest_args), passes.items()))
    results = dict(zip(passes, outcomes, strict=True))

    table = markdown(results, options.modules)
    print(table)
    if options.output is not None:
        options.output.write_text(table)
    stale = sorted({test for data in outcomes for test in data["stale"]})
    if stale and options.modules == MODULES and not options.subset and not pytest_args:
        print(f"Listed in exceptions.toml, but no such test exists: {', '.join(stale)}")
        return 1
    return int(any(module["failed"] for data in outcomes for module in data["modules"].values()))


if __name__ == "__main__":
    sys.exit(main())
