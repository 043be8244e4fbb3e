"""The benchmark: its statistics, its results folder, runs that are interrupted, and what it writes."""

import html
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from scipy import stats

from sb3_rfm import RFM
from sb3_rfm.benchmark import cases, cost, figures, records, report, speed, statistics, summary
from sb3_rfm.benchmark.__main__ import main, make_parser, planned
from sb3_rfm.benchmark.cases import Sizes
from sb3_rfm.benchmark.caveats import few_seeds
from sb3_rfm.benchmark.records import Evaluation, RunFolder, RunSpec, find_runs, git_commit
from sb3_rfm.benchmark.results import Results
from sb3_rfm.benchmark.runner import LocalEngine, Sweep, plan
from sb3_rfm.benchmark.suites import (
    DMC8,
    SETTINGS,
    SUITES,
    Task,
    get_algorithm,
    get_setting,
    get_tasks,
    make_env,
    parse_overrides,
)
from sb3_rfm.benchmark.worker import BUSY, STOPPED, Evaluator, Recorder, build_model, run
from sb3_rfm.files import replacing, write_text

# Statistics


def test_mean_has_the_interval_of_the_t_test() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 5)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert statistics.mean(values) == pytest.approx((values.mean(), expected.low, expected.high))
    assert np.isnan(statistics.mean(values[:1]).low)


def test_interquartile_mean_ignores_the_outer_quarters() -> None:
    scores = [np.array([0.2, -1e9, 0.4, 0.3]), np.array([0.1, 1e9, 0.35, 0.25])]
    assert statistics.interquartile_mean(scores).value == pytest.approx(np.mean([0.2, 0.25, 0.3, 0.35]))


def test_tasks_weigh_the_same_however_many_seeds_they_have() -> None:
    scores = np.random.default_rng(3).beta(2, 3, (10, 4))  # (runs, tasks)
    assert statistics.interquartile_mean(list(scores.T)).value == pytest.approx(stats.trim_mean(scores.ravel(), 0.25))
    few, many = np.array([0.0, 0.0]), np.array([1.0] * 6)
    assert statistics.interquartile_mean([few, many]).value == pytest.approx(0.5)
    assert statistics.performance_profile([few, many], np.array([0.5]))[0].value == pytest.approx(0.5)
    twice = [np.array([score, score]) for score in scores[0]]
    once_less = [twice[0][:1], *twice[1:]]
    assert statistics.interquartile_mean(once_less).value == pytest.approx(statistics.interquartile_mean(twice).value)
    mixed = statistics.interquartile_mean([np.array([0.1, 0.3]), np.repeat([0.2, 0.6], 4)])
    assert mixed.low < mixed.value < mixed.high


def test_probability_of_improvement_is_that_of_mann_and_whitney() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 5, 7).astype(float), rng.integers(0, 5, 6).astype(float)
    u = stats.mannwhitneyu(x, y).statistic
    there, back = statistics.probability_of_improvement([x], [y]), statistics.probability_of_improvement([y], [x])
    assert there.value == pytest.approx(u / (7 * 6))
    assert there.value + back.value == pytest.approx(1.0)
    assert there.low <= there.value <= there.high


def test_performance_profile_falls_from_one_to_zero() -> None:
    profile = statistics.performance_profile([np.array([0.2, 0.4]), np.array([0.6, 0.8])], np.array([0.0, 0.5, 1.0]))
    assert [estimate.value for estimate in profile] == [1.0, 0.5, 0.0]


def test_intervals_agree_with_rliable() -> None:
    try:
        from rliable import library, metrics
    except Exception as error:  # with pandas 3, a dependency of it raises a TypeError
        pytest.skip(f"rliable cannot be imported: {error!r}")
    rng = np.random.default_rng(2)
    scores = rng.beta(2, 3, (10, 4))  # (runs, tasks)
    other = rng.beta(3, 3, (10, 4))
    np.random.seed(0)  # noqa: NPY002 (what rliable draws from)
    points, intervals = library.get_interval_estimates(
        {"x": scores}, lambda s: np.array([metrics.aggregate_iqm(s)]), reps=5000
    )
    ours = statistics.interquartile_mean(list(scores.T))
    assert ours.value == pytest.approx(points["x"][0])
    assert (ours.low, ours.high) == pytest.approx(intervals["x"].ravel(), abs=0.01)
    points, intervals = library.get_interval_estimates(
        {"x": (scores, other)}, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), reps=2000
    )
    ours = statistics.probability_of_improvement(list(scores.T), list(other.T))
    assert ours.value == pytest.approx(points["x"][0])
    assert (ours.low, ours.high) == pytest.approx(intervals["x"].ravel(), abs=0.02)


# What is run


def test_every_setting_is_accepted_by_its_algorithm() -> None:
    for label, setting in SETTINGS.items():
        arguments = {k: v for k, v in setting.items() if k != "action_noise"}
        get_algorithm(label.partition(":")[0])("MlpPolicy", "Pendulum-v1", **{**arguments, "buffer_size": 10})


def test_overrides_are_literals_for_all_algorithms_or_for_one() -> None:
    items = ["tau=0.01", "qne.path=cosine", "qne.policy_kwargs={'net_arch': [64]}"]
    assert parse_overrides(items, ["rfm", "qne"]) == {
        "rfm": {"tau": 0.01},
        "qne": {"tau": 0.01, "path": "cosine", "policy_kwargs": {"net_arch": [64]}},
    }
    for wrong in ("tau", "=1", "sac.tau=1"):
        with pytest.raises(ValueError, match="expects argument=value"):
            parse_overrides([wrong], ["rfm"])
    with pytest.raises(ValueError, match="False instead of 'false'"):
        parse_overrides(["sac.use_sde=false"], ["sac"])


def test_an_argument_of_one_algorithm_precedes_one_of_all() -> None:
    assert parse_overrides(["rfm.tau=0.01", "tau=0.02"], ["rfm", "sac"]) == {"rfm": {"tau": 0.01}, "sac": {"tau": 0.02}}


def test_a_misspelt_setting_is_not_described_by_what_all_algorithms_get() -> None:
    assert parse_overrides(["tau=0.01", "rfm:cold.temperature=0.1"], ["rfm:cold"])["rfm:cold"] == {
        "tau": 0.01,
        "temperature": 0.1,
    }
    overrides = parse_overrides(["tau=0.01"], ["rfm:papr", "rfm:paper"])
    assert overrides["rfm:paper"] == {"tau": 0.01}
    with pytest.raises(ValueError, match="Unknown setting 'rfm:papr'"):
        get_setting("rfm:papr", overrides["rfm:papr"])


def test_names_are_resolved_and_refused() -> None:
    assert [task.env_id for task in get_tasks("dmc8")] == [f"dm_control/{name}-v0" for name in DMC8]
    assert get_tasks("walker-run", 7)[0].steps == 7
    assert get_setting("rfm:cold", {"temperature": 0.01}) == {"temperature": 0.01}
    assert get_setting("qne:paper", {"n_candidates": 3})["n_candidates"] == 3
    with pytest.raises(ValueError, match="Unknown suite or environment 'Pendulum-v9'"):
        get_tasks("Pendulum-v9")
    with pytest.raises(ValueError, match="sac has no argument n_particles;"):
        get_setting("sac", {"tau": 0.01, "n_particles": 32})
    with pytest.raises(ValueError, match="rfm has no argument seed;"):
        get_setting("rfm", {"seed": 1})
    with pytest.raises(ValueError, match="Unknown setting 'rfm:cold'"):
        get_setting("rfm:cold", {})
    with pytest.raises(ValueError, match="Unknown algorithm 'ppo'"):
        get_setting("ppo", {})


def test_plan_does_the_first_seed_of_everything_first() -> None:
    specs = plan(get_tasks("classic"), ["rfm", "sac"], range(2), arguments={"rfm": {"tau": 0.1}})
    assert [spec.seed for spec in specs] == [0] * 4 + [1] * 4
    assert specs[0].arguments == {"tau": 0.1} and specs[1].arguments == {}
    assert len({spec.name for spec in specs}) == 8


def test_one_environment_has_one_budget() -> None:
    twice = [*get_tasks("classic"), *get_tasks("Pendulum-v1")]
    with pytest.raises(ValueError, match="Pendulum-v1 is asked for twice, with 10,000 and 100,000 steps"):
        plan(twice, ["rfm"], range(1))
    assert len(plan([*get_tasks("classic", 10), *get_tasks("Pendulum-v1", 10)], ["rfm"], range(1))) == 3


