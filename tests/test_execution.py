"""Choice of execution mode, and the fallback of what cannot be compiled."""

import contextlib
import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import nn
from torch.distributions import Categorical, Laplace, MixtureSameFamily, Normal
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_rfm import DQS, QNE, QSM, RFM, compilation, execution, recording
from sb3_rfm.actors import unsquash
from sb3_rfm.execution import Executor, resolve_mode, resolve_precision
from sb3_rfm.flow_actor_critic import FlowActorCritic

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_automatic_mode_weighs_compilation_against_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "has_compiler", lambda: True)
    assert resolve_mode("auto", CPU, n_updates=execution.MIN_UPDATES_TO_COMPILE - 1) == "eager"
    assert resolve_mode("auto", CPU, n_updates=execution.MIN_UPDATES_TO_COMPILE) == "compile"
    assert resolve_mode("auto", GPU, n_updates=10**6) == "cuda_graph"
    monkeypatch.setattr(execution, "has_compiler", lambda: False)
    assert resolve_mode("auto", CPU, n_updates=10**6) == "eager"
    assert resolve_mode("auto", GPU, n_updates=10**6) == "eager"


@pytest.mark.parametrize("execution_mode", ["eager", "compile"])
def test_explicit_mode_is_kept(execution_mode: execution.ExecutionMode) -> None:
    assert resolve_mode(execution_mode, CPU, n_updates=0) == execution_mode
    assert resolve_mode(execution_mode, GPU, n_updates=0) == execution_mode


def test_graphs_need_a_gpu() -> None:
    assert resolve_mode("cuda_graph", CPU, n_updates=0) == "compile"
    assert resolve_mode("cuda_graph", GPU, n_updates=0) == "cuda_graph"


@pytest.mark.parametrize("native", [True, False])
def test_precision_follows_the_hardware_unless_it_is_explicit(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "multiplies_bfloat16", lambda device: native)
    assert resolve_precision("auto", CPU) == native
    assert not resolve_precision("float32", CPU)
    expected = contextlib.nullcontext() if native else pytest.warns(UserWarning, match="not known to multiply in hardware")
    with expected:
        assert resolve_precision("bfloat16", CPU)


def compiled(function: Callable[..., Any], module: nn.Module | None = None) -> Callable[..., Any]:
    return Executor("compile").prepare(function, module or nn.Module())


def test_what_cannot_be_compiled_runs_as_written() -> None:
    def awkward(x: torch.Tensor) -> torch.Tensor:
        return x + len(str(x.tolist()))  # a graph has no numbers that Python could look at

    run = compiled(awkward)
    x = torch.arange(3.0)
    with pytest.warns(UserWarning, match="awkward could not be compiled"):
        first = run(x)
    torch.testing.assert_close(first, awkward(x))
    torch.testing.assert_close(run(x + 1), awkward(x + 1))


def test_a_compiler_that_fails_leaves_the_function_as_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SB3_RFM_CACHE", str(tmp_path))
    monkeypatch.setattr(compilation, "COMPILER", (sys.executable, "-c", "raise SystemExit('no space left')"))
    run = compiled(torch.sin)
    with pytest.warns(UserWarning, match="sin could not be compiled and runs eagerly: no space left"):
        assert run(torch.zeros(2)).tolist() == [0.0, 0.0]
    assert not list(tmp_path.glob("*.pt2"))


def test_a_first_compilation_warns_of_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    warned: list[str] = []
    monkeypatch.setattr("torch._inductor.package.package.log.warning", warned.append)
    monkeypatch.setenv("SB3_RFM_CACHE", str(tmp_path))
    torch.testing.assert_close(compiled(torch.cos)(torch.ones(2)), torch.ones(2).cos())
    assert list(tmp_path.glob("*.pt2")) and not warned


def test_a_damaged_library_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SB3_RFM_CACHE", str(tmp_path))
    compiled(torch.sin)(torch.ones(2))
    (library,) = tmp_path.glob("*.pt2")
    library.write_bytes(library.read_bytes()[:1000])
    compilation._load.cache_clear()  # as in another process
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(compiled(torch.sin)(torch.ones(2)), torch.ones(2).sin())
    assert library.stat().st_size > 1000


