"""How the same functions run fast: eager, compiled, with CUDA graphs, and in which precision.

The mathematics of the package is written once, as plain functions of tensors. This module decides how they are executed:

- ``"eager"``: as written;
- ``"compile"``: traced as a graph (:mod:`sb3_rfm.compilation`) and compiled, on the CPU to a library that is kept on disk;
- ``"cuda_graph"``: compiled by ``torch.compile``, and whole updates recorded as CUDA graphs (a GPU is needed);
- ``"auto"``: compiled, on the GPU with graphs, where a compiler is at hand and the run is long enough to repay it;
  else eager.

A function that cannot be compiled runs eagerly, with a warning, and the others stay compiled. A procedure in which the host
waits for the device cannot be recorded as a graph: its kernels are launched one by one, with a warning too. Random numbers
are drawn by the eager generators in every mode, so that all modes see the same noise.
"""

import ctypes
import functools
import operator
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sb3_rfm.compilation import MAX_SHAPES, load_library, name_of, quiet, reason_of, trace
from sb3_rfm.recording import Recorded, load_beside, on_device, run_in_parallel

ExecutionMode = Literal["auto", "eager", "compile", "cuda_graph"]
Precision = Literal["auto", "float32", "bfloat16"]

T = TypeVar("T")

MIN_UPDATES_TO_COMPILE = 2_000
"""With ``"auto"``: compiling takes about as long as this many eager updates save."""


def check_execution(execution: str, precision: str) -> None:
    """Validate the two arguments.

    :raises ValueError: for unknown values
    """
    if execution not in ("auto", "eager", "compile", "cuda_graph"):
        raise ValueError(f"execution must be 'auto', 'eager', 'compile' or 'cuda_graph', got {execution!r}.")
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision must be 'auto', 'float32' or 'bfloat16', got {precision!r}.")


def has_compiler() -> bool:
    """Whether PyTorch finds its compiler here, ``$CXX`` or the system's; code for a GPU takes one for the CPU, too."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX", usual)) is not None


def resolve_mode(execution: ExecutionMode, device: torch.device, n_updates: int) -> Literal["eager", "compile", "cuda_graph"]:
    """The mode that ``execution`` stands for.

    :param execution: What the user asked for
    :param device: Where the networks are
    :param n_updates: Updates that are expected
    """
    if execution == "cuda_graph" and device.type != "cuda":
        return "compile"
    if execution != "auto":
        return execution
    if n_updates < MIN_UPDATES_TO_COMPILE or not has_compiler():
        return "eager"
    return {"cpu": "compile", "cuda": "cuda_graph"}.get(device.type, "eager")  # type: ignore[return-value]


def resolve_precision(precision: Precision, device: torch.device) -> bool:
    """Whether candidates are evaluated in bfloat16; with ``"auto"``, where the hardware multiplies it natively."""
    if precision == "bfloat16" and not multiplies_bfloat16(device):
        warnings.warn(
            f"precision='bfloat16', which this {device.type} device is not known to multiply in hardware: "
            "'auto' or 'float32' may be many times faster.",
            stacklevel=2,
        )
    return precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16(device))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware is known to multiply bfloat16, and does not emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return any(probe is not None and probe() for probe in probes)
    return False


def keep_freed_memory() -> None:
    """Ask glibc to keep freed blocks of megabytes for reuse, instead of giving them back to the system each time.

    Candidate evaluation allocates and frees the same few megabytes in every update; without this, a third of its time goes
    into page faults. Does nothing where the C library has no ``mallopt``.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, the largest value that glibc accepts
        mallopt(-1, 256 * 2**20)  # M_TRIM_THRESHOLD


