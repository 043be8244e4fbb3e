"""Gradients of networks that read the features of an extractor, and steps along them."""

from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T", bound=Tensor)


class Gradients(NamedTuple):
    """Gradients of a loss."""

    metrics: dict[str, Tensor]
    """What was observed on the way, scalars"""
    parameters: list[Tensor]
    """With respect to the network's parameters that are trained"""
    features: list[Tensor]
    """With respect to the features that it was given, where their extractor is trained; else none"""


def trained(*tensors: T) -> list[T]:
    """Those that are trained themselves, or come from something that is."""
    return [tensor for tensor in tensors if tensor.requires_grad]


def differentiate(loss: Tensor, network: nn.Module, features: Tensor, metrics: dict[str, Tensor]) -> Gradients:
    """Gradients of ``loss`` with respect to the network behind the features, and to the features."""
    parameters = trained(*network.parameters())
    wanted = [*parameters, *trained(features)]
    gradients = list(torch.autograd.grad(loss, wanted)) if wanted else []
    return Gradients(metrics, gradients[: len(parameters)], gradients[len(parameters) :])


def train_extractors(parameters: Iterable[nn.Parameter], features: list[Tensor], gradients: list[Tensor]) -> None:
    """Carry the gradients of trained features on to their extractors.

    :param parameters: Of the extractors
    :param features: :func:`trained` features
    :param gradients: Their gradients
    """
    for parameter in parameters:
        parameter.grad = None  # one that is no longer trained may have one
    if features:
        torch.autograd.backward(features, gradients)


def step(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: list[Tensor], max_grad_norm: float | None
) -> None:
    """One step of an optimizer.

    :param optimizer: Of a network, and of its features extractor, whose gradients are there
    :param parameters: Of the network behind the extractor
    :param gradients: Those of the ones that are trained
    :param max_grad_norm: Largest norm of all gradients; None for no clipping
    """
    for parameter in parameters:
        parameter.grad = None  # one that is no longer trained may have one
    for parameter, gradient in zip(trained(*parameters), gradients, strict=True):
        parameter.grad = gradient
    if max_grad_norm is not None:
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], max_grad_norm)
    optimizer.step()
