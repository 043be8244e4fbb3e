"""The pictures of a report, as matplotlib figures."""

from collections.abc import Sequence
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sb3_rfm.benchmark import statistics
from sb3_rfm.benchmark.results import Results
from sb3_rfm.benchmark.statistics import Estimate
from sb3_rfm.benchmark.suites import short

matplotlib.rcParams["svg.hashsalt"] = "sb3_rfm"  # the same picture is the same file

COLORS = {
    "rfm": "#c1272d",
    "qne": "#0072b2",
    "dqs": "#009e73",
    "qsm": "#cc79a7",
    "sac": "#444444",
    "td3": "#e69f00",
    "tqc": "#56b4e9",
    "sbx-sac": "#999999",
}
LINES = ["-", "--", ":", "-."]
MARKERS = ["", "o", "s", "^", "x"]

FEWEST_FOR_BAND = 3
"""Seeds from which on a curve has a band: for two, Student's interval is 12.7 standard errors to each side."""


def style(label: str, labels: Sequence[str]) -> dict[str, str]:
    """Colour of the algorithm, and a dash pattern for its settings; with markers from the fifth on."""
    algo = label.partition(":")[0]
    settings = [other for other in labels if other.partition(":")[0] == algo]
    lap, line = divmod(settings.index(label), len(LINES))
    return {"color": COLORS.get(algo, "#8c564b"), "linestyle": LINES[line], "marker": MARKERS[lap % len(MARKERS)]}


