"""What an update costs against every size it depends on, and what its arithmetic alone would cost.

The lower bound counts the floating-point operations of all matrix products of one update, as PyTorch executes them eagerly,
each divided by the rate at which this machine multiplies matrices of the hidden layers' shape in that precision in the same
round.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sb3_rfm import RFM
from sb3_rfm.benchmark.cases import LONG_RUN, Sizes, StopAfter, build
from sb3_rfm.benchmark.figures import COLORS, tidy
from sb3_rfm.benchmark.speed import Conditions, seconds_per_call
from sb3_rfm.benchmark.tables import markdown
from sb3_rfm.files import write_figure, write_json, write_text

AXES: dict[str, tuple[str, list[int]]] = {
    "n_candidates": ("candidates K", [4, 16, 32, 64, 128, 256]),
    "n_target_particles": ("particles of the target", [1, 4, 8, 16, 32]),
    "integration_steps": ("integration steps", [1, 2, 4, 8, 16]),
    "batch": ("batch", [64, 128, 256, 512, 1024]),
    "width": ("network width", [64, 128, 256, 512, 1024]),
    "action_dim": ("action dimensions", [1, 3, 6, 16, 32, 64]),
}
"""What is varied, one at a time, the others being at their defaults."""


@dataclass(frozen=True)
class Point:
    """The cost of an update at one value of one parameter.

    :param name: Parameter
    :param value: Its value
    :param seconds: Seconds of an update, one for each round
    :param flops: Operations of matrix products, by precision
    :param rates: Operations per second of matrix products, by precision, one for each round
    """

    name: str
    value: int
    seconds: list[float]
    flops: dict[str, int]
    rates: dict[str, list[float]]

    @property
    def bounds(self) -> list[float]:
        """Seconds that the matrix products would take at the rates of each round."""
        return [sum(n / self.rates[precision][i] for precision, n in self.flops.items()) for i in range(len(self.seconds))]

    @property
    def ratio(self) -> float:
        """Median of the ratios to the bound within a round."""
        return float(np.median(np.divide(self.seconds, self.bounds)))


class CountFlops(TorchDispatchMode):
    """Counts the operations of matrix products by the precision of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            dtype = result.dtype if isinstance(result, torch.Tensor) else result[0].dtype
            self.flops[str(dtype).removeprefix("torch.")] += formula(*args, **kwargs, out_val=result)
        return result


def count_flops(sizes: Sizes, device: str, **arguments: Any) -> dict[str, int]:
    """Operations of the matrix products of one update of RFM, by precision."""
    model = build("rfm", sizes, device, "eager", **arguments)
    model.learn(LONG_RUN, callback=StopAfter(model.learning_starts + 1))
    with CountFlops() as counter:
        model.train(1, sizes.batch)
    return dict(counter.flops)


def matrix_rate(dtype: torch.dtype, width: int, device: str, seconds: float) -> float:
    """Operations per second of a product with a width × width matrix: the best over numbers of rows."""
    device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    best = 0.0
    weight = torch.randn(width, width, device=device, dtype=dtype)
    for n_rows in (1024, 4096, 16384):
        x = torch.randn(n_rows, width, device=device, dtype=dtype)
        product = partial(torch.mm, x, weight, out=torch.empty_like(x))
        seconds_per_call(product, seconds / 4, device)
        best = max(best, 2 * n_rows * width**2 / seconds_per_call(product, seconds, device))
    return best


def configuration(name: str, value: int, sizes: Sizes) -> tuple[Sizes, dict[str, int]]:
    """Sizes and arguments of RFM that have one parameter at a value, and the others as they are."""
    if hasattr(sizes, name):
        return replace(sizes, **{name: value}), {}
    is_default = value == inspect.signature(RFM).parameters[name].default
    return sizes, {} if is_default else {name: value}


