"""Is it worth drawing several particles for an action? Evaluate one saved model with one, two, four, ... of them.

.. code-block:: bash

    python examples/particles.py runs/cartpole-swingup-20260101-120000/model.zip
    python examples/particles.py qne_pendulum.zip --algo QNE --env Pendulum-v1 --particles 1 8 64

The weights stay as they are; the critic chooses the best particle (deterministic) or one with probability ∝ exp(min Q/λ)
(exploring). Where it errs, the best of many is the one that it overestimates most.
"""

import argparse
import warnings
from collections.abc import Sequence

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import sb3_rfm
from sb3_rfm.flow_actor_critic import FlowActorCritic


def main(argv: Sequence[str] | None = None) -> list[tuple[int, bool, float, float]]:
    """Evaluate and print a table.

    :param argv: Arguments; those of the process by default
    :return: Particles, whether deterministic, mean return and its standard deviation between episodes
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a saved model")
    parser.add_argument("--algo", choices=["RFM", "QNE", "DQS", "QSM"], default="RFM")
    parser.add_argument("--env", default="shimmy:dm_control/cartpole-swingup-v0", help="environment that it was trained on")
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 2, 4, 8, 32])
    parser.add_argument("--episodes", type=int, default=5)
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", DeprecationWarning)  # dm_control asks for those of every library

    def make_env() -> gym.Env[np.ndarray, np.ndarray]:
        env = gym.make(args.env)
        return FlattenObservation(env) if isinstance(env.observation_space, spaces.Dict) else env

    algorithm: type[FlowActorCritic] = getattr(sb3_rfm, args.algo)
    rows = []
    print("| particles | deterministic | exploring |\n|---|---|---|")
    for n_particles in args.particles:
        model = algorithm.load(args.model, n_particles=n_particles, n_exploration_particles=n_particles)
        cells = []
        for deterministic in (True, False):
            env = make_vec_env(make_env, n_envs=args.episodes, seed=0)
            mean, deviation = evaluate_policy(model, env, args.episodes, deterministic)
            rows.append((n_particles, deterministic, float(mean), float(deviation)))  # type: ignore[arg-type]
            cells.append(f"{mean:.0f} ± {deviation:.0f}")
        print(f"| {n_particles} | " + " | ".join(cells) + " |", flush=True)
    return rows


if __name__ == "__main__":
    main()
