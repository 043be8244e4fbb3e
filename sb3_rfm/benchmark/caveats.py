"""What has to be known to read the numbers of a report."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

from sb3_rfm.benchmark.figures import count
from sb3_rfm.benchmark.results import RUN, UNKNOWN, Results
from sb3_rfm.benchmark.suites import short

ENOUGH_SEEDS = 5
"""In a simulation with normal returns of equal spread, bootstrap intervals of 95 % over eight tasks hold the truth in 70 to
80 % of cases with two seeds, in 90 % with five."""


def caveats(everything: Results, results: Results, steps: int | None) -> list[str]:
    """What has to be known to read the numbers: runs that are missing, that diverged or that are not alike; few seeds; tasks
    that not all algorithms have."""
    found = []
    if not (everything.runs["state"] == "finished").any():
        found.append(f"No run is finished: these are the results at step {steps:,}.")
    there = set(results.runs[RUN].itertuples(index=False, name=None))
    missing = [run for run in everything.runs.itertuples() if (run.env_id, run.algo, run.seed) not in there]
    if missing:
        failed = {True: "failed, ", False: ""}
        names = [
            f"{short(run.env_id)} {run.algo} seed {run.seed} ({failed[run.state == 'failed']}{run.steps:,} steps)"
            for run in missing
        ]
        which = "unfinished" if steps is None else f"without an evaluation at step {steps:,}"
        worth = " A failed run counts in no number, so that its algorithm may look better than it is."
        found.append(
            f"{count(len(missing), 'run')} left out, {which}: {join_names(names)}."
            + (worth if any(run.state == "failed" for run in missing) else "")
        )
    found += different_ends(everything, results) if steps is None else []
    diverged = results.runs[results.runs["final_return"].isna()]
    if len(diverged):
        names = [f"{short(run.env_id)} {run.algo} seed {run.seed}" for run in diverged.itertuples()]
        found.append(
            f"{count(len(diverged), 'run')} diverged, with a return that is not finite: {join_names(names)}. "
            "Means are over the other seeds. What is over several tasks counts them as the worst return of any run, "
            "or as a score of 0 where that is less."
        )
    found += mixtures(results)
    unscored = [short(task) for task in results.tasks if task not in results.scored_tasks]
    if unscored and len(results.tasks) > 1:
        found.append(
            f"No algorithm ends above the untrained policies in {join_names(unscored)}, which therefore counts in no "
            "interquartile mean and no profile."
        )
    found += few_seeds(results)
    if results.tasks_of(results.algos) != results.tasks:
        over = [
            f"{', '.join(algos)} over {'all tasks' if tasks == results.tasks else join_names([short(task) for task in tasks])}"
            for algos, tasks in results.comparisons()
        ]
        found.append(
            "Not every algorithm was run on every task. "
            + (
                f"What is over several tasks compares {'; '.join(over)}."
                if over
                else "Too few tasks are shared for interquartile means."
            )
            + " --algos compares others."
        )
    return found


def few_seeds(results: Results) -> list[str]:
    """A sentence on results that rest on one seed, and on bootstrap intervals that rest on few, if there are any."""
    finals = {f"{short(task)} {algo}": results.final(task, algo) for task in results.tasks for algo in results.algos}
    seeds = {name: len(final) for name, final in finals.items() if len(final)}
    single = [name for name, n in seeds.items() if n == 1]
    if len(single) == len(seeds):
        return ["Every result rests on one seed, and has no interval."]
    over_tasks = results.comparisons()
    bootstrapped = over_tasks or any(results.tasks_of(pair) for pair in combinations(results.algos, 2))
    fewest = min(n for n in seeds.values() if n > 1)
    narrow = bootstrapped and fewest < ENOUGH_SEEDS
    sentences = []
    if single:
        averaged = {f"{short(task)} {algo}" for algos, tasks in over_tasks for task in tasks for algo in algos}
        means = ", nor have interquartile means over them" if averaged.intersection(single) else ""
        others = f"; the others on as few as {fewest}, which makes bootstrap intervals too narrow" if narrow else ""
        sentences.append(f"Some results rest on one seed ({join_names(single)}) and have no interval{means}{others}.")
    elif narrow:
        means = ", the interquartile means rest on few runs" if over_tasks else ""
        sentences.append(f"As few as {fewest} seeds: the bootstrap intervals are too narrow{means}.")
    if narrow:
        sentences.append("The returns in each task, with their spread, say best how much is known.")
    return [" ".join(sentences)] if sentences else []


def different_ends(everything: Results, results: Results) -> list[str]:
    """A sentence on the tasks whose runs did not all end at the same step, if there are any."""
    runs = results.runs.merge(everything.runs[[*RUN, "steps"]], on=RUN, suffixes=("", "_at_the_end"))
    differing = []
    for task, of_task in runs.groupby("env_id", sort=False):
        if (of_task["steps"] < of_task["steps_at_the_end"]).any():
            ends = [
                f"{algo} {' / '.join(f'{steps:,}' for steps in sorted(set(last)))}"
                for algo, last in of_task.groupby("algo", sort=False)["steps_at_the_end"]
            ]
            differing.append(f"{short(task)} at {of_task['steps'].iloc[0]:,} ({', '.join(ends)})")
    if not differing:
        return []
    return [
        "Runs ended at different steps. They are drawn up to, and compared at, the last step that all runs of a task were "
        f"evaluated at: {'; '.join(differing)}."
    ]


def mixtures(results: Results) -> list[str]:
    """Sentences for algorithms whose runs were not all made with the same arguments and the same code, or with code that is
    not known."""
    sentences = []
    versions = results.runs["versions"].map(lambda versions: json.loads(versions).get("sb3_rfm"))
    commits = results.runs["commit"].fillna(UNKNOWN).str.split()
    for algo in results.algos:
        runs = results.runs[results.runs["algo"] == algo]
        of_algo = commits[runs.index]
        known = {commit for all_of_run in of_algo for commit in all_of_run} - {UNKNOWN}
        numbers = {
            "with {} settings": len(settings_of(results, algo)),
            "with {} versions of sb3_rfm": versions[runs.index].nunique(),
            "at {} commits": len(known),
        }
        if several := [how.format(n) for how, n in numbers.items() if n > 1]:
            sentences.append(f"The runs of {algo} were made {', '.join(several)}.")
        if uncommitted := sum(any(commit.endswith("+changes") for commit in all_of_run) for all_of_run in of_algo):
            sentences.append(f"{count(uncommitted, 'run')} of {algo} had changes to the code that are in no commit.")
        if known and (unrecorded := sum(UNKNOWN in all_of_run for all_of_run in of_algo)):
            sentences.append(f"{count(unrecorded, 'run')} of {algo} began with code whose commit was not recorded.")
    return sentences


def settings_of(results: Results, algo: str) -> list[str]:
    """A line for each setting that an algorithm was run with: what was asked for, and the defaults that are not those of all
    its runs."""
    runs = results.runs[results.runs["algo"] == algo]
    defaults = [json.loads(settings) for settings in runs["settings"]]
    known = [values for values in defaults if values]
    differing = sorted({key for values in known for key in values if any(v.get(key) != values[key] for v in known)})
    lines = []
    for arguments, values in zip(runs["arguments"], defaults, strict=True):
        asked = "its defaults" if arguments == "{}" else arguments
        own = {key: values[key] for key in differing if key in values and key not in json.loads(arguments)}
        lines.append(f"{algo}: {asked}" + (f", with {json.dumps(own)}" if own else ""))
    settings = Counter(lines)
    return [line + (f" ({count(n, 'run')})" if len(settings) > 1 else "") for line, n in settings.items()]


def join_names(names: Sequence[str], most: int = 8) -> str:
    """Names in a sentence, the first few of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
