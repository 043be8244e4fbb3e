"""A results folder as tables, pictures and one page to look at."""

import base64
import html
import io
import json
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sb3_rfm.benchmark import figures, statistics
from sb3_rfm.benchmark.results import RUN, Results
from sb3_rfm.benchmark.statistics import Estimate


def final_table(results: Results) -> pd.DataFrame:
    """Final returns: a row for each task and algorithm, with mean, 95 % interval and number of seeds."""
    last = results.evaluations.sort_values("step").groupby(RUN).last().reset_index()
    rows = []
    for task in results.tasks:
        for algo in results.algos:
            final = results.final(task, algo)
            if not len(final):
                continue
            estimate = statistics.mean(final)
            ends = last[(last["env_id"] == task) & (last["algo"] == algo)]
            rows.append(
                {
                    "env_id": task,
                    "algo": algo,
                    "steps": int(results.curve(task, algo).index[-1]),
                    "seeds": len(final),
                    "mean": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "hours": float(ends["wall_clock"].mean()) / 3600,
                    "training_steps_per_second": float((ends["step"] / ends["training_seconds"].clip(lower=1e-9)).mean()),
                }
            )
    return pd.DataFrame(rows)


def pivot(results: Results) -> pd.DataFrame:
    """Final returns as text: tasks down, algorithms across, and the aggregate over the tasks they share last."""
    algos = results.algos
    rows = {}
    for task in results.tasks:
        finals = {algo: results.final(task, algo) for algo in algos}
        rows[figures.short(task)] = {
            algo: text(statistics.mean(final), 0) if len(final) else "" for algo, final in finals.items()
        }
    shared = results.tasks_of(algos)
    if len(shared) > 1:
        rows[f"interquartile mean of scores ({len(shared)} tasks)"] = {
            algo: text(statistics.interquartile_mean(results.scores(algo, shared)), 3) for algo in algos
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=algos)


def improvements(results: Results) -> pd.DataFrame:
    """Probability that the algorithm of a row beats that of a column, over the tasks they share."""

    def cell(x: str, y: str) -> str:
        tasks = results.tasks_of([x, y])
        if x == y or not tasks:
            return ""
        return text(statistics.probability_of_improvement(results.scores(x, tasks), results.scores(y, tasks)), 2)

    rows = {x: {y: cell(x, y) for y in results.algos} for x in results.algos}
    return pd.DataFrame.from_dict(rows, orient="index", columns=results.algos)


def text(estimate: Estimate, digits: int) -> str:
    """An estimate with its interval, where it has one."""
    value = f"{estimate.value:.{digits}f}"
    return value if np.isnan(estimate.low) else f"{value} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def markdown(table: pd.DataFrame) -> str:
    """A table of text as Markdown."""
    lines = ["| |" + "|".join(f" {name} " for name in table.columns) + "|", "|---|" + "---|" * len(table.columns)]
    lines += [
        "| " + " | ".join([str(name), *map(str, row)]) + " |" for name, row in zip(table.index, table.to_numpy(), strict=True)
    ]
    return "\n".join(lines) + "\n"


