"""How close samples are to those of a target: distances between samples, and the effective sample size of reweighted ones.

Sources: Peyré & Cuturi, Computational Optimal Transport (arXiv 1803.00567), section 2; Gretton et al., A kernel two-sample
test (JMLR 2012), lemma 6.
"""

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sb3_rfm.monte_carlo import effective_sample_size


def wasserstein_2(x: Tensor, y: Tensor) -> float:
    """Wasserstein-2 distance between two samples of equal size, by optimal assignment.

    :param x: (N, D)
    :param y: (N, D)
    :raises ValueError: for samples of different shapes
    """
    if x.shape != y.shape:
        raise ValueError(f"Both samples must have one shape (N, D), got {tuple(x.shape)} and {tuple(y.shape)}.")
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square().numpy()
    rows, columns = linear_sum_assignment(cost)
    return math.sqrt(cost[rows, columns].mean())


def squared_mmd(x: Tensor, y: Tensor, width: float) -> float:
    """Squared maximum mean discrepancy with the kernel ``exp(-|x - y|^2 / (2 width^2))``; unbiased, hence at times negative.

    :param x: (N, D)
    :param y: (M, D)
    :param width: Width of the kernel
    """

    def mean_kernel(a: Tensor, b: Tensor) -> float:
        distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # the other mode cancels far from the origin
        kernel = torch.exp(-0.5 * distance.square() / width**2)
        return float((kernel.sum() - kernel.diagonal().sum()) / (len(a) * (len(b) - 1)) if a is b else kernel.mean())

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def effective_share(log_target: Tensor, log_sampler: Tensor) -> float:
    """Effective sample size of samples reweighted to the target, as a share of their number.

    :param log_target: Unnormalised log-density of the target at the samples, (N,)
    :param log_sampler: Log-density that they were drawn from, (N,)
    """
    weights = torch.softmax(torch.nan_to_num(log_target - log_sampler, nan=-math.inf), 0)
    return float(effective_sample_size(weights[None])) / len(weights)
