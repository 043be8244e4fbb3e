"""Flow policies: actors that act by integrating a flow, with the critics that choose among their particles.

The flow lives in an unbounded latent ``u`` with action ``a = tanh(u)``. The actor predicts the data end of the path,
``E[u_1 | u_t]``, with a bounded output: every sampling step then moves towards a bounded point, and integration cannot
diverge whatever the weights are.
"""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    FlattenExtractor,
    NatureCNN,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import ConstantSchedule
from torch import Tensor, nn

from sb3_rfm.dict_observations import DictExtractor
from sb3_rfm.networks import ConditionalMLP, TimeEmbedding
from sb3_rfm.paths import Path, get_path
from sb3_rfm.persistence import PersistentModel
from sb3_rfm.samplers import denoise, langevin, time_grid

LATENT_BOUND = 4.0
"""Largest latent a flow can predict; tanh(4) = 0.9993."""


def squash(latents: Tensor) -> Tensor:
    """Actions in (-1, 1) of latents, of any shape."""
    return th.tanh(latents)


def unsquash(actions: Tensor) -> Tensor:
    """Latents of actions, clipped to the range that a flow can predict."""
    limit = np.tanh(LATENT_BOUND).item()
    return th.atanh(actions.clamp(-limit, limit))


class BoundedPolicy(PersistentModel, BasePolicy):
    """A policy whose actions never leave their box by a rounding, however small, large or degenerate it is."""

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """Rescale actions from the action space to [-1, 1]; 0 where the box has no extent."""
        low, high, dtype = self._bounds()
        # In halves, because the extent of a box may be more than the largest number.
        extent = 0.5 * high - 0.5 * low
        share = (0.5 * action - 0.5 * low) / np.where(extent > 0, extent, 1.0)
        return np.where(extent > 0, np.clip(2 * share - 1, -1, 1), 0.0).astype(dtype)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """Rescale actions from [-1, 1] to the action space."""
        low, high, dtype = self._bounds()
        share = 0.5 * (np.asarray(scaled_action, np.float64) + 1)
        # The bounds are clipped to in their own precision: rounded to it, a number below one may be above it.
        return np.clip(((1 - share) * low + share * high).astype(dtype), low.astype(dtype), high.astype(dtype))

    def _bounds(self) -> tuple[np.ndarray, np.ndarray, Any]:
        box = self.action_space
        assert isinstance(box, spaces.Box)
        return box.low.astype(np.float64), box.high.astype(np.float64), box.dtype


class FlowActor(BoundedPolicy):
    """The flow: a bounded prediction of the data end of the path at ``(s, u_t, t)``, and the sampler that follows it.

    On its own it is a policy of one particle; the deterministic one starts from the centre of the source.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Widths of the hidden layers
    :param features_extractor: Network that turns observations into features
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param normalize_images: Whether to divide images by 255
    :param path: Probability path of the flow
    :param sampler: ``"ode"``, ``"sde"`` (reverse diffusion) or ``"langevin"``
    :param integration_steps: Steps from noise to action
    :param t_min: Time at which sampling starts
    """

    features_extractor: BaseFeaturesExtractor
    optimizer: th.optim.Optimizer
    network: ConditionalMLP
    times: Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        path: str | Path = "cond_ot",
        sampler: str = "ode",
        integration_steps: int = 5,
        t_min: float = 0.01,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
            squash_output=True,
        )
        self.net_arch = net_arch
        self.features_dim = features_dim
        self.activation_fn = activation_fn
        self.action_dim = get_action_dim(action_space)
        self.time_embedding = TimeEmbedding()
        self.network = ConditionalMLP(
            features_dim, self.action_dim + self.time_embedding.dim, self.action_dim, net_arch, activation_fn
        )
        self.configure_sampling(path, sampler, integration_steps, t_min)

    def configure_sampling(self, path: str | Path, sampler: str, integration_steps: int, t_min: float) -> None:
        """Choose how latents are drawn from the flow; see the class for the parameters."""
        self.path, self.sampler, self.integration_steps, self.t_min = path, sampler, integration_steps, t_min
        self._path = get_path(path)
        self.register_buffer("times", time_grid(integration_steps, t_min, device=self.device), persistent=False)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            net_arch=self.net_arch,
            features_extractor=self.features_extractor,
            features_dim=self.features_dim,
            activation_fn=self.activation_fn,
            path=self.path,
            sampler=self.sampler,
            integration_steps=self.integration_steps,
            t_min=self.t_min,
        )
        return data

    def features(self, obs: PyTorchObs) -> Tensor:
        """Features of observations, (B, F)."""
        return self.extract_features(obs, self.features_extractor)

    def predict_data(self, encoded: Tensor, latents: Tensor, t: Tensor, reduced: bool = False) -> Tensor:
        """``E[u_1 | u_t]``, within ``LATENT_BOUND``.

        :param encoded: ``network.encode(features)``, (B, H)
        :param latents: ``u_t``, (B, D) or (B, P, D)
        :param t: Times, (B,) for (B, D), or a scalar for all
        :param reduced: See :meth:`ConditionalMLP.decode`
        :return: Shape of ``latents``
        """
        embedding = self.time_embedding(t)
        embedding = embedding.expand(latents.shape[:-1] + embedding.shape[-1:])
        output = self.network.decode(encoded, th.cat([latents, embedding], dim=-1), reduced)
        return LATENT_BOUND * th.tanh(output / LATENT_BOUND)

    def sample_latents(self, features: Tensor, noise: Tensor, deterministic: bool = False, reduced: bool = False) -> Tensor:
        """Carry noise to latents ``u_1`` along the flow.

        :param features: Actor features, (B, F)
        :param noise: Source samples, (B, P, D)
        :param deterministic: Follow the ODE whatever the sampler; it has the same marginals and draws no noise
        :param reduced: See :meth:`ConditionalMLP.decode`
        :return: (B, P, D)
        """
        encoded = self.network.encode(features)
        times = self.times

        def data_prediction(x: Tensor, t: Tensor) -> Tensor:
            return self.predict_data(encoded, x, t, reduced)

        x = self._path.sigma(times[0]) * noise
        if self.sampler == "langevin" and not deterministic:
            # At the last noise level before the data, where the path's density is nearly the target's own.
            t = times[-2]
            alpha, sigma = self._path.alpha(t), self._path.sigma(t)
            x = langevin(lambda u: (alpha * data_prediction(u, t) - u) / sigma**2, x, 0.5 * sigma**2, self.integration_steps)
            return data_prediction(x, t)
        noise_scale = 1.0 if self.sampler == "sde" and not deterministic else 0.0
        return denoise(data_prediction, x, times, self._path, noise_scale)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        features = self.features(observation)
        shape = (len(features), 1, self.action_dim)
        noise = (th.zeros if deterministic else th.randn)(shape, device=features.device)
        return squash(self.sample_latents(features, noise, deterministic)[:, 0])