@pytest.mark.skipif(sys.platform != "linux", reason="the usual compiler has another name")
def test_the_compiler_is_the_one_that_pytorch_looks_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "clang++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not execution.has_compiler()
    monkeypatch.setenv("CXX", str(compiler))
    assert execution.has_compiler()


def test_without_a_home_libraries_may_be_kept_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("SB3_RFM_CACHE", str(tmp_path))
    assert compilation.cache_folder() == tmp_path


class Scaled(nn.Module):
    """A module whose function depends on a plain attribute, on a parameter, on a buffer and on chance."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.tensor(5.0))
        self.register_buffer("shift", torch.tensor(0.0))

    def apply(self, x: torch.Tensor) -> dict[str, Any]:  # type: ignore[override]
        y = self.factor * self.weight * x + torch.rand(3) + self.shift
        return {"y": y.detach(), "gradient": torch.autograd.grad(y.sum(), [self.weight])}


def evaluate(run: Callable[..., dict[str, Any]], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    result = run(x)
    return result["y"], result["gradient"][0]


def test_compiled_functions_follow_their_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parameters, buffers and gradients; other constants; copies; and no second compilation of the same graph."""
    monkeypatch.setenv("SB3_RFM_CACHE", str(tmp_path))
    x, module = torch.arange(3.0), Scaled(2.0)
    run = compiled(module.apply, module)
    before = torch.get_rng_state()
    torch.testing.assert_close(evaluate(run, x), evaluate(module.apply, x))
    (library,) = tmp_path.glob("*.pt2")
    with torch.no_grad():
        module.weight.fill_(7.0)
    torch.testing.assert_close(evaluate(run, x), evaluate(module.apply, x))

    torch.set_rng_state(before)
    monkeypatch.setattr(compilation, "COMPILER", (sys.executable, "-c", "raise SystemExit('must not be needed')"))
    again = Scaled(2.0)
    torch.testing.assert_close(evaluate(compiled(again.apply, again), x), evaluate(again.apply, x))
    module.shift = torch.tensor(1.0)  # another object: the graph is made anew, and is the same
    torch.testing.assert_close(evaluate(run, x), evaluate(module.apply, x))
    assert list(tmp_path.glob("*.pt2")) == [library]

    module.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):  # as the function itself says
        run(x)
    module.weight.requires_grad_(True)

    twin = copy.deepcopy(run)
    module.weight.data.fill_(0.0)
    torch.testing.assert_close(evaluate(twin, x)[0], evaluate(run, x)[0] + 14.0 * x)

    with pytest.warns(UserWarning, match="must not be needed"):  # another factor is another graph
        other = Scaled(3.0)
        torch.testing.assert_close(evaluate(compiled(other.apply, other), x), evaluate(other.apply, x))


def test_tracing_draws_no_random_numbers() -> None:
    module = Scaled(2.0)
    before = torch.get_rng_state()
    compilation.trace(module.apply, module, (torch.ones(3),))
    assert torch.equal(torch.get_rng_state(), before)


def test_compiling_shows_no_deprecation_warnings_of_the_compiler() -> None:
    """Some environment packages make them visible; in a fresh process, because a module warns when it is loaded."""
    program = """
import warnings, torch
from sb3_rfm.execution import Executor
warnings.simplefilter("always", DeprecationWarning)
assert Executor("compile").prepare(lambda x: 2 * x, torch.nn.Module())(torch.ones(3)).sum() == 6
"""
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "Warning" not in result.stderr


