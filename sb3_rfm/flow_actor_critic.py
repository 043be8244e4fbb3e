"""The training loop that the flow-policy algorithms share.

Here are arguments, logs and files; what is learned from a batch is in :mod:`sb3_rfm.learner`.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TrainFrequencyUnit
from torch import Tensor
from torch.distributions import Distribution

from sb3_rfm.actors import FlowActor
from sb3_rfm.arguments import check_algorithm, check_flow, check_policy_name, parse_auto_temperature
from sb3_rfm.control_variates import Coefficient
from sb3_rfm.critics import QCritic
from sb3_rfm.dict_observations import DictBuffer, scalar_keys
from sb3_rfm.execution import (
    MIN_UPDATES_TO_COMPILE,
    ExecutionMode,
    Executor,
    Precision,
    keep_freed_memory,
    resolve_mode,
    resolve_precision,
)
from sb3_rfm.finite import NOT_LEARNED, RELABELLED, WEIGHTS_LOST, check_finite, check_step
from sb3_rfm.learner import Learner
from sb3_rfm.paths import Path
from sb3_rfm.persistence import PersistentAlgorithm
from sb3_rfm.policies import CnnPolicy, FlowPolicy, MlpPolicy, MultiInputPolicy
from sb3_rfm.posterior import LogProb, PosteriorMean
from sb3_rfm.sources import Source

SelfFlowActorCritic = TypeVar("SelfFlowActorCritic", bound="FlowActorCritic")


class FlowActorCritic(PersistentAlgorithm):
    """Base of the flow-policy algorithms: everything but the regression target of the flow.

    The arguments from ``temperature`` to ``t_min``, and ``precision``, are settled when the model is built. ``load(file,
    temperature=0.1)`` changes them (the path: ``custom_objects={"path": ...}``); an attribute that is set counts only
    once the model has been saved and loaded. The weights of a flow belong to its ``path``, ``source`` and ``t_min``: with
    others, it has to learn again.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a :class:`~sb3_rfm.policies.FlowPolicy` class
    :param env: Environment with a bounded ``Box`` action space, or its registered name
    :param learning_rate: Of actor and critic; a number or a function of the remaining progress (1 → 0)
    :param buffer_size: Size of the replay buffer, in transitions
    :param learning_starts: Environment steps with random actions before learning starts
    :param batch_size: Transitions per update
    :param tau: Rate of the target critic's moving average
    :param gamma: Discount factor
    :param train_freq: Calls of ``env.step()`` between updates, each of which steps all environments; a number, or
        ``(n, "step" | "episode")``
    :param gradient_steps: Updates each time; -1 for as many as transitions were collected
    :param action_noise: Noise added to the actions when exploring, besides the policy's own
    :param replay_buffer_class: Replay buffer class; chosen from the observation space by default
    :param replay_buffer_kwargs: Its keyword arguments
    :param optimize_memory_usage: See SB3's ``ReplayBuffer``
    :param n_steps: Steps of the n-step return
    :param temperature: λ of the target ``exp(Q / λ)``, in units of the reward; or ``"auto_<share>"``: that share of the mean
        difference of Q between two random actions, over the root of the action dimension, which makes learning
        independent of the reward's scale; before the first reward, actions are nearly uniform. ``"auto"`` is ``"auto_0.05"``
    :param n_candidates: Candidates K at which Q (and its gradient) is evaluated for each ``x_t``, by one of the critics
    :param coefficient: Control-variate coefficient in noise coordinates, where the algorithm leaves a choice
    :param path: ``"cond_ot"``, ``"cosine"``, ``"linear_vp"``, ``"ve"`` or a :class:`~sb3_rfm.paths.Path`
    :param source: Where the flow starts: ``"gaussian"``, a ``torch.distributions`` distribution on R^D or a
        :class:`~sb3_rfm.sources.Source`; another than the Gaussian goes with ``"ode"`` and ``"euler"`` alone
    :param sampler: ``"ode"`` (steps of second order, shorter towards the data), ``"euler"`` (even steps of first order, as in
        the papers), ``"sde"`` (reverse diffusion, in steps as those of ``"ode"``) or ``"langevin"`` (the ODE, and a Langevin
        step near its end)
    :param integration_steps: Network evaluations from noise to action; one more with ``sampler="langevin"``
    :param proposal: Where the flow is regressed, and which actions are noised to ``x_t`` there: ``"policy"`` → mostly at the
        next states of a batch, with the actions that the current policy draws for the critic's target; for one row in eight,
        and where an episode ended, at the row's own state, with its replayed action. ``"replay"`` → at the states of the
        batch, with their replayed actions
    :param weighting: How much an error of the flow counts in each dimension: ``"uniform"`` → the same in all, as in the
        papers; ``"gradient"`` → more in those where Q changes more, see :func:`~sb3_rfm.learner.regression_weights`
    :param n_particles: Particles drawn for a deterministic action, of which the one with the highest min Q is taken
    :param n_exploration_particles: Particles drawn when exploring, one of which is chosen with probability ∝ exp(min Q / λ).
        The flow's own draws are in that proportion already, so that many particles act as at half the temperature
    :param n_target_particles: The same at the next states, in the critic's target
    :param t_min: Training times lie in [t_min, 1 - t_min]
    :param max_grad_norm: Largest norm of a gradient of actor or critic; None for no clipping
    :param execution: How updates and actions are computed: ``"auto"``, ``"eager"``, ``"compile"`` or ``"cuda_graph"``; see
        :mod:`sb3_rfm.execution`
    :param precision: Precision in which candidates are evaluated, and in which updates draw actions and compare particles:
        ``"auto"``, ``"float32"`` or ``"bfloat16"``; actions that are taken are computed in float32
    :param stats_window_size: Episodes over which rollout statistics are averaged
    :param tensorboard_log: Where to write TensorBoard logs
    :param policy_kwargs: Keyword arguments of the policy, see :class:`~sb3_rfm.policies.FlowPolicy`
    :param verbose: 0: silent, 1: information, 2: debug
    :param seed: Seed of all random generators
    :param device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
    :param _init_setup_model: Whether to build the networks when the instance is created
    :raises ValueError: for arguments out of range
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: FlowPolicy
    actor: FlowActor
    critic: QCritic
    critic_target: QCritic
    default_coefficient: ClassVar[Coefficient | None] = None
    coefficient_is_fixed: ClassVar[bool] = True
    _metrics: tuple[list[str], Tensor] | None = None
    _default_buffer: type[ReplayBuffer] | None = None  # the class of replay buffer, where the user has named none

    def __init__(
        self,
        policy: str | type[FlowPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        temperature: float | str = "auto",
        n_candidates: int = 4,
        coefficient: Coefficient | None = None,
        path: str | Path = "cond_ot",
        source: str | Source | Distribution = "gaussian",
        sampler: str = "ode",
        integration_steps: int = 5,
        proposal: str = "policy",
        weighting: str = "uniform",
        n_particles: int = 1,
        n_exploration_particles: int = 1,
        n_target_particles: int = 1,
        t_min: float = 0.01,
        max_grad_norm: float | None = None,
        execution: ExecutionMode = "auto",
        precision: Precision = "auto",
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            seed=seed,
            device=device,
            support_multi_env=True,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
        )
        # SB3's SAC writes into the dictionary that it is given, which may be given to this class next.
        self.policy_kwargs = {name: value for name, value in self.policy_kwargs.items() if name != "use_sde" or value}
        self.temperature = temperature
        self.n_candidates = n_candidates
        self.coefficient = coefficient
        self.path = path
        self.source = source
        self.sampler = sampler
        self.integration_steps = integration_steps
        self.proposal = proposal
        self.weighting = weighting
        self.n_particles = n_particles
        self.n_exploration_particles = n_exploration_particles
        self.n_target_particles = n_target_particles
        self.t_min = t_min
        self.max_grad_norm = max_grad_norm
        self.execution = execution
        self.precision = precision
        if _init_setup_model:
            self._setup_model()

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        check_policy_name(self, policy_name)
        return super()._get_policy_from_name(policy_name)

    def _setup_model(self) -> None:
        if self.coefficient is None:
            self.coefficient = self.default_coefficient
        self._check_arguments()
        is_default = self.replay_buffer_class in (None, self._default_buffer)
        if is_default:  # loaded models come here too: n_steps and gamma may have been replaced since it was chosen
            has_scalars = self.n_steps == 1 and scalar_keys(self.observation_space)
            self.replay_buffer_class = DictBuffer if has_scalars else None  # None: SB3 chooses
            of_then = ("n_steps", "gamma") if self._default_buffer is not None else ()
            self.replay_buffer_kwargs = {k: v for k, v in self.replay_buffer_kwargs.items() if k not in of_then}
        super()._setup_model()
        self._default_buffer = self.replay_buffer_class if is_default else None
        self.policy.configure_sampling(
            self.path,
            self.source,
            self.sampler,
            self.integration_steps,
            self.n_particles,
            self.n_exploration_particles,
            self.t_min,
        )
        self._temperature_share = parse_auto_temperature(self.temperature)
        self._fix_temperature()
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target
        self._n_updates_at_setup = self._n_updates
        self._make_learner = partial(
            Learner,
            self.policy,
            self._posterior_mean,
            proposal=self.proposal,
            weighting=self.weighting,
            n_target_particles=self.n_target_particles,
            temperature_share=self._temperature_share,
            reduced=resolve_precision(self.precision, self.device),
        )
        self._prepare_functions(Executor(resolve_mode(self.execution, self.device, n_updates=0), self._inform, self.device))

    def _fix_temperature(self) -> None:
        """Have the policy know the temperature where it is an argument, and not learned."""
        if self._temperature_share is None:
            self.policy.temperature.fill_(float(self.temperature))

    def set_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Load parameters; see SB3's ``BaseAlgorithm.set_parameters``. A temperature given as a number stays as it is."""
        super().set_parameters(*args, **kwargs)
        self._fix_temperature()

    def _prepare_functions(self, executor: Executor) -> None:
        """Have the functions that take the time run by ``executor``."""
        self._learner = self._make_learner(executor=executor)
        self.policy.run_act = executor.record(executor.prepare(self.policy.act, self.policy), self.policy)

    def _inform(self, text: str) -> None:
        """Tell the user something that is no warning."""
        if self.verbose >= 1:
            print(text)

    def _setup_learn(self, total_timesteps: int, *args: Any, **kwargs: Any) -> tuple[int, Any]:
        total_timesteps, callback = super()._setup_learn(total_timesteps, *args, **kwargs)
        with self._begins_anew_after_errors():
            check_finite("observation", self._last_obs, NOT_LEARNED)
        n_updates = self._n_updates - self._n_updates_at_setup + self._expected_updates(total_timesteps)
        mode = resolve_mode(self.execution, self.device, n_updates)
        if mode != self._learner.executor.mode:
            self._prepare_functions(Executor(mode, self._inform, self.device))
        if self.device.type == "cpu":
            keep_freed_memory()
        could_compile = self.device.type in ("cpu", "cuda") and n_updates >= MIN_UPDATES_TO_COMPILE
        if mode == "eager" and self.execution == "auto" and could_compile:
            self._inform("No C++ compiler was found: updates run as written, slower than compiled.")
        return total_timesteps, callback

    @contextmanager
    def _begins_anew_after_errors(self) -> Iterator[None]:
        """After what the environments returned was refused, who learns on begins an episode: they are elsewhere by then."""
        try:
            yield
        except ValueError:
            self._last_obs = None
            raise

    def _expected_updates(self, total_timesteps: int) -> int:
        """Updates that ``total_timesteps`` environment steps will bring; a guess, where they come once an episode."""
        steps = max(total_timesteps - self.num_timesteps, 0)
        if self.gradient_steps < 0 or self.train_freq.unit == TrainFrequencyUnit.EPISODE:  # type: ignore[union-attr]
            return steps
        return steps * self.gradient_steps // (self.train_freq.frequency * self.n_envs)  # type: ignore[union-attr]

    def _check_arguments(self) -> None:
        """Refuse arguments out of range before anything is built."""
        check_algorithm(self)
        check_flow(self)

    # Learning

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        self._learner.hold_learning_rate()

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """Do ``gradient_steps`` updates on batches of ``batch_size`` transitions.

        On a GPU, their metrics are recorded by the next call, or by :meth:`dump_logs`.
        """
        self.policy.set_training_mode(True)
        self._update_learning_rate(list(self._learner.optimizers()))

        assert self.replay_buffer is not None
        sample = partial(self.replay_buffer.sample, batch_size, env=self._vec_normalize_env)
        # Buffers of others may hold their data on the device.
        is_on_host = type(self.replay_buffer).__module__.startswith(("stable_baselines3.", "sb3_rfm."))
        history = []
        for _ in range(gradient_steps):
            batch = self._learner.executor.load(sample) if is_on_host else sample()
            if isinstance(self.replay_buffer, HerReplayBuffer):
                check_finite("reward", batch.rewards.numpy(force=True), RELABELLED)
            self._record_metrics()  # of the last call: the device had the time of loading to finish it
            history.append(self._learner.run_update(batch, self.gamma, self.tau, self.max_grad_norm))
            self._n_updates += 1
        if history:
            self._metrics = self._learner.metric_names, th.stack(history).mean(0)
        if self.device.type != "cuda":
            self._record_metrics()

    @abstractmethod
    def _posterior_mean(self, log_prob: LogProb, x_t: Tensor, t: Tensor, guess: Tensor) -> PosteriorMean:
        """What the flow is regressed on: the one thing that distinguishes the algorithms.

        :param log_prob: Log-density of the Boltzmann policy in the latent, (B, K, D) → (B, K)
        :param x_t: Points of the path, (B, D)
        :param t: (B,)
        :param guess: The flow's own prediction of the data mean, (B, D)
        """

    # Logging and persistence

    def _record_metrics(self) -> None:
        """Record the mean of each metric over the updates of a call of :meth:`train`; one transfer for all of them."""
        if self._metrics is None:
            return
        names, means = self._metrics
        values = dict(zip(names, means.tolist(), strict=True))
        for name in ("critic_loss", "actor_loss"):
            if not math.isfinite(values[name]):
                raise RuntimeError(f"The {name.replace('_', ' ')} is {values[name]}. {WEIGHTS_LOST}")
        for name, value in values.items():
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self._metrics = None

    def dump_logs(self) -> None:
        self._record_metrics()
        super().dump_logs()

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Store a transition, unless the environment returned something that would destroy the weights."""
        with self._begins_anew_after_errors():
            check_step(reward, new_obs, infos, is_normalized=self._vec_normalize_env is not None)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def learn(
        self: SelfFlowActorCritic,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfFlowActorCritic:
        """Learn for ``total_timesteps`` environment steps; see SB3's ``BaseAlgorithm.learn``."""
        super().learn(
            total_timesteps,
            callback,
            log_interval,
            type(self).__name__ if tb_log_name is None else tb_log_name,
            reset_num_timesteps,
            progress_bar,
        )
        self._record_metrics()
        return self

    def settled_arguments(self) -> dict[str, Any]:
        settled: dict[str, Any] = {}
        if self._learner.executor.mode != "eager":
            settled["execution"] = self._learner.executor.mode  # "auto" chose it by the length of the whole run
        if self._temperature_share is not None:
            settled["temperature"] = f"auto_{self._temperature_share}"  # another version may have another default
        return settled

    def _excluded_save_params(self) -> list[str]:
        own = ["actor", "critic", "critic_target", "_learner", "_make_learner", "_metrics", "_n_updates_at_setup"]
        return super()._excluded_save_params() + own

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "actor.optimizer", "critic.optimizer"], []