def test_baselines_have_their_own_choice_among_particles_or_that_of_rfm() -> None:
    names = "n_exploration_particles", "n_target_particles", "n_particles"

    def particles(label: str) -> tuple[int, ...]:
        return tuple(SETTINGS[label].get(name, 1) for name in names)

    assert particles("rfm:paper") == (32, 32, 32)
    assert [particles(f"{algo}:paper") for algo in ("qne", "dqs", "qsm")] == [(1, 1, 32), (1, 1, 1), (1, 1, 1)]
    for algo in ("qne", "dqs", "qsm"):
        assert particles(f"{algo}:paper-particles") == particles("rfm:paper")
        own, other = SETTINGS[f"{algo}:paper"], SETTINGS[f"{algo}:paper-particles"]
        added = set(names) - ({"n_particles"} if algo == "qne" else set())  # QNE's evaluations have it in its own setting
        assert {key for key in other if other[key] != own.get(key)} == added


def test_lists_from_json_become_what_the_algorithm_takes(tmp_path: Path) -> None:
    arguments = {"train_freq": (1, "episode"), **TINY}
    folder = RunFolder.create(tmp_path, spec(arguments=arguments))
    model = build_model(folder, folder.spec, get_setting("rfm", folder.spec.arguments))
    assert model.train_freq.unit.value == "episode"  # type: ignore[union-attr]


def test_a_run_that_is_asked_for_twice_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("sb3_rfm.benchmark.runner.Sweep.run", lambda self: asked.append(len(self.folders)))
    command = ["run", "--suite", "Pendulum-v1", "classic", "--algos", "rfm", "sac", "rfm", "--seeds", "1", "--steps", "10"]
    main([*command, "--out", str(tmp_path)])
    assert asked == [4]


def test_repeated_evaluations_are_no_training(tmp_path: Path) -> None:
    """20 s of training and 50 s of evaluation by step 100, killed, resumed from step 50: the clock goes on from there."""
    folder = RunFolder.create(tmp_path, spec())
    folder.write_evaluations([Evaluation(50, 30.0, 10.0, [0.0]), Evaluation(100, 70.0, 20.0, [0.0])])
    folder.set_status(state="running", step=100, wall_clock=70.0)
    recorder = Recorder(folder, lambda *_: [0.0], 10)  # type: ignore[arg-type]
    recorder.continue_from(50)
    assert [e.step for e in recorder.evaluations] == [50]
    assert recorder.seconds - recorder.evaluation_seconds == pytest.approx(20.0, abs=1.0)
    anew = Recorder(folder, lambda *_: [0.0], 10)  # type: ignore[arg-type]
    anew.continue_from(0)
    assert not anew.evaluations and anew.seconds < 1.0


# The results folder


def spec(**values: object) -> RunSpec:
    defaults = {"algo": "rfm", "env_id": "Pendulum-v1", "seed": 0, "steps": 100, "eval_every": 50, "eval_episodes": 2}
    return RunSpec(**{**defaults, **values})  # type: ignore[arg-type]


def test_a_folder_keeps_to_its_run(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, spec())
    assert folder.spec == spec() and folder.status["state"] == "new" and not folder.finished
    folder.set_status(state="finished", step=100)
    assert RunFolder.create(tmp_path, spec(steps=50)).finished, "a run is never shortened"
    with pytest.raises(ValueError, match="eval_episodes': 2"):
        RunFolder.create(tmp_path, spec(eval_episodes=3))


def test_results_are_not_lost_by_asking_for_more_steps(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, spec())
    folder.set_status(state="finished", step=100)
    with pytest.raises(ValueError, match="finished after 100 steps"):
        RunFolder.create(tmp_path, spec(steps=200))
    folder.checkpoint.touch()
    assert RunFolder.create(tmp_path, spec(steps=200)).spec.steps == 200 and not folder.finished


def test_mistyped_arguments_are_replaced_before_a_run_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run that failed at its start, in one that failed in its first evaluation, and in one that was never started."""

    class Here(LocalEngine):
        def start(self, folder: RunFolder) -> Any:
            try:
                run(folder.path)
            except TypeError:
                return types.SimpleNamespace(poll=lambda: 1)
            return types.SimpleNamespace(poll=lambda: 0)

    monkeypatch.setattr("sb3_rfm.benchmark.runner.LocalEngine", Here)
    command = ["run", "--suite", "Pendulum-v1", "--algos", "sac", "--seeds", "1", "--steps", "100", "--eval-every", "50"]
    command += ["--eval-episodes", "2", "--out", str(tmp_path), "--set", "learning_starts=60"]
    never = RunFolder.create(tmp_path, spec(algo="sac", seed=1, eval_every=10))
    early = RunFolder.create(tmp_path, spec(algo="sac", seed=2, eval_every=10))
    early.record_start(arguments={})
    early.set_status(state="failed")
    assert main([*command, "policy_kwargs={'bad': 1}"]) == 1
    folder = RunFolder(tmp_path / spec(algo="sac").name)
    assert folder.status["state"] == "failed" and not folder.read_evaluations()
    command[command.index("--seeds") + 1] = "3"
    assert main(command) == 0
    for each in (folder, never, early):
        assert each.finished and each.spec.arguments == {"learning_starts": 60} and each.spec.eval_every == 50
        assert len(each.config["starts"]) == 1


@pytest.mark.parametrize("what", ["evaluation", "checkpoint", "process"])
def test_a_run_that_has_begun_is_not_replaced(tmp_path: Path, what: str) -> None:
    folder = RunFolder.create(tmp_path, spec())
    if what == "evaluation":
        folder.write_evaluations([Evaluation(0, 1.0, 1.0, [0.0, 0.0])])
    elif what == "checkpoint":
        folder.checkpoint.touch()
    with (
        folder.lock if what == "process" else nullcontext(),
        pytest.raises(ValueError, match=rf"{folder.path} holds a run .*\(--out\) .* or delete that folder\."),
    ):
        RunFolder.create(tmp_path, spec(arguments={"tau": 0.1}))
    assert folder.spec == spec()


def test_a_sweep_that_is_refused_leaves_all_runs_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [RunFolder.create(tmp_path, spec(algo="sac", seed=seed)) for seed in range(2)]
    for folder in folders:
        folder.set_status(state="finished", step=100)
    folders[0].checkpoint.touch()
    with pytest.raises(SystemExit):
        main(
            ["run", "--suite", "Pendulum-v1", "--algos", "sac", "--seeds", "2", "--steps", "200"]
            + ["--eval-every", "50", "--eval-episodes", "2", "--out", str(tmp_path)]
        )
    assert "seed-1 holds a run that was finished after 100 steps" in capsys.readouterr().err
    assert [folder.spec.steps for folder in folders] == [100, 100]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, spec())
    (folder.path / "status.json").write_text("")
    with pytest.raises(ValueError, match=r"status\.json is damaged"):
        _ = folder.finished


def test_more_steps_may_be_asked_for_while_a_run_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path, spec(arguments=TINY))
    write_status = Recorder.write_status

    def ask_for_more(recorder: Recorder, step: int, state: str = "running") -> None:
        if state == "finished":
            RunFolder.create(tmp_path, spec(steps=150, arguments=TINY))
        write_status(recorder, step, state)

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Recorder, "write_status", ask_for_more)
        run(folder.path, checkpoint_every=10)
    assert not folder.finished and folder.checkpoint.exists()
    before = [e.returns for e in folder.read_evaluations()]
    run(folder.path, checkpoint_every=10)
    assert folder.finished and not folder.checkpoint.exists()
    assert [e.step for e in folder.read_evaluations()] == [0, 50, 100, 150]
    assert [e.returns for e in folder.read_evaluations()][:3] == before


def test_more_steps_may_be_asked_for_while_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path, spec())

    def ask_for_more() -> dict[str, Any]:
        RunFolder.create(tmp_path, spec(steps=300))
        return {"commit": None, "versions": {"sb3_rfm": "1.0"}}

    monkeypatch.setattr(records, "provenance", ask_for_more)
    folder.record_start(arguments={})
    assert folder.spec.steps == 300 and len(folder.config["starts"]) == 1


def test_files_are_written_by_several_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None sees, or takes away, what another has not finished."""
    names: set[Path] = set()
    monkeypatch.setattr(Path, "replace", lambda temporary, file: names.add(temporary))
    for _ in range(2):
        write_text(tmp_path / "file", "text")
    assert len(names) == 2


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "curves.png"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(file) as temporary:
        temporary.write_text("half of the n")
        1 / 0  # noqa: B018
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_run_that_another_process_does_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine(LocalEngine):
        def start(self, folder: RunFolder) -> Any:
            pytest.fail("a process was started for a run that another one is doing")

    folder = RunFolder.create(tmp_path, spec())
    sweep = Sweep([folder], Engine(1, 1, []))
    with folder.lock:
        sweep._start()
    assert sweep.pending == [folder]


