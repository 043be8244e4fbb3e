"""Diffused Q-sampling: reverse flow matching with coefficient 1.

Sources: Jain et al., DQS (arXiv 2410.01312); Akhound-Sadegh et al., iDEM (arXiv 2402.06121).
"""

from typing import ClassVar

from sb3_rfm.control_variates import Coefficient
from sb3_rfm.rfm import RFM


class DQS(RFM):
    """Diffused Q-Sampling: the posterior mean as a Q-weighted mean of gradients of Q.

    The parameters are those of :class:`~sb3_rfm.rfm.RFM` with ``coefficient`` fixed at 1. With the Gaussian ``source``, the
    default, that leaves nothing but gradients; with another, of another variance, a part of the values stays.
    """

    default_coefficient: ClassVar[Coefficient] = 1.0
    coefficient_is_fixed: ClassVar[bool] = True
