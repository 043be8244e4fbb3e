"""How well the posterior-mean estimator does: errors, ablation and K-equivalence, as tables and figures.

.. code-block:: bash

    python -m sb3_rfm.benchmark.estimator                                                   # writes docs/results/estimator/
    python -m sb3_rfm.benchmark.estimator --densities --critic ENV --output FOLDER          # on the critic of a trained agent
    python -m sb3_rfm.benchmark.estimator --critic ENV --output FOLDER --clock              # then times it, on a quiet machine
    python -m sb3_rfm.benchmark.estimator --critic ENV --output FOLDER --rounding           # what bfloat16 does to it
    python -m sb3_rfm.benchmark.estimator --critic ENV --output FOLDER --regression         # what a flow learns from it
    python -m sb3_rfm.benchmark.estimator --densities crescents --update         # measures one density again
    python -m sb3_rfm.benchmark.estimator --rows 32 --candidates 16 32 --densities crescents --output runs/estimator

The targets are in :mod:`sb3_rfm.benchmark.densities`, the measurements in :mod:`sb3_rfm.benchmark.estimator_errors` and
:mod:`sb3_rfm.benchmark.estimator_in_use`.
"""

import argparse
import csv
import math
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sb3_rfm.benchmark.densities import Density, densities, trained_critics, trained_model
from sb3_rfm.benchmark.estimator_errors import KINDS, LINE, NEGLIGIBLE, PLAIN, equivalent, measure
from sb3_rfm.benchmark.estimator_in_use import race, regression, rounding
from sb3_rfm.benchmark.tables import Row, save, write_csv
from sb3_rfm.execution import keep_freed_memory
from sb3_rfm.files import write_figure, write_text

TIMES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)
CANDIDATES = (8, 16, 32, 128, 500)


def summarise(rows: list[Row]) -> str:
    """Worst ratio and mean gain of each rule, as Markdown tables, and the cells whose ratio is above the line."""
    rows = [row for row in rows if not math.isnan(row["ratio"])]
    lines = []
    for kind in KINDS:
        chosen = [row for row in rows if row["candidates"] == kind]
        if not chosen:
            continue
        counts = sorted({row["K"] for row in chosen})
        lines += [f"Candidates: {kind}\n", "| rule | " + " | ".join(f"worst ratio, K = {k}" for k in counts)]
        lines[-1] += f" | cells above {LINE} | error over noise (0) | over the better of both |"
        lines.append("|---" * (len(counts) + 4) + "|")
        noise = {(r["density"], r["t"], r["K"]): floored(r) for r in chosen if r["rule"] == "noise (0)"}
        for rule in dict.fromkeys(row["rule"] for row in chosen):
            own = [row for row in chosen if row["rule"] == rule]
            worst = [max(row["ratio"] for row in own if row["K"] == k) for k in counts]
            above = sum(row["ratio"] > LINE for row in own)
            gain = math.exp(sum(math.log(floored(r) / noise[r["density"], r["t"], r["K"]]) for r in own) / len(own))
            both = math.exp(sum(math.log(row["ratio"]) for row in own) / len(own))
            numbers = " | ".join(f"{w:.3g}" for w in worst)
            lines.append(f"| {rule} | {numbers} | {above} of {len(own)} | {gain:.3g} | {both:.3g} |")
        lines.append("")
    lines += ["The five cells in which `optimal` does worst, with one standard error:\n"]
    lines += ["| density | candidates | t | K | points | ratio |", "|---" * 6 + "|"]
    for row in sorted((row for row in rows if row["rule"] == "optimal"), key=lambda row: -row["ratio"])[:5]:
        cell = " | ".join(str(row[key]) for key in ("density", "candidates", "t", "K", "rows"))
        lines.append(f"| {cell} | {row['ratio']:.3f} ± {row['ratio error']:.3f} |")
    return "\n".join(lines) + "\n"


def floored(row: Row) -> float:
    """Mean squared error, or the least that counts."""
    return float(max(row["mse"], NEGLIGIBLE * row["mean squared velocity"]))


