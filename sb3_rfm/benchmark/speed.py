"""How fast the algorithms are: updates, environment steps of ``learn``, predictions, memory.

Every number is measured in several rounds, and every round measures all cases one after the other: a ratio is the median of
the ratios within a round, so that a machine that is slower for a while is slower for all.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import get_device

from sb3_rfm.benchmark.cases import LONG_RUN, Sizes, StopAfter, build
from sb3_rfm.benchmark.figures import COLORS, tidy
from sb3_rfm.benchmark.records import provenance
from sb3_rfm.benchmark.tables import markdown
from sb3_rfm.files import write_figure, write_json, write_text
from sb3_rfm.flow_actor_critic import FlowActorCritic

REFERENCE = "sac"

QUANTITIES = {
    "updates": "updates/s",
    "steps": "learn() steps/s",
    "latency": "one action, ms",
    "throughput": "1024 at once, actions/s",
    "memory": "memory, MB",
}
"""What is measured. One action is the deterministic one; 1024 are sampled, with one particle each. Memory is that of the host,
and measured where the networks are there."""

UPDATES_AT_ONCE = 10
"""Gradient steps of a call of ``train`` whose updates are counted."""


@dataclass(frozen=True)
class Conditions:
    """On what, and for how long.

    :param sizes: Sizes of the problem
    :param threads: Threads and cores
    :param device: Where the networks are
    :param execution: Replaces the default of our algorithms
    :param rounds: Rounds
    :param seconds: Seconds for each number in a round
    :param memory_steps: Environment steps of the runs whose memory is measured
    """

    sizes: Sizes = field(default_factory=Sizes)
    threads: int = 2
    device: str = "auto"
    execution: str | None = None
    rounds: int = 7
    seconds: float = 0.7
    memory_steps: int = 600


@dataclass
class Measurements:
    """Everything that was measured.

    :param setup: Machine, versions, sizes and threads
    :param first_update: Seconds from making the model to the first updates, compilation included, by case
    :param rounds: Numbers by quantity and case, one for each round
    """

    setup: dict[str, Any]
    first_update: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, quantity: str, case: str, value: float) -> None:
        """Add the number of one round."""
        self.rounds.setdefault(quantity, {}).setdefault(case, []).append(value)

    def median(self, quantity: str, case: str) -> float:
        """Median over the rounds."""
        return float(np.median(self.rounds[quantity][case]))

    def ratio(self, quantity: str, case: str) -> float:
        """Median of the ratios to the reference within a round."""
        return float(np.median(np.divide(self.rounds[quantity][case], self.rounds[quantity][REFERENCE])))

    def spread(self, quantity: str, case: str) -> float:
        """Half the distance between the quartiles over the rounds, relative to the median."""
        low, high = np.percentile(self.rounds[quantity][case], [25, 75])
        return float(high - low) / 2 / self.median(quantity, case)

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Median, spread and ratio to the reference, by quantity and case."""
        return {
            quantity: {
                case: {name: getattr(self, name)(quantity, case) for name in ("median", "spread", "ratio")} for case in cases
            }
            for quantity, cases in self.rounds.items()
        }


def measure(cases: list[str], conditions: Conditions, report: Callable[[str], None] = lambda text: None) -> Measurements:
    """Measure cases in turn.

    :param cases: Names, see :func:`sb3_rfm.benchmark.cases.available`; the reference is among them
    :param conditions: On what, and for how long
    :param report: Is told what is being done
    """
    result = Measurements(provenance() | {"conditions": asdict(conditions)})
    subjects = {}
    for case in cases:
        report(f"{case}: preparing")
        started = time.perf_counter()
        subjects[case] = Subject(case, conditions)
        result.first_update[case] = subjects[case].first_update - started
    for i in range(conditions.rounds):
        for case, subject in subjects.items():
            report(f"round {i + 1} of {conditions.rounds}: {case}")
            result.add("updates", case, subject.updates_per_second())
            result.add("steps", case, subject.steps_per_second())
            result.add("latency", case, subject.latency())
            result.add("throughput", case, subject.throughput())
    if get_device(conditions.device).type == "cpu":
        for case in cases:
            report(f"{case}: memory")
            result.add("memory", case, peak_memory(case, conditions))
    return result


