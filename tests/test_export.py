"""Exported policies act as the policies they were exported from."""

import importlib.util
import math
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_rfm import QSM, RFM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import export


def test_export_trains_a_model_where_there_is_none(tmp_path: Path) -> None:
    differences = export.main(["--steps", "150", "--output", str(tmp_path)])
    assert {"policy.pt2", "policy.torchscript"} <= differences.keys()
    assert all(difference <= export.TOLERANCE for difference in differences.values())
    if importlib.util.find_spec("onnxruntime"):
        assert "policy.onnx" in differences


class Images(gym.Env):
    observation_space = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    action_space = spaces.Box(-0.5, 2.0, (2, 2))

    def reset(self, **kwargs: object) -> tuple[np.ndarray, dict]:
        return self.observation_space.sample(), {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_export_of_saved_models(tmp_path: Path) -> None:
    tiny = {"n_particles": 3, "integration_steps": 2, "buffer_size": 10, "seed": 0}
    RFM("CnnPolicy", Images(), **tiny, policy_kwargs={"net_arch": [8]}).save(tmp_path / "images")
    differences = export.main([str(tmp_path / "images"), "--output", str(tmp_path)])
    assert all(difference <= export.TOLERANCE for difference in differences.values())


def test_an_export_that_answers_otherwise_is_noticed() -> None:
    class Degenerate(gym.Env):
        """An action with one dimension that has no extent."""

        observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Box(np.float32([-1, 2]), np.float32([1, 2]))

        def reset(self, **kwargs: object) -> tuple[np.ndarray, dict]:
            return np.zeros(2, np.float32), {}

    module = export.DeterministicPolicy(RFM("MlpPolicy", Degenerate(), buffer_size=10, seed=0).policy).eval()
    example = th.zeros(3, 2)
    assert export._difference(module, module, example) <= export.TOLERANCE
    assert export._difference(module, lambda o: module(o) + th.tensor([0.5, 0.0]), example) == pytest.approx(0.25)
    assert math.isnan(export._difference(module, lambda o: module(o) * math.nan, example))


def test_dictionaries_are_refused() -> None:
    class Dictionary(Images):
        observation_space = spaces.Dict({"image": Images.observation_space})

    model = QSM("MultiInputPolicy", Dictionary(), buffer_size=10)
    with pytest.raises(ValueError, match="Box"):
        export.DeterministicPolicy(model.policy)
