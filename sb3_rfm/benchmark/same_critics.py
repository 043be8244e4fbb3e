"""What actors make of the same critics: how good the critics find the actions of several, trained side by side.

An agent learns as usual, the *leader*. Other actors follow its critics and its temperature: each makes one step for each of
the leader's, on a batch of the leader's replay buffer, and never acts in the environment. Exploration, data and the critics'
luck are then the same for all, and what is left is how well an actor follows critics that keep changing.

    python -m sb3_rfm.benchmark.same_critics --env HalfCheetah-v5 --actors rfm:replay sac --set rfm:replay.proposal=replay

Draws from the Boltzmann policy itself, by Metropolis' rule, are the standard: what an actor without any error would do.

A critic has been trained on actions of the leader, and is the surest about those. What it says of others' is not what they
would return.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from sb3_rfm.actors import boltzmann_log_prob, squash, unsquash
from sb3_rfm.benchmark.suites import (
    constructor_arguments,
    get_algorithm,
    get_setting,
    get_tasks,
    make_env,
    parse_overrides,
    short,
)
from sb3_rfm.benchmark.tables import Row, save
from sb3_rfm.flow_actor_critic import FlowActorCritic
from sb3_rfm.gradients import step

N_DRAWS = 6
"""Actions that are drawn from each actor at each state of a look."""


class Follower(Protocol):
    """An actor that is trained against the critics of another agent."""

    def train(self, batch: Any) -> None:
        """One step on a batch of the replay buffer."""

    def act(self, observations: Tensor, deterministic: bool) -> Tensor:
        """Actions in [-1, 1], (B, D), for observations."""


def follower_arguments(leader: FlowActorCritic, setting: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a follower: the leader's learning rate unless the setting has one, and no buffer of its own."""
    setting = {"learning_rate": leader.learning_rate} | setting | {"buffer_size": 1}
    return constructor_arguments(setting, leader.action_space)


class FlowFollower:
    """A flow, regressed as its own algorithm does it.

    :param leader: The agent whose critics and temperature it follows, already learning
    :param algorithm: A flow-policy algorithm
    :param arguments: Its keyword arguments
    """

    def __init__(self, leader: FlowActorCritic, algorithm: type[FlowActorCritic], arguments: dict[str, Any]) -> None:
        arguments = follower_arguments(leader, arguments)
        model = algorithm("MlpPolicy", leader.get_env(), device=leader.device, **arguments)  # type: ignore[arg-type]
        self.policy = model.policy
        for name in ("critic", "critic_target", "temperature"):
            setattr(self.policy, name, getattr(leader.policy, name))
        self.learner = model._make_learner(executor=leader._learner.executor)
        self.parameters = list(self.policy.actor.network.parameters())

    def train(self, batch: Any) -> None:
        inputs = self.learner.inputs(batch.observations, batch.actions.float(), batch.next_observations, batch.dones)
        result = self.learner.run_actor_gradients(inputs.actor_features, inputs.value_features, inputs.x_1)
        step(self.policy.actor.optimizer, self.parameters, result.parameters, max_grad_norm=None)

    @torch.no_grad()
    def act(self, observations: Tensor, deterministic: bool) -> Tensor:
        return self.policy._predict(observations, deterministic)


class GaussianFollower:
    """The actor of SB3's SAC, by SAC's loss at the leader's temperature.

    :param leader: See :class:`FlowFollower`
    :param arguments: Keyword arguments of SAC
    """

    def __init__(self, leader: FlowActorCritic, arguments: dict[str, Any]) -> None:
        arguments = follower_arguments(leader, arguments)
        self.actor = SAC("MlpPolicy", leader.get_env(), device=leader.device, **arguments).actor  # type: ignore[arg-type]
        self.policy = leader.policy
        self.parameters = list(self.actor.parameters())

    def train(self, batch: Any) -> None:
        with torch.enable_grad():
            actions, log_prob = self.actor.action_log_prob(batch.observations)
            critic = self.policy.critic
            q = critic.min_q(critic.encode(critic.features(batch.observations)), actions)
            loss = (log_prob - q / self.policy.temperature).mean()
            gradients = torch.autograd.grad(loss, self.parameters)
        step(self.actor.optimizer, self.parameters, list(gradients), max_grad_norm=None)

    @torch.no_grad()
    def act(self, observations: Tensor, deterministic: bool) -> Tensor:
        actions: Tensor = self.actor(observations, deterministic)
        return actions


