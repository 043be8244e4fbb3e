"""Functions as graphs, and graphs as shared libraries.

:func:`trace` turns a function of tensors and of a module's state into a graph of PyTorch's own operations, gradients
included, whose inputs are all that it reads. :func:`load_library` compiles such a graph for the CPU. The compiler runs in a
process of its own: it takes hundreds of megabytes, none of which stay with the process that learns. Libraries are kept on
disk under a hash of what they depend on, so that a graph is compiled once on a machine, whatever it came from.

Source: PyTorch's documentation of ``make_fx`` and of AOTInductor.
"""

import contextlib
import functools
import hashlib
import math
import os
import pickle
import platform
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from sb3_rfm.files import replacing

OPTIONS: dict[str, Any] = {"fallback_random": True, "unroll_reductions_threshold": 17, "cpp.min_chunk_size": 16384}
"""Random numbers come from the eager generators. Averages over a few candidates are written out: as loops, the compiler starts
a parallel region for each state. And threads share a loop only where each gets this many elements."""

MAX_SHAPES = 8
"""Shapes of arguments, and values of those that are no tensors, for which a function is compiled or recorded; with others it
runs as written."""

COMPILER = (sys.executable, "-m", "sb3_rfm.compilation")
"""The command that makes a library of the graph on its standard input."""


class CompilationError(Exception):
    """The compiler could not make a library of a graph."""


class Graph(NamedTuple):
    """A traced function."""

    module: GraphModule
    """The graph: the tensors of ``state`` and the tensors among the arguments, in order → a flat list of tensors"""
    state: list[tuple[dict[str, Any], str]]
    """Where the module's tensors that it reads are: dictionary and key"""
    arguments: list[int]
    """Which of the function's arguments it reads"""
    structure: pytree.TreeSpec
    """How its results belong together"""


class _Call(nn.Module):
    """A function that reads a module, as a module itself; the state to read is then an argument of ``functional_call``."""

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def trace(function: Callable[..., Any], module: nn.Module, args: tuple[Any, ...]) -> Graph:
    """Record what ``function`` does for arguments of these shapes; those that are no tensors keep their value.

    :param function: A function of tensors, and of parameters and buffers of ``module``; its Python must not look at numbers
    :param module: What it reads
    :param args: Its arguments
    :return: The graph, and where its inputs are
    :raises Exception: whatever the function raises, and PyTorch's own errors where it looks at numbers
    """
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    is_tensor = [isinstance(argument, Tensor) for argument in args]
    structure: list[pytree.TreeSpec] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        numbers = iter(tensors[len(state) :])
        arguments = [next(numbers) if tensor else argument for argument, tensor in zip(args, is_tensor, strict=True)]
        swapped = {f"module.{name}": tensor for name, tensor in zip(state, tensors, strict=False)}
        results, spec = pytree.tree_flatten(torch.func.functional_call(_Call(function, module), swapped, tuple(arguments)))
        structure.append(spec)
        return results

    # They take time to import; only who compiles pays for it.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    # With shapes and no numbers: nothing is computed, nothing drawn at random. Other tensors it reads become constants.
    read = [*state.values(), *filter(torch.is_tensor, args)]
    with FakeTensorMode(allow_non_fake_inputs=True) as shapes:
        examples = [shapes.from_tensor(t.detach().contiguous().requires_grad_(t.requires_grad)) for t in read]
        graph = make_fx(flat)(*examples)
    graph.graph.eliminate_dead_code()
    placeholders = graph.graph.find_nodes(op="placeholder")
    used = [bool(node.users) for node in placeholders]
    for node in placeholders:
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    positions = [i for i, tensor in enumerate(is_tensor) if tensor]
    return Graph(
        graph,
        [_location(module, name) for name, kept in zip(state, used, strict=False) if kept],
        [i for i, kept in zip(positions, used[len(state) :], strict=True) if kept],
        structure[0],
    )


