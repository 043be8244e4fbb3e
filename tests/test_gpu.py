"""What only a GPU can show: recorded updates, the host that waits for nothing, models that move to the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn
from torch.distributions import MultivariateNormal

from sb3_rfm import DQS, QNE, QSM, RFM
from sb3_rfm.execution import Executor
from sb3_rfm.flow_actor_critic import FlowActorCritic
from sb3_rfm.posterior import PosteriorMeanEstimator
from sb3_rfm.recording import Recorded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Pictures(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """Observations that need an extractor: an image and a vector."""

    observation_space: spaces.Dict = spaces.Dict(  # type: ignore[assignment]
        {"image": spaces.Box(0, 255, (1, 36, 36), np.uint8), "vector": spaces.Box(-1.0, 1.0, (3,), np.float32)}
    )
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], Any]:
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), float(action[0]), False, bool(self.np_random.random() < 0.1), {}


def make(algorithm: type[FlowActorCritic] = RFM, env: Any = "Pendulum-v1", **kwargs: Any) -> FlowActorCritic:
    policy = "MultiInputPolicy" if isinstance(env, Pictures) else "MlpPolicy"
    arguments: dict[str, Any] = {
        "policy": policy,
        "env": env,
        "learning_starts": 20,
        "batch_size": 32,
        "seed": 0,
        "device": "cuda",
        "execution": "cuda_graph",
    }
    return algorithm(**arguments | kwargs)


def weights(model: FlowActorCritic) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().cpu() for parameter in model.policy.parameters()])


class AsWritten(Executor):
    """Recorded, and not compiled: the kernels are those of eager execution."""

    def prepare(self, function: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
        return function


@pytest.mark.parametrize("env", ["Pendulum-v1", Pictures()])
def test_recorded_updates_are_the_eager_ones(env: Any) -> None:
    """A recording has the same kernels, random numbers included; its learning rate has single precision."""

    def run(executor: Executor) -> torch.Tensor:
        model = make(env=env, learning_rate=lambda remaining: 1e-3 * remaining, execution=executor.mode)
        executor.device = model.device
        model._prepare_functions(executor)
        model.learn(40)
        assert isinstance(model._learner.run_update, Recorded) == (executor.mode == "cuda_graph")
        return weights(model)

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        torch.testing.assert_close(run(AsWritten("cuda_graph")), run(Executor()), rtol=0, atol=1e-6)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("error:.*could not be")
@pytest.mark.parametrize("algorithm", [RFM, QNE, DQS, QSM])
def test_updates_are_compiled_recorded_and_wait_for_nothing(algorithm: type[FlowActorCritic]) -> None:
    model = make(algorithm, max_grad_norm=1.0, proposal="replay", n_target_particles=2)
    model.learn(40)
    assert isinstance(model._learner.run_update, Recorded)
    assert len(model._learner.run_update.recordings) == 1
    batch = model.replay_buffer.sample(32)  # type: ignore[union-attr]
    torch.cuda.set_sync_debug_mode("error")
    try:
        model._learner.run_update(batch, model.gamma, model.tau, model.max_grad_norm)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_optimizers_that_keep_numbers_are_not_recorded() -> None:
    model = make(policy_kwargs={"optimizer_class": torch.optim.SGD}).learn(30)
    assert not isinstance(model._learner.run_update, Recorded)


def test_what_cannot_be_recorded_runs_as_written() -> None:
    module = nn.Linear(2, 2, device="cuda")
    run = Executor("cuda_graph", device="cuda").record(lambda x: x * float(x.sum()), module)
    x = torch.ones(3, device="cuda")
    with pytest.warns(UserWarning, match="could not be recorded as a CUDA graph"):
        results = [run(x) for _ in range(6)]
    assert all(result.tolist() == [3.0, 3.0, 3.0] for result in results)
    assert torch.rand(2, device="cuda").shape == (2,)


def test_sources_go_where_the_points_are() -> None:
    estimator = PosteriorMeanEstimator(source=MultivariateNormal(torch.zeros(2), torch.eye(2)), n_candidates=64)
    for place in ("cuda", "cpu", "cuda"):
        x_t = torch.zeros(3, 2, device=place)
        result = estimator(lambda x: -0.5 * x.square().sum(-1), x_t, torch.full((3,), 0.5, device=place))
        assert result.x1.device.type == place and bool(torch.isfinite(result.x1).all())


def test_models_move_between_gpu_and_cpu(tmp_path: Path) -> None:
    model = make().learn(40)
    model.save(tmp_path / "model")
    observations = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    expected, _ = model.predict(observations, deterministic=True)
    for device in ("cpu", "cuda"):
        loaded = RFM.load(tmp_path / "model", env=model.get_env(), device=device)
        actions, _ = loaded.predict(observations, deterministic=True)
        np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-4)
        loaded.learn(40)
        assert loaded.device.type == device
