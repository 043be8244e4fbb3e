"""Arguments of algorithms with which tests learn in a moment."""

from typing import Any

TINY: dict[str, Any] = {
    "learning_starts": 10,
    "batch_size": 16,
    "buffer_size": 1_000,
    "n_candidates": 4,
    "n_particles": 3,
    "n_exploration_particles": 3,
    "n_target_particles": 2,
    "integration_steps": 3,
    "policy_kwargs": {"net_arch": [16]},
    "execution": "eager",
    "seed": 0,
    "device": "cpu",
}
