"""What a report says of results: tables of text, and the sentences that explain them."""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from sb3_rfm.benchmark import statistics
from sb3_rfm.benchmark.caveats import join_names
from sb3_rfm.benchmark.figures import FEWEST_FOR_BAND, count
from sb3_rfm.benchmark.results import Results, known_score_range
from sb3_rfm.benchmark.statistics import Estimate
from sb3_rfm.benchmark.suites import short


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
        rows[f"interquartile mean of scores, {count(len(tasks), 'task')}"] = {
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
    if len(kept) < FEWEST_FOR_BAND:  # an interval would be wider than all returns there can be
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
            where = f"{len(below) or 'none'} of {count(len(tasks), 'task')}{which}"
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
        return estimate_text(estimate, 2) + (f" ({count(len(tasks), 'task')})" if differ else "")

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
    return f"the {count(max(numbers), 'task')} of both" if len(numbers) == 1 else "the tasks of both"


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


def one_seed(results: Results, algos: Sequence[str], tasks: Sequence[str]) -> bool:
    """Whether one of the algorithms has one seed only in one of the tasks, so that there is no bootstrap interval."""
    return any(len(results.final(task, algo)) == 1 for task in tasks for algo in algos)
