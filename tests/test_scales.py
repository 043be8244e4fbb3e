"""The automatic temperature, against closed forms."""

import math

import gymnasium as gym
import pytest
import torch as th

from sb3_rfm import RFM
from sb3_rfm.scales import action_spread, update_temperature

N_STATES = 200_000


class Linear:
    """``Q(s, a) = slope(s) * sum_d a_d``, in the shape of a critic."""

    def min_q(self, encoded: list[th.Tensor], actions: th.Tensor) -> th.Tensor:
        return encoded[0] * actions.sum(-1)


def spread_of(slopes: th.Tensor, action_dim: int) -> float:
    th.manual_seed(0)
    return action_spread(Linear(), [slopes[:, None]], action_dim, len(slopes)).item()  # type: ignore[arg-type]


def test_spread_is_the_mean_difference_between_random_actions() -> None:
    # For independent a, a' uniform on [-1, 1], E|a - a'| = 2 / 3 and Var|a - a'| = 2 / 9.
    error = 4 * math.sqrt(2 / 9 / N_STATES)
    assert spread_of(th.ones(N_STATES), 1) == pytest.approx(2 / 3, abs=error)
    # Sums of many are normal with variance D / 3 each: E|q - q'| = sqrt(4 D / (3 pi)), Var|q - q'| = (1 - 2 / pi) 2 D / 3.
    error = 4 * math.sqrt((1 - 2 / math.pi) * 2 * 64 / 3 / N_STATES)
    assert spread_of(th.ones(N_STATES), 64) == pytest.approx(math.sqrt(4 * 64 / (3 * math.pi)), abs=error + 0.005)


def test_a_few_decisive_states_count_by_their_share() -> None:
    slopes = th.ones(N_STATES)
    slopes[::100] = 100.0  # 1 % of the states: the mean is 1.99 times the usual; the root of the mean square would be 10 times
    assert spread_of(slopes, 1) / spread_of(th.ones(N_STATES), 1) == pytest.approx(1.99, rel=0.02)


@pytest.mark.parametrize("action_dim", [1, 4])
def test_temperature_is_a_share_of_the_spread(action_dim: int) -> None:
    class Box(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (2,))
        action_space = gym.spaces.Box(-1, 1, (action_dim,))

    policy = RFM("MlpPolicy", Box()).policy
    update_temperature(policy, th.tensor(3.0), 0.2, n_updates=0)
    assert policy.temperature.item() == pytest.approx(0.2 * 3.0 / math.sqrt(action_dim))
    for n_updates in range(1, 3000):
        update_temperature(policy, th.tensor(5.0), 0.2, n_updates)
    assert policy.temperature.item() == pytest.approx(0.2 * 5.0 / math.sqrt(action_dim), rel=1e-3)
