"""Reverse flow matching: the flow is regressed on the posterior mean of least variance.

Source: Li, Tang & Azizan, Reverse Flow Matching (arXiv 2601.08136).
"""

import copy
from typing import ClassVar

from stable_baselines3.common.preprocessing import get_action_dim
from torch import Tensor

from sb3_rfm.actors import LATENT_SCALE
from sb3_rfm.candidates import PointSet
from sb3_rfm.control_variates import Coefficient, check_coefficient
from sb3_rfm.flow_actor_critic import FlowActorCritic
from sb3_rfm.posterior import LogProb, PosteriorMean, PosteriorMeanEstimator
from sb3_rfm.sources import get_source


class RFM(FlowActorCritic):
    """Reverse Flow Matching: Q and its gradient at K candidates, combined by the best control variate.

    The parameters are those of :class:`~sb3_rfm.flow_actor_critic.FlowActorCritic`; ``coefficient`` may be ``"optimal"``
    (the default), ``"scalar"``, ``"diagonal"``, a number, or one number for each action dimension.
    """

    default_coefficient: ClassVar[Coefficient] = "optimal"
    coefficient_is_fixed: ClassVar[bool] = False
    coefficient: Coefficient
    estimator: PosteriorMeanEstimator

    def _setup_model(self) -> None:
        super()._setup_model()
        # A copy: compilers leave marks on tensors, which would be saved.
        source = get_source(copy.deepcopy(self.source)).to(self.device)
        points: PointSet = "antithetic" if source.has_quantiles else "independent"
        self.estimator = PosteriorMeanEstimator(
            self.path, self.n_candidates, self.coefficient, source, LATENT_SCALE, points=points
        )

    def _check_arguments(self) -> None:
        super()._check_arguments()
        coefficient = check_coefficient(self.coefficient)
        n_actions = get_action_dim(self.action_space)
        if isinstance(coefficient, tuple) and len(coefficient) != n_actions:
            raise ValueError(f"coefficient must be one number or {n_actions}, one per action dimension, got {coefficient}.")

    def _posterior_mean(self, log_prob: LogProb, x_t: Tensor, t: Tensor, guess: Tensor) -> PosteriorMean:
        return self.estimator.estimate(log_prob, x_t, t, self.estimator.draw(x_t, t, guess=guess))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "estimator"]
