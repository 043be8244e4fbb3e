"""What is learned from a batch, against closed forms."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.torch_layers import FlattenExtractor
from tiny import TINY
from torch import Tensor

from sb3_rfm import RFM
from sb3_rfm.actors import boltzmann_log_prob, squash, unsquash
from sb3_rfm.critics import QCritic
from sb3_rfm.learner import regression_weights
from sb3_rfm.scales import update_reward_scale


class LinearExtractor(FlattenExtractor):
    """Features that can be trained."""

    def __init__(self, observation_space: gym.Space) -> None:
        super().__init__(observation_space)
        self.linear = th.nn.Linear(self.features_dim, self.features_dim)

    def forward(self, observations: Tensor) -> Tensor:
        return self.linear(super().forward(observations))


def make(**kwargs: Any) -> RFM:
    return RFM("MlpPolicy", "Pendulum-v1", **TINY | kwargs)


def transitions(n: int = 2) -> SimpleNamespace:
    """Some, of which the last ends its episode."""
    th.manual_seed(0)
    return SimpleNamespace(
        observations=th.randn(n, 3),
        actions=1.6 * th.rand(n, 1) - 0.8,
        next_observations=th.randn(n, 3),
        rewards=th.tensor([*[[1.0]] * (n - 1), [5.0]]),
        dones=th.tensor([*[[0.0]] * (n - 1), [1.0]]),
        discounts=None,
    )


def answer(critic: QCritic, values: list[float]) -> None:
    """Have each Q-function give one value for everything, in its own unit."""
    for network, value in zip(critic.q_networks, values, strict=True):
        network.output_layer.weight.data.zero_()
        network.output_layer.bias.data.fill_(value)


def test_density_of_latents_is_that_of_actions_times_the_jacobian() -> None:
    latents = th.randn(5, 4, 3, dtype=th.float64, requires_grad=True)
    q = lambda actions: -(actions - 0.3).square().sum(-1)  # noqa: E731
    jacobian = th.autograd.grad(squash(latents).sum(), latents, create_graph=True)[0]
    expected = q(squash(latents)) / 0.2 + jacobian.log().sum(-1)
    log_p = boltzmann_log_prob(latents, q(squash(latents)), 0.2)
    th.testing.assert_close(log_p, expected)
    gradients = [th.autograd.grad(value.sum(), latents, retain_graph=True)[0] for value in (log_p, expected)]
    th.testing.assert_close(*gradients)


@pytest.mark.parametrize("n_target_particles", [1, 2])
def test_critics_are_regressed_on_the_smaller_target_value(n_target_particles: int) -> None:
    model = make(n_target_particles=n_target_particles)
    update = partial(model._learner.update, transitions(), gamma=0.9, tau=0.005, max_grad_norm=None)
    update()  # the unit of Q is the mean reward from here on
    answer(model.critic, [1.0, 3.0])
    answer(model.critic_target, [10.0, 7.0])
    metrics = dict(zip(model._learner.metric_names, update(), strict=True))
    targets = [1.0 + 0.9 * 3.0 * 7.0, 5.0]  # the second transition ends its episode
    expected = 0.5 * sum((q - target) ** 2 / 2 for q in (3.0, 9.0) for target in targets) / 3.0**2
    assert metrics["critic_loss"].item() == pytest.approx(expected)


@pytest.mark.parametrize("share", [False, True])
def test_the_flow_is_regressed_where_the_proposal_says(share: bool) -> None:
    kwargs = {"features_extractor_class": LinearExtractor, "share_features_extractor": share}
    batch = transitions(20)
    # Two rows in sixteen, one for each critic, and the last transition, which ends its episode.
    own = {"replay": th.ones(20, dtype=th.bool), "policy": th.tensor([row in (0, 1, 16, 17, 19) for row in range(20)])}
    for proposal, replayed in own.items():
        model = make(
            proposal=proposal, n_target_particles=1, precision="float32", policy_kwargs=TINY["policy_kwargs"] | kwargs
        )
        observations = th.where(replayed[:, None], batch.observations, batch.next_observations)
        th.manual_seed(0)
        inputs = model._learner.inputs(batch.observations, batch.actions, batch.next_observations, batch.dones)
        th.manual_seed(0)
        drawn = model.actor.sample_latents(model.actor.features(batch.next_observations), model.actor.draw_noise(20, 1))[:, 0]
        encoded = model.critic_target.encode(model.critic_target.features(batch.next_observations))
        next_q = model.critic_target.min_q(encoded, squash(drawn))
        th.testing.assert_close(inputs.x_1, th.where(replayed[:, None], unsquash(batch.actions), drawn))
        th.testing.assert_close(inputs.actor_features, model.actor.features(observations))
        th.testing.assert_close(inputs.value_features, model.critic.features(observations))
        th.testing.assert_close(inputs.critic_features, model.critic.features(batch.observations))
        th.testing.assert_close(inputs.next_q, next_q)
        features = inputs.actor_features, inputs.critic_features, inputs.value_features
        assert [tensor.requires_grad for tensor in features] == [True, not share, False]


def test_discounts_of_the_transitions_count() -> None:
    """Those of n-step returns are ``gamma^n``."""
    model, batch = make(), transitions()
    batch.discounts = th.tensor([[0.5], [0.5]])
    update = partial(model._learner.update, batch, gamma=0.9, tau=0.005, max_grad_norm=None)
    update()
    answer(model.critic, [1.0, 3.0])
    answer(model.critic_target, [10.0, 7.0])
    metrics = dict(zip(model._learner.metric_names, update(), strict=True))
    targets = [1.0 + 0.5 * 3.0 * 7.0, 5.0]
    assert metrics["critic_loss"].item() == pytest.approx(0.5 * sum((q - y) ** 2 / 2 for q in (3.0, 9.0) for y in targets) / 9)


def test_the_target_critic_moves_by_tau() -> None:
    model = make()
    update = partial(model._learner.update, transitions(), gamma=0.9, max_grad_norm=None)
    update(tau=0.005)  # sets the unit of Q, which the same rewards leave as it is
    before = [parameter.detach().clone() for parameter in model.critic_target.parameters()]
    update(tau=0.25)
    for target, was, online in zip(model.critic_target.parameters(), before, model.critic.parameters(), strict=True):
        th.testing.assert_close(target.detach(), 0.75 * was + 0.25 * online.detach())


def test_gradients_are_clipped() -> None:
    """By plain gradient descent with a learning rate of 1, a step is as long as its gradient."""
    model = make(learning_rate=1.0, policy_kwargs={"net_arch": [16], "optimizer_class": th.optim.SGD})
    update = partial(model._learner.update, transitions(), gamma=0.9, tau=0.0, max_grad_norm=1e-3)
    update()
    before = [[p.detach().clone() for p in network.parameters()] for network in (model.actor, model.critic)]
    update()
    for network, was in zip((model.actor, model.critic), before, strict=True):
        step = th.cat([(p.detach() - b).flatten() for p, b in zip(network.parameters(), was, strict=True)])
        assert step.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_next_values_are_those_of_the_target_critic() -> None:
    kwargs = {"features_extractor_class": LinearExtractor, "net_arch": [16]}
    model, batch = make(n_target_particles=1, precision="float32", policy_kwargs=kwargs), transitions(20)
    th.nn.init.constant_(model.critic.features_extractor.linear.weight, 7.0)
    th.manual_seed(0)
    inputs = model._learner.inputs(batch.observations, batch.actions, batch.next_observations, batch.dones)
    th.manual_seed(0)
    drawn = model.actor.sample_latents(model.actor.features(batch.next_observations), model.actor.draw_noise(20, 1))[:, 0]
    q = th.cat(model.critic_target(batch.next_observations, squash(drawn)), 1).amin(1)
    th.testing.assert_close(inputs.next_q, q)


def test_one_of_several_next_actions_is_drawn_and_not_the_best() -> None:
    """At an infinite temperature, each particle with the same probability."""
    model, features = make(n_target_particles=2, temperature=1e6, precision="float32"), th.zeros(4000, 3)
    th.manual_seed(0)
    _, q, _ = model._learner.next_actions(features, features)
    th.manual_seed(0)
    latents = model.actor.sample_latents(features, model.actor.draw_noise(4000, 2))
    both = model.critic_target.min_q(model.critic_target.encode(features), squash(latents))
    assert abs(q.mean() - both.mean()) < 4.5 * both.std() / 4000**0.5 < both.amax(1).mean() - both.mean()


def test_each_extractor_has_the_gradient_of_its_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = {"features_extractor_class": LinearExtractor, "net_arch": [16], "optimizer_class": th.optim.SGD}
    model = make(proposal="replay", learning_rate=1.0, policy_kwargs=kwargs)
    loss = model._learner.critic_loss
    monkeypatch.setattr(model._learner, "critic_loss", lambda *args: (0 * loss(*args)[0], loss(*args)[1]))
    actor, critic = (network.features_extractor.linear.weight for network in (model.actor, model.critic))
    actor_before, critic_before = actor.detach().clone(), critic.detach().clone()
    model._learner.update(transitions(8), gamma=0.9, tau=0.0, max_grad_norm=None)
    assert not th.equal(actor, actor_before) and th.equal(critic, critic_before)


def test_a_shared_extractor_is_stepped_with_the_actor() -> None:
    kwargs = {"features_extractor_class": LinearExtractor, "share_features_extractor": True}
    model = make(policy_kwargs=TINY["policy_kwargs"] | kwargs)
    of_actor, of_critic = (
        {id(p) for group in network.optimizer.param_groups for p in group["params"]} for network in (model.actor, model.critic)
    )
    assert not of_actor & of_critic and id(model.actor.features_extractor.linear.weight) in of_actor


def test_metrics_are_means_over_the_updates_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().learn(20)
    losses, n_metrics = iter([1.0, 3.0]), len(model._learner.metric_names)
    monkeypatch.setattr(model._learner, "run_update", lambda *_: th.full((n_metrics,), next(losses)))
    model.train(2, 8)
    assert model.logger.name_to_value["train/critic_loss"] == 2.0


def test_times_are_within_their_limits() -> None:
    model, times = make(t_min=0.2), []
    target = model._learner.posterior_mean
    model._learner.posterior_mean = lambda *args: times.append(args[2]) or target(*args)
    model._learner.actor_loss(th.zeros(2000, 3), th.zeros(2000, 3), th.zeros(2000, 1))
    assert 0.2 <= times[0].min() < 0.21 and 0.79 < times[0].max() <= 0.8


class OneDecision(gym.Env):
    """The first of ``n_steps`` actions is worth ``-(a - goal)^2``, and the first observation shows the goal, 0.5 or -0.5.

    :param n_steps: Length of an episode
    """

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.goal, self.step_number = float(self.np_random.choice([-0.5, 0.5])), 0
        return np.array([self.goal, 0], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.step_number += 1
        reward = -float((action[0] - self.goal) ** 2) if self.step_number == 1 else 0.0
        return np.array([0, 1], np.float32), reward, self.step_number == self.n_steps, False, {}


@pytest.mark.parametrize("n_steps", [1, 2])
def test_the_first_action_of_an_episode_is_learned(n_steps: int) -> None:
    """No transition leads to the first observation, where the only action that matters is taken."""
    arguments = {"policy_kwargs": {"net_arch": [64, 64]}, "execution": "eager", "precision": "float32", "seed": 0}
    model = RFM("MlpPolicy", OneDecision(n_steps), **arguments, device="cpu").learn(500 * n_steps)
    actions, _ = model.predict(np.repeat([[-0.5, 0], [0.5, 0]], 200, axis=0))
    low, high = actions[:200], actions[200:]
    assert abs(low.mean() + 0.5) < 0.2 and abs(high.mean() - 0.5) < 0.2
    assert max(low.std(), high.std()) < 0.3


@pytest.mark.parametrize("path", ["cond_ot", "cosine"])
def test_the_flow_that_knows_the_posterior_mean_has_no_loss(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Q such that latents are Gaussian, N(m, s^2): u_1 given u_t is Gaussian then, too."""
    mean, std, temperature = 0.9, 0.6, 0.5
    model = make(n_candidates=64, path=path, temperature=temperature)

    def gaussian_q(encoded: Any, actions: Tensor, reduced: bool) -> Tensor:
        u, jacobian = unsquash(actions), 1 - actions.square()
        return temperature * (-0.5 * ((u - mean) / std).square() - jacobian.log()).sum(-1)

    def exact(encoded: Tensor, latents: Tensor, t: Tensor, reduced: bool = False) -> Tensor:
        alpha, sigma = (f(t)[:, None] for f in (model.actor.probability_path.alpha, model.actor.probability_path.sigma))
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (latents - alpha * mean)

    monkeypatch.setattr(model.critic, "split_q", gaussian_q)
    features, latents = th.randn(500, 3), unsquash(1.6 * th.rand(500, 1) - 0.8)
    with monkeypatch.context() as known:
        known.setattr(model.actor, "predict_data", exact)
        loss, _ = model._learner.actor_loss(features, features, latents)
    untrained, _ = model._learner.actor_loss(features, features, latents)
    assert loss.item() < 1e-3 < 0.1 < untrained.item()