def summarise_equivalents(rows: list[Row]) -> str:
    """Plain samples that K = 32 is worth, as a Markdown table over t."""
    times = sorted({row["t"] for row in rows})
    lines = ["| density | candidates | " + " | ".join(f"t = {t:g}" for t in times) + " |", "|---" * (len(times) + 2) + "|"]
    table = {(row["density"], row["candidates"], row["t"]): row["plain samples"] for row in rows}
    for density, kind in dict.fromkeys((row["density"], row["candidates"]) for row in rows):
        cells = [table[density, kind, t] for t in times]
        shown = (f"> {PLAIN[-1]}" if math.isinf(c) else f"< {PLAIN[0]}" if c <= PLAIN[0] else f"{c:.0f}" for c in cells)
        lines.append(f"| {density} | {kind} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def plot_errors(file: Path, rows: list[Row], n: int) -> None:
    """Error against t, one panel for each density."""
    import matplotlib

    matplotlib.use("Agg")  # pictures go to files, with or without a display
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["K"] == n and row["candidates"] == "source"]
    names = list(dict.fromkeys(row["density"] for row in rows))
    styles = {
        "noise (0)": ("C0", "-"),
        "gradient (1)": ("C1", "-"),
        "textbook diagonal, clipped": ("0.6", ":"),
        "two halves": ("C2", "--"),
        "optimal": ("k", "-"),
    }
    columns = min(4, len(names))
    height = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(3.1 * columns, 2.7 * height + 0.5), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes.flat, names, strict=False):
        for rule, (colour, line) in styles.items():
            own = sorted(
                (r["t"], r["mse"] / r["mean squared velocity"]) for r in rows if (r["density"], r["rule"]) == (name, rule)
            )
            axis.plot(*zip(*own, strict=True), line, color=colour, label=rule, linewidth=2 if rule == "optimal" else 1.2)
        axis.axhline(NEGLIGIBLE, color="0.8", linewidth=0.8)
        axis.set(yscale="log", title=textwrap.fill(name, 36), ylim=(1e-5, 1e4))
        axis.title.set_fontsize(8)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.supxlabel("t", fontsize=9)
    figure.supylabel(f"relative squared error, K = {n}", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels) if columns > 2 else 3, fontsize=8)
    write_figure(file, figure, dpi=130)
    plt.close(figure)


