"""RL Zoo's commands, with the four algorithms: ``python -m sb3_rfm.zoo train --algo rfm --env Pendulum-v1``."""

import argparse
import runpy
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt

from sb3_rfm.zoo import register

COMMANDS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "record-video": "rl_zoo3.record_video",
    "plot-train": "rl_zoo3.plots.plot_train",
    "all-plots": "rl_zoo3.plots.all_plots",
    "plot-from-file": "rl_zoo3.plots.plot_from_file",
}


def save_figures(*args: Any, **kwargs: Any) -> None:
    """What ``plt.show()`` does where there is no display: every figure becomes a picture in the current folder."""
    for number in plt.get_fignums():
        figure = plt.figure(number)
        file = f"{figure.get_label() or number}.png".replace("/", "-").replace(" ", "-")
        figure.savefig(file, dpi=150, bbox_inches="tight")
        print(f"No display: saved {file}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of RL Zoo's commands.

    :param argv: Its name and arguments; those of the process by default
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_rfm.zoo", description="RL Zoo with the algorithms rfm, qne, dqs and qsm."
    )
    parser.add_argument("--trusted", action="store_true", help="load files with classes of your own: runs their code")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see COMMAND --help")
    args = parser.parse_args(argv)
    register(args.trusted)
    if plt.get_backend().lower() == "agg":  # what matplotlib takes where it cannot open a window
        plt.show = save_figures
    sys.argv = [f"{parser.prog} {args.command}", *args.arguments]
    with warnings.catch_warnings():
        # The package of the plots imports its modules before they are run; nothing in them depends on being run once.
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
        runpy.run_module(COMMANDS[args.command], run_name="__main__")


if __name__ == "__main__":
    main()