def test_a_run_is_failed_before_another_process_may_take_it_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards, "failed" would be written over the state of the other one."""
    set_status, seen = RunFolder.set_status, []

    def watch(folder: RunFolder, **status: Any) -> None:
        seen.append((status["state"], RunFolder(folder.path).is_busy))
        set_status(folder, **status)

    folder = RunFolder.create(tmp_path, spec(algo="sac", arguments={"policy_kwargs": {"bad": 1}}))
    monkeypatch.setattr(RunFolder, "set_status", watch)
    with pytest.raises(TypeError):
        run(folder.path)
    assert seen == [("failed", True)]


def test_the_commit_is_that_of_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, it may lie in the checkout of a project that uses it."""
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    package = tmp_path / "installed" / "benchmark"
    package.mkdir(parents=True)
    (package / "records.py").touch()
    monkeypatch.setattr("sb3_rfm.benchmark.records.__file__", str(package / "records.py"))
    assert git_commit() is None


def test_evaluations_are_read_as_they_were_written(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, spec())
    evaluations = [Evaluation(0, 1.5, 0.5, [1.25, -3.0]), Evaluation(50, 9.0, 7.0, [2.0, 4.0])]
    folder.write_evaluations(evaluations)
    assert folder.read_evaluations() == evaluations
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.json", "evaluations.csv"]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three algorithms on two tasks with three seeds, one run unfinished."""
    root, rng = tmp_path_factory.mktemp("results"), np.random.default_rng(0)
    for task in ("dm_control/walker-run-v0", "Pendulum-v1"):
        for level, algo in enumerate(("rfm", "qne:paper", "sac")):
            for seed in range(3):
                folder = RunFolder.create(root, spec(algo=algo, env_id=task, seed=seed))
                folder.record_start(arguments=SETTINGS.get(algo, {}))
                returns = [rng.normal(100 * level + step, 5, 2).tolist() for step in (0, 50, 100)]
                if (task, algo, seed) == ("Pendulum-v1", "sac", 2):
                    returns.pop()
                else:
                    folder.set_status(state="finished", step=100)
                folder.write_evaluations([Evaluation(50 * i, 60.0 * i, 50.0 * i, r) for i, r in enumerate(returns)])
    return root


def test_results_are_the_same_from_folders_and_from_tables(made_up: Path, tmp_path: Path) -> None:
    results = Results.load(made_up)
    results.save(tmp_path)
    again = Results.load(tmp_path)
    assert again.algos == results.algos == ["rfm", "qne:paper", "sac"]
    for task in results.tasks:
        for algo in results.algos:
            np.testing.assert_allclose(again.at(50).final(task, algo), results.at(50).final(task, algo), rtol=1e-4)
    assert len(results.at(None).final("Pendulum-v1", "sac")) == 2, "the unfinished run is left out"
    assert len(results.at(50).final("Pendulum-v1", "sac")) == 3, "but not at a step that it has reached"
    with pytest.raises(
        ValueError, match=r"No run was evaluated at step 70\. .* all runs were evaluated is 50 \(--at-step 50\)"
    ):
        results.at(70)
    assert set(results.at(50).runs["steps"]) == {50}, "runs are described as they were"
    early, late = results.at(50).runs, results.at(None).runs
    assert (early["final_return"].mean(), early["wall_clock"].max()) < (late["final_return"].mean(), late["wall_clock"].max())
    assert results.of(["rfm", "sac"]).algos == ["rfm", "sac"]
    with pytest.raises(ValueError, match=r"no runs of \['tqc'\]"):
        results.of(["tqc"])


