"""The flow as an actor: a prediction of the data end of the path, and latents drawn with it.

The flow lives in an unbounded latent ``u`` with action ``a = tanh(u)``. The actor predicts ``E[u_1 | u_t]``, and what latents
are drawn with is clipped: every sampling step then moves towards a bounded point, and integration cannot diverge whatever the
weights are.

Source: Karras et al. (arXiv 2206.00364), section 5, for the preconditioned network.
"""

import copy
import math
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from sb3_rfm.checks import check_integer
from sb3_rfm.finite import WEIGHTS_LOST, check_observation
from sb3_rfm.networks import ConditionalMLP, TimeEmbedding
from sb3_rfm.paths import Path, expand_to, get_path
from sb3_rfm.persistence import PersistentModel
from sb3_rfm.samplers import denoise_unchecked, langevin, noise_grid, time_grid
from sb3_rfm.sources import GaussianSource, Source, get_source

LATENT_BOUND = 4.0
"""Largest latent that is drawn; tanh(4) = 0.9993."""

LATENT_SPREAD = 0.5
"""Standard deviation of the latents of one state that the network is preconditioned for."""

LATENT_SCALE = 1.0
"""Spread of latents under a uniform action, whose density sech^2 has standard deviation pi / sqrt(12) = 0.91, rounded up:
candidates from too narrow a proposal would miss what is outside."""


def squash(latents: Tensor) -> Tensor:
    """Actions in (-1, 1) of latents, of any shape."""
    return th.tanh(latents)


def unsquash(actions: Tensor) -> Tensor:
    """Latents of actions, clipped to the range of what is drawn."""
    limit = np.tanh(LATENT_BOUND).item()
    return th.atanh(actions.clamp(-limit, limit))


def clip_latents(latents: Tensor) -> Tensor:
    """Latents in the range of what is drawn."""
    return latents.clamp(-LATENT_BOUND, LATENT_BOUND)


def log_sech2(u: Tensor) -> Tensor:
    """``log(1 - tanh(u)^2)`` without cancellation."""
    return 2 * (math.log(2) - u - F.softplus(-2 * u))


def boltzmann_log_prob(latents: Tensor, q: Tensor, temperature: Tensor | float) -> Tensor:
    """Log-density, up to a constant, of the latents of actions with density ∝ exp(Q / temperature) (change of variables).

    :param latents: (..., D)
    :param q: Q of the actions ``tanh(latents)``, (...)
    :param temperature: In units of Q
    :return: (...)
    """
    return q / temperature + log_sech2(latents).sum(-1)


def check_sampler(sampler: str, source: Source) -> None:
    """Validate a way to draw latents from a flow.

    :raises ValueError: for unknown samplers, and for those that the source does not allow
    """
    if sampler not in ("ode", "euler", "sde", "langevin"):
        raise ValueError(f"sampler must be 'ode', 'euler', 'sde' or 'langevin', got {sampler!r}.")
    if sampler in ("sde", "langevin") and not isinstance(source, GaussianSource):
        raise ValueError(
            f"sampler={sampler!r} needs source='gaussian', whose score follows from the flow's data prediction; "
            "other sources go with sampler='ode' or 'euler'."
        )


