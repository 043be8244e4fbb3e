"""What is learned from a batch: one update of a flow policy and its critics.

A batch's way through it:

    replay buffer → actions of the policy at the next states → critic target → loss of the critics → step → target critic
                    these actions and replayed ones → x_t on the path → posterior mean of the Boltzmann policy
                                                                      → loss of the flow → step

The policy aimed at is ``pi(a|s) ∝ exp(Q(s, a) / temperature)``. In the latent ``u = atanh(a)`` its log-density is
``Q(s, tanh u) / temperature + sum_j log sech^2 u_j`` (change of variables), and the flow regresses the posterior mean of
``u_1`` given ``u_t`` under it.

Source: Li, Tang & Azizan, Reverse Flow Matching (arXiv 2601.08136), algorithm 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch as th
from torch import Tensor

from sb3_rfm.actors import boltzmann_log_prob, clip_latents, squash, unsquash
from sb3_rfm.critics import QCritic
from sb3_rfm.execution import Executor
from sb3_rfm.gradients import Gradients, differentiate, step, train_extractors, trained
from sb3_rfm.policies import FlowPolicy
from sb3_rfm.posterior import LogProb, PosteriorMean, value_and_gradient
from sb3_rfm.recording import Recorded
from sb3_rfm.scales import action_spread, update_reward_scale, update_temperature

RegressionTarget = Callable[[LogProb, Tensor, Tensor, Tensor], PosteriorMean]
"""What the flow is regressed on, given the log-density of the Boltzmann policy in the latent, points ``x_t`` of the path,
(B, D), their times, (B,), and the flow's own prediction of the data mean there, (B, D)."""

REPLAYED_EVERY = 8
"""With ``proposal="policy"``, one row in so many is regressed at its own state, because the first state of an episode is the
next state of no transition."""


class Inputs(NamedTuple):
    """What the losses take from a batch."""

    critic_features: Tensor
    """Critic features of the observations, (B, F)"""
    next_q: Tensor
    """The target critics' min Q of the policy's actions at the next observations, (B,)"""
    actor_features: Tensor
    """Actor features of the observations where the flow is regressed, (B, F)"""
    value_features: Tensor
    """Critic features of the same observations, (B, F); they carry no gradient"""
    x_1: Tensor
    """Latents there, which are noised to the points of the regression, (B, D)"""
    metrics: dict[str, Tensor]
    """What was observed on the way, scalars"""


