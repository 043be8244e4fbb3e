"""Q-weighted noise estimation: reverse flow matching with coefficient 0.

Sources: Ma et al., SDAC (arXiv 2502.00361); Dong et al., MaxEntDP (arXiv 2502.11612).
"""

from typing import ClassVar

from sb3_rfm.control_variates import Coefficient
from sb3_rfm.rfm import RFM


class QNE(RFM):
    """Q-weighted Noise Estimation: the posterior mean from Q alone.

    No gradient of Q is computed, except for the weights of ``weighting="gradient"``.

    The parameters are those of :class:`~sb3_rfm.rfm.RFM` with ``coefficient`` fixed at 0.
    """

    default_coefficient: ClassVar[Coefficient] = 0.0
    coefficient_is_fixed: ClassVar[bool] = True
