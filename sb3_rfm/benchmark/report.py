"""A results folder as tables, pictures and one page to look at."""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sb3_rfm.benchmark import figures, statistics
from sb3_rfm.benchmark.caveats import caveats, few_seeds, listed, settings_of
from sb3_rfm.benchmark.results import Results
from sb3_rfm.benchmark.statistics import Estimate
from sb3_rfm.benchmark.suites import short
from sb3_rfm.files import write_figure, write_text


def final_table(results: Results) -> pd.DataFrame:
    """Final returns: a row for each task and algorithm, with number of seeds, and mean and 95 % interval of the seeds that
    have not diverged."""
    rows = []
    for task in results.tasks:
        for algo in results.algos:
            final = results.final(task, algo)
            if not len(final):
                continue
            kept = final[np.isfinite(final)]
            estimate = statistics.mean(kept) if len(kept) else Estimate(np.nan, np.nan, np.nan)
            runs = results.runs.query("env_id == @task and algo == @algo")
            rows.append(
                {
                    "env_id": task,
                    "algo": algo,
                    "steps": int(results.curve(task, algo).index[-1]),
                    "seeds": len(final),
                    "diverged": len(final) - len(kept),
                    "mean": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "hours": float(runs["wall_clock"].mean()) / 3600,
                    "training_steps_per_second": float((runs["steps"] / runs["training_seconds"].clip(lower=1e-9)).mean()),
                }
            )
    return pd.DataFrame(rows)


def pivot(results: Results) -> pd.DataFrame:
    """Final returns as text, see :data:`CELLS`: tasks down, algorithms across, and the interquartile means last."""
    rows = {}
    for task in results.tasks:
        finals = {algo: results.final(task, algo) for algo in results.algos}
        digits = decimals(np.concatenate(list(finals.values())))
        rows[short(task)] = {algo: returns_text(final, digits) for algo, final in finals.items()}
    for algos, tasks in results.comparisons():
        rows[f"interquartile mean of scores, {figures.count(len(tasks), 'task')}"] = {
            algo: text(statistics.interquartile_mean(results.scores(algo, tasks)), 3) for algo in algos
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=results.algos).fillna("")


CELLS = (
    "Mean over seeds, with its 95 % interval (Student) and the number n of seeds; for two seeds, the return of each; for one, "
    "that alone. Interquartile means are over all runs of those tasks, each task weighing the same, with stratified bootstrap "
    "intervals."
)
"""What is in the table of final returns."""


def decimals(returns: np.ndarray) -> int:
    """Decimals that tell returns apart, (N,): none where the largest has two digits or more, one for 1 to 9, then more."""
    largest = np.abs(returns[np.isfinite(returns)]).max(initial=0.0)
    return max(0, 1 - math.floor(math.log10(largest))) if largest > 0 else 0


def returns_text(final: np.ndarray, digits: int) -> str:
    """The final returns of an algorithm in a task, (N,), as text with so many decimals."""
    kept = final[np.isfinite(final)]
    if not len(kept):
        return "diverged" if len(final) else ""
    if len(kept) < figures.FEWEST_FOR_BAND:  # an interval would be wider than all returns there can be
        each = f" ({', '.join(return_text(value, digits) for value in final)})" if len(final) > 1 else ""
        return return_text(kept.mean(), digits) + each
    diverged = f", {len(final) - len(kept)} diverged" if len(kept) < len(final) else ""
    return f"{text(statistics.mean(kept), digits)}, n = {len(kept)}{diverged}"


def return_text(value: float, digits: int) -> str:
    """The return of a run as text."""
    return f"{value:.{digits}f}" if np.isfinite(value) else "diverged"


def losses(results: Results) -> list[str]:
    """A sentence for each algorithm that RFM is compared with, on the tasks where it ends with the lower mean."""
    reference, sentences = reference_of(results), []
    for algo in results.algos:
        tasks = [] if algo == reference else results.tasks_of([reference, algo])
        if tasks:
            below = [short(t) for t in tasks if results.mean_return(t, reference) < results.mean_return(t, algo)]
            where = f"{len(below) or 'none'} of {figures.count(len(tasks), 'task')}" + (f": {listed(below)}" if below else "")
            sentences.append(f"{reference} ends below {algo} in {where}.")
    return sentences


