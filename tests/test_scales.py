"""The automatic temperature, against closed forms."""

import math

import gymnasium as gym
import pytest
import torch as th
from tiny import TINY

from sb3_rfm import RFM
from sb3_rfm.scales import action_spread, update_temperature

N_STATES = 200_000


class Linear:
    """``Q(s, a) = slope(s) * sum_d a_d``, in the shape of a critic."""

    def min_q(self, encoded: list[th.Tensor], actions: th.Tensor) -> th.Tensor:
        return encoded[0] * actions.sum(-1)


def test_the_spread_is_that_of_the_whole_batch() -> None:
    """Replay buffers with goals put transitions of one kind first: of these, only the last half knows a difference."""
    slopes = th.ones(4 * N_STATES)
    slopes[: 2 * N_STATES] = 0.0
    th.manual_seed(0)
    spread = action_spread(Linear(), [slopes[:, None]], 1, N_STATES).item()  # type: ignore[arg-type]
    variance = 0.5 * (2 / 9 + (2 / 3) ** 2) - (1 / 3) ** 2
    assert spread == pytest.approx(1 / 3, abs=4 * math.sqrt(variance / N_STATES))


@pytest.mark.parametrize(("temperature", "share"), [("auto", 0.05), ("auto_0.4", 0.4)])
def test_learning_ends_at_the_share_of_the_spread(temperature: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_rfm.learner.action_spread", lambda *_: th.tensor(3.0))
    model = RFM("MlpPolicy", "Pendulum-v1", **TINY, temperature=temperature).learn(20)
    assert model.policy.temperature.item() == pytest.approx(3.0 * share)


def spread_of(slopes: th.Tensor, action_dim: int) -> float:
    th.manual_seed(0)
    return action_spread(Linear(), [slopes[:, None]], action_dim, len(slopes)).item()  # type: ignore[arg-type]


@pytest.mark.parametrize(("action_dim", "mean", "variance"), [(1, 2 / 3, 2 / 9), (2, 14 / 15, 4 / 3 - (14 / 15) ** 2)])
def test_spread_is_the_mean_difference_between_random_actions(action_dim: int, mean: float, variance: float) -> None:
    """Q - Q' is a sum of 2 D numbers uniform on [-1, 1], whose absolute value has these moments (Irwin-Hall distribution)."""
    error = math.sqrt(variance / N_STATES)
    assert spread_of(th.ones(N_STATES), action_dim) == pytest.approx(mean, abs=4 * error)


def test_a_few_decisive_states_count_by_their_share() -> None:
    slopes = th.ones(N_STATES)
    slopes[::100] = 100.0  # the mean of the slopes is 1.99; the root of their mean square would be 10
    error = math.sqrt(slopes.square().mean() * 2 / 9 / N_STATES)
    assert spread_of(slopes, 1) == pytest.approx(1.99 * 2 / 3, abs=4 * error)


@pytest.mark.parametrize("action_dim", [1, 4])
def test_temperature_follows_a_share_of_the_spread(action_dim: int) -> None:
    class Box(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (2,))
        action_space = gym.spaces.Box(-1, 1, (action_dim,))

    policy = RFM("MlpPolicy", Box()).policy
    update_temperature(policy, th.tensor(3.0), 0.2)
    assert policy.temperature == 1.0, "before the first reward, the spread is that of untrained networks"
    policy.n_rewarded_batches += 1
    share = 0.2 / math.sqrt(action_dim)
    spreads = [3.0, 5.0, 10.0]
    for spread in spreads:
        update_temperature(policy, th.tensor(spread), 0.2)
    assert policy.temperature.item() == pytest.approx(share * 6.0)  # the first ones count alike
    policy.n_batches.fill_(10_000)
    update_temperature(policy, th.tensor(16.0), 0.2)
    assert policy.temperature.item() == pytest.approx(share * (6.0 + 10.0 / 200))  # later ones by 1 / 200
