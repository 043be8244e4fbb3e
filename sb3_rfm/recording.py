"""Procedures as CUDA graphs: what a procedure does on the GPU is recorded once, and launched as a whole from then on.

A recorded procedure may change tensors in place, as an optimizer does. Whatever differs from one call to the next must be in
tensors that it reads, or among its arguments.

Source: PyTorch's documentation of CUDA graphs.
"""

import operator
import warnings
from collections import Counter
from collections.abc import Callable
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

    Its first calls run as written, and so do calls with other tensors than those of ``module`` and ``optimizers`` were when
    it was recorded, until they have been recorded too. A copy of it is the procedure as written, of the copied module.

    :param procedure: See :meth:`~sb3_rfm.execution.Executor.record`
    :param module: See :meth:`~sb3_rfm.execution.Executor.record`
    :param optimizers: See :meth:`~sb3_rfm.execution.Executor.record`
    """

    def __init__(self, procedure: Callable[..., T], module: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
        self.procedure = procedure
        self.module = module
        self.optimizers = optimizers
        self.locations = state_locations(module)
        self.recordings: dict[Any, _Recording] = {}
        self.calls: Counter[Any] = Counter()
        self.failed = False

    def __call__(self, *args: Any) -> T:
        leaves, structure = pytree.tree_flatten(args)
        key = (structure, *((a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in leaves))
        state = self._state()
        recording = self.recordings.get(key)
        if recording is not None and all(map(operator.is_, state, recording.state)):
            return recording(leaves)
        if self.failed or (recording is None and len(self.recordings) >= MAX_SHAPES):
            return self.procedure(*args)
        self.calls[key] += 1
        if self.calls[key] < CALLS_BEFORE_RECORDING:
            return self.procedure(*args)
        if self.calls[key] == CALLS_BEFORE_RECORDING:
            return self._run_watched(args)
        self.calls[key] = 0
        try:
            recording = self.recordings[key] = _Recording(self.procedure, leaves, structure, state)
        except Exception as error:  # it leaves random generators and memory as they were while recording
            raise RuntimeError(
                f"{name_of(self.procedure)} could not be recorded as a CUDA graph: {reason_of(error)}. "
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
        self.failed = any("called a synchronizing" in str(warning.message) for warning in caught)
        if self.failed:
            warnings.warn(
                f"{name_of(self.procedure)} could not be recorded as a CUDA graph: the host waits for the device in it.",
                stacklevel=3,
            )
        return result

    def _state(self) -> list[Any]:
        """What a recording is bound to. The state of an optimizer is another dictionary when it is loaded."""
        return [*(owner[key] for owner, key in self.locations), *(optimizer.state for optimizer in self.optimizers)]

    def __reduce__(self) -> Any:
        return _unchanged, (self.procedure,)


class _Recording:
    """A CUDA graph of a procedure, with the tensors that it reads its arguments from."""

    def __init__(self, procedure: Callable[..., Any], leaves: list[Any], structure: pytree.TreeSpec, state: list[Any]) -> None:
        self.state = state
        self.arguments = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.graph = torch.cuda.CUDAGraph()
        # Recording computes nothing: the caller launches the graph for the call that it is made in, too.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.results = procedure(*pytree.tree_unflatten(self.arguments, structure))
        self.inputs = [argument for argument in self.arguments if isinstance(argument, Tensor)]

    def __call__(self, leaves: list[Any]) -> Any:
        with torch.no_grad():
            torch._foreach_copy_(self.inputs, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
            self.graph.replay()
            return pytree.tree_map_only(Tensor, Tensor.clone, self.results)  # the next launch overwrites them


def run_in_parallel(*tasks: Callable[[], T]) -> list[T]:
    """While recording: results of tasks that do not need each other, and are computed at the same time."""
    here, branches, results = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in tasks], []
    for task, branch in zip(tasks, branches, strict=True):
        branch.wait_stream(here)
        with torch.cuda.stream(branch):
            results.append(task())
    for branch in branches:
        here.wait_stream(branch)
    return results


def load_beside(source: Callable[[], T], stream: torch.cuda.Stream) -> T:
    """What ``source`` puts on the device, on a stream of its own: what else is being computed need not come to its end."""
    here = torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        loaded = source()
    here.wait_stream(stream)
    for leaf in pytree.tree_leaves(loaded):
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            leaf.record_stream(here)  # its memory may be used again only when ``here`` is done with it
    return loaded


def _unchanged(procedure: T) -> T:
    return procedure