def test_errors_of_the_function_are_not_swallowed() -> None:
    def failing(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("the function's own")

    for mode in ("eager", "compile"):
        with pytest.raises(KeyError, match="the function's own"):
            Executor(mode).prepare(failing, nn.Module())(torch.ones(2))


def test_without_a_compiler_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return False

    monkeypatch.setattr(execution, "has_compiler", lambda: False)
    model = RFM("MlpPolicy", "Pendulum-v1", device="cpu", verbose=1)
    model.learn(100_000, callback=Stop())
    assert capsys.readouterr().out.count("No C++ compiler was found: updates run as written") == 1
    assert model._learner.executor.mode == "eager"


class ForbidWaiting(TorchDispatchMode):
    """Refuses every operation for which the host would have to wait for the device."""

    WAITING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal, torch.ops.aten.is_nonzero)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._overloadpacket not in self.WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("algorithm", [RFM, QNE, DQS, QSM])
@pytest.mark.parametrize("proposal", ["replay", "policy"])
def test_the_host_waits_for_nothing_inside_an_update(algorithm: type[FlowActorCritic], proposal: str) -> None:
    model = algorithm(
        "MlpPolicy", "Pendulum-v1", learning_starts=20, device="cpu", execution="eager", proposal=proposal, max_grad_norm=1.0
    )
    model.learn(25)
    batch = model.replay_buffer.sample(8)  # type: ignore[union-attr]
    with ForbidWaiting():
        metrics = model._learner.update(batch, model.gamma, model.tau, model.max_grad_norm)
        with pytest.raises(AssertionError, match="waits for the device"):
            metrics[0].item()


@pytest.mark.filterwarnings("error:.*could not be compiled")
@pytest.mark.parametrize(
    ("algorithm", "precision", "temperature", "mode", "tolerance"),
    [
        (RFM, "float32", 1.0, "compile", 1e-5),
        (RFM, "bfloat16", "auto", "compile", 1e-3),
        (QNE, "bfloat16", "auto", "compile", 1e-3),
        (QSM, "float32", "auto", "compile", 1e-6),
    ],
)
def test_compiled_gradients_are_the_eager_ones(
    algorithm: type[FlowActorCritic], precision: execution.Precision, temperature: float | str, mode: Any, tolerance: float
) -> None:
    """Both modes draw the same numbers, so what differs is rounding: a small part of the largest gradient.

    An importance weight is as uncertain as its exponent, eps |Q| / λ, and |Q| is 2.3 here. QSM has none. Where
    the modes round one number of bfloat16 differently, a state's target differs by as much as bfloat16 does to it; among
    256 states that hardly counts. Two action dimensions, because the regression weights of a single one are 1.
    """
    model = algorithm(
        "MlpPolicy",
        "Reacher-v5",
        learning_starts=20,
        temperature=temperature,
        weighting="gradient",
        seed=0,
        device="cpu",
        execution="eager",
        precision=precision,
    )
    model.learn(60)
    batch = model.replay_buffer.sample(256)  # type: ignore[union-attr]
    now, after, rewards = batch.observations.float(), batch.next_observations.float(), batch.rewards.flatten()
    _, q, _ = model._learner.next_actions(after, after)
    arguments: dict[Callable[..., Any], Any] = {
        model._learner.critic_gradients: (now, batch.actions, rewards + 0.99 * q),
        model._learner.actor_gradients: (now, now, unsquash(batch.actions)),
    }

    def run(executor: Executor) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        latents, q, _ = executor.prepare(model._learner.next_actions, model.policy)(after, after)
        results = [executor.prepare(function, model.policy)(*args) for function, args in arguments.items()]
        return latents, q, torch.cat([gradient.flatten() for result in results for gradient in result.parameters])

    for eager, other in zip(run(Executor()), run(Executor(mode)), strict=True):
        torch.testing.assert_close(other, eager, rtol=0, atol=tolerance * float(eager.abs().max()))


