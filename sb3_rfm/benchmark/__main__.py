"""The benchmark's command line: ``python -m sb3_rfm.benchmark run | report | speed``."""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gymnasium import spaces

from sb3_rfm.benchmark.records import RunFolder, RunSpec
from sb3_rfm.benchmark.suites import SETTINGS, SUITES, get_setting, get_tasks, make_env, parse_overrides


def positive(text: str) -> int:
    """An integer from 1 on."""
    if (number := integer(text)) is None or number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return number


def not_negative(text: str) -> int:
    """An integer from 0 on."""
    if (number := integer(text)) is None or number < 0:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 on, got {text!r}")
    return number


def integer(text: str) -> int | None:
    """The integer that a text is, if it is one."""
    try:
        return int(text)
    except ValueError:
        return None


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite", nargs="+", default=["classic"], metavar="NAME", help=f"{', '.join(SUITES)}, or environment ids"
    )
    parser.add_argument(
        "--algos",
        nargs="+",
        default=["rfm", "sac"],
        metavar="ALGO",
        help=f"rfm, qne, dqs, qsm, sac, td3, tqc, or one with a setting: {', '.join(SETTINGS)}",
    )
    parser.add_argument("--seeds", type=positive, default=5, help="number of seeds")
    parser.add_argument("--first-seed", type=not_negative, default=0)
    parser.add_argument("--steps", type=positive, help="environment steps of a run; those of the suite by default")
    parser.add_argument("--eval-every", type=positive, default=10_000, help="environment steps between evaluations")
    parser.add_argument("--eval-episodes", type=positive, default=25, help="episodes of an evaluation")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="[ALGO.]ARGUMENT=VALUE",
        help="arguments of the algorithms, e.g. rfm.n_candidates=32, or rfm:cold.temperature=0.01 with --algos rfm:cold",
    )
    parser.add_argument("--jobs", type=positive, help="runs at once; 1 by default, and with ray as many as there is room for")
    parser.add_argument("--threads", type=positive, default=1, help="threads of a run")
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="ray: on a cluster (extra [cluster])")
    parser.add_argument("--gpus", type=float, default=0.0, help="with ray: GPUs of a run, e.g. 0.25")
    parser.add_argument("--checkpoint-every", type=positive, default=10_000, help="environment steps between checkpoints")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep the last, to continue with more --steps later")
    parser.add_argument("--out", type=Path, default=Path("results"), help="results folder")


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, help="results folder")
    parser.add_argument("--out", type=Path, help="where to write; <results>/report by default")
    parser.add_argument(
        "--at-step", type=int, help="results at this step, of all runs that reached it; by default those of the finished runs"
    )
    parser.add_argument("--algos", nargs="+", metavar="ALGO", help="algorithms to compare; by default all")
    parser.add_argument("--title", default="Benchmark of sb3_rfm")


def add_speed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--paper", action="store_true", help="the paper's settings too")
    parser.add_argument(
        "--curves",
        nargs="*",
        metavar="PARAMETER",
        help="cost curves too, against all parameters or these; compiling for every point takes a while",
    )
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="what to measure; everything that is installed by default")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--execution", choices=["auto", "eager", "compile", "cuda_graph"], help="replaces the algorithms' default"
    )
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--quick", action="store_true", help="two short rounds, to see whether it works")
    parser.add_argument("--out", type=Path, default=Path("results/speed"), help="folder of table, JSON and figures")


def planned(args: argparse.Namespace) -> list[RunSpec]:
    """The runs that the arguments of ``run`` describe."""
    from sb3_rfm.benchmark.runner import plan

    arguments = parse_overrides(args.set, args.algos)
    for label in args.algos:
        get_setting(label, arguments[label])
    return plan(
        [task for name in args.suite for task in get_tasks(name, args.steps)],
        args.algos,
        range(args.first_seed, args.first_seed + args.seeds),
        eval_every=args.eval_every,
        eval_episodes=args.eval_episodes,
        arguments=arguments,
    )


def check_actions(env_id: str) -> None:
    """Make an environment once, to see whether it can be learned in.

    :param env_id: Environment
    :raises ValueError: if it cannot be made, or if its actions are no vectors
    """
    if env_id.startswith("dm_control/"):  # takes seconds to import, and has vectors
        return
    try:
        env = make_env(env_id)
    except Exception as error:
        raise ValueError(f"{env_id} cannot be made: {error}") from error
    env.close()
    if not isinstance(env.action_space, spaces.Box):
        raise ValueError(f"{env_id} has the actions {env.action_space}: expected vectors, a space of the type Box.")