def test_report_writes_tables_pictures_and_one_page(made_up: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(made_up), "--out", str(tmp_path), "--title", "A <title>"]) == 0
    written = capsys.readouterr().out.split()
    assert all(Path(file).stat().st_size > 0 for file in written)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "A &lt;title&gt;" in page
    assert "1 run left out, unfinished: Pendulum-v1 sac seed 2 (50 steps)." in page and "As few as 2 seeds" in page
    assert page.count("<img") == 5 and page.count('src="data:image/svg+xml') == 5
    assert "averaged over the 2 tasks of both" in page and "No bar" not in page
    assert ("A score is linear in the return" in page) and "the best final mean of an algorithm" not in page
    assert "<th>final return</th>" in page and re.search(r"<td>\d+<small>\[", page)
    assert "<td>unknown<small>" not in page
    assert "http" not in page and "$" not in page, "self-contained, and every place filled"
    table = (tmp_path / "final_returns.md").read_text(encoding="utf-8")
    assert "| walker-run |" in table and "[" in table and "As few as 2 seeds" in table
    final = summary.final_table(Results.load(made_up).at(None))
    assert final.set_index(["env_id", "algo"]).loc[("Pendulum-v1", "sac"), "seeds"] == 2
    assert main(["report", str(tmp_path), "--at-step", "50", "--out", str(tmp_path / "again")]) == 0


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (
            [("rfm", "Pendulum-v1")],
            ["Every result rests on one seed, and has no interval.", "<h2>Comparison</h2><p>There is one algorithm"],
        ),
        (
            [("rfm", "Pendulum-v1"), ("sac", "Reacher-v5")],
            ["on every task. Too few tasks are shared for interquartile means.", "No two algorithms have a task in common."],
        ),
        (
            [("rfm", "Pendulum-v1"), ("sac", "Pendulum-v1"), ("rfm", "Reacher-v5")],
            [
                "Too few tasks are shared for interquartile means.",
                "<h2>Pairs of algorithms</h2>",
                "No bar for sac: one seed in",
            ],
        ),
        (
            [("rfm", "Pendulum-v1"), ("rfm", "Reacher-v5")],
            [
                "<h2>Over several tasks</h2>",
                "-1,600 and 0 in Pendulum-v1",
                "In Reacher-v5, the two are the mean of the untrained",
            ],
        ),
    ],
)
def test_a_report_of_few_runs_says_so(tmp_path: Path, runs: list[tuple[str, str]], said: list[str]) -> None:
    for algo, env_id in runs:
        folder = RunFolder.create(tmp_path, spec(algo=algo, env_id=env_id))
        folder.write_evaluations([Evaluation(0, 1, 1, [1.0, 2.0]), Evaluation(100, 2, 2, [3.0, 4.0])])
        folder.record_start(arguments={})
        folder.set_status(state="finished", step=100)
    report.write(tmp_path, tmp_path / "report")
    page = html.unescape((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
    assert [sentence for sentence in said if sentence not in page] == []
    assert ("<h2>Over several tasks</h2>" in page) == ("Interquartile means are over" in page) == ("profile" in page)
    assert "<ul></ul>" not in page and "<p></p>" not in page


def test_a_report_of_partial_results(tmp_path: Path) -> None:
    """RFM and SAC on two tasks, QNE on one of them; runs that go on, that failed, and that have not begun."""
    finals = {
        ("dm_control/walker-run-v0", "rfm", 0): 400.0,
        ("dm_control/walker-run-v0", "rfm", 1): 500.0,
        ("dm_control/walker-run-v0", "sac", 0): 420.0,
        ("dm_control/walker-run-v0", "qne", 0): 430.0,
        ("dm_control/fish-swim-v0", "rfm", 0): 100.0,
        ("dm_control/fish-swim-v0", "sac", 0): 200.0,
    }

    def learn(algo: str, env_id: str, seed: int, returns: list[float], state: str) -> None:
        folder = RunFolder.create(tmp_path, spec(algo=algo, env_id=env_id, seed=seed))
        folder.record_start(arguments={})
        evaluations = [Evaluation(50 * i, 1.0 + i, 1.0 + i, [value, value]) for i, value in enumerate(returns)]
        folder.write_evaluations(evaluations)
        folder.set_status(state=state, step=evaluations[-1].step)

    def page_and_table() -> tuple[str, list[str]]:
        report.write(tmp_path, tmp_path / "report")
        page = html.unescape((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
        return page, (tmp_path / "report" / "final_returns.md").read_text(encoding="utf-8").splitlines()

    RunFolder.create(tmp_path, spec(algo="qne", env_id="dm_control/fish-swim-v0"))
    for (env_id, algo, seed), final in finals.items():
        learn(algo, env_id, seed, [0.0, final / 2], "running")
    page, table = page_and_table()
    assert "No run is finished: these are the results at step 50." in page and "qne seed 0 (0 steps)" in page
    assert "| fish-swim | 50 |  | 100 |" in table and "After 50 environment steps." in table[-1]

    for (env_id, algo, seed), final in finals.items():
        learn(algo, env_id, seed, [0.0, final / 2, final], "finished")
    learn("sac", "dm_control/fish-swim-v0", 1, [0.0, 1.0], "failed")
    page, table = page_and_table()
    assert table[:6] == [
        "|  | rfm | qne | sac |",
        "| --- | --- | --- | --- |",
        "| fish-swim | 100 |  | 200 |",
        "| walker-run | 450 (400, 500) | 430 | 420 |",
        "| interquartile mean of scores, 2 tasks | 0.250 |  | 0.310 |",
        "",
    ]
    few = (
        "Some results rest on one seed (fish-swim rfm, fish-swim sac, walker-run qne, walker-run sac) and have no interval, "
        "nor have interquartile means over them; the others on as few as 2, which makes bootstrap intervals too narrow."
    )
    assert few in page and few in table[-1] and "As few as" not in page
    better = (tmp_path / "report" / "improvement.md").read_text(encoding="utf-8")
    assert "| rfm |  | 0.50 (1 task) | 0.25 (2 tasks) |" in better and "ties count half" in better
    assert "No bar for qne, sac: one seed in some task allows no interval." in page
    assert "No band for rfm, sac: one seed in some task allows no interval." in page
    assert "2 runs left out, unfinished: fish-swim qne seed 0 (0 steps), fish-swim sac seed 1 (failed, 50 steps)." in page
    assert "A failed run counts in no number, so that its algorithm may look better than it is." in page
    assert "What is over several tasks compares rfm, sac over all tasks. --algos" in page
    for sentence in ("rfm ends below qne in none of 1 task.", "rfm ends below sac in 1 of 2 tasks: fish-swim."):
        assert sentence in page and sentence in table[-1]
    assert page.count("<img") == 2 + 3


def add_run(
    root: Path, algo: str, returns: dict[int, float], seed: int = 0, env_id: str = "dm_control/walker-run-v0", **config: object
) -> None:
    """A finished run with a return at each of these steps."""
    folder = RunFolder.create(root, spec(algo=algo, env_id=env_id, seed=seed, steps=max(returns)))
    folder.write_evaluations([Evaluation(step, step, step, [value]) for step, value in returns.items()])
    folder.record_start(**({"arguments": {}} | config))
    folder.set_status(state="finished", step=max(returns))


def write_report(root: Path) -> str:
    """Text of the page and of the table of final returns."""
    report.write(root, root / "report")
    page = html.unescape((root / "report" / "report.html").read_text(encoding="utf-8"))
    return page + (root / "report" / "final_returns.md").read_text(encoding="utf-8")


def test_results_in_two_folders_are_no_two_runs(tmp_path: Path) -> None:
    for machine in ("here", "there"):
        add_run(tmp_path / machine, "rfm", {0: 0.0, 100: 10.0})
    with pytest.raises(ValueError, match=r"here/.*seed-0 and .*there/.*seed-0 both hold rfm on .* with seed 0"):
        Results.load(tmp_path)


def test_a_report_compares_runs_at_the_same_step(tmp_path: Path) -> None:
    add_run(tmp_path, "rfm", {0: 0.0, 100: 400.0, 250: 900.0})
    add_run(tmp_path, "rfm", {0: 0.0, 100: 500.0}, seed=1)
    add_run(tmp_path, "sac", {0: 0.0, 100: 600.0})
    add_run(tmp_path, "sac", {0: 0.0, 100: 1.0, 250: 2.0}, env_id="dm_control/fish-swim-v0")
    text = write_report(tmp_path)
    assert "| walker-run | 450 (400, 500) | 600 |" in text and "| fish-swim |  | 2.0 |" in text
    assert "evaluated at: walker-run at 100 (rfm 100 / 250, sac 100)." in text


def test_results_in_common_are_at_a_step_that_all_runs_were_evaluated_at(tmp_path: Path) -> None:
    add_run(tmp_path, "rfm", {0: 0.0, 20: 1.0, 40: 2.0, 60: 3.0, 80: 4.0})
    add_run(tmp_path, "sac", {0: 0.0, 30: 1.0, 60: 2.0, 90: 3.0})
    results = Results.load(tmp_path)
    assert results.common_step == 60 and results.at(60).algos == results.at(None).algos == ["rfm", "sac"]
    assert results.at(None).final("dm_control/walker-run-v0", "rfm") == [3.0]


def test_commits_are_counted_one_by_one(tmp_path: Path) -> None:
    """A run that went on with other code has two."""
    for seed in range(3):
        add_run(tmp_path, "rfm", {0: 0.0, 100: 1.0}, seed=seed)
    for folder, commits in zip(find_runs(tmp_path), (["a"], ["a", "b"], ["b"]), strict=True):
        starts = [{"at": "2026-01-01T00:00:00+00:00", "commit": commit} for commit in commits]
        write_text(folder.path / "config.json", json.dumps(folder.config | {"starts": starts}))
    assert "The runs of rfm were made at 2 commits." in write_report(tmp_path)


def test_code_that_is_not_known_is_told(tmp_path: Path) -> None:
    for seed, commits in enumerate(([None, "a"], ["a"])):
        add_run(tmp_path, "rfm", {0: 0.0, 100: 1.0}, seed=seed)
        folder = RunFolder(tmp_path / spec(env_id="dm_control/walker-run-v0", seed=seed).name)
        write_text(folder.path / "config.json", json.dumps(folder.config | {"starts": [{"commit": c} for c in commits]}))
    assert "1 run of rfm began with code whose commit was not recorded." in write_report(tmp_path)
    assert list(Results.load(tmp_path).runs["commit"]) == ["unknown a", "a"]


def test_defaults_that_changed_are_told(tmp_path: Path) -> None:
    """Both runs were asked for with no argument at all."""
    for seed, coefficient in enumerate(("scalar", "optimal")):
        add_run(tmp_path, "rfm", {0: 0.0, 100: 1.0}, seed=seed)
        folder = RunFolder(tmp_path / spec(env_id="dm_control/walker-run-v0", seed=seed).name)
        write_text(
            folder.path / "config.json", json.dumps(folder.config | {"settings": {"coefficient": coefficient, "tau": 0.005}})
        )
    text = html.unescape(write_report(tmp_path))
    assert "The runs of rfm were made with 2 settings" in text
    assert 'rfm: its defaults, with {"coefficient": "scalar"} (1 run)' in text and "tau" not in text


def test_defaults_are_recorded(tmp_path: Path) -> None:
    for algo in ("rfm", "sac"):
        folder = RunFolder.create(tmp_path, spec(algo=algo, arguments={"learning_starts": 60}))
        run(folder.path)
        settings, (start,) = folder.config["settings"], folder.config["starts"]
        assert (settings["learning_starts"], settings["tau"], start["threads"]) == (60, 0.005, 1)
    assert folder.config["settings"]["ent_coef"] == "auto"
    settings = RunFolder(tmp_path / spec().name).config["settings"]
    assert (settings["coefficient"], settings["temperature"]) == ("optimal", "auto_0.05")


def test_runs_without_a_common_end_are_not_compared(tmp_path: Path) -> None:
    add_run(tmp_path, "rfm", {0: 0.0, 100: 1.0})
    add_run(tmp_path, "sac", {0: 0.0, 150: 1.0})
    with pytest.raises(ValueError, match=r"walker-run.*never evaluated at the same step"):
        Results.load(tmp_path).at(None)


def test_half_a_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.csv").write_text("env_id,algo,seed\n")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "but no evaluations.csv" in capsys.readouterr().err


def test_nothing_is_recorded_beyond_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    """Where updates come once an episode, which of Pendulum has 200 steps."""
    folder = RunFolder.create(tmp_path, spec(algo="sac", arguments={"train_freq": [1, "episode"], "learning_starts": 300}))
    run(folder.path)
    assert folder.finished and [e.step for e in folder.read_evaluations()] == [0, 50, 100]


def test_a_report_names_settings_and_commits_of_one_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, arguments in enumerate(({"tau": 0.01}, {"tau": 0.02}, {"tau": 0.02})):
        versions = {"versions": {"sb3_rfm": f"0.{seed}"}, "commit": f"c{min(seed, 1)}", "machine": {}}
        monkeypatch.setattr("sb3_rfm.benchmark.records.provenance", lambda versions=versions: versions)
        add_run(tmp_path, "rfm", {0: 0.0, 100: 1.0}, seed=seed, arguments=arguments)
        add_run(tmp_path, "sac", {0: 0.0, 100: 1.0}, seed=seed) if seed else None
    text = write_report(tmp_path)
    assert "The runs of rfm were made with 2 settings, with 3 versions of sb3_rfm, at 2 commits." in text
    assert "The runs of sac were made with 2 versions of sb3_rfm." in text
    assert 'rfm: {"tau": 0.01} (1 run)' in text and 'rfm: {"tau": 0.02} (2 runs)' in text and "sac: its defaults<" in text


def test_results_that_diverged_are_reported_as_such(tmp_path: Path) -> None:
    for seed, last in enumerate((400.0, 500.0, float("nan"))):
        add_run(tmp_path, "rfm", {0: 0.0, 50: 100.0, 100: last}, seed=seed)
    add_run(tmp_path, "sac", {0: 0.0, 50: float("inf"), 100: 300.0})
    add_run(tmp_path, "td3", {0: 0.0, 50: 100.0, 100: float("nan")})
    text = write_report(tmp_path)
    assert "| walker-run | 450 (400, 500, diverged) | 300 | diverged |" in text
    assert "2 runs diverged, with a return that is not finite: walker-run rfm seed 2, walker-run td3 seed 0." in text
    for results in (Results.load(tmp_path).at(None), Results.load(tmp_path / "report").at(None)):
        assert results.scores("rfm", results.tasks)[0] == pytest.approx([0.4, 0.5, 0.0])


def test_scores_are_given_where_somebody_beats_the_untrained_policy(tmp_path: Path) -> None:
    for algo, final in (("rfm", 5.0), ("sac", 4.0)):
        add_run(tmp_path, algo, {0: 10.0, 100: final}, env_id="Some-v0")
        add_run(tmp_path, algo, {0: 0.0, 100: 100 * final})
        add_run(tmp_path, algo, {0: 0.0, 100: 100 * final}, env_id="dm_control/walker-walk-v0")
    results = Results.load(tmp_path).at(None)
    assert results.comparisons() == [(["rfm", "sac"], ["dm_control/walker-run-v0", "dm_control/walker-walk-v0"])]
    text = write_report(tmp_path)
    assert "No algorithm ends above the untrained policies in Some, which" in text
    assert "rfm ends below sac in none of 3 tasks." in text
    assert "| interquartile mean of scores, 2 tasks | 0.500 | 0.400 |" in text
    assert statistics.probability_of_improvement(*(results.scores(algo, ["Some-v0"]) for algo in ("rfm", "sac"))).value == 1.0


def test_a_report_does_not_take_the_place_of_its_results(tmp_path: Path) -> None:
    add_run(tmp_path, "rfm", {0: 0.0, 100: 1.0})
    with pytest.raises(ValueError, match="A report has a folder of its own"):
        report.write(tmp_path, tmp_path / "." / "report" / "..")
    assert not (tmp_path / "runs.csv").exists()


def test_a_report_hides_no_runs(tmp_path: Path) -> None:
    for machine, algo in (("here", "rfm"), ("there", "sac")):
        add_run(tmp_path / machine, algo, {0: 0.0, 100: 1.0})
    with pytest.raises(
        ValueError, match=r"would hide the runs there, such as .*here/.*seed-0\. By default, it is .*here/report"
    ):
        report.write(tmp_path / "here", tmp_path)
    assert not (tmp_path / "runs.csv").exists()
    Results.load(tmp_path / "here").save(tmp_path)
    with pytest.raises(ValueError, match=r"has a runs\.csv, as reports have, and folders of runs, such as .*here/.*seed-0"):
        Results.load(tmp_path)


def test_one_algorithm_has_interquartile_means_and_nothing_to_lose(tmp_path: Path) -> None:
    for env_id in ("dm_control/walker-run-v0", "dm_control/walker-walk-v0"):
        for seed in range(2):
            add_run(tmp_path, "rfm", {0: 0.0, 100: 400.0 + 100 * seed}, seed, env_id=env_id)
    text = write_report(tmp_path)
    assert "| interquartile mean of scores, 2 tasks | 0.450 [0.400, 0.500] |" in text
    assert "rest on few runs" in text and "<h2>Over several tasks</h2>" in text
    assert text.count("<img") == 4 and "ends below" not in text and "<ul></ul>" not in text and "Pairs" not in text


def test_results_of_one_seed_are_named_beside_those_of_few(tmp_path: Path) -> None:
    for env_id in ("dm_control/walker-run-v0", "dm_control/walker-walk-v0"):
        for algo in ("rfm", "sac"):
            for seed in range(3):
                add_run(tmp_path, algo, {0: 0.0, 100: 400.0}, seed, env_id=env_id)
    add_run(tmp_path, "qne", {0: 0.0, 100: 400.0})
    results = Results.load(tmp_path)
    (sentence,) = few_seeds(results)
    assert sentence.startswith(
        "Some results rest on one seed (walker-run qne) and have no interval; the others on as few as 3, "
    )
    assert few_seeds(results.of(["rfm", "sac"]))[0].startswith("As few as 3 seeds: the bootstrap intervals are too narrow, ")
    assert few_seeds(results.of(["qne"])) == ["Every result rests on one seed, and has no interval."]


def test_a_cell_is_split_only_where_it_is_an_estimate(tmp_path: Path) -> None:
    table = pd.DataFrame({"a": ["1.0 [0.5, 1.5]"]}, index=["b"])
    assert "<td>1.0<small>[0.5, 1.5]</small></td>" in report.html_table(table, estimates=True)
    assert "<td>1.0 [0.5, 1.5]</td>" in report.html_table(table)


def test_rows_of_improvement_name_their_tasks_where_these_differ(tmp_path: Path) -> None:
    for env_id, algos in (("dm_control/walker-run-v0", ["rfm", "dqs", "sac"]), ("dm_control/fish-swim-v0", ["rfm", "sac"])):
        for algo in algos:
            add_run(tmp_path, algo, {0: 0.0, 100: 400.0}, env_id=env_id)

    def rows(*algos: str) -> list[str]:
        figure = figures.improvement(Results.load(tmp_path).of(algos), "rfm")
        return [label.get_text() for label in figure.axes[0].get_yticklabels()]

    assert rows("rfm", "dqs", "sac") == ["sac (2 tasks)", "dqs (1 task)"]
    assert rows("rfm", "sac") == ["sac"]


def test_sample_efficiency_is_drawn_at_the_evaluations(tmp_path: Path) -> None:
    for seed in range(3):
        add_run(tmp_path, "rfm", {0: 0.0, 10: 900.0, 100: 100.0 + seed}, seed)
        add_run(tmp_path, "rfm", {0: 0.0, 20: 900.0, 200: 100.0 + seed}, seed, env_id="dm_control/fish-swim-v0")
    results = Results.load(tmp_path)
    line = figures.sample_efficiency(results, ["rfm"], results.tasks).axes[0].lines[0]
    assert list(line.get_xdata()) == [0.0, 10.0, 100.0]
    assert list(line.get_ydata()) == pytest.approx([0.0, 0.9, 0.101])
    assert report.between(results, ["rfm"], results.tasks) == ""
    add_run(tmp_path, "rfm", {0: 0.0, 50: 500.0, 100: 100.0}, env_id="dm_control/cheetah-run-v0")
    results = Results.load(tmp_path)
    line = figures.sample_efficiency(results, ["rfm"], results.tasks).axes[0].lines[0]
    assert list(line.get_xdata()) == [0.0, 10.0, 50.0, 100.0]
    assert line.get_ydata()[1] == pytest.approx(statistics.interquartile_mean([np.full(3, 0.9)] * 2 + [np.array([0.1])]).value)
    assert "scores are interpolated" in report.between(results, ["rfm"], results.tasks)


def test_a_profile_falls_at_the_scores_of_the_runs(tmp_path: Path) -> None:
    for seed, final in enumerate((123.0, 456.0)):
        add_run(tmp_path, "rfm", {0: 0.0, 100: final}, seed)
    results = Results.load(tmp_path)
    axes = figures.profiles(results, ["rfm"], results.tasks).axes[0]
    (line,) = axes.lines
    assert line.get_drawstyle() == "steps-post"
    assert list(line.get_xdata()) == pytest.approx([0.0, 0.123, 0.456, 1.0])
    assert list(line.get_ydata()) == [1.0, 0.5, 0.0, 0.0]
    corners = axes.collections[0].get_paths()[0].vertices
    assert [0.123, 1.0] in corners.round(6).tolist(), "the band is made of steps too"


def test_scores_of_unknown_tasks_are_between_untrained_and_best(tmp_path: Path) -> None:
    for algo, final in (("rfm", 30.0), ("sac", 20.0)):
        folder = RunFolder.create(tmp_path, spec(algo=algo, env_id="Some-v0"))
        folder.write_evaluations([Evaluation(0, 1, 1, [10.0, 10.0]), Evaluation(100, 2, 2, [final, final])])
        folder.set_status(state="finished", step=100)
    results = Results.load(tmp_path)
    assert results.scores("rfm", ["Some-v0"])[0] == pytest.approx([1.0])
    assert results.scores("sac", ["Some-v0"])[0] == pytest.approx([0.5])


def test_small_returns_are_told_apart(tmp_path: Path) -> None:
    for algo, final in (("rfm", 0.42), ("sac", 0.18)):
        for seed in range(3):
            add_run(tmp_path, algo, {0: 3e-5, 100: final + 0.01 * seed}, seed, env_id="Some-v0")
    page = write_report(tmp_path)
    assert "| Some | 0.43 [0.41, 0.45], n = 3 | 0.19 [0.17, 0.21], n = 3 |" in page
    results = Results.load(tmp_path)
    assert "these are the returns 0.00 and 0.43 in Some." in summary.score_ranges(results)
    assert "In Some, the two are the mean of the untrained policies" in summary.score_ranges(results)
    assert results.score_range("Some-v0")[0] == pytest.approx(3e-5)
    assert results.evaluations["returns"].astype(float).tolist() == pytest.approx(results.evaluations["mean"].tolist())


# Evaluation and runs


def test_evaluation_depends_on_seed_and_step_and_leaves_training_alone() -> None:
    model = RFM("MlpPolicy", "Pendulum-v1", seed=0, buffer_size=100)
    evaluate = Evaluator(spec())
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = evaluate(model, 50)
    assert evaluate(model, 50) == first and evaluate(model, 100) != first
    assert Evaluator(spec(seed=1))(model, 50) != Evaluator(spec())(model, 50)
    assert torch.equal(state[0], torch.get_rng_state())
    assert np.array_equal(state[1], np.random.get_state()[1])  # noqa: NPY002


def test_control_suite_observations_are_flat() -> None:
    pytest.importorskip("shimmy")
    assert make_env("dm_control/walker-walk-v0").observation_space.shape == (24,)


def test_number_as_action_noise(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, spec(algo="qsm:paper"))
    model = build_model(folder, folder.spec, get_setting("qsm:paper", {"buffer_size": 10}))
    assert model.action_noise is not None and model.action_noise().shape == (1,)


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TINY = {"learning_starts": 60, "execution": "eager"}


def worker(folder: RunFolder, checkpoint_every: int = 30) -> subprocess.Popen:
    command = [sys.executable, "-m", "sb3_rfm.benchmark.worker", str(folder.path), "--checkpoint-every", str(checkpoint_every)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def wait_until(condition: object, seconds: float = 1200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("algo", ["rfm", "sac"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path: Path, algo: str) -> None:
    arguments = TINY if algo == "rfm" else {"learning_starts": 60}
    wanted = spec(algo=algo, steps=250, eval_every=50, arguments=arguments)
    whole, broken = RunFolder.create(tmp_path / "a", wanted), RunFolder.create(tmp_path / "b", wanted)
    assert worker(whole).wait() == 0
    for sign, status, checkpoint_every in ((signal.SIGTERM, STOPPED, 10_000), (signal.SIGKILL, -signal.SIGKILL, 30)):
        process, start = worker(broken, checkpoint_every), broken.status["step"]
        wait_until(lambda start=start, process=process: broken.status["step"] >= start + 70 or process.poll() is not None)
        process.send_signal(sign)
        assert process.wait() == status and broken.checkpoint.exists()
    process = worker(broken)
    assert process.wait() == 0 and broken.finished and not broken.checkpoint.exists()
    assert [e.returns for e in broken.read_evaluations()] == [e.returns for e in whole.read_evaluations()]
    assert [e.step for e in whole.read_evaluations()] == [0, 50, 100, 150, 200, 250]
    assert len(broken.config["starts"]) == 3


def test_a_sweep_that_was_stopped_goes_on(tmp_path: Path) -> None:
    algos = ["rfm", "qne", "dqs", "qsm", "sac"]
    command = [sys.executable, "-m", "sb3_rfm.benchmark", "run", "--suite", "Pendulum-v1", "--algos", *algos]
    command += ["--seeds", "1", "--steps", "150", "--eval-every", "50", "--eval-episodes", "2", "--jobs", "2"]
    command += ["--checkpoint-every", "20", "--out", str(tmp_path), "--set", "learning_starts=60"]
    command += [f"{algo}.execution=eager" for algo in algos[:4]]

    def statuses() -> Iterator[dict]:
        return (json.loads(file.read_text()) for file in tmp_path.rglob("status.json"))

    def some_in_the_middle() -> bool:
        states = list(statuses())
        return any(s["state"] == "finished" for s in states) and any(60 < s["step"] < 130 for s in states)

    sweep = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    wait_until(some_in_the_middle)
    sweep.terminate()
    assert sweep.wait() == 130
    assert any(s["state"] == "stopped" for s in statuses()) and not any(s["state"] == "running" for s in statuses())
    finished = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("status.json") if '"finished"' in file.read_text()}
    output = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    assert f"5 runs, {len(finished)} of them finished before" in output
    assert all(file.stat().st_mtime_ns == when for file, when in finished.items()), "finished runs are not done again"
    assert sum(s["state"] == "finished" for s in statuses()) == 5
    assert len(Results.load(tmp_path).at(None).runs) == 5


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN], ids=["terminal", "nohup"])
def test_the_end_of_the_terminal_stops_the_runs(tmp_path: Path, handler: signal.Handlers) -> None:
    """Unless it was asked not to, as by ``nohup``, which the tests themselves may have been started with."""
    command = [sys.executable, "-m", "sb3_rfm.benchmark", "run", "--suite", "Pendulum-v1", "--algos", "rfm", "--seeds", "1"]
    command += ["--steps", "100000", "--eval-episodes", "1", "--out", str(tmp_path), "--set", "execution=eager"]
    sweep = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, handler),
    )
    try:
        folder = RunFolder(tmp_path / "Pendulum-v1" / "rfm" / "seed-0")
        wait_until(lambda: folder.status["step"] > 0)
        sweep.send_signal(signal.SIGHUP)
        if handler == signal.SIG_IGN:
            with pytest.raises(subprocess.TimeoutExpired):
                sweep.wait(timeout=3)
            sweep.terminate()
        _, error = sweep.communicate(timeout=300)
        assert sweep.returncode == 130 and "The same command continues." in error
        assert folder.checkpoint.exists() and not folder.is_busy
    finally:
        sweep.kill()


def test_runs_that_were_asked_for_with_more_steps_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder.create(tmp_path, spec())
    folder.set_status(state="finished", step=100, wall_clock=1.0)
    arguments = ["--eval-every", "50", "--eval-episodes", "2", "--seeds", "1", "--out", str(tmp_path)]
    for steps, told in ((50, True), (100, False)):
        assert main(["run", "--suite", "Pendulum-v1", "--algos", "rfm", "--steps", str(steps), *arguments]) == 0
        assert ("1 of these runs were asked for with 100 steps before" in capsys.readouterr().out) == told


def test_runs_with_more_steps_than_those_of_their_suite_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SUITES, "classic", (Task("Pendulum-v1", 50),))
    folder = RunFolder.create(tmp_path, spec())
    folder.set_status(state="finished", step=100, wall_clock=1.0)
    arguments = ["--eval-every", "50", "--eval-episodes", "2", "--seeds", "1", "--out", str(tmp_path)]
    assert main(["run", "--suite", "classic", "--algos", "rfm", *arguments]) == 0
    assert "1 of these runs were asked for with 100 steps before" in capsys.readouterr().out


def test_a_sweep_survives_kills(tmp_path: Path) -> None:
    script = Path(__file__).parent / "kill_a_sweep.py"
    command = [sys.executable, str(script), "--seeds", "1", "--steps", "200", "--eval-episodes", "1", "--out", str(tmp_path)]
    command += ["--set", "execution=eager", "learning_starts=60"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "-- killed the benchmark" in result.stdout and "evaluations equal to" in result.stdout


class ScriptedEngine:
    """Ends every run at once, with the exit statuses of a script."""

    jobs = slots = 2

    def __init__(self, *script: int) -> None:
        self.script = list(script)
        self.started: list[str] = []

    def start(self, folder: RunFolder) -> "ScriptedEngine":
        self.started.append(folder.spec.name)
        self.folder = folder
        return self

    def poll(self) -> int:
        status = self.script.pop(0)
        if status == 0:
            self.folder.set_status(state="finished", step=100, wall_clock=10.0, last_return=1.0)
        return status

    def request_stop(self) -> None:
        raise AssertionError("nothing runs when the sweep ends")

    wait = request_stop


@pytest.mark.parametrize(
    ("script", "n_started", "n_failed"),
    [((0,), 1, 0), ((-9, STOPPED, 0), 3, 0), ((-9, -9, -9, -9), 4, 1), ((1,), 1, 1), ((BUSY, 0), 2, 0)],
)
def test_what_becomes_of_a_run_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: tuple[int, ...], n_started: int, n_failed: int
) -> None:
    monkeypatch.setattr("sb3_rfm.benchmark.runner.POLL_SECONDS", 0.0)
    monkeypatch.setattr("sb3_rfm.benchmark.runner.BUSY_RETRY_SECONDS", 0.0)
    engine = ScriptedEngine(*script)
    sweep = Sweep([RunFolder.create(tmp_path, spec())], engine, Console(quiet=True))
    assert len(sweep.run()) == n_failed
    assert len(engine.started) == n_started


TRACEBACK = "Traceback (most recent call last):\n  File 'x.py', line 1\n    x()\n"


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (f"{TRACEBACK}ValueError: no [such] thing\ntensor([nan])\n\n", "ValueError: no [such] thing"),
        # The names of Gymnasium's errors do not end in Error; the log goes on from the attempt before; one follows another.
        (
            f"{TRACEBACK}OSError: of the first attempt\na warning\n{TRACEBACK}ModuleNotFoundError: No module named 'Box2D'\n\n"
            f"The above exception was the direct cause of the following exception:\n\n{TRACEBACK}"
            "gymnasium.error.DependencyNotInstalled: Box2D is not installed\n",
            "gymnasium.error.DependencyNotInstalled: Box2D is not installed",
        ),
        ("a warning\nthe last line\n", "the last line"),
        ("", "no output"),
    ],
)
def test_a_failed_run_is_shown_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: str, error: str) -> None:
    monkeypatch.setattr("sb3_rfm.benchmark.runner.POLL_SECONDS", 0.0)
    folder = RunFolder.create(tmp_path, spec())
    (folder.path / "log.txt").write_text(log)
    console = Console(width=80)
    with console.capture() as capture:
        Sweep([folder], ScriptedEngine(1), console).run()
    assert f"failed: {folder.path / 'log.txt'}: {error}\n" in capture.get()


