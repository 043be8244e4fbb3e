"""Q-score matching: the score at the noisy action is set to the gradient of Q there.

Source: Psenka et al., Q-score matching (arXiv 2312.11752). The regression is not consistent with the Boltzmann policy for
0 < t < 1; that is a property of the method.
"""

import torch as th
from torch import Tensor

from sb3_rfm.flow_actor_critic import FlowActorCritic
from sb3_rfm.posterior import LogProb, PosteriorMean, value_and_gradient
from sb3_rfm.sources import GaussianSource, get_source


class QSM(FlowActorCritic):
    """Q-Score Matching: the target takes one gradient of Q, at ``x_t``, and no candidates.

    The parameters are those of :class:`~sb3_rfm.flow_actor_critic.FlowActorCritic`; ``n_candidates`` is not used, there is no
    ``coefficient``, and ``source`` must be Gaussian. ``sampler`` chooses between reverse diffusion, its ODE, and the ODE with
    a Langevin step near its end.
    """

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if not isinstance(get_source(self.source), GaussianSource):
            raise ValueError(
                f"QSM knows the score of the path, which is a data mean only where source='gaussian', got {self.source!r}."
            )

    def _posterior_mean(self, log_prob: LogProb, x_t: Tensor, t: Tensor, guess: Tensor) -> PosteriorMean:
        path = self.actor.probability_path
        _, score = value_and_gradient(log_prob, x_t.unsqueeze(1))
        # The data mean that has this score.
        x_1 = path.convert(score.squeeze(1), x_t, t, source="score", target="data")
        x_0 = path.noise_from_data(x_1, x_t, t)
        one = th.ones_like(t)
        return PosteriorMean(
            x0=x_0,
            x1=x_1,
            velocity=path.velocity(x_0, x_1, t),
            score=path.convert(x_1, x_t, t, source="data", target="score"),
            ess=one,
            coefficient=th.ones_like(x_t),
            variance_ratio=one,
        )
