"""What is learned from a batch: one update of a flow policy and its critics.

A batch's way through it:

    replay buffer → x_t on the path → posterior mean of the Boltzmann policy → loss of the flow   ┐
                  → action of the policy at the next state → critic target   → loss of the critics ┴→ step → target critic

The policy aimed at is ``pi(a|s) ∝ exp(Q(s, a) / temperature)``. In the latent ``u = atanh(a)`` its log-density is
``Q(s, tanh u) / temperature + sum_j log sech^2 u_j`` (change of variables), and the flow regresses the posterior mean of
``u_1`` given ``u_t`` under it.

Source: Li, Tang & Azizan, Reverse Flow Matching (arXiv 2601.08136), algorithm 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch as th
from torch import Tensor

from sb3_rfm.actors import LATENT_BOUND, boltzmann_log_prob, squash, unsquash
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


class Learner:
    """Steps the critics, and regresses the flow.

    :param policy: The flow, the critics and the target critics
    :param posterior_mean: What the flow is regressed on
    :param proposal: Which actions are noised for the regression: ``"replay"`` → replayed ones, ``"policy"`` → actions of the
        current policy at replayed states
    :param weighting: How much an error counts in each dimension: ``"uniform"`` → all the same, ``"gradient"`` →
        see :func:`regression_weights`
    :param n_target_particles: Particles of which one is chosen where the policy is drawn from, here and in the critic's target
    :param temperature_share: Share of the spread of Q that the temperature follows; None where it is fixed
    :param reduced: Whether candidates are evaluated, and actions drawn, in bfloat16
    :param executor: How updates are run
    """

    run_update: Callable[..., Tensor]
    """:meth:`update` as ``executor`` runs it"""
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
        # The parameters themselves, not their data: those stay the policy's own when it is copied or its data replaced.
        self._averaged: tuple[list[Tensor], list[Tensor]] = (
            list(self.critic.parameters()),
            list(self.critic_target.parameters()),
        )
        self._copied = _running_statistics(self.critic), _running_statistics(self.critic_target)
        self._run_critic_gradients = executor.prepare(self.critic_gradients, policy)
        self._run_actor_gradients = executor.prepare(self.actor_gradients, policy)
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
        discounts = th.full_like(batch.rewards, gamma) if batch.discounts is None else batch.discounts
        actor_features, critic_features = self.policy.features(batch.observations)
        with th.no_grad():
            next_actor_features = self.actor.features(batch.next_observations)
            next_critic_features = self.critic_target.features(batch.next_observations)
        actions = batch.actions.float()  # a box may have another precision
        rewards, discounts = batch.rewards.flatten(), ((1 - batch.dones) * discounts).flatten()
        critic_gradients = partial(
            self._run_critic_gradients,
            critic_features,
            actions,
            next_actor_features,
            next_critic_features,
            rewards,
            discounts,
        )
        actor_gradients = partial(self._run_actor_gradients, actor_features, critic_features.detach(), actions)
        critic_result, actor_result = self.executor.parallel(critic_gradients, actor_gradients)
        train_extractors(
            self.optimizers(), trained(actor_features, critic_features), actor_result.features + critic_result.features
        )
        metrics = critic_result.metrics | actor_result.metrics
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

    def critic_gradients(self, features: Tensor, *others: Tensor) -> Gradients:
        """Gradients of :meth:`critic_loss`, which has the same parameters."""
        loss, metrics = self.critic_loss(features, *others)
        return differentiate(loss, self.critic.q_networks, features, metrics)

    def actor_gradients(self, actor_features: Tensor, *others: Tensor) -> Gradients:
        """Gradients of :meth:`actor_loss`, which has the same parameters."""
        loss, metrics = self.actor_loss(actor_features, *others)
        return differentiate(loss, self.actor.network, actor_features, metrics)

    def critic_loss(
        self,
        features: Tensor,
        actions: Tensor,
        next_actor_features: Tensor,
        next_critic_features: Tensor,
        rewards: Tensor,
        discounts: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the critics against ``r + discount * min_i Q'_i(s', a')``, with a' from the policy.

        :param features: Critic features of the observations, (B, F)
        :param actions: (B, D), in [-1, 1]
        :param next_actor_features: Actor features of the next observations, (B, F)
        :param next_critic_features: Target-critic features of the next observations, (B, F)
        :param rewards: (B,)
        :param discounts: Discount factors, 0 after termination, (B,)
        :return: Scalar loss, in squared units of ``critic.scale``, and metrics
        """
        with th.no_grad():
            latents, next_q = self._sample_policy(next_actor_features, self.critic_target, next_critic_features)
            target = rewards + discounts * next_q
        q = self.critic.q_values(self.critic.encode(features), actions)
        loss = 0.5 * ((q - target) / self.critic.scale).square().mean(1).sum()
        return loss, {
            "critic_loss": loss.detach(),
            "q_mean": q.detach().mean(),
            "latent_max": latents.abs().amax(),
            "saturation": (squash(latents).abs() > 0.99).float().mean(),
        }

    def actor_loss(self, actor_features: Tensor, critic_features: Tensor, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted squared error of the flow's data prediction against the posterior mean of the Boltzmann policy's latent.

        :param actor_features: (B, F)
        :param critic_features: (B, F)
        :param actions: Replayed actions, (B, D), in [-1, 1]
        :return: Scalar loss, in squared units of the latent, and metrics
        """
        with th.no_grad():
            encoded_q = self.critic.encode(critic_features)
            x_1 = unsquash(actions)
            if self.proposal == "policy":
                x_1, _ = self._sample_policy(actor_features, self.critic, critic_features)
            t_min = self.actor.t_min
            t = t_min + (1 - 2 * t_min) * th.rand(x_1.shape[0], device=x_1.device)
            x_t = self.actor.add_noise(x_1, t)
        prediction = self.actor.predict_data(self.actor.network.encode(actor_features), x_t, t)

        def log_prob(u: Tensor) -> Tensor:
            q = self.critic.split_q(encoded_q, squash(u), self.reduced)
            return boltzmann_log_prob(u, q, self.policy.temperature)

        with th.no_grad():
            posterior = self.posterior_mean(log_prob, x_t, t, prediction.detach())
            error_weights = 1.0 if self.weighting == "uniform" else regression_weights(log_prob, prediction.detach())
            spread = action_spread(self.critic, encoded_q, self.actor.action_dim)
            # Kept where the prediction can follow: near the noise a gradient of log p1 counts (sigma / alpha)^2 times, and a
            # few targets made of gradients alone would outweigh all others.
            target = posterior.x1.clamp(-LATENT_BOUND, LATENT_BOUND)
        loss = (error_weights * (prediction - target).square()).sum(-1).mean()
        return loss, {
            "actor_loss": loss.detach(),
            "ess": posterior.ess.mean(),
            "coefficient": posterior.coefficient.mean(),
            "variance_ratio": posterior.variance_ratio.median(),
            "action_spread": spread,
        }

    def _sample_policy(self, actor_features: Tensor, critic: QCritic, critic_features: Tensor) -> tuple[Tensor, Tensor]:
        """Draw from the current policy.

        :param actor_features: (B, F)
        :param critic: The critic that chooses among ``n_target_particles``
        :param critic_features: Its features, (B, F)
        :return: Latents (B, D), and the critic's min Q there (B,)
        """
        noise = self.actor.draw_noise(len(actor_features), self.n_target_particles)
        return self.policy.draw(actor_features, critic, critic_features, noise, reduced=self.reduced)

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

    A network that is never quite there errs where errors are cheap, in Q and not in the latent. The gradient is looked at near
    the prediction and not at it, so that it tells of the slope where the policy is not yet at its best, and of the curvature
    where it is. Weights are the square root of its size, as the gradient of a young critic is not to be trusted with whole
    dimensions. The point is none of the candidates: with weights that are independent of what it is regressed on, a flow still
    has its optimum at the posterior mean, whatever they are. One dimension has nothing to be compared with. The rule is this
    library's.

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


def _running_statistics(critic: QCritic) -> list[Tensor]:
    """What batch normalisation has seen."""
    return [buffer for name, buffer in critic.named_buffers() if "running_" in name]
