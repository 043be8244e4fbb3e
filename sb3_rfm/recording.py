"""Procedures as CUDA graphs: what a procedure does on the GPU is recorded once, and launched as a whole from then on.

A recorded procedure may change tensors in place, as an optimizer does. Whatever differs from one call to the next must be in
tensors that it reads, or among its arguments.

Source: PyTorch's documentation of CUDA graphs.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sb3_rfm.compilation import MAX_SHAPES, name_of, reason_of, state_locations

T = TypeVar("T")

CALLS_BEFORE_RECORDING = 3
"""Calls in which a procedure sets up what it needs: compiled kernels, the state of optimizers, workspaces of libraries.
The last of them is watched."""


class Recorded(Generic[T]):
    """A procedure whose kernels are recorded once as a CUDA graph and then launched together.

    Its first calls run as written, and so do calls after the tensors of ``module``, the optimizers or their settings were
    replaced by others, until they have been recorded again. A copy of it is the procedure as written, of the copied module.

    :param procedure: See :meth:`~sb3_rfm.execution.Executor.record`
    :param module: See :meth:`~sb3_rfm.execution.Executor.record`
    :param optimizers: See :meth:`~sb3_rfm.execution.Executor.record`
    :param device: Where it runs
    """

    def __init__(
        self,
        procedure: Callable[..., T],
        module: nn.Module,
        optimizers: Callable[[], Iterable[torch.optim.Optimizer]],
        device: torch.device,
    ) -> None:
        self.procedure = procedure
        self.module = module
        self.optimizers = optimizers
        self.device = device
        self.locations = state_locations(module)
        self.state: list[Any] = []
        self.held: list[Any] = []  # so that nothing else gets their identity
        self.recordings: dict[Any, _Recording] = {}
        self.calls: Counter[Any] = Counter()
        self.failed = False

    def __call__(self, *args: Any) -> T:
        leaves, structure = pytree.tree_flatten(args)
        if any(leaf.device.type != self.device.type for leaf in leaves if isinstance(leaf, Tensor)):
            return self.procedure(*args)  # the module was moved elsewhere, where nothing can be recorded
        key = (structure, *((a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in leaves))
        state = self._read_state()
        if state != self.state:
            self.state, self.recordings, self.calls = state, {}, Counter()
            self.held = [(optimizer, optimizer.state) for optimizer in self.optimizers()]
        if key in self.recordings:
            return self.recordings[key](leaves)
        if self.failed or (key not in self.calls and len(self.calls) >= MAX_SHAPES):
            return self.procedure(*args)
        self.calls[key] += 1
        if self.calls[key] < CALLS_BEFORE_RECORDING:
            return self.procedure(*args)
        if self.calls[key] == CALLS_BEFORE_RECORDING:
            return self._run_watched(args)
        try:
            with on_device(self.device):
                recording = self.recordings[key] = _Recording(self.procedure, leaves, structure)
        except Exception as error:  # it leaves random generators and memory as they were while recording
            raise RuntimeError(
                f"{name_of(self.procedure)} could not be recorded as a CUDA graph: {reason_of(error.__context__ or error)}. "
                "execution='compile' does without."
            ) from error
        return recording(leaves)

    def _run_watched(self, args: tuple[Any, ...]) -> T:
        """Run as written, and see whether the host waits for the device, which it must not while recording."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = self.procedure(*args)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        for warning in caught:
            if "called a synchronizing" in str(warning.message):
                self.failed = True
            elif "Synchronization debug mode" not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if self.failed:
            warnings.warn(
                f"{name_of(self.procedure)} could not be recorded as a CUDA graph: the host waits for the device in it.",
                stacklevel=3,
            )
        return result

    def _read_state(self) -> list[Any]:
        """What a recording is bound to: memory, what is trained, optimizers, and the numbers in their settings."""
        tensors = [owner[key] for owner, key in self.locations]
        state: list[Any] = [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]
        for optimizer in self.optimizers():
            # The state is another dictionary when it is loaded. It has no tensors before the first step.
            state += [id(optimizer), id(optimizer.state), len(optimizer.state)]
            for group in optimizer.param_groups:
                state += [value for name, value in group.items() if name != "params" and not isinstance(value, Tensor)]
        return state

    def __reduce__(self) -> Any:
        return _unchanged, (self.procedure,)


class _Recording:
    """A CUDA graph of a procedure, with the tensors that it reads its arguments from."""

    def __init__(self, procedure: Callable[..., Any], leaves: list[Any], structure: pytree.TreeSpec) -> None:
        self.graph = torch.cuda.CUDAGraph()
        needs_gradients = torch.is_grad_enabled()
        # What is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.set_grad_enabled(needs_gradients):
            arguments = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            # Recording computes nothing: the caller launches the graph for the call that it is made in, too.
            with torch.cuda.graph(self.graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                self.results = procedure(*pytree.tree_unflatten(arguments, structure))
        self.inputs = [argument for argument in arguments if isinstance(argument, Tensor)]

    def __call__(self, leaves: list[Any]) -> Any:
        with torch.no_grad():
            torch._foreach_copy_(self.inputs, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
            self.graph.replay()
            return pytree.tree_map_only(Tensor, Tensor.clone, self.results)  # the next launch overwrites them


def run_in_parallel(*tasks: Callable[[], T]) -> list[T]:
    """While recording: results of tasks that do not need each other, and are computed at the same time."""
    here, branches, results = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in tasks], []
    for branch in branches:
        branch.wait_stream(here)
    try:
        for task, branch in zip(tasks, branches, strict=True):
            with torch.cuda.stream(branch):
                results.append(task())
    finally:
        for branch in branches:
            here.wait_stream(branch)
    return results


def load_beside(source: Callable[[], T], stream: torch.cuda.Stream) -> T:
    """What ``source`` puts on the device, on a stream of its own: what else is being computed need not come to its end.

    :param source: Reads from the host alone; what it read on the device might not be there yet
    :param stream: Stream for it
    """
    here = torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        loaded = source()
    here.wait_stream(stream)
    for leaf in pytree.tree_leaves(loaded):
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            leaf.record_stream(here)  # its memory may be used again only when ``here`` is done with it
    return loaded


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Where streams are made and graphs recorded: on a GPU that need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _unchanged(procedure: T) -> T:
    return procedure
