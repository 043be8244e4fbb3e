"""Dictionaries with scalar entries: boxes of shape ``()``, as many tasks of the DeepMind Control Suite have them.

Stable-Baselines3's ``CombinedExtractor`` and ``DictReplayBuffer`` take entries of any other shape.
"""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.torch_layers import CombinedExtractor
from torch import Tensor, nn


def scalar_keys(space: spaces.Space) -> list[str]:
    """Keys of the scalar boxes in an observation space."""
    if not isinstance(space, spaces.Dict):
        return []
    return [key for key, entry in space.spaces.items() if isinstance(entry, spaces.Box) and entry.shape == ()]


class ToVector(nn.Module):
    """(B,) or (B, 1) → (B, 1)"""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 1)


class DictExtractor(CombinedExtractor):
    """SB3's ``CombinedExtractor``, also for scalar entries.

    :param observation_space: Dictionary of observations
    :param kwargs: Keyword arguments of ``CombinedExtractor``
    :raises ValueError: for other observations
    """

    def __init__(self, observation_space: spaces.Dict, **kwargs: Any) -> None:
        if not isinstance(observation_space, spaces.Dict):
            raise ValueError(f"MultiInputPolicy is for dictionaries; for {observation_space}, use MlpPolicy or CnnPolicy.")
        super().__init__(observation_space, **kwargs)
        for key in scalar_keys(observation_space):
            self.extractors[key] = ToVector()


class DictBuffer(DictReplayBuffer):
    """SB3's ``DictReplayBuffer``, also for scalar entries, which it stores as vectors of length one.

    The parameters are those of ``DictReplayBuffer``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scalar_keys = scalar_keys(self.observation_space)
        for key in self.scalar_keys:
            self.observations[key] = self.observations[key][..., None]
            self.next_observations[key] = self.next_observations[key][..., None]

    def add(self, obs: dict[str, np.ndarray], next_obs: dict[str, np.ndarray], *args: Any) -> None:  # type: ignore[override]
        super().add(self._to_vectors(obs), self._to_vectors(next_obs), *args)

    def _to_vectors(self, obs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return obs | {key: np.reshape(obs[key], (self.n_envs, 1)) for key in self.scalar_keys}
