"""A results folder as tables, pictures and one page to look at."""

import base64
import html
import io
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sb3_rfm.benchmark import figures
from sb3_rfm.benchmark.caveats import caveats, few_seeds, join_names, settings_of
from sb3_rfm.benchmark.records import find_runs
from sb3_rfm.benchmark.results import Results
from sb3_rfm.benchmark.suites import short
from sb3_rfm.benchmark.summary import (
    cells,
    decimals,
    final_table,
    improvements,
    losses,
    one_seed,
    pairs_note,
    pivot,
    reference_of,
    return_text,
    score_ranges,
    shared_numbers,
    steps_of,
    tasks_of_both,
)
from sb3_rfm.benchmark.tables import markdown
from sb3_rfm.files import write_figure, write_text


def with_names(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of text, with the names of its rows."""
    rows = [[str(name), *map(str, row)] for name, row in zip(table.index, table.to_numpy(), strict=True)]
    return ["", *map(str, table.columns)], rows


def html_table(table: pd.DataFrame, estimates: bool = False) -> str:
    """A table of text as HTML.

    :param table: The table
    :param estimates: Whether its cells are estimates, whose interval comes below the value
    """

    def cell(value: object) -> str:
        text = html.escape(str(value))
        main, _, rest = text.partition(" ") if estimates else (text, "", "")
        return f"<td>{main}" + (f"<small>{rest}</small>" if rest else "") + "</td>"

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
    made = {
        "learning_curves": (
            figures.learning_curves(results),
            "Mean return of the deterministic policy over seeds, with its 95 % interval (Student). With fewer than "
            f"{figures.FEWEST_FOR_BAND} seeds, each is a thin line instead. A line breaks off where a seed diverges.",
        )
    }
    reference = reference_of(results)
    if shared := figures.opponents(results, reference):
        over = tasks_of_both({len(tasks) for tasks in shared.values()})
        without = [algo for algo, tasks in shared.items() if one_seed(results, [reference, algo], tasks)]
        made["improvement"] = (
            figures.improvement(results, reference),
            f"Probability that a run of {reference} ends above a run of another algorithm, averaged over {over} "
            f"(line), with 95 % stratified bootstrap intervals (bar); ties count half.{missing('bar', without)}",
        )
    for algos, tasks in results.comparisons():
        without = [algo for algo in algos if one_seed(results, [algo], tasks)]
        no_band = missing("band", without)
        over = figures.count(len(tasks), "task")
        suffix = "" if tasks == results.scored_tasks else f"_{len(tasks)}"
        made[f"aggregate{suffix}"] = (
            figures.aggregate(results, algos, tasks),
            f"Interquartile mean of the final scores on {over} (line) with 95 % stratified bootstrap intervals (bar)."
            + missing("bar", without),
        )
        made[f"sample_efficiency{suffix}"] = (
            figures.sample_efficiency(results, algos, tasks),
            f"Interquartile mean of the scores on {over} while learning, with 95 % stratified bootstrap intervals of each "
            f"point alone (band).{between(results, algos, tasks)}{no_band}",
        )
        made[f"profiles{suffix}"] = (
            figures.profiles(results, algos, tasks),
            f"Performance profiles: share of the final scores on {over} above τ, with 95 % stratified bootstrap intervals "
            f"(band), which are pointwise: each holds for its τ, not all for the whole profile.{no_band}",
        )
    return made


def missing(what: str, algos: Sequence[str]) -> str:
    """A sentence on the intervals that a figure lacks, if there are any."""
    return f" No {what} for {join_names(algos)}: one seed in some task allows no interval." if algos else ""


def between(results: Results, algos: Sequence[str], tasks: Sequence[str]) -> str:
    """A sentence on scores between evaluations, if some had to be made up."""
    shares = [{tuple(figures.evaluated_shares(results, task, algo)) for task in tasks} for algo in algos]
    if max(map(len, shares)) == 1:
        return ""
    return " Tasks were not all evaluated after the same shares of their steps: between evaluations, scores are interpolated."


def write(
    root: Path,
    out: Path,
    steps: int | None = None,
    algos: Sequence[str] | None = None,
    title: str = "Benchmark of sb3_rfm",
) -> list[Path]:
    """Write the report of a results folder.

    :param root: Results folder, or a folder with ``runs.csv`` and ``evaluations.csv``
    :param out: Where to write
    :param steps: Report the results at this step, of all runs that reached it; by default the finished runs as they ended, or,
        as long as there are none, the last step that all have reached
    :param algos: Algorithms to compare; by default all
    :param title: Heading of the page
    :return: The files
    :raises ValueError: if there is nothing to report, or if ``out`` is ``root`` or holds runs
    """
    if out.resolve() == root.resolve():
        raise ValueError(
            f"A report has a folder of its own: its tables in {root} would take the place of what it is made from."
        )
    if folder := next(find_runs(out), None):
        raise ValueError(
            f"A report has a folder of its own: its tables in {out} would hide the runs there, such as {folder.path}. "
            f"By default, it is {root / 'report'}."
        )
    everything = Results.load(root)
    if algos:
        everything = everything.of(algos)
    if steps is None and not (everything.runs["state"] == "finished").any():
        steps = everything.common_step
    results = everything.at(steps)
    out.mkdir(parents=True, exist_ok=True)
    everything.save(out)
    final, table, better = final_table(results), pivot(results), improvements(results)
    write_text(out / "final_returns.csv", final.to_csv(index=False, float_format="%.6g"))
    notes = " ".join([f"After {steps_of(results)}.", cells(results), *few_seeds(results), *losses(results)])
    write_text(out / "final_returns.md", f"{markdown(*with_names(table))}\n{notes}\n")
    write_text(out / "improvement.md", f"{markdown(*with_names(better))}\n{pairs_note(results)}\n")
    made = make_figures(results)
    for name, (figure, _) in made.items():
        write_figure(out / f"{name}.png", figure)
    page = render(title, caveats(everything, results, steps), results, made, table, better)
    write_text(out / "report.html", page)
    names = ["runs.csv", "evaluations.csv", "final_returns.csv", "final_returns.md", "improvement.md", "report.html"]
    return [out / name for name in names] + [out / f"{name}.png" for name in made]


def render(
    title: str,
    warnings: list[str],
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
    facts = [
        ", ".join(
            figures.count(n, noun)
            for n, noun in (
                (len(runs), "run"),
                (len(results.tasks), "task"),
                (len(results.algos), "algorithm"),
                (runs["seed"].nunique(), "seed"),
            )
        ),
        steps_of(results),
        f"{'/'.join(map(str, sorted(runs['eval_episodes'].unique())))} episodes per evaluation, deterministic policy",
        f"{runs['wall_clock'].sum() / 3600:.1f} hours of computing",
    ]
    seeds = runs.assign(
        task=runs["env_id"].map(short),
        hours=(runs["wall_clock"] / 3600).map("{:.2f}".format),
        final_return=runs["final_return"].map(lambda value: return_text(value, max(1, decimals(np.array([value]))))),
        commit=runs["commit"].fillna("").str.replace(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", regex=True),
    )[["task", "algo", "seed", "steps", "final_return", "hours", "commit"]]
    seeds = seeds.rename(columns={"final_return": "final return", "commit": "commits of its starts"})
    seeds.index += 1
    machines = sorted({describe(run.machine, run.versions) for run in runs.itertuples()})
    over_tasks = [parts[name] for name in made if name not in ("learning_curves", "improvement")]
    comparison = ""
    if over_tasks:
        comparison += f"<h2>Over several tasks</h2><p>{html.escape(score_ranges(results))}</p>"
        comparison += f'<div class="pair">{"".join(over_tasks)}</div>'
    if shared_numbers(results):
        comparison += f"<h2>Pairs of algorithms</h2>{parts.get('improvement', '')}"
        comparison += f"<p>{html.escape(pairs_note(results))}</p>{html_table(better, estimates=True)}"
    if not comparison:
        why = "There is one algorithm, and nothing to compare it with."
        if len(results.algos) > 1:
            why = "No two algorithms have a task in common."
        comparison = f"<h2>Comparison</h2><p>{why}</p>"
    template = resources.files("sb3_rfm.benchmark").joinpath("report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=html.escape(title),
        facts=items(facts),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        caveats=f'<ul class="caveats">{items(warnings)}</ul>' if warnings else "",
        learning_curves=parts["learning_curves"],
        cells=html.escape(cells(results)),
        final=html_table(table, estimates=True),
        losses=f"<ul>{items(sentences)}</ul>" if (sentences := losses(results)) else "",
        comparison=comparison,
        settings=items([line for algo in results.algos for line in settings_of(results, algo)]),
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
