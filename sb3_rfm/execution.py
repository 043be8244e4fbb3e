"""How the same functions run fast: eager, compiled, with CUDA graphs, and in which precision.

The mathematics of the package is written once, as plain functions of tensors. This module decides how they are executed:

- ``"eager"``: as written;
- ``"compile"``: by ``torch.compile``;
- ``"cuda_graph"``: by ``torch.compile`` with CUDA graphs (a GPU is needed);
- ``"auto"``: compiled, on the GPU with graphs, where a compiler is at hand and the run is long enough to repay it;
  else eager.

A function that cannot be compiled falls back to eager execution on its own, with a warning. Random numbers are drawn by the
eager generators in every mode, so that all modes see the same noise.
"""

import ctypes
import importlib
import shutil
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

import torch

ExecutionMode = Literal["auto", "eager", "compile", "cuda_graph"]
Precision = Literal["auto", "float32", "bfloat16"]

P = ParamSpec("P")
T = TypeVar("T")

MIN_UPDATES_TO_COMPILE = 2_000
"""With ``"auto"``: compiling takes about as long as this many eager updates save."""

CPU_LOOPS = {"unroll_reductions_threshold": 17, "cpp.min_chunk_size": 16384}
"""Averages over a few candidates are written out: as loops, the compiler starts a parallel region for each state. And
threads share a loop only where each gets this many elements."""


def check_execution(execution: str, precision: str) -> None:
    """Validate the two arguments.

    :raises ValueError: for unknown values
    """
    if execution not in ("auto", "eager", "compile", "cuda_graph"):
        raise ValueError(f"execution must be 'auto', 'eager', 'compile' or 'cuda_graph', got {execution!r}.")
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision must be 'auto', 'float32' or 'bfloat16', got {precision!r}.")


def has_compiler() -> bool:
    """Whether ``torch.compile`` can build code for the CPU here."""
    return any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl"))


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
    if n_updates < MIN_UPDATES_TO_COMPILE:
        return "eager"
    if device.type == "cuda":
        return "cuda_graph"
    return "compile" if device.type == "cpu" and has_compiler() else "eager"


def resolve_precision(precision: Precision, device: torch.device) -> bool:
    """Whether candidates are evaluated in bfloat16; with ``"auto"``, where the hardware multiplies it natively."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
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
    """

    def __init__(self, mode: Literal["eager", "compile", "cuda_graph"] = "eager") -> None:
        self.mode = mode

    def prepare(self, function: Callable[P, T]) -> Callable[P, T]:
        """Make ``function`` run in this mode; it must be a function of tensors and of module state.

        :param function: What to run
        :return: A function with the same results
        """
        if self.mode == "eager":
            return function
        _load_compiler()
        # The compiled code calls its kernels from C++, and does not check before each call that no module was exchanged.
        options: dict[str, Any] = {"fallback_random": True, "cpp_wrapper": True, **CPU_LOOPS}
        if hasattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe"):
            options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        if self.mode == "cuda_graph":
            options["triton.cudagraphs"] = True
        compiled = torch.compile(_own_code(function), options=options, dynamic=False, fullgraph=True)
        failed = False

        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            nonlocal failed
            if failed:
                return function(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                failed = True
                name, reason = getattr(function, "__name__", function), str(error).splitlines()[0]
                warnings.warn(f"{name} could not be compiled and runs eagerly: {reason}", stacklevel=2)
                return function(*args, **kwargs)

        return run


def _own_code(function: Callable[P, T]) -> Callable[P, T]:
    """The same function with a code object of its own.

    Compiled code belongs to a code object, so that two models would share it: with no check of their modules, one would run
    with the path, the sampler or the steps of the other.
    """
    plain = getattr(function, "__func__", function)
    copy = types.FunctionType(
        plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    copy.__kwdefaults__ = plain.__kwdefaults__
    return types.MethodType(copy, function.__self__) if hasattr(function, "__self__") else copy


def _load_compiler() -> None:
    """Load the compiler, which takes seconds; only who compiles pays for it.

    Deprecation warnings of its own modules, which some environment packages make visible, are not the user's.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._inductor.compile_fx")