def test_a_killed_run_is_no_riddle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_rfm.benchmark.runner.POLL_SECONDS", 0.0)
    folder = RunFolder.create(tmp_path, spec())
    folder.set_status(state="running", step=50)
    (folder.path / "log.txt").write_text("a warning of a library\n")
    console = Console(width=80)
    with console.capture() as capture:
        Sweep([folder], ScriptedEngine(-9, -9, -9, -9), console).run()
    assert f"failed: {folder.path / 'log.txt'}: killed by SIGKILL, 4 times; for want of memory?\n" in capture.get()
    assert folder.status["state"] == "failed"


@pytest.mark.parametrize(
    ("script", "lines"),
    [
        ((-9, 0), ["killed by SIGKILL after 50 steps, started again", "return 1.0 after 100 steps, 0:00:10"]),
        ((STOPPED, 1), ["stopped after 50 steps, started again", "ended with exit status 1 after 50 steps"]),
        ((-9,) * 4, ["killed by SIGKILL after 50 steps, started again"] * 3 + ["killed by SIGKILL after 50 steps"]),
    ],
)
def test_a_run_that_is_started_again_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: tuple[int, ...], lines: list[str]
) -> None:
    monkeypatch.setattr("sb3_rfm.benchmark.runner.POLL_SECONDS", 0.0)
    folder = RunFolder.create(tmp_path, spec())
    folder.set_status(state="running", step=50)
    console = Console(width=80)
    with console.capture() as capture:
        Sweep([folder], ScriptedEngine(*script), console).run()
    name = "Pendulum-v1  rfm  seed 0: "
    assert [line.removeprefix(name) for line in capture.get().splitlines() if line.startswith(name)] == lines


