"""Acting with several numbers of particles."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from tiny import TINY

from sb3_rfm import QNE
from sb3_rfm.policies import FlowPolicy

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import particles


def test_weights_are_the_same_and_particles_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    QNE("MlpPolicy", "Pendulum-v1", **TINY).learn(40).save(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--algo", "QNE", "--env", "Pendulum-v1", "--episodes", "2", "--particles", "1", "16"]
    rows = particles.main(arguments)
    assert [row[:2] for row in rows] == [(1, True), (1, False), (16, True), (16, False)]
    assert rows[0][2] != rows[2][2] and rows[0] == particles.main(arguments)[0]
    assert capsys.readouterr().out.startswith("| particles | deterministic | exploring |")


def test_numbers_of_particles_are_checked() -> None:
    space = spaces.Box(-1, 1, (1,), np.float32)
    for name in ("n_particles", "n_exploration_particles"):
        for wrong in (0, 2.5):
            with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
                FlowPolicy(space, space, lambda _: 1e-3, **{name: wrong})  # type: ignore[arg-type]


def test_exploring_and_deterministic_actions_have_their_own_numbers() -> None:
    """Exploring with one particle is the flow's own distribution; the deterministic action is the best of many."""
    arguments = TINY | {"n_particles": 64, "n_exploration_particles": 1}
    policy = QNE("MlpPolicy", "Pendulum-v1", **arguments).policy
    observation = np.zeros((500, 3), np.float32)
    th.manual_seed(0)
    explored, _ = policy.predict(observation)
    th.manual_seed(0)
    features = policy.actor.features(th.as_tensor(observation))
    drawn = th.tanh(policy.actor.sample_latents(features, policy.actor.draw_noise(500, 1)))[:, 0]
    assert np.allclose(explored, 2 * drawn.detach().numpy(), atol=1e-5)  # Pendulum's actions are in [-2, 2]
    best, _ = policy.predict(observation[:1], deterministic=True)
    encoded = policy.critic.encode(policy.critic.features(th.as_tensor(observation)))
    q = policy.critic.min_q(encoded, th.as_tensor(np.stack([explored, best.repeat(500, 0)], 1)) / 2)
    assert (q[:, 1] >= q[:, 0]).float().mean() > 0.95


def test_more_exploration_particles_find_better_actions() -> None:
    def mean_q(n_exploration_particles: int) -> float:
        policy = QNE(
            "MlpPolicy", "Pendulum-v1", **(TINY | {"n_exploration_particles": n_exploration_particles, "temperature": 1e-6})
        ).policy
        observation = th.zeros(500, 3)
        actions, _ = policy.predict(observation.numpy())
        q = policy.critic.min_q(policy.critic.encode(policy.critic.features(observation)), th.as_tensor(actions)[:, None] / 2)
        return float(q.mean())

    assert mean_q(1) < mean_q(8)


def test_the_critic_chooses_and_not_its_target() -> None:
    arguments = TINY | {"n_particles": 64, "n_exploration_particles": 1}
    model, observations = QNE("MlpPolicy", "Pendulum-v1", **arguments), th.randn(200, 3)
    for network in model.critic_target.q_networks:  # it prefers the opposite
        network.output_layer.weight.data.neg_()
    best, drawn = (model.predict(observations.numpy(), deterministic=how)[0] for how in (True, False))
    encoded = model.critic.encode(observations)
    q_best, q_drawn = (model.critic.min_q(encoded, th.as_tensor(actions) / 2) for actions in (best, drawn))
    assert (q_best >= q_drawn).float().mean() > 0.9


def test_an_actor_that_acted_alone_is_trained_again() -> None:
    model = QNE("MlpPolicy", "Pendulum-v1", **TINY)
    model.policy.set_training_mode(True)
    model.actor.predict(np.zeros(3, np.float32))
    model.policy.set_training_mode(True)
    assert model.actor.training and model.critic.training and not model.critic_target.training


def test_a_choice_among_particles_needs_the_critic() -> None:
    policy = QNE("MlpPolicy", "Pendulum-v1", **TINY).policy
    features = th.zeros(2, 3)
    with pytest.raises(ValueError, match="unpack"):
        policy.act(features, None, th.zeros(2, 3, 1), deterministic=True)
    assert policy.act(features, None, th.zeros(2, 1, 1), deterministic=True).shape == (2, 1)