def test_a_copy_of_a_compiled_model_learns_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a graph takes the place of the library made of it. The copy runs as written."""
    monkeypatch.setattr(execution, "load_library", lambda graph, inputs: lambda tensors: graph(*tensors))
    model = RFM("MlpPolicy", "Pendulum-v1", learning_starts=20, batch_size=16, seed=0, device="cpu", execution="compile")
    model.learn(25)
    other = copy.deepcopy(model)
    before = [tensor.clone() for tensor in tensors_of(model)]
    learned = []
    for learner in (other, model):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        learner.train(5, 16)
        learned.append([tensor.clone() for tensor in tensors_of(learner)])
        if learner is other:
            assert all(map(torch.equal, tensors_of(model), before))
    torch.testing.assert_close(*learned, rtol=1e-4, atol=1e-5)


MIXTURE = MixtureSameFamily(Categorical(torch.ones(2)), Normal(torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.5])))


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        (
            RFM,
            {
                "coefficient": [0.5],
                "n_particles": 2,
                "n_exploration_particles": 3,
                "n_target_particles": 2,
                "proposal": "replay",
            },
        ),
        (RFM, {"coefficient": "diagonal", "sampler": "sde", "path": "cosine"}),
        (RFM, {"source": Laplace(0.0, 1.0)}),
        (QNE, {"source": MIXTURE, "path": "ve"}),
        (QSM, {"sampler": "langevin", "path": "linear_vp", "policy_kwargs": {"layer_norm": False, "net_arch": []}}),
    ],
)
def test_whatever_is_chosen_becomes_a_graph(algorithm: type[FlowActorCritic], arguments: dict[str, Any]) -> None:
    model = algorithm("MlpPolicy", "Pendulum-v1", device="cpu", execution="eager", **arguments)
    states, actions = torch.zeros(4, 3), torch.zeros(4, 1)
    compilation.trace(model._learner.next_actions, model.policy, (states, states))
    compilation.trace(model._learner.critic_gradients, model.policy, (states, actions, torch.zeros(4)))
    compilation.trace(model._learner.actor_gradients, model.policy, (states, states, actions))
    for deterministic, n_particles in ((False, model.n_exploration_particles), (True, model.n_particles)):
        features = states if n_particles > 1 else None
        compilation.trace(model.policy.act, model.policy, (states, features, torch.zeros(4, n_particles, 1), deterministic))


@pytest.mark.filterwarnings("error:.*could not be compiled")
def test_compiled_runs_are_the_eager_ones() -> None:
    """After some updates, weights and actions differ by rounding only."""

    def run(mode: execution.ExecutionMode) -> tuple[torch.Tensor, np.ndarray, str]:
        model = RFM(
            "MlpPolicy",
            "Pendulum-v1",
            batch_size=8,
            learning_starts=20,
            seed=0,
            device="cpu",
            execution=mode,
            precision="float32",
            policy_kwargs={"net_arch": [16, 16]},
        )
        model.learn(25)
        weights = torch.cat([p.detach().flatten() for p in model.policy.parameters()])
        actions, _ = model.predict(np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3), deterministic=True)
        return weights, actions, model._learner.executor.mode

    (eager, eager_actions, _), (compiled, compiled_actions, mode) = run("eager"), run("compile")
    assert mode == "compile"
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)
    np.testing.assert_allclose(compiled_actions, eager_actions, rtol=0, atol=2e-5)


class FakeGraph:
    """What a CUDA graph does, on the CPU: operations are recorded once, and replayed on the same tensors.

    :param state: What recording must leave as it is
    """

    def __init__(self, state: Callable[[], list[torch.Tensor]]) -> None:
        self.state = state
        self.tape: list[tuple[Any, Any, Any, Any]] = []

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        tape, before, random_state = self.tape, [tensor.clone() for tensor in self.state()], torch.get_rng_state()

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                # Aliases, because the shape of a tensor may be changed in place.
                read = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
                out = func(*args, **(kwargs or {}))
                if func.namespace == "aten":  # and not "profiler"
                    tape.append((func, *read, pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, out)))
                return out

        with Recorder():
            yield
        with torch.no_grad():
            torch._foreach_copy_(self.state(), before)
        torch.set_rng_state(random_state)

    def replay(self) -> None:
        for func, args, kwargs, out in self.tape:
            new = func(*args, **kwargs)
            if all(returned.alias_info is None for returned in func._schema.returns):  # neither views nor changed in place
                for was, now in zip(pytree.tree_leaves(out), pytree.tree_leaves(new), strict=True):
                    if isinstance(now, torch.Tensor):
                        was.copy_(now)


@pytest.mark.parametrize(
    "arguments",
    [
        {"learning_rate": lambda remaining: 1e-3 * remaining},
        {
            "proposal": "replay",
            "n_target_particles": 2,
            "n_exploration_particles": 2,
            "max_grad_norm": 0.1,
            "temperature": 0.1,
        },
    ],
)
def test_a_recorded_update_is_the_update(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever changes from one update to the next must be read from tensors, or be recorded anew."""

    class Recording(Executor):
        def prepare(self, function: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
            return function

        def load(self, source: Callable[..., Any]) -> Any:
            return source()

    graphs: list[FakeGraph] = []

    def run() -> tuple[RFM, np.ndarray]:
        model = RFM("MlpPolicy", "Pendulum-v1", batch_size=8, learning_starts=20, seed=0, device="cpu", **arguments)
        model._prepare_functions(Recording("cuda_graph"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(FakeGraph(lambda: tensors_of(model))) or graphs[-1])
        model.learn(32)
        model.tau = 0.5
        model.learn(10, reset_num_timesteps=False)
        model.set_parameters(model.get_parameters())  # the optimizers get other tensors
        model.learn(10, reset_num_timesteps=False)
        model.policy.load_from_vector(0.9 * model.policy.parameters_to_vector())  # other memory
        model.learn(10, reset_num_timesteps=False)
        model.actor.optimizer.state.clear()
        model.learn(2, reset_num_timesteps=False)
        model.critic.optimizer.param_groups[0]["weight_decay"] = 0.1
        model.learn(10, reset_num_timesteps=False)
        model.actor.optimizer = torch.optim.Adam(model.actor.parameters(), fused=True)
        model.learn(10, reset_num_timesteps=False)
        actions, _ = model.predict(np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3))
        return model, actions

    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph.record())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr("sb3_rfm.flow_actor_critic.resolve_mode", lambda *_, **__: "cuda_graph")
    recorded, recorded_actions = run()
    assert len(graphs) >= 6  # one for each change
    monkeypatch.setattr(recording, "CALLS_BEFORE_RECORDING", 10**9)
    graphs.clear()
    written, written_actions = run()
    assert not graphs
    for a, b in zip(tensors_of(recorded), tensors_of(written), strict=True):
        assert torch.equal(a, b)
    np.testing.assert_array_equal(recorded_actions, written_actions)