class Executor:
    """Runs functions in one mode.

    :param mode: ``"eager"``, ``"compile"`` or ``"cuda_graph"``
    :param report: Is told how long the compiler took
    :param device: Where graphs are recorded
    """

    def __init__(
        self,
        mode: Literal["eager", "compile", "cuda_graph"] = "eager",
        report: Callable[[str], None] = lambda text: None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.mode = mode
        self.report = report
        self.device = torch.device(device)

    def __reduce__(self) -> Any:
        return Executor, ()  # a copy of a model runs its functions as written, until it learns

    def prepare(self, function: Callable[..., T], module: nn.Module) -> Callable[..., T]:
        """Make ``function`` run in this mode.

        :param function: A function of tensors, and of parameters and buffers of ``module``; its results carry no gradients
            once compiled, but may be gradients themselves
        :param module: What it reads
        :return: A function of positional arguments with the same results
        """
        return function if self.mode == "eager" else Compiled(function, module, self)

    def record(
        self,
        procedure: Callable[..., T],
        module: nn.Module,
        optimizers: Callable[[], Iterable[torch.optim.Optimizer]] = tuple,
    ) -> Callable[..., T]:
        """Make ``procedure`` run as one CUDA graph where the mode is ``"cuda_graph"`` and the optimizers allow it.

        :param procedure: A function of tensors that may change the tensors of ``module`` and optimizers, always the same
            way; what else it does in Python is done while it is recorded, and not again
        :param module: What it reads and changes
        :param optimizers: Returns the optimizers that it uses. Those that are neither ``fused`` nor ``capturable`` keep
            numbers that a graph would not see change
        :return: A function of positional arguments with the same results and effects
        """
        groups = [group for optimizer in optimizers() for group in optimizer.param_groups]
        allowed = all(group.get("fused") or group.get("capturable") for group in groups)
        if self.mode != "cuda_graph" or not allowed:
            return procedure
        return Recorded(procedure, module, optimizers, self.device)

    def parallel(self, *tasks: Callable[[], T]) -> list[T]:
        """Results of tasks that do not need each other; in a recorded procedure they run at the same time."""
        if self.mode == "cuda_graph" and torch.cuda.is_current_stream_capturing():
            return run_in_parallel(*tasks)
        return [task() for task in tasks]

    def load(self, source: Callable[[], T]) -> T:
        """What ``source`` takes from the host and puts on the device; with CUDA graphs, beside what the device computes."""
        if self.mode != "cuda_graph":
            return source()
        with on_device(self.device):
            return load_beside(source, self._loading)

    @functools.cached_property
    def _loading(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()


class Compiled(Generic[T]):
    """A function that is compiled whenever it is called with arguments of a new shape.

    A copy of it is the function as written, of the copied module.

    :param function: See :meth:`Executor.prepare`
    :param module: See :meth:`Executor.prepare`
    :param executor: Says how it is compiled
    """

    def __init__(self, function: Callable[..., T], module: nn.Module, executor: Executor) -> None:
        self.function = function
        self.__name__ = name_of(function)
        self.module = module
        self.executor = executor
        self.programs: dict[Any, _Program] = {}
        self.failed = False

    def __call__(self, *args: Any) -> T:
        key = tuple((a.shape, a.dtype, a.requires_grad) if isinstance(a, Tensor) else a for a in args)
        program = self.programs.get(key)
        if program is not None and program.is_current():
            return program(args)
        if self.failed or (program is None and len(self.programs) >= MAX_SHAPES):
            return self.function(*args)
        started = time.perf_counter()
        try:
            with quiet():
                program = self.programs[key] = _Program(self.function, self.module, args)
                result = program(args)
        except Exception as error:
            result = self.function(*args)  # raises what is the function's own
            self.failed = True
            warnings.warn(f"{self.__name__} could not be compiled and runs eagerly: {reason_of(error)}", stacklevel=2)
            return result
        self.executor.report(f"Compiled {self.__name__} in {time.perf_counter() - started:.0f} s.")
        return result

    def __reduce__(self) -> Any:
        return getattr, (self.function.__self__, self.function.__name__)  # type: ignore[attr-defined]


class _Program:
    """A compiled function for arguments of certain shapes."""

    def __init__(self, function: Callable[..., Any], module: nn.Module, args: tuple[Any, ...]) -> None:
        graph = trace(function, module, args)
        self.locations, self.arguments, self.structure = graph.state, graph.arguments, graph.structure
        self.state = self._read_state()
        self.trained = [tensor.requires_grad for tensor in self.state]
        inputs = self._inputs(args)
        if all(tensor.device.type == "cpu" for tensor in inputs):
            self.run = load_library(graph.module, inputs)
        else:
            compiled = torch.compile(graph.module, options={"fallback_random": True}, dynamic=False, fullgraph=True)
            self.run = lambda tensors: compiled(*tensors)

    def is_current(self) -> bool:
        """Whether the module's tensors are the same objects, and the same ones are trained: else the function may do
        something else."""
        state = self._read_state()
        return all(map(operator.is_, state, self.state)) and [tensor.requires_grad for tensor in state] == self.trained

    def __call__(self, args: tuple[Any, ...]) -> Any:
        with torch.no_grad():
            return pytree.tree_unflatten(self.run(self._inputs(args)), self.structure)

    def _read_state(self) -> list[Tensor]:
        return [owner[key] for owner, key in self.locations]

    def _inputs(self, args: tuple[Any, ...]) -> list[Tensor]:
        return [tensor.contiguous() for tensor in (*self.state, *(args[i] for i in self.arguments))]