def steps_of(results: Results) -> str:
    """The environment steps after which runs ended, in words."""
    return f"{' / '.join(f'{steps:,}' for steps in sorted(results.runs['steps'].unique()))} environment steps"


def reference_of(results: Results) -> str:
    """The algorithm that the others are compared with."""
    return "rfm" if "rfm" in results.algos else results.algos[0]


def improvements(results: Results) -> pd.DataFrame:
    """Probability that the algorithm of a row beats that of a column, over the tasks they share."""

    def cell(x: str, y: str) -> str:
        tasks = results.tasks_of([x, y])
        if x == y or not tasks:
            return ""
        return text(statistics.probability_of_improvement(results.scores(x, tasks), results.scores(y, tasks)), 2)

    rows = {x: {y: cell(x, y) for y in results.algos} for x in results.algos}
    return pd.DataFrame.from_dict(rows, orient="index", columns=results.algos)


def score_ranges(results: Results) -> str:
    """A sentence on what the scores are."""
    tasks: dict[tuple[float, float], list[str]] = {}
    for task in results.scored_tasks:
        tasks.setdefault(results.score_range(task), []).append(short(task))
    ranges = []
    for ends, names in tasks.items():
        low, high = (f"{end:,.{decimals(np.array(ends))}f}" for end in ends)
        ranges.append(f"{low} and {high} in {listed(names)}")
    return f"A score is a return scaled to [0, 1]. Its ends are the returns {'; '.join(ranges)}." if ranges else ""


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
        main, _, rest = html.escape(str(value)).partition(" ")
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
    if any(results.tasks_of([reference, algo]) for algo in results.algos if algo != reference):
        made["improvement"] = (
            figures.improvement(results, reference),
            f"Probability that a run of {reference} ends above a run of another algorithm, averaged over the tasks of both.",
        )
    for algos, tasks in results.comparisons():
        over = figures.count(len(tasks), "task")
        suffix = "" if tasks == results.scored_tasks else f"_{len(tasks)}"
        made[f"aggregate{suffix}"] = (
            figures.aggregate(results, algos, tasks),
            f"Interquartile mean of the final scores on {over} (line) with 95 % stratified bootstrap intervals (bar).",
        )
        made[f"sample_efficiency{suffix}"] = (
            figures.sample_efficiency(results, algos, tasks),
            f"Interquartile mean of the scores on {over} while learning.",
        )
        made[f"profiles{suffix}"] = (
            figures.profiles(results, algos, tasks),
            f"Performance profiles: share of the final scores on {over} above τ, with 95 % stratified bootstrap intervals.",
        )
    return made


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
    :raises ValueError: if there is nothing to report, or if ``out`` is ``root``
    """
    if out.resolve() == root.resolve():
        raise ValueError(
            f"A report has a folder of its own: its tables in {root} would take the place of what it is made from."
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
    notes = " ".join([f"After {steps_of(results)}.", CELLS, *few_seeds(results), *losses(results)])
    write_text(out / "final_returns.md", f"{markdown(table)}\n{notes}\n")
    write_text(out / "improvement.md", markdown(better))
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
    seeds.index += 1
    machines = sorted({describe(run.machine, run.versions) for run in runs.itertuples()})
    figures_of_all = [parts[name] for name in made if name != "learning_curves"]
    comparison = ""
    if len(results.algos) > 1:
        comparison = f"<p>{html.escape(score_ranges(results))}</p>" + f'<div class="pair">{"".join(figures_of_all)}</div>'
        comparison += "<p>Probability that a run of the row's algorithm ends above a run of the column's, over the tasks "
        comparison += f"that both were run on:</p>{html_table(better)}"
    template = resources.files("sb3_rfm.benchmark").joinpath("report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=html.escape(title),
        facts=items(facts),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        caveats=f'<ul class="caveats">{items(warnings)}</ul>' if warnings else "",
        learning_curves=parts["learning_curves"],
        cells=html.escape(CELLS),
        final=html_table(table),
        losses=f"<ul>{items(losses(results))}</ul>",
        comparison=comparison or "<p>There is one algorithm, and nothing to compare it with.</p>",
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
