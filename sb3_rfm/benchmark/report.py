"""A results folder as tables, pictures and one page to look at."""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources
from itertools import combinations
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sb3_rfm.benchmark import figures, statistics
from sb3_rfm.benchmark.caveats import caveats, few_seeds, join_names, settings_of
from sb3_rfm.benchmark.records import find_runs
from sb3_rfm.benchmark.results import Results, known_score_range
from sb3_rfm.benchmark.statistics import Estimate
from sb3_rfm.benchmark.suites import short
from sb3_rfm.benchmark.tables import markdown
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
    """Final returns as text, see :func:`cells`: tasks down, algorithms across, and the interquartile means last."""
    rows = {}
    for task in results.tasks:
        finals = {algo: results.final(task, algo) for algo in results.algos}
        digits = decimals(np.concatenate(list(finals.values())))
        rows[short(task)] = {algo: returns_text(final, digits) for algo, final in finals.items()}
    for algos, tasks in results.comparisons():
        rows[f"interquartile mean of scores, {figures.count(len(tasks), 'task')}"] = {
            algo: estimate_text(statistics.interquartile_mean(results.scores(algo, tasks)), 3) for algo in algos
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=results.algos).fillna("")


def cells(results: Results) -> str:
    """What is in the table of final returns."""
    in_tasks = (
        "Mean over seeds, with its 95 % interval (Student) and the number n of seeds; for two seeds, the return of each; for "
        "one, that alone."
    )
    over_tasks = (
        " Interquartile means are over all runs of those tasks, each task weighing the same, with stratified bootstrap "
        "intervals."
    )
    return in_tasks + (over_tasks if results.comparisons() else "")


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
    return f"{estimate_text(statistics.mean(kept), digits)}, n = {len(kept)}{diverged}"


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
            which = f": {join_names(below)}" if below else ""
            where = f"{len(below) or 'none'} of {figures.count(len(tasks), 'task')}{which}"
            sentences.append(f"{reference} ends below {algo} in {where}.")
    return sentences


def steps_of(results: Results) -> str:
    """The environment steps after which runs ended, in words."""
    return f"{' / '.join(f'{steps:,}' for steps in sorted(results.runs['steps'].unique()))} environment steps"


def reference_of(results: Results) -> str:
    """The algorithm that the others are compared with."""
    return "rfm" if "rfm" in results.algos else results.algos[0]


def improvements(results: Results) -> pd.DataFrame:
    """Probability that the algorithm of a row beats that of a column, over the tasks they share, with their number where it is
    not the same for all pairs."""
    differ = len(shared_numbers(results)) > 1

    def cell(x: str, y: str) -> str:
        tasks = results.tasks_of([x, y])
        if x == y or not tasks:
            return ""
        estimate = statistics.probability_of_improvement(results.scores(x, tasks), results.scores(y, tasks))
        return estimate_text(estimate, 2) + (f" ({figures.count(len(tasks), 'task')})" if differ else "")

    rows = {x: {y: cell(x, y) for y in results.algos} for x in results.algos}
    return pd.DataFrame.from_dict(rows, orient="index", columns=results.algos)


def shared_numbers(results: Results) -> set[int]:
    """How many tasks pairs of algorithms share, of those that share any."""
    return {len(results.tasks_of(pair)) for pair in combinations(results.algos, 2)} - {0}


def pairs_note(results: Results) -> str:
    """What is in the table of probabilities of improvement."""
    without = any(one_seed(results, pair, results.tasks_of(pair)) for pair in combinations(results.algos, 2))
    return (
        "Probability that a run of the row's algorithm ends above a run of the column's, averaged over "
        f"{tasks_of_both(shared_numbers(results))}, with its 95 % stratified bootstrap interval; ties count half."
        + (" One seed in some task allows no interval." if without else "")
    )


def tasks_of_both(numbers: set[int]) -> str:
    """What pairs of algorithms are compared on that share so many tasks."""
    return f"the {figures.count(max(numbers), 'task')} of both" if len(numbers) == 1 else "the tasks of both"


def score_ranges(results: Results) -> str:
    """Sentences on what the scores are."""
    tasks: dict[tuple[float, float], list[str]] = {}
    for task in results.scored_tasks:
        tasks.setdefault(results.score_range(task), []).append(short(task))
    ranges = []
    for ends, names in tasks.items():
        low, high = (f"{end:,.{decimals(np.array(ends))}f}" for end in ends)
        ranges.append(f"{low} and {high} in {join_names(names)}")
    if not ranges:
        return ""
    sentence = f"A score is linear in the return, and not cut off at 0 and 1: these are the returns {'; '.join(ranges)}."
    unknown = [short(task) for task in results.scored_tasks if not known_score_range(task)]
    if unknown:
        sentence += (
            f" In {join_names(unknown)}, the two are the mean of the untrained policies and the best final mean of an "
            "algorithm: scores there depend on which algorithms are in the report, and intervals leave the uncertainty of the "
            "two out."
        )
    return sentence


def estimate_text(estimate: Estimate, digits: int) -> str:
    """An estimate with its interval, where it has one."""
    value = f"{estimate.value:.{digits}f}"
    return value if np.isnan(estimate.low) else f"{value} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


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


def one_seed(results: Results, algos: Sequence[str], tasks: Sequence[str]) -> bool:
    """Whether one of the algorithms has one seed only in one of the tasks, so that there is no bootstrap interval."""
    return any(len(results.final(task, algo)) == 1 for task in tasks for algo in algos)


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
