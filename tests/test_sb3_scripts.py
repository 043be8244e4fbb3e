"""The scripts of Stable-Baselines3's documentation, with the class name changed and budgets cut."""

import multiprocessing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.results_plotter import load_results, ts2xy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_rfm import DQS, QNE, QSM, RFM

SMALL: dict[str, Any] = {"learning_starts": 20, "batch_size": 16, "policy_kwargs": {"net_arch": [16]}, "device": "cpu"}


@pytest.mark.parametrize("algorithm", [RFM, QNE, DQS, QSM])
def test_quick_start(algorithm: Any, tmp_path: Path) -> None:
    env = gym.make("Pendulum-v1", render_mode="rgb_array")
    model = algorithm("MlpPolicy", env, verbose=1, **SMALL)
    model.learn(total_timesteps=60, log_interval=4)
    model.save(tmp_path / "pendulum")
    del model

    model = algorithm.load(tmp_path / "pendulum")
    obs, _info = env.reset()
    for _ in range(5):
        action, _states = model.predict(obs, deterministic=True)
        obs, _reward, terminated, truncated, _info = env.step(action)
        if terminated or truncated:
            obs, _info = env.reset()


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_multiprocessing(start_method: str) -> None:
    if start_method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"{start_method} is not available here")
    vec_env = make_vec_env(
        "Pendulum-v1", n_envs=2, seed=0, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": start_method}
    )
    model = RFM("MlpPolicy", vec_env, train_freq=1, gradient_steps=2, **SMALL)
    model.learn(total_timesteps=60)
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=2)
    assert np.isfinite(mean)
    vec_env.close()


class SaveOnBestTrainingReward(BaseCallback):
    """The custom callback of the documentation."""

    def __init__(self, check_freq: int, log_dir: Path) -> None:
        super().__init__()
        self.check_freq, self.log_dir, self.best_mean_reward = check_freq, log_dir, -np.inf

    def _on_step(self) -> bool:
        if self.n_calls % self.check_freq == 0:
            x, y = ts2xy(load_results(str(self.log_dir)), "timesteps")
            if len(x) > 0 and np.mean(y[-100:]) > self.best_mean_reward:
                self.best_mean_reward = np.mean(y[-100:])
                self.model.save(self.log_dir / "best_model")
        return True


def test_custom_callback_and_monitor(tmp_path: Path) -> None:
    env = Monitor(gym.make("Pendulum-v1"), str(tmp_path))
    noise = NormalActionNoise(mean=np.zeros(1), sigma=0.1 * np.ones(1))
    model = RFM("MlpPolicy", env, action_noise=noise, **(SMALL | {"learning_starts": 390}))
    model.learn(total_timesteps=410, callback=SaveOnBestTrainingReward(check_freq=205, log_dir=tmp_path))
    assert (tmp_path / "best_model.zip").exists()


def test_callbacks(tmp_path: Path) -> None:
    eval_env = gym.make("Pendulum-v1")
    evaluation = EvalCallback(
        eval_env,
        callback_on_new_best=StopTrainingOnRewardThreshold(reward_threshold=-1, verbose=1),
        callback_after_eval=StopTrainingOnNoModelImprovement(max_no_improvement_evals=3, min_evals=5),
        best_model_save_path=str(tmp_path),
        log_path=str(tmp_path),
        eval_freq=30,
        n_eval_episodes=1,
    )
    checkpoint = CheckpointCallback(save_freq=30, save_path=str(tmp_path), save_replay_buffer=True, save_vecnormalize=True)
    event = EveryNTimesteps(n_steps=25, callback=CheckpointCallback(1, str(tmp_path), name_prefix="event"))
    callback = CallbackList([evaluation, checkpoint, event, StopTrainingOnMaxEpisodes(max_episodes=5)])
    model = RFM("MlpPolicy", "Pendulum-v1", tensorboard_log=str(tmp_path / "tensorboard"), **SMALL)
    model.learn(total_timesteps=60, callback=callback, progress_bar=True, tb_log_name="first")
    assert (tmp_path / "best_model.zip").exists()
    assert (tmp_path / "rl_model_60_steps.zip").exists()
    assert list((tmp_path / "tensorboard").glob("first_1/events*"))
    model.load_replay_buffer(tmp_path / "rl_model_replay_buffer_60_steps.pkl")
    RFM.load(tmp_path / "best_model.zip", env=eval_env)