class Learner:
    """Steps the critics, and regresses the flow.

    :param policy: The flow, the critics and the target critics
    :param posterior_mean: What the flow is regressed on
    :param proposal: Where the flow is regressed, and which actions are noised for it: ``"replay"`` → states and actions of the
        replay buffer, ``"policy"`` → their next states, with the actions of the current policy that the critic's target needs,
        but for the rows of :meth:`replayed_rows`
    :param weighting: How much an error counts in each dimension: ``"uniform"`` → all the same, ``"gradient"`` →
        see :func:`regression_weights`
    :param n_target_particles: Particles of which one is chosen at the next states
    :param temperature_share: Share of the spread of Q that the temperature follows; None where it is fixed
    :param reduced: Whether candidates are evaluated, and actions drawn, in bfloat16
    :param executor: How updates are run
    """

    run_update: Callable[..., Tensor]
    """:meth:`update` as ``executor`` runs it"""
    run_actor_gradients: Callable[..., Gradients]
    """:meth:`actor_gradients` as ``executor`` runs it"""
    metric_names: list[str]
    """Names of the metrics, after an update"""

    def __init__(
        self,
        policy: FlowPolicy,
        posterior_mean: RegressionTarget,
        proposal: str,
        weighting: str,
        n_target_particles: int,
        temperature_share: float | None,
        reduced: bool,
        executor: Executor,
    ) -> None:
        self.policy, self.actor = policy, policy.actor
        self.critic, self.critic_target = policy.critic, policy.critic_target
        self.posterior_mean = posterior_mean
        self.proposal, self.weighting, self.n_target_particles = proposal, weighting, n_target_particles
        self.temperature_share = temperature_share
        self.reduced = reduced
        self.executor = executor
        # Walking the modules in every update is not free.
        self._actor_parameters = list(self.actor.network.parameters())
        self._critic_parameters = list(self.critic.q_networks.parameters())
        self._extractor_parameters = [p for user in (self.actor, self.critic) for p in user.features_extractor.parameters()]
        # The parameters themselves, not their data: those stay the policy's own when it is copied or its data replaced.
        self._averaged: tuple[list[Tensor], list[Tensor]] = (
            list(self.critic.parameters()),
            list(self.critic_target.parameters()),
        )
        self._copied = _running_statistics(self.critic), _running_statistics(self.critic_target)
        self._run_next_actions = executor.prepare(self.next_actions, policy)
        self._run_critic_gradients = executor.prepare(self.critic_gradients, policy)
        self.run_actor_gradients = executor.prepare(self.actor_gradients, policy)
        self.run_update = executor.record(self.update, policy, self.optimizers)
        self._learning_rate = th.zeros((), device=policy.device)

    def optimizers(self) -> tuple[th.optim.Optimizer, ...]:
        """Those that it steps."""
        return self.actor.optimizer, self.critic.optimizer

    def hold_learning_rate(self) -> None:
        """Have a recorded update read the learning rate from a tensor: a number would be that of the moment of recording."""
        if not isinstance(self.run_update, Recorded):
            return
        for optimizer in self.optimizers():
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate.fill_(group["lr"])
                group["capturable"] = True  # as fused optimizers are, whatever a file says

    def update(self, batch: Any, gamma: float, tau: float, max_grad_norm: float | None) -> Tensor:
        """One step of the critics, and one regression step of the flow.

        On the GPU it is recorded and launched as a whole: nothing here may look at a number.

        :param batch: What the replay buffer returned
        :param gamma: Discount factor of transitions that bring none of their own
        :param tau: Rate of the target critic's moving average
        :param max_grad_norm: Largest norm of a gradient of actor or critic; None for no clipping
        :return: Metrics, in the order of ``metric_names``, (M,)
        """
        share = self.temperature_share
        update_reward_scale(self.policy, batch.rewards, scale_temperature=share is not None)
        actions = batch.actions.float()  # a box may have another precision
        discounts = th.full_like(batch.rewards, gamma) if batch.discounts is None else batch.discounts
        inputs = self.inputs(batch.observations, actions, batch.next_observations, batch.dones)
        targets = batch.rewards.flatten() + ((1 - batch.dones) * discounts).flatten() * inputs.next_q
        critic_gradients = partial(self._run_critic_gradients, inputs.critic_features, actions, targets)
        actor_gradients = partial(self.run_actor_gradients, inputs.actor_features, inputs.value_features, inputs.x_1)
        critic_result, actor_result = self.executor.parallel(critic_gradients, actor_gradients)
        train_extractors(
            self._extractor_parameters,
            trained(inputs.actor_features, inputs.critic_features),
            actor_result.features + critic_result.features,
        )
        metrics = inputs.metrics | critic_result.metrics | actor_result.metrics
        steps = [
            partial(self._step_critics, critic_result.parameters, tau, max_grad_norm),
            partial(step, self.actor.optimizer, self._actor_parameters, actor_result.parameters, max_grad_norm),
        ]
        if share is not None:
            steps.append(partial(update_temperature, self.policy, metrics["action_spread"], share))
        self.executor.parallel(*steps)
        metrics["temperature"] = self.policy.temperature
        self.metric_names = list(metrics)
        return th.stack(list(metrics.values()))

    def inputs(self, observations: Any, actions: Tensor, next_observations: Any, dones: Tensor) -> Inputs:
        """Features, actions of the policy, and where the flow is regressed.

        :param observations: Of a batch of transitions
        :param actions: (B, D), in [-1, 1]
        :param next_observations: Of the same transitions
        :param dones: 1 where a transition ended its episode, (B, 1)
        """
        with th.no_grad():
            next_actor_features = self.actor.features(next_observations)
            next_critic_features = self.critic_target.features(next_observations)
        next_latents, next_q, metrics = self._run_next_actions(next_actor_features, next_critic_features)
        x_1 = unsquash(actions)
        if self.proposal == "replay":
            actor_features, critic_features = self.policy.features(observations)
            return Inputs(critic_features, next_q, actor_features, critic_features.detach(), x_1, metrics)
        replayed = self.replayed_rows(dones)
        states, x_1 = _choose(replayed, observations, next_observations), _choose(replayed, x_1, next_latents)
        critic_features, actor_features = self.critic.features(observations), self.actor.features(states)
        with th.no_grad():
            is_shared = self.policy.share_features_extractor
            value_features = actor_features.detach() if is_shared else self.critic.features(states)
        return Inputs(critic_features, next_q, actor_features, value_features, x_1, metrics)

    def replayed_rows(self, dones: Tensor) -> Tensor:
        """Rows at whose own state and action the flow is regressed; for the others it is the next state, and the policy's
        action there.

        They are one in ``REPLAYED_EVERY``, for the sake of the first states of episodes, and those that ended an episode:
        no target says what Q is after that. They are spread over the batch, so that each critic answers for some
        (:meth:`QCritic.split_q`).

        :param dones: 1 where a transition ended its episode, (B, 1)
        :return: (B,), bool
        """
        row = th.arange(len(dones), device=dones.device)
        return (row // self.critic.n_critics % REPLAYED_EVERY == 0) | (dones.flatten() > 0)

    @th.no_grad()
    def next_actions(self, actor_features: Tensor, critic_features: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Draw from the current policy, and ask the target critic.

        :param actor_features: Actor features of the next observations, (B, F)
        :param critic_features: Target-critic features of the next observations, (B, F)
        :return: Latents, (B, D), ``min_i Q'_i`` there, (B,), and metrics
        """
        noise = self.actor.draw_noise(len(actor_features), self.n_target_particles)
        latents, q = self.policy.draw(actor_features, self.critic_target, critic_features, noise, reduced=self.reduced)
        saturation = (squash(latents).abs() > 0.99).float().mean()
        return latents, q, {"latent_max": latents.abs().amax(), "saturation": saturation}

    def critic_gradients(self, features: Tensor, actions: Tensor, targets: Tensor) -> Gradients:
        """Gradients of :meth:`critic_loss`, which has the same parameters."""
        loss, metrics = self.critic_loss(features, actions, targets)
        return differentiate(loss, self.critic.q_networks, features, metrics)

    def actor_gradients(self, actor_features: Tensor, critic_features: Tensor, x_1: Tensor) -> Gradients:
        """Gradients of :meth:`actor_loss`, which has the same parameters."""
        loss, metrics = self.actor_loss(actor_features, critic_features, x_1)
        return differentiate(loss, self.actor.network, actor_features, metrics)

    def critic_loss(self, features: Tensor, actions: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the critics against their targets.

        :param features: Critic features of the observations, (B, F)
        :param actions: (B, D), in [-1, 1]
        :param targets: ``r + discount * min_i Q'_i(s', a')``, with a' from the policy, (B,)
        :return: Scalar loss, in squared units of ``critic.scale``, and metrics
        """
        q = self.critic.q_values(self.critic.encode(features), actions)
        loss = 0.5 * ((q - targets) / self.critic.scale).square().mean(1).sum()
        return loss, {"critic_loss": loss.detach(), "q_mean": q.detach().mean()}

    def actor_loss(self, actor_features: Tensor, critic_features: Tensor, x_1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted squared error of the flow's data prediction against the posterior mean of the Boltzmann policy's latent.

        :param actor_features: (B, F)
        :param critic_features: (B, F)
        :param x_1: Latents that are noised to where the flow is regressed, (B, D)
        :return: Scalar loss, in squared units of the latent, and metrics
        """
        with th.no_grad():
            encoded_q = self.critic.encode(critic_features)
            t_min = self.actor.t_min
            t = t_min + (1 - 2 * t_min) * th.rand(x_1.shape[0], device=x_1.device)
            x_t = self.actor.add_noise(x_1, t)
        prediction = self.actor.predict_data(self.actor.network.encode(actor_features), x_t, t)

        def log_prob(u: Tensor) -> Tensor:
            q = self.critic.split_q(encoded_q, squash(u), self.reduced)
            return boltzmann_log_prob(u, q, self.policy.temperature)

        with th.no_grad():
            guess = clip_latents(prediction.detach())
            posterior = self.posterior_mean(log_prob, x_t, t, guess)
            error_weights = 1.0 if self.weighting == "uniform" else regression_weights(log_prob, guess)
            spread = action_spread(self.critic, encoded_q, self.actor.action_dim)
            # Kept where the prediction can follow: near the noise a gradient of log p1 counts (sigma / alpha)^2 times, and a
            # few targets made of gradients alone would outweigh all others.
            target = clip_latents(posterior.x1)
        loss = (error_weights * (prediction - target).square()).sum(-1).mean()
        return loss, {
            "actor_loss": loss.detach(),
            "ess": posterior.ess.mean(),
            "coefficient": posterior.coefficient.mean(),
            "variance_ratio": posterior.variance_ratio.median(),
            "action_spread": spread,
        }

    def _step_critics(self, gradients: list[Tensor], tau: float, max_grad_norm: float | None) -> None:
        """One step of the critics, and the target critic after them.

        :param gradients: Of the critics' parameters
        :param tau: See :meth:`update`
        :param max_grad_norm: See :meth:`update`
        """
        step(self.critic.optimizer, self._critic_parameters, gradients, max_grad_norm)
        self.update_target_critic(tau)

    @th.no_grad()
    def update_target_critic(self, tau: float) -> None:
        """Move the target critic towards the critic, in one call for all parameters; batch-norm statistics are copied."""
        online, target = self._averaged
        th._foreach_lerp_(target, online, tau)
        statistics, target_statistics = self._copied
        if statistics:
            th._foreach_copy_(target_statistics, statistics)


def regression_weights(log_prob: LogProb, prediction: Tensor, spread: float = 0.3) -> Tensor:
    """How much an error of the flow costs in each dimension, from the log-density's gradient around its prediction.

    A network of limited accuracy should err in the dimensions where that costs little Q. The gradient is taken at a random
    point near the prediction: it shows the slope where the policy is not yet at its best, and the curvature where it is.
    Weights are the square root of its size, so that a critic that has learned little yet cannot switch dimensions off. The
    point is none of the candidates: weights that are independent of the regression target leave the optimum, the posterior
    mean of one critic, where it is. With one dimension, all weights are 1. The rule is this library's.

    :param log_prob: Log-density of the Boltzmann policy in the latent, (B, D) → (B,)
    :param prediction: The flow's prediction of the data mean, (B, D)
    :param spread: How far around it, in the latent: about the standard deviation of the policy
    :return: Weights, 1 in the mean over the dimensions of each state, (B, D)
    """
    if prediction.shape[1] == 1:
        return th.ones_like(prediction)
    point = prediction + spread * th.randn_like(prediction)
    _, gradient = value_and_gradient(log_prob, point)
    root = gradient.abs().clamp(min=th.finfo(gradient.dtype).tiny).sqrt()
    return root / root.mean(1, keepdim=True)


def _choose(mask: Tensor, chosen: Any, others: Any) -> Any:
    """Rows of one batch where ``mask`` says so, (B,), and of another elsewhere: tensors (B, ...) or dictionaries of them."""
    if isinstance(chosen, dict):
        return {key: _choose(mask, value, others[key]) for key, value in chosen.items()}
    return th.where(mask.view(-1, *[1] * (chosen.dim() - 1)), chosen, others)


def _running_statistics(critic: QCritic) -> list[Tensor]:
    """What batch normalisation has seen."""
    return [buffer for name, buffer in critic.named_buffers() if "running_" in name]