class QCritic(BaseModel):
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
        share_features_extractor: bool = True,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        action_dim = get_action_dim(action_space)
        self.share_features_extractor = share_features_extractor
        self.n_critics = n_critics
        networks = [ConditionalMLP(features_dim, action_dim, 1, net_arch, activation_fn) for _ in range(n_critics)]
        self.q_networks = nn.ModuleList(networks)
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
        :param reduced: Compute what distinguishes the K actions in bfloat16, see :meth:`ConditionalMLP.decode_differences`
        :return: (n_critics, B) or (n_critics, B, K)
        """
        pairs = zip(self._networks, encoded, strict=True)
        if reduced:
            values = [network.decode_differences(e, actions).squeeze(-1) for network, e in pairs]
        else:
            values = [network.decode(e, actions).squeeze(-1) for network, e in pairs]
        return self.scale * th.stack(values)

    def min_q(self, encoded: list[Tensor], actions: Tensor, reduced: bool = False) -> Tensor:
        """Minimum over the ensemble, (B,) or (B, K)."""
        return self.q_values(encoded, actions, reduced).amin(0)

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


class FlowPolicy(BoundedPolicy):
    """Policy of the flow actor-critics: a flow actor, a critic ensemble and its target.

    Acting draws ``n_particles`` latents from the flow and picks one with probability ∝ exp(min Q / temperature); the
    deterministic policy starts from a fixed set of noises and picks the best.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule
    :param net_arch: Widths of the hidden layers, a list or ``dict(pi=[...], qf=[...])``
    :param activation_fn: Activation function
    :param features_extractor_class: Features extractor
    :param features_extractor_kwargs: Its keyword arguments
    :param normalize_images: Whether to divide images by 255
    :param optimizer_class: Optimizer of actor and critic
    :param optimizer_kwargs: Its keyword arguments, without the learning rate
    :param n_critics: Number of Q-functions
    :param share_features_extractor: Whether actor and critic share the features extractor
    :param path: Probability path of the flow
    :param sampler: ``"ode"``, ``"sde"`` (reverse diffusion) or ``"langevin"``
    :param integration_steps: Steps from noise to action
    :param n_particles: Particles to choose among when acting
    :param t_min: Time at which sampling starts
    """

    actor: FlowActor
    critic: QCritic
    critic_target: QCritic
    temperature: Tensor
    n_rewarded_batches: Tensor
    fixed_noise: Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        path: str | Path = "cond_ot",
        sampler: str = "ode",
        integration_steps: int = 5,
        n_particles: int = 8,
        t_min: float = 0.01,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
            normalize_images=normalize_images,
        )
        self.net_arch = [256, 256] if net_arch is None else net_arch
        self.activation_fn = activation_fn
        self.n_critics = n_critics
        self.share_features_extractor = share_features_extractor
        self.register_buffer("temperature", th.ones(()))
        self.register_buffer("n_rewarded_batches", th.zeros(()))
        self.run_act = self.act
        self._build(lr_schedule)
        self.configure_sampling(path, sampler, integration_steps, n_particles, t_min)

    def configure_sampling(
        self, path: str | Path, sampler: str, integration_steps: int, n_particles: int, t_min: float
    ) -> None:
        """Choose how actions are drawn from the flow; see the class for the parameters."""
        self.actor.configure_sampling(path, sampler, integration_steps, t_min)
        self.n_particles = n_particles
        # The deterministic policy is a function of observation and weights alone: its noise never changes.
        noise = th.randn(n_particles, get_action_dim(self.action_space), generator=th.Generator().manual_seed(0))
        noise[0] = 0.0
        self.register_buffer("fixed_noise", noise.to(self.device), persistent=False)

    def _build(self, lr_schedule: Schedule) -> None:
        pi_arch, qf_arch = get_actor_critic_arch(self.net_arch)
        common = {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "activation_fn": self.activation_fn,
            "normalize_images": self.normalize_images,
        }
        actor_kwargs = self._update_features_extractor({**common, "net_arch": pi_arch})
        self.actor = FlowActor(**actor_kwargs).to(self.device)

        critic_kwargs = {
            **common,
            "net_arch": qf_arch,
            "n_critics": self.n_critics,
            "share_features_extractor": self.share_features_extractor,
        }
        shared = self.actor.features_extractor if self.share_features_extractor else None
        self.critic = QCritic(**self._update_features_extractor(critic_kwargs, shared)).to(self.device)
        self.critic_target = QCritic(**self._update_features_extractor(critic_kwargs)).to(self.device)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.set_training_mode(False)

        self.actor.optimizer = self._make_optimizer(self.actor.parameters(), lr_schedule)
        # A shared extractor is trained by the actor's loss alone.
        own = [p for name, p in self.critic.named_parameters() if shared is None or "features_extractor" not in name]
        self.critic.optimizer = self._make_optimizer(own, lr_schedule)

    def _make_optimizer(self, parameters: Any, lr_schedule: Schedule) -> th.optim.Optimizer:
        kwargs = dict(self.optimizer_kwargs)
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW) and not {"fused", "foreach", "capturable"} & set(kwargs):
            kwargs["fused"] = True  # the same update in one kernel; several times cheaper on the CPU
        return self.optimizer_class(parameters, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            net_arch=self.net_arch,
            activation_fn=self.activation_fn,
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            lr_schedule=ConstantSchedule(0.0),
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            n_critics=self.n_critics,
            share_features_extractor=self.share_features_extractor,
            path=self.actor.path,
            sampler=self.actor.sampler,
            integration_steps=self.actor.integration_steps,
            n_particles=self.n_particles,
            t_min=self.actor.t_min,
        )
        return data

    def set_training_mode(self, mode: bool) -> None:
        """Put actor and critic in training or evaluation mode; the target critic stays in evaluation mode."""
        if mode == self.training:
            return  # called before every action and every update, and walking the modules is not free
        self.actor.set_training_mode(mode)
        self.critic.set_training_mode(mode)
        self.training = mode

    def choose_index(self, q: Tensor, deterministic: bool = False) -> Tensor:
        """Choose one particle of each state.

        :param q: min Q of the particles, (B, P)
        :param deterministic: Take the best, instead of one with probability ∝ exp(q / temperature)
        :return: Indices, (B, 1)
        """
        if not deterministic:
            # Gumbel-max: an exact draw from softmax(q / temperature).
            q = q / self.temperature - th.empty_like(q).exponential_().log()
        return q.argmax(dim=1, keepdim=True)

    def act(self, actor_features: Tensor, critic_features: Tensor, noise: Tensor, deterministic: bool) -> Tensor:
        """Actions in (-1, 1) for features, from given noise (B, P, D)."""
        latents = self.actor.sample_latents(actor_features, noise, deterministic)
        if noise.shape[1] == 1:
            return squash(latents[:, 0])
        q = self.critic.min_q(self.critic.encode(critic_features), squash(latents))
        index = self.choose_index(q, deterministic).unsqueeze(-1)
        return squash(th.take_along_dim(latents, index, dim=1).squeeze(1))

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self._predict(obs, deterministic=deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        actor_features = self.actor.features(observation)
        critic_features = self.critic.features(observation)
        shape = (actor_features.shape[0], *self.fixed_noise.shape)
        noise = self.fixed_noise.expand(shape) if deterministic else th.randn(shape, device=self.device)
        return self.run_act(actor_features, critic_features, noise, deterministic)


MlpPolicy = FlowPolicy


class CnnPolicy(FlowPolicy):
    """:class:`FlowPolicy` for images: the same parameters, with SB3's NatureCNN as features extractor."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, features_extractor_class=features_extractor_class, **kwargs
        )


class MultiInputPolicy(FlowPolicy):
    """:class:`FlowPolicy` for dictionaries: the same parameters, with :class:`~sb3_rfm.dict_observations.DictExtractor`."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        features_extractor_class: type[BaseFeaturesExtractor] = DictExtractor,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, features_extractor_class=features_extractor_class, **kwargs
        )