class WatchAll(BaseCallback):
    """What the callback of Weights & Biases does: text of every attribute, gradients of every parameter, saved models."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.gradients = folder, set()

    def _init_callback(self) -> None:
        self.config = {name: str(value) for name, value in vars(self.model).items()}
        for name, parameter in self.model.policy.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, name=name: self.gradients.add(name))

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.model.save(self.folder / "model.zip")


def test_callback_that_watches_everything(tmp_path: Path) -> None:
    callback = WatchAll(tmp_path)
    model = RFM("MlpPolicy", "Pendulum-v1", **SMALL).learn(40, callback=callback)
    assert "temperature" in callback.config
    learned = {name for name, _ in model.policy.named_parameters() if not name.startswith("critic_target")}
    assert callback.gradients >= learned
    RFM.load(tmp_path / "model.zip")


def test_logger_to_csv(tmp_path: Path) -> None:
    model = RFM("MlpPolicy", "Pendulum-v1", **SMALL)
    model.set_logger(configure(str(tmp_path), ["csv", "json"]))
    model.learn(total_timesteps=210, log_interval=1)
    assert "train/actor_loss" in (tmp_path / "progress.csv").read_text()


def test_vec_normalize(tmp_path: Path) -> None:
    vec_env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=1), norm_obs=True, norm_reward=True, clip_obs=10.0)
    model = RFM("MlpPolicy", vec_env, **SMALL)
    model.learn(total_timesteps=40)
    model.save(tmp_path / "model")
    vec_env.save(str(tmp_path / "vec_normalize.pkl"))

    vec_env = VecNormalize.load(str(tmp_path / "vec_normalize.pkl"), make_vec_env("Pendulum-v1", n_envs=1))
    vec_env.training = False
    vec_env.norm_reward = False
    model = RFM.load(tmp_path / "model", env=vec_env)
    evaluate_policy(model, vec_env, n_eval_episodes=1)


def test_hindsight_experience_replay(tmp_path: Path) -> None:
    env = BitFlippingEnv(n_bits=4, continuous=True, max_steps=4)
    model = RFM(
        "MultiInputPolicy",
        env,
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"n_sampled_goal": 4, "goal_selection_strategy": "future"},
        verbose=1,
        **SMALL,
    )
    model.learn(60)
    model.save(tmp_path / "her_bit_env")
    model = RFM.load(tmp_path / "her_bit_env", env=env)
    obs, _info = env.reset()
    for _ in range(5):
        action, _ = model.predict(obs, deterministic=True)
        obs, _reward, terminated, truncated, _info = env.step(action)
        if terminated or truncated:
            obs, _info = env.reset()


def test_dict_observations() -> None:
    env = SimpleMultiObsEnv(random_start=False, discrete_actions=False)
    arguments = SMALL | {"policy_kwargs": {"net_arch": [16], "features_extractor_kwargs": {"cnn_output_dim": 8}}}
    RFM("MultiInputPolicy", env, verbose=1, buffer_size=100, **arguments).learn(total_timesteps=40)


def test_saving_and_changing_parameters(tmp_path: Path) -> None:
    model = RFM("MlpPolicy", "Pendulum-v1", **SMALL)
    model.learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = RFM.load(tmp_path / "model")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer.size() == 40
    loaded.set_env(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    loaded.learn(20, reset_num_timesteps=False)
    parameters = loaded.get_parameters()
    parameters["policy"] = {name: tensor * 0.5 for name, tensor in parameters["policy"].items()}
    loaded.set_parameters(parameters)
