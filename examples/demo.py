"""Swing up a pole: train RFM at its defaults on the DeepMind Control Suite's cartpole, then look at what it learned.

.. code-block:: bash

    make demo                            # or: python examples/demo.py
    python examples/demo.py --steps 50000 --seed 1
    tensorboard --logdir runs

Everything is written to ``runs/cartpole-swingup-<date>-<time>/``: the model, TensorBoard logs, the learning curve and a
video of one episode. Ctrl-C ends training early and still writes all of it.
"""

import argparse
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import gymnasium as gym
import imageio.v2 as imageio
import matplotlib
import numpy as np
from gymnasium.wrappers import FlattenObservation
from PIL import Image, ImageDraw
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.results_plotter import ts2xy

from sb3_rfm import RFM

matplotlib.use("Agg")  # pictures go to files, with or without a display
import matplotlib.pyplot as plt

MAX_RETURN = 1000  # the reward of a step is at most 1, and an episode has 1000 steps
STEPS_PER_SECOND = 100  # of simulated time
FRAMES_PER_SECOND = 25
FRAME_SIZE = (640, 480)


def make_env(**kwargs: Any) -> gym.Env[np.ndarray, np.ndarray]:
    """The task. The prefix ``shimmy:`` imports Shimmy, which registers the environments of the Control Suite."""
    return FlattenObservation(gym.make("shimmy:dm_control/cartpole-swingup-v0", **kwargs))


class StopOnCtrlC(BaseCallback):
    """End training after the current step when Ctrl-C is pressed; a second Ctrl-C interrupts at once.

    Unlike a ``KeyboardInterrupt``, this never stops between the halves of an update.
    """

    stopped = False

    def _on_training_start(self) -> None:
        self._previous_handler = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.stopped = True
        signal.signal(signal.SIGINT, self._previous_handler)
        print("\nCtrl-C: ending training and writing the results.", flush=True)

    def _on_step(self) -> bool:
        return not self.stopped

    def _on_training_end(self) -> None:
        signal.signal(signal.SIGINT, self._previous_handler)


class PrintEvaluation(BaseCallback):
    """One line for each evaluation of the :class:`EvalCallback` this is given to."""

    parent: EvalCallback

    def _on_step(self) -> bool:
        print(f"step {self.num_timesteps:>7,}   mean return {self.parent.last_mean_reward:4.0f}", flush=True)
        return True