def get_follower_class(label: str) -> type[FlowActorCritic] | type[SAC]:
    """The algorithm of a label of the benchmark.

    :raises ValueError: for one whose actor is neither a flow nor SAC's
    """
    algorithm = get_algorithm(label.partition(":")[0])
    if not issubclass(algorithm, (FlowActorCritic, SAC)):
        raise ValueError(f"Actors that can follow are those of flow policies and SAC, got {label}.")
    return algorithm


def make_follower(leader: FlowActorCritic, label: str, arguments: dict[str, Any]) -> Follower:
    """The follower that a label of the benchmark names.

    :param leader: The agent that it follows, already learning
    :param label: See :func:`get_follower_class`
    :param arguments: Keyword arguments of its algorithm; the learning rate is the leader's unless it is among them
    """
    algorithm = get_follower_class(label)
    if issubclass(algorithm, FlowActorCritic):
        return FlowFollower(leader, algorithm, arguments)
    return GaussianFollower(leader, arguments)


class Compare(BaseCallback):
    """Trains followers beside the leader, and looks at what its critics think of them once it has begun to learn.

    :param followers: Keyword arguments of each follower, by label
    :param every: Environment steps between two looks
    :param n_states: Replayed states at which actions are compared
    :param report: Is told the rows of each look
    """

    model: FlowActorCritic

    def __init__(
        self, followers: dict[str, dict[str, Any]], every: int, n_states: int, report: Callable[[list[Row]], None]
    ) -> None:
        super().__init__()
        self.arguments, self.every, self.n_states, self.report = followers, every, n_states, report
        self.rows: list[Row] = []

    def _on_training_start(self) -> None:
        self.n_updates = self.model._n_updates
        self.followers = {label: make_follower(self.model, label, given) for label, given in self.arguments.items()}

    def _on_step(self) -> bool:
        assert self.model.replay_buffer is not None
        for _ in range(self.n_updates, self.model._n_updates):
            for follower in self.followers.values():
                follower.train(self.model.replay_buffer.sample(self.model.batch_size))
        self.n_updates = self.model._n_updates
        if self.n_updates > 0 and self.num_timesteps % self.every == 0:
            rows = self.look(self.model.replay_buffer.sample(self.n_states).observations)
            self.rows += rows
            self.report(rows)
        return True

    @torch.no_grad()
    def look(self, observations: Tensor) -> list[Row]:
        """How good the critics find the actions of each actor.

        :param observations: Of replayed states, (B, ...)
        :return: For each actor, deterministic and drawn: the mean Q of both critics over the states, above that of the
            leader's deterministic actions, in units of the temperature. For drawn actions also the standard deviation of
            their latents at one state, in the mean over states and dimensions
        """
        critic, temperature = self.model.policy.critic, self.model.policy.temperature
        encoded = critic.encode(critic.features(observations))

        def value(actions: Tensor) -> Tensor:
            return critic.q_values(encoded, actions).mean() / temperature

        def log_prob(latents: Tensor) -> Tensor:
            return boltzmann_log_prob(latents, critic.split_q(encoded, squash(latents)), temperature)

        actors: dict[str, Callable[[Tensor, bool], Tensor]] = {"leader": self.model.policy._predict}
        actors |= {label: follower.act for label, follower in self.followers.items()}
        best = {label: act(observations, True) for label, act in actors.items()}
        drawn = {label: [act(observations, False) for _ in range(N_DRAWS)] for label, act in actors.items()}
        drawn["boltzmann"] = [squash(draw) for draw in metropolis(log_prob, unsquash(best["leader"]), N_DRAWS)]
        common = {"step": self.num_timesteps, "temperature": float(temperature)}
        base = value(best["leader"])
        rows: list[Row] = []
        for label, draws in drawn.items():
            if label in best:
                advantage = float(value(best[label]) - base)
                rows.append({**common, "actor": label, "actions": "deterministic", "advantage": advantage, "spread": 0.0})
            advantage = float(torch.stack([value(actions) for actions in draws]).mean() - base)
            spread = float(unsquash(torch.stack(draws)).std(0).mean())
            rows.append({**common, "actor": label, "actions": "drawn", "advantage": advantage, "spread": spread})
        return rows