def count(n: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def tidy(axes: Axes) -> None:
    """Leave out what is not information."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)


def annotate(axes: Axes, algos: Sequence[str], x: str, y: str, legend: Literal["best", "lower left"] = "best") -> None:
    """Say what the lines of the algorithms and the axes are."""
    axes.legend(axes.lines, algos, frameon=False, fontsize=8, loc=legend)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    tidy(axes)


def learning_curves(results: Results) -> Figure:
    """Mean return against environment steps with its 95 % interval over seeds, one panel for each task."""
    tasks, algos = results.tasks, results.algos
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    width = max(3.1 * columns, 4.5)
    shown = [algo for algo in algos if any(len(results.curve(task, algo)) for task in tasks)]
    # An entry of the legend: its line with the space around it, and 0.08 inches for each character.
    legend_columns = min(max(int(width / (0.55 + 0.08 * max(map(len, shown), default=1))), 1), 8)
    legend_rows = -(-len(shown) // legend_columns)
    figure = Figure(figsize=(width, 2.5 * rows + 0.3 + 0.2 * legend_rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    handles: dict[str, Line2D] = {}
    for task, panel in zip(tasks, panels, strict=False):
        returns: list[np.ndarray] = []
        for algo in algos:
            curve = results.curve(task, algo)
            if curve.empty:
                continue
            x, estimates = curve.index.to_numpy() / 1000, [statistics.mean(row) for row in curve.to_numpy()]
            if curve.shape[1] < FEWEST_FOR_BAND:
                estimates = [Estimate(estimate.value, np.nan, np.nan) for estimate in estimates]
                panel.plot(x, curve.to_numpy(), **style(algo, algos), markersize=2, linewidth=0.6, alpha=0.7)
            handles[algo] = band(panel, x, estimates, style(algo, algos))
            returns.append(curve.to_numpy().ravel())
        panel.set_title(short(task), fontsize=10)
        panel.set_xlim(left=0)
        finite = [values[np.isfinite(values)] for values in returns]
        if any(map(len, finite)):  # a band may be cut off, a run never is
            low, high = np.min(np.concatenate(finite)), np.max(np.concatenate(finite))
            margin = 0.05 * max(high - low, 1e-9)
            panel.set_ylim(low - margin, high + margin)
        tidy(panel)
    figure.supxlabel("environment steps (thousands)", fontsize=9)
    figure.supylabel("return", fontsize=9)
    lines = [handles[algo] for algo in shown]
    figure.legend(lines, shown, loc="outside upper center", ncols=legend_columns, frameon=False, fontsize=9)
    return figure


def band(axes: Axes, x: np.ndarray, estimates: Sequence[Estimate], line_style: dict[str, str], steps: bool = False) -> Line2D:
    """A line with its interval.

    :param steps: Whether each value holds until the next x, instead of a straight line to it
    """
    values, low, high = (np.array(column) for column in zip(*estimates, strict=True))
    every = max(len(x) // 10, 1)
    (line,) = axes.plot(x, values, linewidth=1.6, markersize=4, markevery=every, **line_style)  # type: ignore[arg-type]
    line.set_drawstyle("steps-post" if steps else "default")
    axes.fill_between(x, low, high, step="post" if steps else None, color=line_style["color"], alpha=0.15, linewidth=0)
    return line


def aggregate(results: Results, algos: Sequence[str], tasks: Sequence[str]) -> Figure:
    """Interquartile mean of the scores of each algorithm over tasks that all of these were run on."""
    estimates = {algo: statistics.interquartile_mean(results.scores(algo, tasks)) for algo in algos}
    figure = intervals(estimates, f"interquartile mean of scores, {count(len(tasks), 'task')}")
    low, high = figure.axes[0].get_xlim()
    # The whole range of scores, in which differences have their size.
    figure.axes[0].set_xlim(min(low, -0.02), max(high, 1.02))
    return figure


def improvement(results: Results, reference: str) -> Figure:
    """Probability that a run of ``reference`` beats a run of each other algorithm, over the tasks of both, with their number
    where it is not the same for all."""
    shared = opponents(results, reference)
    estimates = {
        algo: statistics.probability_of_improvement(results.scores(reference, tasks), results.scores(algo, tasks))
        for algo, tasks in shared.items()
    }
    differ = len({len(tasks) for tasks in shared.values()}) > 1
    names = [f"{algo} ({count(len(tasks), 'task')})" if differ else algo for algo, tasks in shared.items()]
    figure = intervals(estimates, f"probability that {reference} is better", names)
    figure.axes[0].axvline(0.5, color="0.5", linewidth=0.8, linestyle="--")
    figure.axes[0].set_xlim(-0.02, 1.02)
    return figure


def opponents(results: Results, reference: str) -> dict[str, list[str]]:
    """The algorithms that ``reference`` shares tasks with, and these tasks."""
    shared = {algo: results.tasks_of([reference, algo]) for algo in results.algos if algo != reference}
    return {algo: tasks for algo, tasks in shared.items() if tasks}


def intervals(estimates: dict[str, Estimate], label: str, names: Sequence[str] | None = None) -> Figure:
    """One line for each algorithm: its number and the interval of it.

    :param estimates: The numbers, by algorithm
    :param label: What they are
    :param names: Names of the lines; by default those of the algorithms
    """
    figure = Figure(figsize=(5, 0.36 * len(estimates) + 0.9), layout="constrained")
    axes = figure.subplots()
    axes.use_sticky_edges = False
    for i, (algo, (value, low, high)) in enumerate(reversed(estimates.items())):
        color = style(algo, [algo])["color"]
        axes.barh(i, high - low, left=low, height=0.55, color=color, alpha=0.4)
        axes.plot([value, value], [i - 0.28, i + 0.28], color=color, linewidth=2)
    axes.set_yticks(range(len(estimates)), list(reversed(names or list(estimates))))
    axes.set_xlabel(label, fontsize=9)
    tidy(axes)
    return figure


def sample_efficiency(results: Results, algos: Sequence[str], tasks: Sequence[str]) -> Figure:
    """Interquartile mean of the scores against the share of the budget, wherever the algorithm was evaluated in some task."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for algo in algos:
        own = {task: evaluated_shares(results, task, algo) for task in tasks}
        shares = np.unique(np.concatenate(list(own.values())))
        scores = []
        for task in tasks:
            curve = results.curve(task, algo)
            returns = [np.interp(shares, own[task], curve[seed].to_numpy()) for seed in curve.columns]
            scores.append(results.scaled(task, np.array(returns)))  # (seeds, shares)
        estimates = [statistics.interquartile_mean([of_task[:, i] for of_task in scores]) for i in range(len(shares))]
        band(axes, 100 * shares, estimates, style(algo, algos))
    axes.set_xlim(0, 100)
    annotate(axes, algos, "percentage of the steps", "interquartile mean of scores")
    return figure


def evaluated_shares(results: Results, task: str, algo: str) -> np.ndarray:
    """The evaluations of an algorithm in a task, as shares of its steps."""
    steps = results.curve(task, algo).index.to_numpy()
    return steps / max(steps[-1], 1)


def profiles(results: Results, algos: Sequence[str], tasks: Sequence[str]) -> Figure:
    """Share of the runs that exceed a score, against the score: a step function, which falls at the scores of the runs."""
    scores = {algo: results.scores(algo, tasks) for algo in algos}
    highest = max(1.0, *(float(np.max(s)) for values in scores.values() for s in values))
    lowest = min(0.0, *(float(np.min(s)) for values in scores.values() for s in values))
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for algo in algos:
        thresholds = np.unique(np.concatenate([[lowest, highest], *scores[algo]]))
        band(axes, thresholds, statistics.performance_profile(scores[algo], thresholds), style(algo, algos), steps=True)
    axes.set_ylim(0, 1.02)
    annotate(axes, algos, "score τ", "share of runs with score > τ", "lower left")  # every profile begins above
    return figure