class BoundedPolicy(PersistentModel, BasePolicy):
    """A policy whose actions stay within their box, also where it is so small, large or flat that rounding would put them
    outside."""

    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Actions for observations; see SB3's ``BasePolicy.predict``.

        :raises ValueError: for observations of another shape or with other entries, and where they or the actions are not
            finite
        """
        check_observation(observation, self.observation_space)
        actions, states = super().predict(observation, *args, **kwargs)
        if not np.isfinite(actions).all():
            raise ValueError(f"The action is not finite: {actions}. {WEIGHTS_LOST}")
        return actions, states

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
        # Clipped after rounding to the precision of the bounds, as rounding may carry a number beyond one of them.
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
    :param source: Where the flow starts
    :param sampler: ``"ode"`` (steps of second order, shorter towards the data), ``"euler"`` (even steps of first order, as in
        the papers), ``"sde"`` (reverse diffusion, in steps as those of ``"ode"``) or ``"langevin"`` (the ODE, and a Langevin
        step near its end)
    :param integration_steps: Steps from noise to action, one evaluation of the network each; Langevin dynamics take one more
    :param t_min: The flow is trained for times from here to ``1 - t_min``. Before, it is asked for ``t_min``; after, where
        the last of many steps may lie, it goes on as it is, and what it still corrects vanishes with the noise
    """

    features_extractor: BaseFeaturesExtractor
    optimizer: th.optim.Optimizer
    network: ConditionalMLP
    times: Tensor
    latent_spread: Tensor

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
        source: str | Source | Distribution = "gaussian",
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
        self.register_buffer("latent_spread", th.tensor(LATENT_SPREAD))  # saved: weights are of no use with another
        self.network = ConditionalMLP(
            features_dim, self.action_dim, self.action_dim, net_arch, activation_fn, time_dim=self.time_embedding.dim
        )
        self.configure_sampling(path, source, sampler, integration_steps, t_min)

    def configure_sampling(
        self, path: str | Path, source: str | Source | Distribution, sampler: str, integration_steps: int, t_min: float
    ) -> None:
        """Choose how latents are drawn from the flow; see the class for the parameters."""
        check_integer("integration_steps", integration_steps, 1)
        self.path, self.sampler, self.integration_steps, self.t_min = path, sampler, integration_steps, t_min
        self.source = source
        # A copy: compilers leave marks on tensors.
        self.probability_path, self._source = get_path(path), copy.deepcopy(get_source(source)).to(self.device)
        check_sampler(sampler, self._source)
        # From t = 0 on, where x_t is noise alone; the flow, which is trained from t_min on, is asked for t_min there.
        even = sampler == "euler"
        times = time_grid(integration_steps) if even else noise_grid(self.probability_path, integration_steps)
        self.register_buffer("times", times.to(self.device), persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> "FlowActor":
        super()._apply(*args, **kwargs)  # moves parameters and buffers
        self._source = self._source.to(self.device)
        return self

    def features(self, obs: PyTorchObs) -> Tensor:
        """Features of observations, (B, F)."""
        return self.extract_features(obs, self.features_extractor)

    def draw_noise(self, n_states: int, n_particles: int) -> Tensor:
        """Draw from the source, (n_states, n_particles, D)."""
        return self._source.sample((n_states, n_particles, self.action_dim), self.times)

    def add_noise(self, latents: Tensor, t: Tensor) -> Tensor:
        """Draw ``u_t`` given ``u_1``.

        :param latents: ``u_1``, (B, D)
        :param t: Times, (B,)
        :return: (B, D)
        """
        return self.probability_path.interpolate(self.draw_noise(len(latents), 1)[:, 0], latents, t)

    def predict_data(self, encoded: Tensor, latents: Tensor, t: Tensor, reduced: bool = False) -> Tensor:
        """``E[u_1 | u_t]``.

        The network corrects what would be right if the latents of each state were Gaussian around 0 with standard deviation
        ``LATENT_SPREAD``, by an amount that vanishes with the noise. Near the data the prediction is nearly ``u_t`` itself,
        already before training; without that, actions drawn at one state would lie too close together.

        :param encoded: ``network.encode(features)``, (B, H)
        :param latents: ``u_t``, (B, D) or (B, P, D)
        :param t: Times, (B,) or a scalar for all
        :param reduced: See :meth:`ConditionalMLP.decode`
        :return: Shape of ``latents``
        """
        alpha, sigma = (expand_to(f(t), latents) for f in (self.probability_path.alpha, self.probability_path.sigma))
        spread = self.latent_spread
        std = (alpha**2 * spread**2 + sigma**2).sqrt()  # of u_t
        output = self.network.decode(self.network.at_time(encoded, self.time_embedding(t)), latents / std, reduced)
        return alpha * (spread / std) ** 2 * latents + sigma * spread / std * output

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
            return clip_latents(self.predict_data(encoded, x, t.clamp(min=self.t_min), reduced))

        path = self.probability_path
        x = path.sigma(times[0]) * noise
        if self.sampler == "langevin" and not deterministic:
            # A corrector after the predictor (arXiv 2011.13456, section 4.2), at the last noise level before the data, where
            # the path's density is nearly the target's own.
            t = times[-2]
            alpha, sigma = path.alpha(t), path.sigma(t)
            x = denoise_unchecked(data_prediction, x, times[:-1], path)
            x = langevin(lambda u: (alpha * data_prediction(u, t) - u) / sigma**2, x, 0.5 * sigma**2, n_steps=1)
            return data_prediction(x, t)
        noise_scale = 1.0 if self.sampler == "sde" and not deterministic else 0.0
        x = denoise_unchecked(data_prediction, x, times, path, noise_scale, order=1 if self.sampler == "euler" else 2)
        return clip_latents(x)  # of second order, the last step of a path that ends with noise may overshoot

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        features = self.features(observation)
        if deterministic:
            noise = self._source.centre(features.new_empty(len(features), 1, self.action_dim))
        else:
            noise = self.draw_noise(len(features), 1)
        return squash(self.sample_latents(features, noise, deterministic)[:, 0])