def html_table(table: pd.DataFrame) -> str:
    """A table of text as HTML, the interval below its value."""

    def cell(value: object) -> str:
        main, bracket, interval = html.escape(str(value)).partition(" [")
        return f"<td>{main}" + (f"<small>[{interval}</small>" if bracket else "") + "</td>"

    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in table.columns)
    body = "".join(
        f"<tr><th>{html.escape(str(name))}</th>{''.join(map(cell, row))}</tr>"
        for name, row in zip(table.index, table.to_numpy(), strict=True)
    )
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def embed(figure: Figure, alternative: str) -> str:
    """A figure as an image that is part of the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/svg+xml;base64,{data}">'


def make_figures(results: Results) -> dict[str, tuple[Figure, str]]:
    """The figures of a report with their captions, by file name."""
    algos = results.algos
    reference = "rfm" if "rfm" in algos else algos[0]
    made = {
        "learning_curves": (
            figures.learning_curves(results),
            "Mean return of the deterministic policy; bands are 95 % intervals of the mean over seeds (Student).",
        )
    }
    if len(algos) > 1 and results.tasks_of(algos):
        made["aggregate"] = (
            figures.aggregate(results),
            "Interquartile mean of the final scores (line) with 95 % stratified bootstrap intervals (bar).",
        )
        made["sample_efficiency"] = (figures.sample_efficiency(results), "The same while learning.")
        made["profiles"] = (figures.profiles(results), "Performance profiles: how many runs exceed a score.")
        made["improvement"] = (
            figures.improvement(results, reference),
            f"Probability that a run of {reference} ends above a run of another algorithm, averaged over the tasks of both.",
        )
    return made


def write(root: Path, out: Path, steps: int | None = None, title: str = "Benchmark of sb3_rfm") -> list[Path]:
    """Write the report of a results folder.

    :param root: Results folder, or a folder with ``runs.csv`` and ``evaluations.csv``
    :param out: Where to write
    :param steps: Report the results at this step, of all runs that reached it; by default the finished runs as they ended
    :param title: Heading of the page
    :return: The files
    """
    everything = Results.load(root)
    results = everything.at(steps)
    out.mkdir(parents=True, exist_ok=True)
    everything.save(out)
    final, table, better = final_table(results), pivot(results), improvements(results)
    final.to_csv(out / "final_returns.csv", index=False, float_format="%.6g")
    (out / "final_returns.md").write_text(markdown(table), encoding="utf-8")
    (out / "improvement.md").write_text(markdown(better), encoding="utf-8")
    made = make_figures(results)
    for name, (figure, _) in made.items():
        figure.savefig(out / f"{name}.png", dpi=150)
    page = render(title, everything, results, made, table, better)
    (out / "report.html").write_text(page, encoding="utf-8")
    names = ["runs.csv", "evaluations.csv", "final_returns.csv", "final_returns.md", "improvement.md", "report.html"]
    return [out / name for name in names] + [out / f"{name}.png" for name in made]


def render(
    title: str,
    everything: Results,
    results: Results,
    made: dict[str, tuple[Figure, str]],
    table: pd.DataFrame,
    better: pd.DataFrame,
) -> str:
    """The page."""
    parts = {
        name: f"<figure>{embed(figure, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for name, (figure, caption) in made.items()
    }
    runs = results.runs
    left_out = len(everything.runs) - len(runs)
    n_steps = sorted({int(steps) for steps in results.evaluations.groupby(RUN)["step"].max()})
    facts = [
        f"{len(runs)} runs: {len(results.tasks)} tasks, {len(results.algos)} algorithms, up to "
        f"{runs.groupby(['env_id', 'algo'])['seed'].nunique().max()} seeds",
        f"{' / '.join(f'{n:,}' for n in n_steps)} environment steps",
        f"{'/'.join(map(str, sorted(runs['eval_episodes'].unique())))} episodes per evaluation, deterministic policy",
        f"{runs['wall_clock'].sum() / 3600:.1f} hours of computing",
    ]
    if left_out:
        facts.append(f"{left_out} unfinished runs left out")
    settings = [
        f"{run.algo}: {'its defaults' if run.arguments == '{}' else run.arguments}"
        + (
            ""
            if pd.isna(run.evaluation_particles)
            else f", the best of {run.evaluation_particles:.0f} particles in evaluations"
        )
        for run in runs.drop_duplicates("algo").set_index("algo", drop=False).loc[results.algos].itertuples()
    ]
    seeds = runs.assign(
        task=runs["env_id"].map(figures.short),
        hours=(runs["wall_clock"] / 3600).map("{:.2f}".format),
        final_return=runs["final_return"].map("{:.1f}".format),
        commit=runs["commit"].astype(str).str[:10],
    )[["task", "algo", "seed", "steps", "final_return", "hours", "commit"]]
    seeds.index += 1
    machines = sorted({describe(run.machine, run.versions) for run in runs.itertuples()})
    aggregates = [name for name in made if name != "learning_curves"]
    template = resources.files("sb3_rfm.benchmark").joinpath("report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=html.escape(title),
        facts=items(facts),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        learning_curves=parts["learning_curves"],
        final=html_table(table),
        aggregates="".join(parts[name] for name in aggregates),
        better=html_table(better) if len(results.algos) > 1 else "",
        settings=items(settings),
        runs=html_table(seeds),
        machines=items(machines),
    )


def items(texts: list[str]) -> str:
    """Items of an HTML list."""
    return "".join(f"<li>{html.escape(item)}</li>" for item in texts)


def describe(machine: str, versions: str) -> str:
    """One line about where a run was done."""
    described = ", ".join(str(value) for value in json.loads(machine).values())
    return f"{described}; " + ", ".join(f"{name} {version}" for name, version in json.loads(versions).items())