def test_what_waits_for_the_device_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    mode: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: "default")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)

    def look(x: torch.Tensor) -> torch.Tensor:
        if mode[-1:] == ["warn"]:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        return x * float(x.sum())

    run, x = Executor("cuda_graph").record(look, nn.Module()), torch.ones(3)
    with pytest.warns(UserWarning) as caught:
        assert all(run(x).tolist() == [3.0, 3.0, 3.0] for _ in range(6))
    (warning,) = caught
    assert str(warning.message) == "look could not be recorded as a CUDA graph: the host waits for the device in it."
    assert mode == ["warn", "default"]


def test_numbers_that_always_change_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does anything grow with them: an annealed ``tau`` is another argument at each call."""
    monkeypatch.setattr(recording, "CALLS_BEFORE_RECORDING", 10**9)
    run: Any = Executor("cuda_graph").record(lambda x, tau: tau * x, nn.Module())
    for i in range(100):
        assert run(torch.ones(2), i / 100).tolist() == pytest.approx([i / 100] * 2)
    assert len(run.calls) == compilation.MAX_SHAPES


def tensors_of(model: FlowActorCritic) -> list[torch.Tensor]:
    """Everything that an update changes."""
    optimizers = (model.actor.optimizer, model.critic.optimizer)
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return [*model.policy.parameters(), *model.policy.buffers(), *states]


def test_a_model_that_was_moved_to_the_cpu_is_not_recorded() -> None:
    layer, calls = nn.Linear(2, 2), 10
    recorded = recording.Recorded(layer.forward, layer, tuple, torch.device("cuda"))
    for i in range(calls):
        x = torch.full((1, 2), float(i))
        torch.testing.assert_close(recorded(x), layer(x))