def test_errors_count_as_much_as_the_density_changes_in_their_dimension() -> None:
    """log p = -1/2 sum_j c_j (u_j - m_j)^2: at a distance d from u, the gradient is c (m - u - d)."""
    curvature, mean = th.tensor([1.0, 3.0, 9.0]), th.tensor([0.1, -0.4, 0.7])
    log_prob = lambda u: -0.5 * (curvature * (u - mean).square()).sum(-1)  # noqa: E731
    predictions = th.cat([th.randn(50, 3), mean.expand(50, 3)])
    th.manual_seed(0)
    weights = regression_weights(log_prob, predictions, spread=0.5)
    th.manual_seed(0)
    distance = 0.5 * th.randn(100, 3)
    root = (curvature * (mean - predictions - distance)).abs().sqrt()
    th.testing.assert_close(weights, root / root.mean(1, keepdim=True))


def test_every_state_counts_the_same() -> None:
    slopes = th.tensor([[1.0, 9.0], [1e6, 9e6], [0.0, 0.0]])
    weights = regression_weights(lambda u: (slopes * u).sum(-1), th.zeros(3, 2))
    th.testing.assert_close(weights, th.tensor([[0.5, 1.5], [0.5, 1.5], [1.0, 1.0]]))
    alone = regression_weights(lambda u: (slopes[:, :1] * u).sum(-1), th.zeros(3, 1))
    assert (alone == 1).all(), "nothing to be weighed against"


