"""The scales that follow the rewards: the critics' unit, and the temperature.

With both, learning does not depend on the scale of the rewards. They live in the policy's state, and change a
little with every batch.

Sources: van Hasselt et al., Pop-Art (arXiv 1602.07714), for rescaled outputs; the rule of the temperature is this library's.
"""

import torch as th
from torch import Tensor

from sb3_rfm.critics import QCritic
from sb3_rfm.policies import FlowPolicy


@th.no_grad()
def update_reward_scale(policy: FlowPolicy, rewards: Tensor, scale_temperature: bool) -> None:
    """Keep the critics' unit at the mean size of a reward: values are then of order 1 / (1 - gamma), whatever the scale of
    the rewards. With ``n_steps > 1``, what a transition brings is the n-step return, and the unit the mean size of that.

    Batches without any reward do not count: where rewards are sparse, the unit would shrink towards zero.

    :param policy: Policy whose critics are rescaled; their values stay as they are, except at the first reward
    :param rewards: Rewards of a batch, (B, 1)
    :param scale_temperature: Whether the temperature goes with the unit that the first reward sets
    """
    critic, target, n_batches = policy.critic, policy.critic_target, policy.n_rewarded_batches
    size = rewards.abs().mean()
    rewarded = size > 0
    # Before the first reward values mean nothing: then, the outputs of the networks are kept, and not the values.
    unit = th.where(rewarded & (n_batches == 0), size, 1.0)
    th._foreach_mul_([critic.scale, target.scale, *([policy.temperature] if scale_temperature else [])], unit)
    n_batches += rewarded
    scale = critic.scale + rewarded * (1 / n_batches).clamp(1e-3, 1) * (size - critic.scale)
    critic.rescale(scale)
    target.rescale(scale)


def action_spread(critic: QCritic, encoded_q: list[Tensor], action_dim: int, n_states: int = 32) -> Tensor:
    """Mean absolute difference of min Q between two uniformly random actions at the same state.

    Not the root of the mean square: where one action decides between falling and balancing, the difference is a hundred
    times the usual one, and a few such states would make the policy random everywhere else.

    :param critic: The critics
    :param encoded_q: States, as :meth:`QCritic.encode` gives them, (B, H) each
    :param action_dim: Action dimensions D
    :param n_states: States that are looked at
    :return: A scalar, in units of the reward
    """
    # From all over the batch: replay buffers with goals put transitions of one kind first.
    encoded = [e[:: max(1, len(e) // n_states)][:n_states] for e in encoded_q]
    actions = 2 * th.rand(len(encoded[0]), 2, action_dim, device=encoded[0].device) - 1
    q_1, q_2 = critic.min_q(encoded, actions).unbind(dim=1)
    return (q_1 - q_2).abs().mean()


@th.no_grad()
def update_temperature(policy: FlowPolicy, spread: Tensor, share: float) -> None:
    """``temperature="auto"``: follow the spread of Q between random actions.

    A Boltzmann policy over D independent action dimensions whose Q differs by S between random actions keeps the same
    entropy in each dimension, whatever S and D, when the temperature is proportional to S / sqrt(D).

    Before the first reward, that spread is what the networks began with, and an agent that followed it would stay where it
    is. Until then the temperature does not move, from a value far above any such spread: actions are nearly uniform.

    :param policy: Policy whose temperature is moved
    :param spread: Result of :func:`action_spread`
    :param share: Temperature aimed at, as a share of S / sqrt(D)
    """
    value = share * spread / policy.actor.action_dim**0.5
    counts = policy.n_rewarded_batches > 0
    policy.n_batches += counts
    # The first batches average over all, later ones over about 200.
    rate = (1 / policy.n_batches.clamp(min=1)).clamp(min=5e-3)
    policy.temperature.lerp_(value.clamp(min=1e-12), counts * rate)