def choose_renderer() -> None:
    """Point MuJoCo at the first OpenGL that draws without a display; to be called before MuJoCo is imported.

    Each is tried in a process of its own, because MuJoCo decides once, when it is imported, and may crash.
    """
    test = "from dm_control import suite; suite.load('cartpole', 'swingup').physics.render(32, 32)"
    wanted = os.environ.get("MUJOCO_GL")
    for name in [wanted] if wanted else ["egl", "osmesa", "glfw"]:
        environment = {**os.environ, "MUJOCO_GL": name}
        if subprocess.run([sys.executable, "-c", test], env=environment, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return
    os.environ["MUJOCO_GL"] = "off"


def draw_cartpole(observation: np.ndarray) -> np.ndarray:
    """Draw cart and pole from an observation, for machines on which MuJoCo cannot render.

    :param observation: Position of the cart in metres, then cosine and sine of the pole's angle from upright, ..., (5,)
    :return: Image, (height, width, 3)
    """
    x, cosine, sine = observation[:3]
    width, height = 2 * FRAME_SIZE[0], 2 * FRAME_SIZE[1]  # drawn at twice the size, which smooths the edges
    metre = height / 3
    cart = np.array([width / 2 + metre * x, 0.55 * height])
    tip = cart + metre * np.array([sine, -cosine])
    image = Image.new("RGB", (width, height), "#f4f1ea")
    draw = ImageDraw.Draw(image)
    draw.line([(width / 2 - 1.8 * metre, cart[1]), (width / 2 + 1.8 * metre, cart[1])], fill="#b8b2a6", width=10)
    draw.rounded_rectangle([*(cart - [80, 45]), *(cart + [80, 45])], radius=16, fill="#3b4a5a")
    draw.line([*cart, *tip], fill="#d1783c", width=28)
    for centre, radius in ((cart, 20), (tip, 26)):
        draw.ellipse([*(centre - radius), *(centre + radius)], fill="#d1783c")
    draw.text((24, 24), "schematic, drawn from the observations", fill="#6b665c", font_size=32)
    return np.asarray(image.resize(FRAME_SIZE, Image.Resampling.LANCZOS))


def film(model: RFM, file: Path, seed: int) -> tuple[float, bool]:
    """Write a video of one episode of the deterministic policy.

    :return: The episode's return, and whether MuJoCo rendered it
    """
    env = make_env(render_mode="rgb_array", render_kwargs={"width": FRAME_SIZE[0], "height": FRAME_SIZE[1]})
    observation, _ = env.reset(seed=seed)
    try:
        env.render()
        rendered = True
    except Exception:  # whatever the drivers raise; a drawing is better than no video
        rendered = False
    total = 0.0
    video = imageio.get_writer(file, fps=FRAMES_PER_SECOND)
    for step in range(MAX_RETURN):
        if step % (STEPS_PER_SECOND // FRAMES_PER_SECOND) == 0:
            video.append_data(np.asarray(env.render()) if rendered else draw_cartpole(observation))
        action, _ = model.predict(observation, deterministic=True)
        observation, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        if terminated or truncated:
            break
    video.close()
    env.close()
    return total, rendered


def plot_learning_curve(file: Path, training: tuple[np.ndarray, np.ndarray], evaluations: dict[int, np.ndarray]) -> None:
    """Plot the returns of the training episodes and of the evaluations.

    :param training: Environment steps at which episodes ended, and their returns
    :param evaluations: Returns of the evaluation episodes at a number of environment steps
    """
    steps = list(evaluations)
    mean = [np.mean(returns) for returns in evaluations.values()]
    lowest, highest = [min(r) for r in evaluations.values()], [max(r) for r in evaluations.values()]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(*training, ".", color="0.6", label="training episodes (exploring)")
    axes.fill_between(steps, lowest, highest, color="C0", alpha=0.2, linewidth=0)
    axes.plot(steps, mean, "o-", color="C0", markersize=4, clip_on=False, label="evaluation: mean, lowest and highest return")
    axes.set(xlabel="environment steps", ylabel="return", ylim=(0, MAX_RETURN * 1.02), title="RFM on cartpole-swingup")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=22_000, help="environment steps to train for")
    parser.add_argument("--evaluations", type=int, default=10, help="number of evaluations during training")
    parser.add_argument("--eval-episodes", type=int, default=5, help="episodes of each evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the run's folder")
    parser.add_argument("--no-progress-bar", dest="progress_bar", action="store_false")
    args = parser.parse_args(argv)
    if min(args.steps, args.evaluations, args.eval_episodes) < 1:
        parser.error("--steps, --evaluations and --eval-episodes must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, evaluate and film.

    :param argv: Command-line arguments; those of the process by default
    :return: The folder with the results
    """
    args = parse_arguments(argv)
    print(f"Training RFM on cartpole-swingup for {args.steps:,} steps; Ctrl-C ends it early.", flush=True)
    choose_renderer()
    run: Path = args.runs / f"cartpole-swingup-{datetime.now():%Y%m%d-%H%M%S}"
    run.mkdir(parents=True)

    env = Monitor(make_env(), str(run / "training"))
    # dm_control asks for the deprecation warnings of every library, which would tear the progress bar.
    warnings.simplefilter("ignore", DeprecationWarning)
    # One copy of the environment for each episode: the policy then answers for all of them at once.
    eval_env = make_vec_env(make_env, n_envs=args.eval_episodes, seed=args.seed + 1000)
    model = RFM("MlpPolicy", env, seed=args.seed, tensorboard_log=str(run))

    def evaluate() -> np.ndarray:
        returns, _ = evaluate_policy(model, eval_env, args.eval_episodes, return_episode_rewards=True)
        return np.asarray(returns)

    before = evaluate()
    print(f"step       0   mean return {np.mean(before):4.0f}", flush=True)

    evaluation = EvalCallback(
        eval_env,
        callback_after_eval=PrintEvaluation(),
        n_eval_episodes=args.eval_episodes,
        eval_freq=max(args.steps // args.evaluations, 1),
        log_path=str(run),
        verbose=0,
    )
    model.learn(
        args.steps,
        callback=[evaluation, StopOnCtrlC()],
        log_interval=1,
        tb_log_name="tensorboard",
        progress_bar=args.progress_bar,
    )
    model.save(run / "model")

    after = evaluate()
    during = zip(evaluation.evaluations_timesteps, map(np.asarray, evaluation.evaluations_results), strict=True)
    evaluations = {0: before, **dict(during), model.num_timesteps: after}
    plot_learning_curve(run / "learning_curve.png", ts2xy(load_results(str(run)), "timesteps"), evaluations)
    filmed, rendered = film(RFM.load(run / "model"), run / "video.mp4", seed=args.seed)

    print(
        f"\nMean return over {args.eval_episodes} episodes, at most {MAX_RETURN}: "
        f"{np.mean(before):.0f} before training, {np.mean(after):.0f} after {model.num_timesteps:,} steps.\n"
        f"\nWritten to {run}/\n"
        f"  model.zip            RFM.load('{run / 'model'}')\n"
        f"  learning_curve.png   returns while learning\n"
        f"  video.mp4            one episode of the trained policy, return {filmed:.0f}\n"
        f"  tensorboard_1/       {os.path.relpath(sys.executable)} -m tensorboard.main --logdir {args.runs}\n"
        f"  training.monitor.csv and evaluations.npz, the numbers behind the picture"
    )
    if not rendered:
        print(
            "\nThe video is a schematic drawing, because no OpenGL was found that renders without a display. "
            "On Debian and Ubuntu, `apt install libegl1` brings one; the next run will use it."
        )
    return run


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before training, or the second one
        sys.exit(130)