def test_the_last_runs_that_ended_are_shown_in_that_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_rfm.benchmark.runner.POLL_SECONDS", 0.0)
    folders = [RunFolder.create(tmp_path, spec(seed=seed)) for seed in range(12)]
    folders[5].set_status(state="finished", step=100, wall_clock=10.0, last_return=1.0)

    class Backwards(ScriptedEngine):
        jobs = 12

        def start(self, folder: RunFolder) -> Any:
            self.started.append(folder.spec.name)
            return types.SimpleNamespace(poll=lambda: self.end(folder))

        def end(self, folder: RunFolder) -> int | None:
            """The run that was started last ends first; one of them fails."""
            if self.started[-1] != folder.spec.name:
                return None
            self.started.pop()
            folder.set_status(
                state="finished" if folder.spec.seed != 3 else "failed", step=100, wall_clock=1.0, last_return=1.0
            )
            return int(folder.spec.seed == 3)

    sweep = Sweep(folders, Backwards(), Console(width=120, quiet=True))
    sweep.run()
    assert list(sweep.table().columns[2].cells) == ["8", "7", "6", "4", "3", "2", "1", "0"]


def test_remaining_time_and_table(tmp_path: Path) -> None:
    folders = [RunFolder.create(tmp_path, spec(seed=seed)) for seed in range(3)]
    folders[0].set_status(state="finished", step=100, wall_clock=50.0, last_return=1.0)
    sweep = Sweep(folders, ScriptedEngine(), Console(width=120))
    assert sweep.remaining({}) == pytest.approx(2 * 50.0 / 2)
    with sweep.console.capture() as capture:
        sweep.console.print(sweep.table())
    assert "1 of 3 finished" in capture.get()