def metropolis(log_prob: Callable[[Tensor], Tensor], start: Tensor, n_draws: int, n_steps: int = 600) -> list[Tensor]:
    """Draws from densities by random walks that Metropolis et al. (1953) accept or refuse.

    :param log_prob: Log-densities up to constants, (B, D) → (B,)
    :param start: (B, D)
    :param n_draws: From the second half of the walks, at equal distances
    :param n_steps: Length of a walk; its steps are of five sizes, half of them in some dimensions only
    :return: (B, D) each
    """
    x, log_p, draws = start, log_prob(start), []
    kept = {n_steps - 1 - k * (n_steps // 2 // n_draws) for k in range(n_draws)}
    for i in range(n_steps):
        step = (0.05, 0.1, 0.2, 0.4, 0.8)[i % 5] * torch.randn_like(x)
        if i % 2:
            step *= torch.rand_like(x) < 1 / 3
        other = x + step
        log_other = log_prob(other)
        accepted = torch.rand_like(log_p) < (log_other - log_p).exp()
        x, log_p = torch.where(accepted.unsqueeze(1), other, x), torch.where(accepted, log_other, log_p)
        if i in kept:
            draws.append(x)
    return draws


def summarise(rows: list[Row]) -> str:
    """Markdown table of the advantages and spreads, each the mean over the second half of the looks."""
    half = max(row["step"] for row in rows) / 2
    lines = ["| actor | deterministic | drawn | spread |", "|---|---|---|---|"]

    def cell(actor: str, actions: str, name: str, style: str) -> str:
        own = [row[name] for row in rows if (row["actor"], row["actions"]) == (actor, actions) and row["step"] > half]
        return format(sum(own) / len(own), style) if own else "–"

    for actor in dict.fromkeys(row["actor"] for row in rows):
        cells = [cell(actor, actions, "advantage", "+.1f") for actions in ("deterministic", "drawn")]
        cells.append(cell(actor, "drawn", "spread", ".2f"))
        lines.append(f"| {actor} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Train the leader and its followers, and write what the critics think of them.

    :param argv: Command-line arguments; those of the process by default
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--env", required=True, help="as --suite of the benchmark, for one environment")
    parser.add_argument("--leader", default="rfm", metavar="ALGO", help="a flow policy")
    parser.add_argument("--actors", nargs="+", required=True, metavar="ALGO", help="followers: algo, or algo:setting")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="ALGO.ARGUMENT=VALUE", dest="overrides")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000, help="environment steps between two looks")
    parser.add_argument("--states", type=int, default=2_048, help="replayed states of a look")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/same_critics"))
    args = parser.parse_args(argv)
    try:
        (task,) = get_tasks(args.env, args.steps)
        overrides = parse_overrides(args.overrides, [args.leader, *args.actors])
        settings = {label: get_setting(label, given) for label, given in overrides.items()}
        for label in args.actors:
            get_follower_class(label)
        leading = get_algorithm(args.leader.partition(":")[0])
        if not issubclass(leading, FlowActorCritic):
            raise ValueError(f"The leader is a flow policy, got {args.leader}.")
    except ValueError as error:
        parser.error(str(error))

    env = make_env(task.env_id)
    arguments = constructor_arguments(settings[args.leader], env.action_space)
    leader = leading("MlpPolicy", env, seed=args.seed, device="cpu", **arguments)
    if min(args.every, args.states) < 1 or args.steps // args.every * args.every <= leader.learning_starts + 1:
        parser.error(
            f"--every and --states are positive, and there is a look after the leader has begun to learn, at step "
            f"{leader.learning_starts + 1}: got --steps {args.steps} --every {args.every} --states {args.states}."
        )

    def report(rows: list[Row]) -> None:
        shown = ", ".join(f"{r['actor']} {r['advantage']:+.1f}" for r in rows if r["actions"] == "deterministic")
        print(f"{rows[0]['step']:,} steps: {shown}", flush=True)

    print("Where updates are compiled, the first ones wait for the compiler, up to a minute for each actor.", flush=True)
    compare = Compare({label: settings[label] for label in args.actors}, args.every, args.states, report)
    leader.learn(args.steps, callback=compare)
    args.out.mkdir(parents=True, exist_ok=True)
    return save(args.out, short(task.env_id), compare.rows, summarise)


if __name__ == "__main__":
    main()
