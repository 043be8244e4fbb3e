"""Acting with several numbers of particles."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from tiny import TINY

from sb3_rfm import QNE

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
    policy = QNE("MlpPolicy", "Pendulum-v1", **TINY).policy
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match="n_particles must be an integer >= 1"):
            policy.set_particles(wrong)  # type: ignore[arg-type]


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