def summarise_races(rows: list[Row]) -> str:
    """Markdown table of :func:`race`: error gain / time gain."""
    times = sorted({row["t"] for row in rows})
    lines = ["| critic | candidates | K | plain samples in the same time | " + " | ".join(f"t = {t:g}" for t in times) + " |"]
    lines.append("|---" * (len(times) + 4) + "|")
    table = {(row["density"], row["candidates"], row["K"], row["t"]): row for row in rows}
    for density, kind, n in dict.fromkeys((row["density"], row["candidates"], row["K"]) for row in rows):
        cells = [table[density, kind, n, t] for t in times]
        shown = [f"{c['error gain']:.2g} / " + ("∞" if math.isinf(c["time gain"]) else f"{c['time gain']:.2g}") for c in cells]
        affordable = f"{cells[0]['affordable plain samples']:.0f}"
        lines.append(f"| {density} | {kind} | {n} | {affordable} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def summarise_rounding(rows: list[Row]) -> str:
    """Markdown table of :func:`rounding`: the share of the squared error that bfloat16 adds, in percent."""
    times = list(dict.fromkeys(row["t"] for row in rows))
    lines = ["| λ | K | " + " | ".join(f"t = {t:g}" for t in times) + " |", "|---" * (len(times) + 2) + "|"]
    shares = {(row["temperature"], row["K"], row["t"]): row["squared difference"] / row["mse"] for row in rows}
    for temperature, n in dict.fromkeys((row["temperature"], row["K"]) for row in rows):
        cells = [f"{100 * shares[temperature, n, t]:.2g} %" for t in times]
        lines.append(f"| {temperature:.2g} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summarise_regression(rows: list[Row]) -> str:
    """Markdown table of :func:`regression`: squared bias and variance over the squared distance, and the share of the way."""
    times = list(dict.fromkeys(row["t"] for row in rows))
    lines = ["| λ | coefficient | K | " + " | ".join(f"t = {t:g}" for t in times) + " |", "|---" * (len(times) + 3) + "|"]
    table = {(row["temperature"], row["coefficient"], row["K"], row["t"]): row for row in rows}
    for temperature, coefficient, n in dict.fromkeys((row["temperature"], row["coefficient"], row["K"]) for row in rows):
        cells = [table[temperature, coefficient, n, t] for t in times]
        errors = [[cell[key] / cell["squared distance"] for key in ("squared bias", "variance")] for cell in cells]
        shown = [f"{b:.2f}, {v:.2f}, {cell['share of the way']:.2f}" for cell, (b, v) in zip(cells, errors, strict=True)]
        lines.append(f"| {temperature:.2g} | {coefficient} | {n} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def read_csv(file: Path) -> list[Row]:
    """Errors that :func:`~sb3_rfm.benchmark.tables.write_csv` wrote."""
    words, counts = ("density", "candidates", "rule"), ("dim", "K", "rows")
    with file.open(newline="") as stream:
        return [
            {key: value if key in words else int(value) if key in counts else float(value) for key, value in row.items()}
            for row in csv.DictReader(stream)
        ]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, tabulate and plot.

    :param argv: Command-line arguments; those of the process by default
    :return: Errors with their ratios
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--densities", nargs="*", default=list(densities()), choices=list(densities()), metavar="NAME")
    parser.add_argument("--times", nargs="+", type=float, default=TIMES, metavar="T")
    parser.add_argument("--candidates", nargs="+", type=int, default=CANDIDATES, metavar="K")
    parser.add_argument("--rows", type=int, default=256, help="points x_t in each cell; fewer where the truth is expensive")
    parser.add_argument("--critic", metavar="ENV", help="train RFM on this environment and take its critic")
    parser.add_argument("--critic-steps", type=int, default=20_000, help="environment steps of that training")
    parser.add_argument("--critic-states", type=int, default=16, help="replayed states at which its critic is taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/results/estimator"))
    parser.add_argument("--update", action="store_true", help="keep what errors.csv already has of other densities")
    parser.add_argument("--clock", action="store_true", help="race on that critic, with the errors of errors.csv")
    parser.add_argument("--rounding", action="store_true", help="what evaluating that critic in bfloat16 does")
    parser.add_argument("--regression", action="store_true", help="bias and variance of what the flow is regressed on")
    args = parser.parse_args(argv)
    if (args.clock or args.rounding or args.regression) and not args.critic:
        parser.error("--clock, --rounding and --regression need --critic")
    args.output.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()

    if args.clock:
        races = race(trained_model(args.critic, args.critic_steps), read_csv(args.output / "errors.csv"))
        return save(args.output, "race", races, summarise_races)
    if args.rounding:
        return save(args.output, "rounding", rounding(trained_model(args.critic, args.critic_steps)), summarise_rounding)
    if args.regression:
        return save(args.output, "regression", regression(trained_model(args.critic, args.critic_steps)), summarise_regression)

    groups: list[Callable[[], Sequence[Density]]] = [lambda name=name: [densities()[name]()] for name in args.densities]  # type: ignore[misc]
    if args.critic:
        critics = trained_critics(trained_model(args.critic, args.critic_steps), args.critic_states)
        groups += [lambda group=group: group for group in critics]  # type: ignore[misc]
    rows: list[Row] = []
    for make_group in groups:
        began, group = time.perf_counter(), make_group()
        n_rows = min(args.rows, 48) if group[0].expensive else args.rows
        rows += measure(group, args.times, args.candidates, n_rows, args.seed)
        print(f"{group[0].name}: {time.perf_counter() - began:.0f} s", flush=True)
    new = {row["density"] for row in rows}
    if args.update:
        rows = [row for row in read_csv(args.output / "errors.csv") if row["density"] not in new] + rows
    write_csv(args.output / "errors.csv", rows)
    tables = [summarise(rows)]
    write_text(args.output / "rules.txt", tables[0])
    if equivalents := equivalent(rows):
        write_csv(args.output / "equivalence.csv", equivalents)
        tables.append(summarise_equivalents(equivalents))
        write_text(args.output / "equivalence.txt", tables[-1] + "\n")
    print("\n" + "\n".join(tables))
    plot_errors(args.output / "errors.png", rows, 16 if 16 in args.candidates else min(args.candidates))
    return rows


if __name__ == "__main__":
    main()
