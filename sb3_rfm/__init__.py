"""Flow and diffusion policies for Stable-Baselines3."""

from sb3_rfm.checkpoint import RunCheckpoint
from sb3_rfm.dqs import DQS
from sb3_rfm.qne import QNE
from sb3_rfm.qsm import QSM
from sb3_rfm.rewindable import Rewindable
from sb3_rfm.rfm import RFM

__version__ = "0.2.0"

__all__ = ["DQS", "QNE", "QSM", "RFM", "Rewindable", "RunCheckpoint", "__version__"]
