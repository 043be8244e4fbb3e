"""Choice of execution mode, and the fallback of what cannot be compiled."""

import numpy as np
import pytest
import torch

from sb3_rfm import RFM, execution
from sb3_rfm.execution import Executor, resolve_mode, resolve_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_automatic_mode_weighs_compilation_against_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "has_compiler", lambda: True)
    assert resolve_mode("auto", CPU, n_updates=execution.MIN_UPDATES_TO_COMPILE - 1) == "eager"
    assert resolve_mode("auto", CPU, n_updates=execution.MIN_UPDATES_TO_COMPILE) == "compile"
    assert resolve_mode("auto", GPU, n_updates=10**6) == "cuda_graph"
    monkeypatch.setattr(execution, "has_compiler", lambda: False)
    assert resolve_mode("auto", CPU, n_updates=10**6) == "eager"


@pytest.mark.parametrize("execution_mode", ["eager", "compile"])
def test_explicit_mode_is_kept(execution_mode: execution.ExecutionMode) -> None:
    assert resolve_mode(execution_mode, CPU, n_updates=0) == execution_mode
    assert resolve_mode(execution_mode, GPU, n_updates=0) == execution_mode


def test_graphs_need_a_gpu() -> None:
    assert resolve_mode("cuda_graph", CPU, n_updates=0) == "compile"
    assert resolve_mode("cuda_graph", GPU, n_updates=0) == "cuda_graph"


def test_explicit_precision_is_kept() -> None:
    assert resolve_precision("bfloat16", CPU)
    assert not resolve_precision("float32", CPU)


def test_what_cannot_be_compiled_runs_as_written() -> None:
    def awkward(x: torch.Tensor) -> torch.Tensor:
        return x + len(str(x.tolist()))  # the compiler cannot look into the numbers of a tensor

    run = Executor("compile").prepare(awkward)
    x = torch.arange(3.0)
    with pytest.warns(UserWarning, match="awkward could not be compiled"):
        first = run(x)
    torch.testing.assert_close(first, awkward(x))
    torch.testing.assert_close(run(x + 1), awkward(x + 1))


class Scaled(torch.nn.Module):
    """A module whose function depends on a plain attribute."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def apply(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.factor * x


def test_two_models_share_no_compiled_code() -> None:
    x = torch.arange(3.0)
    for factor in (2.0, 3.0):
        torch.testing.assert_close(Executor("compile").prepare(Scaled(factor).apply)(x), factor * x)


def test_errors_of_the_function_are_not_swallowed() -> None:
    def failing(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("the function's own")

    for mode in ("eager", "compile"):
        with pytest.raises(KeyError, match="the function's own"):
            Executor(mode).prepare(failing)(torch.ones(2))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_updates_are_the_eager_ones(precision: execution.Precision) -> None:
    """Both modes draw the same numbers, so weights and actions may differ by rounding only."""

    def run(mode: execution.ExecutionMode) -> tuple[torch.Tensor, np.ndarray, str]:
        model = RFM(
            "MlpPolicy",
            "Pendulum-v1",
            batch_size=8,
            learning_starts=20,
            seed=0,
            device="cpu",
            execution=mode,
            precision=precision,
            policy_kwargs={"net_arch": [16, 16]},
        )
        model.learn(25)
        weights = torch.cat([p.detach().flatten() for p in model.policy.parameters()])
        actions, _ = model.predict(np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3), deterministic=True)
        return weights, actions, model._executor.mode

    (eager, eager_actions, _), (compiled, compiled_actions, mode) = run("eager"), run("compile")
    assert mode == "compile"
    tolerance = 1e-5 if precision == "float32" else 5e-3
    torch.testing.assert_close(compiled, eager, rtol=0, atol=tolerance)
    np.testing.assert_allclose(compiled_actions, eager_actions, rtol=0, atol=2 * tolerance)
