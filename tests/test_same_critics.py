"""Actors that follow the critics of another agent."""

import math
from pathlib import Path

import pytest
import torch as th
from tiny import TINY
from torch import Tensor

from sb3_rfm import RFM
from sb3_rfm.benchmark import same_critics


@pytest.mark.parametrize(("label", "tolerance"), [("rfm", 0.05), ("qne", 0.05), ("dqs", 0.15), ("sac", 0.05)])
def test_followers_learn_the_boltzmann_policy_of_the_leaders_critics(label: str, tolerance: float) -> None:
    """Q = -50 |a - 0.5|^2 at temperature 1: a Gaussian of standard deviation 0.1 around 0.5, in each dimension.

    DQS, whose targets near the noise are far off, comes within 1.5 of these. QSM is not consistent with that policy.
    """
    leader = RFM("MlpPolicy", "Reacher-v5", **TINY | {"temperature": 1.0}).learn(60)

    def q(encoded: list[Tensor], actions: Tensor, reduced: bool = False) -> Tensor:
        return -50 * (actions - 0.5).square().sum(-1)

    for name in ("split_q", "min_q"):
        object.__setattr__(leader.policy.critic, name, q)
    follower = same_critics.make_follower(leader, label, {"learning_rate": 3e-3})
    acted = [parameter.clone() for parameter in leader.policy.parameters()]
    assert leader.replay_buffer is not None
    for _ in range(400):
        follower.train(leader.replay_buffer.sample(256))
    observations = leader.replay_buffer.sample(512).observations
    assert (follower.act(observations, deterministic=True) - 0.5).abs().mean() < tolerance
    if label == "sac":  # the flows' spread is theirs
        assert follower.act(observations, deterministic=False).std(0).mean() == pytest.approx(0.1, rel=0.15)
    assert all(th.equal(now, before) for now, before in zip(leader.policy.parameters(), acted, strict=True))


def test_the_comparison_from_the_command_line(tmp_path: Path) -> None:
    arguments = ["--env", "Pendulum-v1", "--actors", "rfm", "rfm:wide", "sac", "--set", "rfm:wide.proposal=policy"]
    rows = same_critics.main([*arguments, "--steps", "140", "--every", "20", "--states", "32", "--out", str(tmp_path)])
    assert len(rows) == 7 * 4 * 2 and all(math.isfinite(row["advantage"]) for row in rows)
    assert all(row["advantage"] == 0 for row in rows if (row["actor"], row["actions"]) == ("leader", "deterministic"))
    assert "| rfm:wide | " in (tmp_path / "Pendulum-v1.txt").read_text()
    assert len((tmp_path / "Pendulum-v1.csv").read_text().splitlines()) == 1 + len(rows)


@pytest.mark.parametrize("arguments", [["--actors", "td3"], ["--actors", "sac", "--leader", "sac"], ["--actors", "rfm:odd"]])
def test_other_actors_are_refused(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        same_critics.main(["--env", "Pendulum-v1", "--steps", "10", "--out", str(tmp_path), *arguments])