def test_weights_hardly_depend_on_the_precision() -> None:
    observation_space, action_space = gym.spaces.Box(-1, 1, (17,)), gym.spaces.Box(-1, 1, (6,))
    critic = QCritic(observation_space, action_space, [256, 256], FlattenExtractor(observation_space), 17)
    encoded, predictions = critic.encode(th.randn(512, 17)), 0.5 * th.randn(512, 6)

    def weights(reduced: bool) -> Tensor:
        th.manual_seed(0)
        return regression_weights(
            lambda u: boltzmann_log_prob(u, critic.split_q(encoded, squash(u), reduced), 0.01), predictions
        )

    exact = weights(False)
    assert 0 < (weights(True) - exact).abs().mean() < 0.1 * exact.std()


@pytest.mark.parametrize(("weighting", "expected"), [("uniform", 1 + 4 + 9), ("gradient", 3 * 1 + 2 * 4 + 1 * 9)])
def test_the_weights_are_those_of_the_regression(weighting: str, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are looked for around the prediction, and an error counts by the weight of its dimension."""

    class Box(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (2,))
        action_space = gym.spaces.Box(-1, 1, (3,))

    model, looked_at, guesses = RFM("MlpPolicy", Box(), **TINY, weighting=weighting), [], []

    def weights(log_prob: Any, prediction: Tensor) -> Tensor:
        looked_at.append(prediction)
        return th.tensor([3.0, 2.0, 1.0]).expand_as(prediction)

    def off_by_one_two_three(log_prob: Any, x_t: Tensor, t: Tensor, guess: Tensor) -> Any:
        guesses.append(guess)
        return target(log_prob, x_t, t, guess)._replace(x1=guess + th.tensor([1.0, -2.0, 3.0]))

    target = model._learner.posterior_mean
    monkeypatch.setattr("sb3_rfm.learner.regression_weights", weights)
    monkeypatch.setattr(model._learner, "posterior_mean", off_by_one_two_three)
    features = th.randn(8, 2)
    loss, _ = model._learner.actor_loss(features, features, unsquash(0.5 * th.rand(8, 3)))
    assert loss.item() == pytest.approx(expected)
    if weighting == "gradient":
        th.testing.assert_close(looked_at, guesses)


def test_an_untrained_network_predicts_the_mean_of_the_gaussian_it_is_preconditioned_for() -> None:
    """u_1 ~ N(0, 0.5^2) given u_t; what the network adds to that vanishes with the noise."""
    for path in ("cond_ot", "cosine", "linear_vp", "ve"):
        actor, latents, t = make(path=path).actor, th.randn(2_000, 1), th.linspace(0.01, 0.99, 2_000)
        encoded = actor.network.encode(th.randn(2_000, 3))
        alpha, sigma = (f(t).unsqueeze(1) for f in (actor.probability_path.alpha, actor.probability_path.sigma))
        expected = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * latents
        added = (actor.predict_data(encoded, latents, t) - expected).abs()
        assert added.max() > 0.01 and (added <= 2 * sigma).all()
        th.nn.init.zeros_(actor.network.output_layer.weight)
        th.nn.init.zeros_(actor.network.output_layer.bias)
        th.testing.assert_close(actor.predict_data(encoded, latents, t), expected)


@pytest.mark.parametrize("prediction", [-100.0, 0.5, 100.0])
def test_the_guess_is_kept_within_the_range_of_what_is_drawn(prediction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setattr(model.actor, "predict_data", lambda encoded, latents, t: th.full_like(latents, prediction))
    target, guesses = model._learner.posterior_mean, []
    monkeypatch.setattr(model._learner, "posterior_mean", lambda *args: guesses.append(args[-1]) or target(*args))
    model._learner.actor_loss(th.randn(8, 3), th.randn(8, 3), th.zeros(8, 1))
    assert (guesses[0] == max(-4.0, min(prediction, 4.0))).all()


def test_targets_are_kept_within_the_range_of_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setattr(model.actor, "predict_data", lambda encoded, latents, t: th.zeros_like(latents))
    target = model._learner.posterior_mean
    monkeypatch.setattr(model._learner, "posterior_mean", lambda *args: target(*args)._replace(x1=th.full((8, 1), -100.0)))
    features = th.randn(8, 3)
    loss, _ = model._learner.actor_loss(features, features, th.zeros(8, 1))
    assert loss.item() == pytest.approx(4.0**2)


def test_a_new_unit_leaves_values_as_they_are() -> None:
    model = make()
    critic, obs, actions = model.critic, th.randn(6, 3), 2 * th.rand(6, 1) - 1
    before = critic.q_values(critic.encode(obs), actions)
    critic.rescale(th.tensor(5.0))
    th.testing.assert_close(critic.q_values(critic.encode(obs), actions), before)
    assert critic.scale.item() == 5.0


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_the_first_reward_sets_the_unit_of_what_networks_say(dtype: th.dtype) -> None:
    """Before it, values mean nothing: the networks' outputs are kept. After it, the values are."""
    model = make()
    critic, obs, actions = model.critic, th.randn(6, 3), 2 * th.rand(6, 1) - 1
    values = lambda: critic.q_values(critic.encode(obs), actions)  # noqa: E731
    fresh = values()
    update_reward_scale(model.policy, th.zeros(4, 1, dtype=dtype), scale_temperature=True)
    th.testing.assert_close(values(), fresh)
    update_reward_scale(model.policy, th.full((4, 1), -3.0, dtype=dtype), scale_temperature=True)
    th.testing.assert_close(values(), 3 * fresh)
    assert model.policy.temperature.item() == pytest.approx(3.0)
    update_reward_scale(model.policy, th.full((4, 1), 5.0, dtype=dtype), scale_temperature=True)
    th.testing.assert_close(values(), 3 * fresh)
    assert critic.scale.item() == pytest.approx(4.0), "the mean size of a reward"
    assert model.critic_target.scale.item() == pytest.approx(4.0)
    update_reward_scale(model.policy, th.full((4, 1), -10.0, dtype=dtype), scale_temperature=True)
    assert critic.scale.item() == pytest.approx(6.0), "of all batches that had any"


def test_frozen_layers_are_not_trained() -> None:
    """Also those that have a gradient, and a state in the optimizer, from before."""
    model = make().learn(20)
    frozen = [*model.actor.network.first.parameters(), *model.critic.q_networks[0].first.parameters()]
    before = [parameter.detach().clone() for parameter in frozen]
    last = model.actor.network.output_layer.weight.detach().clone()
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.train(3, 16)
    for parameter, value in zip(frozen, before, strict=True):
        th.testing.assert_close(parameter.detach(), value, rtol=0, atol=0)
    assert not th.equal(model.actor.network.output_layer.weight, last)


@pytest.mark.parametrize("share", [False, True])
def test_frozen_extractors_are_not_trained(share: bool) -> None:
    kwargs = {"features_extractor_class": LinearExtractor, "share_features_extractor": share}
    model = make(policy_kwargs=TINY["policy_kwargs"] | kwargs).learn(20)
    frozen = [*model.actor.features_extractor.parameters(), *model.critic.features_extractor.parameters()]
    before = [parameter.detach().clone() for parameter in frozen]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.train(3, 16)
    for parameter, value in zip(frozen, before, strict=True):
        th.testing.assert_close(parameter.detach(), value, rtol=0, atol=0)


@pytest.mark.parametrize("proposal", ["replay", "policy"])
@pytest.mark.parametrize("share", [False, True])
def test_a_shared_extractor_sees_an_observation_once(share: bool, proposal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = {"features_extractor_class": LinearExtractor, "share_features_extractor": share}
    model = make(proposal=proposal, policy_kwargs=TINY["policy_kwargs"] | kwargs).learn(20)
    calls: list[int] = []
    forward = LinearExtractor.forward
    monkeypatch.setattr(LinearExtractor, "forward", lambda self, obs: calls.append(len(obs)) or forward(self, obs))
    model.train(1, 16)
    # The target critic has its own; some rows are regressed at another observation than the one actions are drawn at.
    assert calls == [16] * (3 + (not share) + (proposal == "policy"))
    calls.clear()
    model.predict(model.observation_space.sample(), deterministic=False)
    assert calls == [1] * (1 if share else 2)


def test_what_is_settled_stays_when_updates_are_run_another_way() -> None:
    model = make()
    model.proposal, model.n_target_particles = "replay", 32
    model._prepare_functions(model._learner.executor)
    assert (model._learner.proposal, model._learner.n_target_particles) == ("policy", TINY["n_target_particles"])


def test_metrics_outlive_another_way_of_running_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read late on a GPU: maybe after the functions were prepared anew."""
    model = make().learn(20)
    with monkeypatch.context() as late:
        late.setattr(model, "_record_metrics", lambda: None)
        model.train(1, 16)
    model._prepare_functions(model._learner.executor)
    model._record_metrics()
    assert math.isfinite(model.logger.name_to_value["train/critic_loss"])


def test_what_was_compiled_is_kept_by_later_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts are the updates of this process, also where many short calls of ``learn`` make them."""
    expected: list[int] = []

    def resolve(execution: str, device: th.device, n_updates: int) -> str:
        expected.append(n_updates)
        return "eager"

    monkeypatch.setattr("sb3_rfm.flow_actor_critic.resolve_mode", resolve)
    model = make(learning_starts=0)
    for _ in range(3):
        model.learn(10, reset_num_timesteps=False)
    assert expected == [0, 10, 20, 30]


def test_the_policy_as_a_module() -> None:
    """PyTorch's ``train`` and ``eval`` leave the target critic alone, and actions carry gradients where they are asked for."""
    model = make()
    model.policy.train()
    assert model.critic.training and not model.critic_target.training
    model.policy.eval()
    assert not model.critic.training
    model.policy.run_act = lambda *_: pytest.fail("compiled functions carry no gradients")
    assert model.policy(th.zeros(2, 3), deterministic=True).requires_grad