class Subject:
    """An algorithm that is ready to be measured: compiled, and with something in its buffer.

    :param case: Its name
    :param conditions: On what, and for how long
    """

    def __init__(self, case: str, conditions: Conditions) -> None:
        self.conditions = conditions
        self.model = self._warm(case)
        self.first_update = time.perf_counter()
        self.model.learn(LONG_RUN, callback=StopAfter(20), reset_num_timesteps=False)
        self.one_particle = self.model
        if isinstance(self.model, FlowActorCritic) and self.model.n_exploration_particles > 1:
            self.one_particle = self._warm(case, n_exploration_particles=1)
        self.observations = np.random.default_rng(0).standard_normal((1024, conditions.sizes.obs_dim)).astype(np.float32)
        self.model.predict(self.observations[0], deterministic=True)
        self.one_particle.predict(self.observations)

    def _warm(self, case: str, **arguments: Any) -> OffPolicyAlgorithm:
        model = build(case, self.conditions.sizes, self.conditions.device, self.conditions.execution, **arguments)
        model.learn(LONG_RUN, callback=StopAfter(model.learning_starts + 5))
        return model

    def updates_per_second(self) -> float:
        """Updates per second, several in each call of ``train``."""
        return UPDATES_AT_ONCE / self._time(lambda: self.model.train(UPDATES_AT_ONCE, self.conditions.sizes.batch))

    def steps_per_second(self) -> float:
        """Environment steps per second of ``learn``, with an update each; the last one, which is cut short, does not count."""
        n_steps = 10
        while True:
            before, started = self.model._n_updates, time.perf_counter()
            self.model.learn(LONG_RUN, callback=StopAfter(n_steps), reset_num_timesteps=False)
            elapsed = time.perf_counter() - started
            if elapsed > self.conditions.seconds / 2:
                return (self.model._n_updates - before) / elapsed
            n_steps *= 2

    def latency(self) -> float:
        """Milliseconds for the deterministic action at one observation."""
        return 1000 * self._time(lambda: self.model.predict(self.observations[0], deterministic=True))

    def throughput(self) -> float:
        """Actions per second for many observations, sampled with one particle."""
        return len(self.observations) / self._time(lambda: self.one_particle.predict(self.observations))

    def _time(self, function: Callable[[], Any]) -> float:
        return seconds_per_call(function, self.conditions.seconds, self.conditions.device)


def seconds_per_call(function: Callable[[], Any], seconds: float, device: str = "cpu") -> float:
    """Mean duration of a call.

    :param function: What to call
    :param seconds: For how long
    :param device: Where it computes, to be waited for at the end
    """
    n, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds or n == 0:
        function()
        n += 1
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / n


def peak_memory(case: str, conditions: Conditions) -> float:
    """Peak memory of a process that learns, in megabytes."""
    command = [sys.executable, "-m", "sb3_rfm.benchmark.cases", case, "--steps", str(conditions.memory_steps)]
    command += ["--threads", str(conditions.threads), "--device", conditions.device]
    command += ["--execution", conditions.execution] if conditions.execution else []
    command += ["--sizes", *map(str, astuple(conditions.sizes))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def rows(result: Measurements) -> list[list[str]]:
    """The table: one row for each case, with spreads in percent and ratios to the reference in brackets."""
    table = []
    for case in result.rounds["updates"]:
        cells = [case]
        for quantity in result.rounds:
            value, spread = result.median(quantity, case), result.spread(quantity, case)
            digits = 2 if quantity == "latency" else 0
            plus_minus = f" ±{100 * spread:.0f}%" if len(result.rounds[quantity][case]) > 1 else ""
            cells.append(f"{value:,.{digits}f}{plus_minus} ({result.ratio(quantity, case):.2f})")
        table.append([*cells, f"{result.first_update[case]:.1f}"])
    return table


def header(result: Measurements) -> list[str]:
    """Names of the columns of :func:`rows`."""
    return [f"(÷ {REFERENCE})", *(QUANTITIES[quantity] for quantity in result.rounds), "first update, s"]


def plot(result: Measurements) -> Figure:
    """Updates and environment steps per second of every case."""
    cases = list(result.rounds["updates"])
    figure = Figure(figsize=(8, 0.32 * len(cases) + 1.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for quantity, panel in zip(("updates", "steps"), panels, strict=True):
        for i, case in enumerate(reversed(cases)):
            low, value, high = np.percentile(result.rounds[quantity][case], [25, 50, 75])
            color = COLORS.get(case.partition(":")[0], "0.5")
            panel.barh(i, value, height=0.6, color=color, xerr=[[value - low], [high - value]], ecolor="0.2")
        panel.set_yticks(range(len(cases)), list(reversed(cases)))
        panel.set_xlabel(QUANTITIES[quantity], fontsize=9)
        tidy(panel)
    return figure


def write(out: Path, result: Measurements) -> None:
    """Write ``speed.json``, ``speed.txt`` (a Markdown table) and ``speed.png``."""
    out.mkdir(parents=True, exist_ok=True)
    content = {"first_update": result.first_update, "rounds": result.rounds, "summary": result.summary()}
    write_json(out / "speed.json", result.setup | content)
    write_text(out / "speed.txt", markdown(header(result), rows(result)))
    write_figure(out / "speed.png", plot(result))
