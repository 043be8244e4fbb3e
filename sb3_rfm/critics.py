"""Ensembles of Q-functions that learn numbers of one size, whatever the unit of the reward."""

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor, nn

from sb3_rfm.networks import ConditionalMLP
from sb3_rfm.persistence import PersistentModel


class QCritic(PersistentModel):
    """Ensemble of Q-functions, ``Q(s, a) = scale * network(s, a)``, in units of the reward.

    ``scale`` is the size of one reward (see :meth:`rescale`): the networks then learn numbers of the same size whatever
    the units of the reward are.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Widths of the hidden layers
    :param features_extractor: Network that turns observations into features
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param normalize_images: Whether to divide images by 255
    :param n_critics: Number of Q-functions
    :param layer_norm: Whether to normalise the hidden layers
    :param share_features_extractor: Whether the extractor belongs to the actor, and is not trained by the critic's loss
    """

    features_extractor: BaseFeaturesExtractor
    optimizer: th.optim.Optimizer
    scale: Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 2,
        layer_norm: bool = True,
        share_features_extractor: bool = False,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        action_dim = get_action_dim(action_space)
        self.net_arch = net_arch
        self.features_dim = features_dim
        self.activation_fn = activation_fn
        self.layer_norm = layer_norm
        self.share_features_extractor = share_features_extractor
        self.n_critics = n_critics
        self.q_networks = nn.ModuleList(
            ConditionalMLP(features_dim, action_dim, 1, net_arch, activation_fn, layer_norm) for _ in range(n_critics)
        )
        self.register_buffer("scale", th.ones(()))

    @property
    def _networks(self) -> list[ConditionalMLP]:
        return list(self.q_networks)  # type: ignore[arg-type]

    def features(self, obs: PyTorchObs) -> Tensor:
        """Features of observations, (B, F)."""
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            return self.extract_features(obs, self.features_extractor)

    def encode(self, features: Tensor) -> list[Tensor]:
        """What each Q-function needs of the features, one (B, H) each."""
        return [network.encode(features) for network in self._networks]

    def q_values(self, encoded: list[Tensor], actions: Tensor, reduced: bool = False) -> Tensor:
        """Q-values in units of the reward.

        :param encoded: Result of :meth:`encode`
        :param actions: (B, D) or (B, K, D), in [-1, 1]
        :param reduced: Multiply matrices in bfloat16; of K actions, only what distinguishes them is computed so, see
            :meth:`ConditionalMLP.decode_differences`
        :return: (n_critics, B) or (n_critics, B, K)
        """
        return self.scale * th.stack([self._answer(i, e, actions, reduced) for i, e in enumerate(encoded)])

    def min_q(self, encoded: list[Tensor], actions: Tensor, reduced: bool = False) -> Tensor:
        """Minimum over the ensemble, (B,) or (B, K)."""
        return self.q_values(encoded, actions, reduced).amin(0)

    def split_q(self, encoded: list[Tensor], actions: Tensor, reduced: bool = False) -> Tensor:
        """Q-values of one critic for each state: row i is answered by critic ``i mod n_critics``.

        A loss that averages over the batch then averages over the critics too, at the cost of one. Where they differ, its
        optimum is the average of what follows from each critic, and not what follows from their average.

        :param encoded: Result of :meth:`encode`
        :param actions: (B, D) or (B, K, D), in [-1, 1]
        :param reduced: See :meth:`q_values`
        :return: (B,) or (B, K)
        """
        n, values = self.n_critics, actions.new_empty(actions.shape[:-1])
        for i, e in enumerate(encoded):
            values = th.slice_scatter(values, self._answer(i, e[i::n], actions[i::n], reduced), start=i, step=n)
        return self.scale * values

    def _answer(self, index: int, encoded: Tensor, actions: Tensor, reduced: bool) -> Tensor:
        """What one network says, in its own units."""
        network = self._networks[index]
        if reduced and actions.dim() == 3:
            return network.decode_differences(encoded, actions).squeeze(-1)
        return network.decode(encoded, actions, reduced).squeeze(-1)

    def forward(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, ...]:
        """Q-values of each critic.

        :param obs: Observations
        :param actions: (B, D), in [-1, 1]
        :return: One (B, 1) for each critic
        """
        return tuple(q.unsqueeze(-1) for q in self.q_values(self.encode(self.features(obs)), actions))

    @th.no_grad()
    def rescale(self, scale: Tensor) -> None:
        """Change the unit of the networks, leaving every Q-value as it is (Pop-Art, arXiv 1602.07714, without the shift).

        :param scale: New positive scale, a scalar
        """
        outputs = [p.data for network in self._networks for p in network.output_layer.parameters()]
        th._foreach_mul_(outputs, self.scale / scale)
        self.scale.copy_(scale)