def measure(
    conditions: Conditions, axes: dict[str, tuple[str, list[int]]] = AXES, report: Callable[[str], None] = lambda text: None
) -> list[Point]:
    """Measure the cost of an update of RFM at all values of all parameters.

    All are measured in every round, one after the other: a machine that is slower for a while is slower for all.

    :param conditions: On what, and for how long
    :param axes: Parameters with their labels and values
    :param report: Is told what is being done
    """
    device, rates = conditions.device, dict[tuple[str, int], list[float]]()
    values = [(name, value) for name, (_, values) in axes.items() for value in values]
    updates, flops, times = {}, {}, {}
    configurations = [configuration(name, value, conditions.sizes) for name, value in values]
    keys = [(sizes, *arguments.items()) for sizes, arguments in configurations]
    for key, (name, value), (sizes, arguments) in zip(keys, values, configurations, strict=True):
        if key in updates:
            continue
        report(f"{name} = {value}: preparing")
        flops[key] = count_flops(sizes, device, **arguments)
        rates |= {(precision, sizes.width): [] for precision in flops[key]}
        model = build("rfm", sizes, device, conditions.execution, **arguments)
        model.learn(LONG_RUN, callback=StopAfter(model.learning_starts + 10))
        updates[key], times[key] = partial(model.train, 1, sizes.batch), list[float]()
    for i in range(conditions.rounds):
        report(f"round {i + 1} of {conditions.rounds}")
        for (precision, width), measured in rates.items():
            measured.append(matrix_rate(getattr(torch, precision), width, device, conditions.seconds / 16))
        for key, update in updates.items():
            times[key].append(seconds_per_call(update, conditions.seconds / 2, device))
    return [
        Point(name, value, times[key], flops[key], {precision: rates[precision, sizes.width] for precision in flops[key]})
        for key, (name, value), (sizes, _) in zip(keys, values, configurations, strict=True)
    ]


HEADER = ["", "", "ms per update", "÷ its matrix products"]
"""Names of the columns of :func:`rows`."""


def rows(points: list[Point]) -> list[list[str]]:
    """The table: one row for each point, with medians over the rounds."""
    return [
        [AXES[point.name][0], str(point.value), f"{1000 * np.median(point.seconds):.1f}", f"{point.ratio:.2f}"]
        for point in points
    ]


def plot(points: list[Point]) -> Figure:
    """Cost against each parameter, with the lower bound."""
    names = list(dict.fromkeys(point.name for point in points))
    columns = min(3, len(names))
    n_rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(3.2 * columns + 0.4, 4.4), 2.5 * n_rows + 0.5), layout="constrained")
    panels = figure.subplots(n_rows, columns, squeeze=False, sharey=True).ravel()
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for name, panel in zip(names, panels, strict=False):
        chosen = [point for point in points if point.name == name]
        values = [point.value for point in chosen]
        milliseconds = 1000 * np.array([np.percentile(point.seconds, [25, 50, 75]) for point in chosen])
        (measured,) = panel.plot(values, milliseconds[:, 1], "o-", color=COLORS["rfm"], markersize=3.5)
        panel.fill_between(values, milliseconds[:, 0], milliseconds[:, 2], color=COLORS["rfm"], alpha=0.2, linewidth=0)
        (bound,) = panel.plot(values, [1000 * np.median(point.bounds) for point in chosen], "--", color="0.3")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
        panel.set_xlabel(AXES[name][0], fontsize=9)
        tidy(panel)
    figure.supylabel("milliseconds per update", fontsize=9)
    labels = ["RFM, measured", "its matrix products at the measured matrix rate"]
    figure.legend([measured, bound], labels, loc="outside upper center", ncols=min(2, columns), frameon=False, fontsize=9)
    return figure


def write(out: Path, setup: dict[str, Any], points: list[Point]) -> None:
    """Write ``cost_curves.json``, ``cost_curves.txt`` (a Markdown table) and ``cost_curves.png``.

    :param out: Folder
    :param setup: Machine, versions and conditions
    :param points: The measurements
    """
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "cost_curves.json", setup | {"points": [asdict(point) | {"ratio": point.ratio} for point in points]})
    write_text(out / "cost_curves.txt", markdown(HEADER, rows(points)))
    write_figure(out / "cost_curves.png", plot(points))