def test_remaining_time_of_a_run_that_went_back_to_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path, spec(steps=2000))
    sweep = Sweep([folder], ScriptedEngine(), Console(width=120))
    sweep.running[folder.path] = sweep.engine  # type: ignore[assignment]
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr("sb3_rfm.benchmark.runner.time.monotonic", lambda: next(times))
    for step in (1900, 1000, 1100):  # what the process before left behind, its checkpoint, and 10 seconds later
        folder.set_status(state="running", step=step)
        rates = sweep.rates()
    assert rates == {folder.path: 10.0} and sweep.remaining(rates) == pytest.approx(90.0)


def test_remaining_time_is_not_that_of_random_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 steps per second before learning starts, 10 afterwards, and at the end an evaluation of 200 seconds."""
    folder = RunFolder.create(tmp_path, spec(steps=100_000))
    sweep = Sweep([folder], ScriptedEngine(), Console(width=120))
    sweep.running[folder.path] = sweep.engine  # type: ignore[assignment]
    now = 0.0
    monkeypatch.setattr("sb3_rfm.benchmark.runner.time.monotonic", lambda: now)

    def rate_after(seconds: int, steps_per_second: int) -> float:
        nonlocal now
        for _ in range(seconds // 5):
            now += 5
            folder.set_status(state="running", step=folder.status["step"] + 5 * steps_per_second)
            rates = sweep.rates()
        return rates.get(folder.path, 0.0)

    assert rate_after(10, 1000) == pytest.approx(1000)
    assert rate_after(60, 10) > 50
    assert rate_after(60, 10) == pytest.approx(10)
    assert 0 < rate_after(200, 0) < 10


def test_runs_of_another_process_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_rfm.benchmark.runner.POLL_SECONDS", 0.0)
    monkeypatch.setattr("sb3_rfm.benchmark.runner.BUSY_RETRY_SECONDS", 0.0)
    folder = RunFolder.create(tmp_path, spec())
    folder.set_status(state="running", step=50, last_return=1.0)
    engine = ScriptedEngine()
    sweep = Sweep([folder], engine, Console(width=120))
    with folder.lock:
        sweep._start()
        with sweep.console.capture() as capture:
            sweep.console.print(sweep.table())
        assert "0 running, 1 done by another process" in capture.get() and "50 / 100" in capture.get()
        folder.set_status(state="finished", step=100, wall_clock=10.0)
    with sweep.console.capture() as capture:
        assert sweep.run() == []
    assert engine.started == [] and "1 of 1 finished, 0 running" in capture.get()


@pytest.mark.parametrize(("n_seeds", "low", "high"), [(2, 0.70, 0.85), (5, 0.86, 0.95)])
def test_with_few_seeds_intervals_over_tasks_are_too_narrow(n_seeds: int, low: float, high: float) -> None:
    """What reports say: of intervals that promise 95 %, 70 to 80 % hold the truth with two, and about 90 % with five, where
    returns are normal and spread the same everywhere."""
    rng = np.random.default_rng(0)
    means = np.linspace(0.1, 0.9, 8)[:, None]
    truth = statistics.interquartile_mean(list(rng.normal(means, 0.1, (8, 2000)))).value
    inside = []
    for _ in range(150):
        estimate = statistics.interquartile_mean(list(rng.normal(means, 0.1, (8, n_seeds))))
        inside.append(estimate.low < truth < estimate.high)
    assert low < np.mean(inside) < high


def test_a_cluster_does_a_run_again_whose_worker_was_killed(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from sb3_rfm.benchmark.cluster import RayEngine

    arguments = {"learning_starts": 60}
    folders = [RunFolder.create(tmp_path, spec(algo="sac", seed=seed, steps=250, arguments=arguments)) for seed in range(2)]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        engine = RayEngine(options=["--checkpoint-every", "30"])
        assert engine.slots == 2
        jobs = [engine.start(folder) for folder in folders]
        wait_until(lambda: folders[0].checkpoint.exists())
        os.kill(folders[0].status["pid"], signal.SIGKILL)
        wait_until(lambda: all(job.poll() == 0 for job in jobs))
    finally:
        ray.shutdown()
    assert all(folder.finished for folder in folders)
    assert [len(folder.config["starts"]) for folder in folders] == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "explanation"),
    [
        (["run", "--algos", "ppo"], "Unknown algorithm 'ppo': expected one of"),
        (["run", "--set", "nonsense"], "--set expects argument=value"),
        (["report", "/nonexistent"], "There are no evaluated runs in /nonexistent."),
        (["run", "--jobs", "0"], "argument --jobs: must be a positive integer, got '0'"),
        (["run", "--seeds", "1e5"], "argument --seeds: must be a positive integer, got '1e5'"),
        (["run", "--first-seed", "-1"], "argument --first-seed: must be an integer from 0 on, got '-1'"),
        (["run", "--suite", "classic", "Pendulum-v1"], "Pendulum-v1 is asked for twice, with 10,000 and 100,000 steps"),
        (["run", "--gpus", "0.5"], "--gpus is for --engine ray"),
        (["speed", "--device", "cuda:0", "--quick"], "--device cuda:0: PyTorch sees no GPU here."),
    ],
)
def test_wrong_arguments_are_explained(
    arguments: list[str], explanation: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(arguments)
    assert explanation in capsys.readouterr().err


def test_a_run_that_fails_on_a_cluster_says_why_in_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    monkeypatch.delitem(sys.modules, "sb3_rfm.benchmark.cluster", raising=False)
    cluster = importlib.import_module("sb3_rfm.benchmark.cluster")
    monkeypatch.delitem(sys.modules, "sb3_rfm.benchmark.cluster")  # the next one to ask has the real Ray
    folder = RunFolder.create(tmp_path, spec(algo="sac", arguments={"policy_kwargs": {"bad": 1}}))
    with pytest.raises(TypeError):
        cluster.run(str(folder.path), [])
    assert "unexpected keyword argument 'bad'" in (folder.path / "log.txt").read_text().splitlines()[-1]


def test_a_cluster_without_ray_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "sb3_rfm.benchmark.cluster", raising=False)
    with pytest.raises(SystemExit):
        main(["run", "--suite", "Pendulum-v1", "--engine", "ray", "--out", str(tmp_path / "results")])
    assert "pip install '.[cluster]'" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("env_id", "explanation"),
    [
        ("CartPole-v1", "CartPole-v1 has the actions Discrete(2): expected vectors"),
        ("no_such_module:Some-v0", "no_such_module:Some-v0 cannot be made: No module named 'no_such_module'"),
    ],
)
def test_an_environment_that_cannot_be_learned_in_is_refused_at_once(
    tmp_path: Path, env_id: str, explanation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--suite", "Pendulum-v1", env_id, "--out", str(tmp_path / "results")])
    assert explanation in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--suite", "Pendulum-v1", "--out", "{}/results"],
        ["speed", "--quick", "--cases", "rfm", "--out", "{}/speed"],
        ["report", "{}"],
    ],
)
def test_a_folder_that_cannot_be_is_an_error_at_once(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main([argument.format(tmp_path / "file") for argument in arguments])
    assert str(tmp_path / "file") in capsys.readouterr().err


def documented_runs() -> Iterator[Any]:
    """The arguments of each ``run`` in the documentation."""
    root = Path(__file__).parent.parent
    for file in [root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted((root / "docs/algorithms").glob("*.md"))]:
        text = file.read_text(encoding="utf-8").replace("\\\n", " ")
        for command in re.findall(r"^python -m sb3_rfm\.benchmark (run .*)$", text, re.MULTILINE):
            yield pytest.param(shlex.split(command, comments=True), id=f"{file.name}: {' '.join(command.split())}")


@pytest.mark.parametrize("command", list(documented_runs()))
def test_documented_runs_can_be_repeated(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed folders hold the runs that the command beside them describes, and not others of the same name."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    args = make_parser().parse_args(command)
    specs = planned(args)
    assert specs
    folders = [RunFolder(args.out / each.name) for each in specs]
    for folder, each in zip(folders, specs, strict=True):
        folder.merged_with(each)
    if args.out.is_relative_to("docs"):
        assert any(folder.path.exists() for folder in folders)


# Speed


def test_speed_measures_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "AXES", {"batch": ("batch", [8]), "width": ("network width", [16])})
    arguments = ["--quick", "--execution", "eager", "--cases", "rfm", "--threads", "1", "--out", str(tmp_path)]
    arguments += ["--curves", "batch"]
    assert main(["speed", *arguments]) == 0
    content = json.loads((tmp_path / "speed.json").read_text())
    assert set(content["summary"]) == set(speed.QUANTITIES)
    assert all(value["median"] > 0 for cases in content["summary"].values() for value in cases.values())
    assert content["summary"]["updates"]["sac"]["ratio"] == 1.0
    assert "rfm" in capsys.readouterr().out and (tmp_path / "speed.png").exists()
    points = json.loads((tmp_path / "cost_curves.json").read_text())["points"]
    assert [(point["name"], point["value"]) for point in points] == [("batch", 8)]


def test_unknown_curves_are_refused_before_anything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["speed", "--quick", "--curves", "candidates", "--out", str(tmp_path / "speed")])
    assert "'n_candidates'" in capsys.readouterr().err and not (tmp_path / "speed").exists()


def test_ratios_are_taken_within_rounds() -> None:
    result = speed.Measurements({})
    for factor in (1.0, 10.0, 3.0):  # a machine whose speed drifts
        result.add("updates", "sac", 100 * factor)
        result.add("updates", "rfm", 150 * factor)
    assert result.ratio("updates", "rfm") == pytest.approx(1.5)


def test_operations_are_counted_by_precision() -> None:
    with cost.CountFlops() as counter:
        torch.randn(3, 5) @ torch.randn(5, 7)
        torch.nn.functional.linear(torch.randn(2, 4).bfloat16(), torch.randn(6, 4).bfloat16())
    assert counter.flops == {"float32": 2 * 3 * 5 * 7, "bfloat16": 2 * 2 * 4 * 6}


def test_cost_grows_with_candidates_and_is_drawn_above_its_bound(tmp_path: Path) -> None:
    sizes = Sizes(obs_dim=3, action_dim=2, batch=8, width=32)
    conditions = speed.Conditions(sizes, threads=1, execution="eager", rounds=2, seconds=0.01)
    points = cost.measure(conditions, {"n_candidates": ("K", [4, 64]), "batch": ("B", [8])})
    few, many, _ = points
    assert sum(many.flops.values()) > sum(few.flops.values())
    assert all(min(point.bounds) > 0 and point.ratio > 1 for point in points)
    cost.write(tmp_path, {}, points)
    assert (tmp_path / "cost_curves.png").exists() and (tmp_path / "cost_curves.json").exists()
    assert f"| {many.ratio:.2f} |\n" in (tmp_path / "cost_curves.txt").read_text()


def test_labels_of_one_algorithm_differ_in_their_lines() -> None:
    labels = ["qne", "qne:paper", "sac"]
    assert figures.style("qne", labels)["color"] == figures.style("qne:paper", labels)["color"]
    assert figures.style("qne", labels) != figures.style("qne:paper", labels)
    many = [f"qne:{i}" for i in range(20)]
    assert len({tuple(figures.style(label, many).values()) for label in many}) == 20


def test_legend_of_labels_is_within_the_picture(tmp_path: Path) -> None:
    for i in range(8):
        add_run(tmp_path, f"qne:paper-particles-{i}", {0: 0.0, 100: float(i)})
    figure = figures.learning_curves(Results.load(tmp_path))
    figure.draw_without_rendering()
    legend, picture = figure.legends[0].get_window_extent(), figure.bbox
    assert legend.x0 >= 0 and legend.x1 <= picture.width
    assert figure.axes[0].get_window_extent().height > 0.5 * picture.height


def test_memory_is_that_of_the_sizes_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured in a process of its own, here in this one."""
    sizes, built = Sizes(3, 1, 8, 16), list[Sizes]()

    def build(case: str, sizes: Sizes, *args: Any, **kwargs: Any) -> Any:
        built.append(sizes)
        return types.SimpleNamespace(learn=lambda *args, **kwargs: None)

    def start(command: list[str], **kwargs: Any) -> Any:
        cases.main(command[command.index("sb3_rfm.benchmark.cases") + 1 :])
        return types.SimpleNamespace(stdout="12.5\n")

    monkeypatch.setattr(cases, "build", build)
    monkeypatch.setattr(subprocess, "run", start)
    assert speed.peak_memory("sac", speed.Conditions(threads=1, sizes=sizes)) == 12.5
    assert built == [sizes]