def run(args: argparse.Namespace) -> int:
    """Do the runs that are not finished yet."""
    from sb3_rfm.benchmark.runner import Engine, LocalEngine, Sweep

    specs = {spec.name: spec for spec in planned(args)}.values()  # each run once
    for env_id in dict.fromkeys(spec.env_id for spec in specs):
        check_actions(env_id)
    options = ["--checkpoint-every", str(args.checkpoint_every), *(["--keep-checkpoint"] if args.keep_checkpoints else [])]
    engine: Engine
    if args.engine == "ray":
        try:
            from sb3_rfm.benchmark.cluster import RayEngine
        except ModuleNotFoundError as error:
            raise ValueError(f"--engine ray needs Ray: pip install '.[cluster]' in a checkout ({error}).") from error
        engine = RayEngine(args.threads, args.gpus, options, args.jobs)
    elif args.gpus:
        raise ValueError("--gpus is for --engine ray; runs on this machine share its GPU as they are.")
    else:
        engine = LocalEngine(args.jobs or 1, args.threads, options)
    for spec in specs:  # a refusal leaves all of them as they are
        RunFolder(args.out / spec.name).merged_with(spec)
    folders = [RunFolder.create(args.out, spec) for spec in specs]
    ends = [folder.spec.steps for folder, spec in zip(folders, specs, strict=True) if folder.spec.steps > spec.steps]
    if ends:
        before = " / ".join(f"{steps:,}" for steps in sorted(set(ends)))
        print(f"{len(ends)} of these runs were asked for with {before} steps before, and go on to that.")
    return 1 if Sweep(folders, engine).run() else 0


def report(args: argparse.Namespace) -> int:
    """Write tables, figures and the page."""
    from sb3_rfm.benchmark.report import write

    for file in write(args.results, args.out or args.results / "report", args.at_step, args.algos, args.title):
        print(file)
    return 0


def speed(args: argparse.Namespace) -> int:
    """Measure, print the table and write it with the figures."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from sb3_rfm.benchmark import cost, speed
    from sb3_rfm.benchmark.cases import available, cores

    if args.device.startswith("cuda") and not torch.cuda.is_available():  # SB3 would take the CPU
        raise ValueError(f"--device {args.device}: PyTorch sees no GPU here.")
    console = Console()

    def show(header: list[str], rows: list[list[str]]) -> None:
        table = Table(*header, box=None)
        for row in rows:
            table.add_row(*row)
        console.print(table)

    conditions = speed.Conditions(threads=args.threads, device=args.device, execution=args.execution, rounds=args.rounds)
    if args.quick:
        conditions = replace(conditions, rounds=2, seconds=0.02, memory_steps=110)
    cases = args.cases or available(args.paper)
    unknown = set(cases) - set(available(paper=True))
    if unknown:
        raise ValueError(f"Unknown or not installed: {sorted(unknown)}; available are {available(paper=True)}.")
    unknown = set(args.curves or []) - set(cost.AXES)
    if unknown:
        raise ValueError(f"Unknown parameters: {sorted(unknown)}; there are curves against {list(cost.AXES)}.")
    args.out.mkdir(parents=True, exist_ok=True)  # what cannot be written is not worth measuring
    with cores(args.threads), console.status("") as status:
        result = speed.measure(list(dict.fromkeys([*cases, speed.REFERENCE])), conditions, status.update)
        speed.write(args.out, result)
    show(speed.header(result), speed.rows(result))
    if args.curves is not None:
        axes = {name: cost.AXES[name] for name in args.curves or cost.AXES}
        with cores(args.threads), console.status("") as status:
            points = cost.measure(conditions, axes, status.update)
            cost.write(args.out, result.setup, points)
        show(cost.HEADER, cost.rows(points))
    console.print(f"Written to {args.out}/")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m sb3_rfm.benchmark", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add_run(commands.add_parser("run", help="learn and evaluate: algorithms × tasks × seeds"))
    add_report(commands.add_parser("report", help="tables, learning curves and statistics of a results folder"))
    add_speed(commands.add_parser("speed", help="updates, steps and predictions per second, and memory"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    :param argv: Arguments; those of the process by default
    :return: Exit status
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    # A scheduler's SIGTERM, or the end of the terminal, is handled like Ctrl-C: the processes of the runs are stopped too.
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup has it ignored
            signal.signal(number, signal.default_int_handler)
    try:
        return {"run": run, "report": report, "speed": speed}[args.command](args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("Stopped. The same command continues.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