def state_locations(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a module's parameters and buffers are: dictionary and key."""
    return [_location(module, name) for name, _ in (*module.named_parameters(), *module.named_buffers())]


def _location(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Where a parameter or buffer is kept."""
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    return (owner._parameters if key in owner._parameters else owner._buffers), key


def load_library(graph: GraphModule, inputs: list[Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Compile a graph for the CPU, or find it compiled already.

    :param graph: Its inputs are flat, and so are its results
    :param inputs: Inputs of the shapes it is to have
    :return: The compiled graph: contiguous inputs of the same shapes → results
    :raises CompilationError: if the compiler fails
    """
    constants = {name: value for name, value in vars(graph).items() if isinstance(value, Tensor)} | dict(graph.named_buffers())
    recipe = _Recipe(graph.code, constants, [(tuple(t.shape), t.dtype) for t in inputs], torch.get_num_threads())
    file = cache_folder() / f"{recipe.key()}.pt2"
    with contextlib.suppress(Exception):  # there is none yet, or one that cannot be loaded
        return _load(file)
    with FileLock(f"{file}.lock"):  # whoever needs the same library at the same time waits for it
        with contextlib.suppress(Exception):
            return _load(file)
        _run_compiler(recipe, file)
    return _load(file)


class _Recipe(NamedTuple):
    """What a library is made of."""

    code: str
    """A graph as Python"""
    constants: dict[str, Tensor]
    """The tensors in it"""
    inputs: list[tuple[tuple[int, ...], torch.dtype]]
    """Shapes of its inputs, and their types"""
    n_threads: int
    """Threads that it is to use"""

    def key(self) -> str:
        """A hash of everything that the library depends on."""
        constants = [(name, value.dtype, value.tolist()) for name, value in sorted(self.constants.items())]
        what = (self.code, constants, self.inputs, self.n_threads, OPTIONS, torch.__version__, _processor())
        return hashlib.sha256(repr(what).encode()).hexdigest()[:40]

    def module(self) -> nn.Module:
        """The graph as a module again."""
        namespace: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}
        exec(self.code, namespace)
        module = type("Recorded", (nn.Module,), {"forward": namespace["forward"]})()
        for name, value in self.constants.items():
            module.register_buffer(name, value)
        return module


def cache_folder() -> Path:
    """Where libraries are kept: ``$SB3_RFM_CACHE``, else ``sb3_rfm`` in the user's cache folder. It may be emptied."""
    own = os.environ.get("SB3_RFM_CACHE")
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sb3_rfm"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run_compiler(recipe: _Recipe, file: Path) -> None:
    """Have the compiler, in a process of its own, write ``file``."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with tempfile.TemporaryDirectory(dir=file.parent) as folder, replacing(file) as package:
        work = pickle.dumps((*recipe, str(package)))
        result = subprocess.run(COMPILER, input=work, capture_output=True, env=environment, cwd=folder, check=False)
        if result.returncode != 0 or not package.exists():
            lines = result.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            raise CompilationError(next((line for line in reversed(lines) if re.match(r"[\w.]+Error: ", line)), lines[-1]))


@functools.cache
def _load(file: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    """Load a library; models with the same graph share it.

    :raises FileNotFoundError: if there is none, of which PyTorch would warn as of an outdated one
    """
    if not file.exists():
        raise FileNotFoundError(file)
    return torch._inductor.aoti_load_package(str(file)).loader.run


@functools.cache
def _processor() -> str:
    """What compiled code is specific to: libraries may lie on a disk that several machines share."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"


def name_of(function: Callable[..., Any]) -> str:
    """Name of a function, for messages."""
    return getattr(function, "__name__", repr(function)).strip("_")


def reason_of(error: BaseException) -> str:
    """First line of an error, for messages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the warnings of the compiler's own modules: hints, and deprecations that some environment packages make visible."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo)")
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def main() -> None:
    """Make the library that standard input asks for."""
    import torch._inductor.compile_fx  # before the graph, whose operations it registers

    *recipe, package = pickle.load(sys.stdin.buffer)
    made = _Recipe(*recipe)
    torch.set_num_threads(made.n_threads)
    inputs = tuple(torch.ones(shape, dtype=dtype) for shape, dtype in made.inputs)
    with torch.no_grad():
        program = torch.export.export(made.module(), inputs)
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=OPTIONS)


if __name__ == "__main__":
    main()
