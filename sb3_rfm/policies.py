"""Flow policies: actors that act by integrating a flow, with the critics that choose among their particles."""

from typing import Any, TypeVar

import torch as th
from gymnasium import spaces
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
from torch.distributions import Distribution

from sb3_rfm.actors import BoundedPolicy, FlowActor, squash
from sb3_rfm.checks import check_integer
from sb3_rfm.critics import QCritic
from sb3_rfm.dict_observations import DictExtractor
from sb3_rfm.paths import Path
from sb3_rfm.sources import Source, get_source

SelfFlowPolicy = TypeVar("SelfFlowPolicy", bound="FlowPolicy")


class FlowPolicy(BoundedPolicy):
    """Policy of the flow actor-critics: a flow actor, a critic ensemble and its target.

    ``"MlpPolicy"`` is this class. The parameters from ``path`` on are the algorithm's own arguments, not ``policy_kwargs``.

    Exploring draws ``n_exploration_particles`` latents from the flow and picks one with probability
    ∝ exp(min Q / temperature); the deterministic policy starts from a fixed set of ``n_particles`` noises and picks the best.

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
    :param layer_norm: Whether to normalise the hidden layers of the Q-functions (see Ball et al., arXiv 2302.02948)
    :param share_features_extractor: Whether actor and critic share the features extractor
    :param path: Probability path of the flow
    :param source: Where the flow starts: ``"gaussian"``, a ``torch.distributions`` distribution or a
        :class:`~sb3_rfm.sources.Source`
    :param sampler: ``"ode"`` (steps of second order, shorter towards the data), ``"euler"`` (even steps of first order, as in
        the papers), ``"sde"`` (reverse diffusion, in steps as those of ``"ode"``) or ``"langevin"`` (the ODE, and a Langevin
        step near its end)
    :param integration_steps: Steps from noise to action
    :param n_particles: Particles of which the deterministic policy takes the best
    :param n_exploration_particles: Particles to choose among when exploring
    :param t_min: First time for which the flow is trained
    """

    actor: FlowActor
    critic: QCritic
    critic_target: QCritic
    temperature: Tensor
    n_batches: Tensor
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
        layer_norm: bool = True,
        share_features_extractor: bool = False,
        path: str | Path = "cond_ot",
        source: str | Source | Distribution = "gaussian",
        sampler: str = "ode",
        integration_steps: int = 5,
        n_particles: int = 1,
        n_exploration_particles: int = 1,
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
        check_networks(self.net_arch, activation_fn, optimizer_class, n_critics, layer_norm)
        self.activation_fn = activation_fn
        self.n_critics = n_critics
        self.layer_norm = layer_norm
        self.share_features_extractor = share_features_extractor
        self.register_buffer("temperature", th.ones(()))
        self.register_buffer("n_batches", th.zeros(()))
        self.register_buffer("n_rewarded_batches", th.zeros(()))
        self.run_act = self.act
        self._build(lr_schedule)
        self.configure_sampling(path, source, sampler, integration_steps, n_particles, n_exploration_particles, t_min)

    def configure_sampling(
        self,
        path: str | Path,
        source: str | Source | Distribution,
        sampler: str,
        integration_steps: int,
        n_particles: int,
        n_exploration_particles: int,
        t_min: float,
    ) -> None:
        """Choose how actions are drawn from the flow; see the class for the parameters."""
        check_integer("n_particles", n_particles, 1)
        check_integer("n_exploration_particles", n_exploration_particles, 1)
        self.actor.configure_sampling(path, source, sampler, integration_steps, t_min)
        self.n_particles, self.n_exploration_particles = n_particles, n_exploration_particles
        # The deterministic policy is a function of observation and weights alone: its noise never changes.
        shape, source = (n_particles, get_action_dim(self.action_space)), get_source(self.actor.source)
        noise = source.sample(shape, th.empty(0), th.Generator().manual_seed(0))
        noise[0] = source.centre(noise[0])
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
            "layer_norm": self.layer_norm,
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
        data |= {name: getattr(self.actor, name) for name in ("path", "source", "sampler", "integration_steps", "t_min")}
        return data | {"lr_schedule": ConstantSchedule(0.0)}

    def train(self: SelfFlowPolicy, mode: bool = True) -> SelfFlowPolicy:
        """Put actor and critic in training or evaluation mode; the target critic stays in evaluation mode."""
        # Asked for before every action and every update, and walking the modules is not free.
        if not self.training == self.actor.training == self.critic.training == mode:
            self.actor.train(mode)
            self.critic.train(mode)
            self.training = mode
        return self

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

    def draw(
        self,
        actor_features: Tensor,
        critic: QCritic,
        critic_features: Tensor,
        noise: Tensor,
        deterministic: bool = False,
        reduced: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Carry noise to latents along the flow, and have a critic choose one of several particles.

        :param actor_features: (B, F)
        :param critic: The critic that is asked
        :param critic_features: Its features, (B, F)
        :param noise: Source samples, (B, P, D)
        :param deterministic: See :meth:`choose_index`
        :param reduced: Draw and compare particles in bfloat16
        :return: Latents, (B, D), and the critic's min Q there, (B,)
        """
        latents = self.actor.sample_latents(actor_features, noise, deterministic, reduced)
        # In bfloat16 particles are compared with each other; one alone has nothing that it could save.
        several = noise.shape[1] > 1
        q = critic.min_q(critic.encode(critic_features), squash(latents), reduced and several)
        if not several:
            return latents[:, 0], q[:, 0]
        index = self.choose_index(q, deterministic)
        # Not th.take_along_dim, which would fix the number of states in an exported policy.
        return latents.gather(1, index.unsqueeze(-1).expand(-1, -1, latents.shape[-1]))[:, 0], q.gather(1, index)[:, 0]

    def features(self, observation: PyTorchObs) -> tuple[Tensor, Tensor]:
        """Features of actor and critic, (B, F) each. A shared extractor is asked once, and trained by the actor alone."""
        actor_features = self.actor.features(observation)
        return actor_features, actor_features.detach() if self.share_features_extractor else self.critic.features(observation)

    def acting_features(self, observation: PyTorchObs, n_particles: int) -> tuple[Tensor, Tensor | None]:
        """Features of the actor, and of the critic where it is to choose among particles, (B, F) each."""
        return self.features(observation) if n_particles > 1 else (self.actor.features(observation), None)

    def act(self, actor_features: Tensor, critic_features: Tensor | None, noise: Tensor, deterministic: bool) -> Tensor:
        """Actions in (-1, 1) for features, from given noise.

        :param actor_features: (B, F)
        :param critic_features: (B, F), by which one particle is chosen; None for one particle
        :param noise: Source samples, (B, P, D)
        :param deterministic: See :meth:`choose_index`
        :return: (B, D)
        :raises ValueError: for several particles without ``critic_features``
        """
        if critic_features is None:
            (latents,) = self.actor.sample_latents(actor_features, noise, deterministic).unbind(dim=1)
        else:
            latents, _ = self.draw(actor_features, self.critic, critic_features, noise, deterministic)
        return squash(latents)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self._predict(obs, deterministic=deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        n_particles = self.n_particles if deterministic else self.n_exploration_particles
        actor_features, critic_features = self.acting_features(observation, n_particles)
        n_states = len(actor_features)
        fixed = self.fixed_noise.expand(n_states, -1, -1)
        noise = fixed if deterministic else self.actor.draw_noise(n_states, n_particles)
        act = self.act if th.is_grad_enabled() else self.run_act  # what is compiled carries no gradients
        return act(actor_features, critic_features, noise, deterministic)


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


def check_networks(
    net_arch: list[int] | dict[str, list[int]],
    activation_fn: object,
    optimizer_class: object,
    n_critics: int,
    layer_norm: object,
) -> None:
    """Check what networks are made of.

    :raises ValueError: for anything of which none can be made
    """
    for widths in net_arch.values() if isinstance(net_arch, dict) else [net_arch]:
        if not isinstance(widths, (list, tuple)):
            raise ValueError(f"net_arch must be a list of widths, or dict(pi=[...], qf=[...]), got {net_arch!r}.")
        for width in widths:
            check_integer("Each width in net_arch", width, 1)
    for name, value, example in (
        ("activation_fn", activation_fn, "torch.nn.ReLU"),
        ("optimizer_class", optimizer_class, "torch.optim.Adam"),
    ):
        if not callable(value):
            raise ValueError(f"{name} must be a class, such as {example}, got {value!r}.")
    check_integer("n_critics", n_critics, 1)
    if not isinstance(layer_norm, bool):
        raise ValueError(f"layer_norm must be True or False, got {layer_norm!r}.")
