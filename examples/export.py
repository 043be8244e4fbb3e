"""Export a trained policy, to run it without this package: as ONNX, ``torch.export`` and TorchScript.

.. code-block:: bash

    python examples/export.py model.zip --output exported     # a model saved by `model.save("model")`
    python examples/export.py                                 # trains a small one first

What is exported is the deterministic policy, from observations to actions in the units of the environment, for any batch
size. Each file is loaded again and compared with the policy. ONNX needs the extra ``export``.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from torch import Tensor, nn

from sb3_rfm import RFM
from sb3_rfm.policies import FlowPolicy

TOLERANCE = 1e-4
"""Largest difference to the policy, as a share of the extent of the action space: what rounding in another order may cost."""


class DeterministicPolicy(nn.Module):
    """The deterministic policy as a pure function of the observation.

    :param policy: A policy whose observations are a ``Box`` (dictionaries have no common form in the formats written here)
    :raises ValueError: for other observations
    """

    low: Tensor
    high: Tensor

    def __init__(self, policy: FlowPolicy) -> None:
        super().__init__()
        if not isinstance(policy.observation_space, spaces.Box):
            raise ValueError(f"Only Box observations can be exported here, not {policy.observation_space}.")
        assert isinstance(policy.action_space, spaces.Box)
        self.policy = policy
        self.register_buffer("low", th.as_tensor(policy.action_space.low, dtype=th.float32))
        self.register_buffer("high", th.as_tensor(policy.action_space.high, dtype=th.float32))

    def forward(self, observations: Tensor) -> Tensor:
        """(B, *observation shape) → (B, *action shape)"""
        policy = self.policy
        actor_features, critic_features = policy.acting_features(observations, policy.n_particles)
        noise = policy.fixed_noise.expand(actor_features.shape[0], -1, -1)
        actions = policy.act(actor_features, critic_features, noise, deterministic=True)
        share = 0.5 * (actions.reshape(-1, *self.low.shape) + 1)
        return ((1 - share) * self.low + share * self.high).clamp(self.low, self.high)


def export_torch(module: DeterministicPolicy, example: Tensor, path: Path) -> float:
    """Write ``torch.export``'s format; return the largest difference to the policy."""
    program = th.export.export(module, (example,), dynamic_shapes=({0: th.export.Dim("batch")},))
    th.export.save(program, path)
    loaded = th.export.load(path).module()
    return _difference(module, lambda observations: loaded(observations), example)


def export_torchscript(module: DeterministicPolicy, example: Tensor, path: Path) -> float:
    """Write TorchScript; return the largest difference to the policy."""
    th.jit.save(th.jit.trace(module, (example,)), str(path))
    return _difference(module, th.jit.load(str(path)), example)


def export_onnx(module: DeterministicPolicy, example: Tensor, path: Path) -> float:
    """Write ONNX; return the largest difference to the policy."""
    import onnxruntime

    th.onnx.export(
        module,
        (example,),
        path,
        input_names=["observations"],
        output_names=["actions"],
        dynamo=True,
        dynamic_shapes=({0: th.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(observations: Tensor) -> Tensor:
        return th.as_tensor(session.run(None, {"observations": observations.numpy()})[0])

    return _difference(module, run, example)


def _difference(module: DeterministicPolicy, exported: object, example: Tensor) -> float:
    """Largest difference to what the policy itself predicts, for several batch sizes, as a share of the action space."""
    assert callable(exported)
    space = module.policy.observation_space
    extent = (module.high - module.low).numpy()
    extent = np.where(extent > 0, extent, 1.0)
    worst = np.float64(0.0)
    for batch_size in (1, 2, len(example)):
        observations = example[:batch_size]
        expected, _ = module.policy.predict(observations.numpy().astype(space.dtype), deterministic=True)
        with th.no_grad():
            actions = exported(observations).numpy()
        worst = np.maximum(worst, np.abs((actions - expected) / extent).max())  # not-a-number if either is
    return float(worst)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Export a model.

    :param arguments: Command line
    :return: Largest difference to the policy for each format
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", help="saved model; default: train a small one on Pendulum-v1")
    parser.add_argument("--output", type=Path, default=Path("exported"), help="folder for the files")
    parser.add_argument("--steps", type=int, default=2_000, help="training steps where there is no model")
    options = parser.parse_args(arguments)

    model = RFM.load(options.model, device="cpu") if options.model else RFM("MlpPolicy", "Pendulum-v1").learn(options.steps)
    policy = model.policy.to("cpu")
    policy.set_training_mode(False)
    module = DeterministicPolicy(policy).eval()
    space = policy.observation_space
    # Sizes that happen to be equal would be taken for one and the same by the tracers.
    example = np.stack([space.sample() for _ in range(policy.n_particles + 1)])
    example_tensor = th.as_tensor(example, dtype=th.uint8 if is_image_space(space) else th.float32)

    options.output.mkdir(parents=True, exist_ok=True)
    formats = {"policy.pt2": export_torch, "policy.torchscript": export_torchscript}
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        formats["policy.onnx"] = export_onnx
    else:
        print("ONNX is left out: it needs the extra `export`.")
    differences = {}
    for name, export in formats.items():
        differences[name] = export(module, example_tensor, options.output / name)
        print(f"{options.output / name}: largest difference to the policy {differences[name]:.1e} of the action space")
        assert differences[name] <= TOLERANCE, "the exported policy acts differently"
    return differences


if __name__ == "__main__":
    main()
