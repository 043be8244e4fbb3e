"""Networks of flow policies: one conditional MLP serves as the flow's data prediction and as a Q-function.

Both answer many queries about one state: a critic is asked about K candidate actions, a flow about P particles at N times.
:class:`ConditionalMLP` therefore splits its first layer, ``W [context, x] + b = (W_c context + b) + W_x x``, so that the
context's part is computed once per state, and the time's once for all particles.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConditionalMLP(nn.Module):
    """An MLP of ``(context, x, time)`` that shares the context's part of the first layer among many ``x``.

    :param context_dim: Size C of the context
    :param input_dim: Size D of the queries
    :param output_dim: Size O of the answers
    :param net_arch: Widths of the hidden layers; may be empty
    :param activation_fn: Activation between layers
    :param layer_norm: Whether to normalise the layers before each activation (Ba et al., arXiv 1607.06450)
    :param time_dim: Size E of the time's embedding; 0 where there is no time
    """

    def __init__(
        self,
        context_dim: int,
        input_dim: int,
        output_dim: int,
        net_arch: list[int],
        activation_fn: type[nn.Module] = nn.ReLU,
        layer_norm: bool = False,
        time_dim: int = 0,
    ) -> None:
        super().__init__()
        self.dims = [context_dim, input_dim, time_dim]
        widths = [sum(self.dims), *net_arch, output_dim]
        layers = [nn.Linear(n_in, n_out) for n_in, n_out in pairwise(widths)]
        activations = [
            nn.Sequential(nn.LayerNorm(width), activation_fn()) if layer_norm else activation_fn() for width in net_arch
        ]
        self.first = layers[0]
        pairs = zip(activations[:-1], layers[1:-1], strict=True)
        self.hidden = nn.Sequential(*(module for pair in pairs for module in pair))
        self.last = nn.Sequential(activations[-1], layers[-1]) if net_arch else nn.Identity()

    @property
    def output_layer(self) -> nn.Linear:
        """The layer that the answers are linear in."""
        layer = self.last[-1] if isinstance(self.last, nn.Sequential) else self.first
        assert isinstance(layer, nn.Linear)
        return layer

    def encode(self, context: Tensor) -> Tensor:
        """The context's share of the first layer, (B, C) → (B, H)."""
        weight, _, _ = self.first.weight.split(self.dims, dim=1)
        return F.linear(context, weight, self.first.bias)

    def at_time(self, encoded: Tensor, time: Tensor) -> Tensor:
        """Encoded contexts at a time.

        :param encoded: Result of :meth:`encode`, (B, H)
        :param time: Embedding of the time, (E,) or (B, E)
        :return: (B, H)
        """
        _, _, weight = self.first.weight.split(self.dims, dim=1)
        return encoded + F.linear(time, weight)

    def decode(self, encoded: Tensor, x: Tensor, reduced: bool = False) -> Tensor:
        """Answer queries about encoded contexts.

        :param encoded: Result of :meth:`encode`, of :meth:`at_time` where there is time, (B, H)
        :param x: Queries, (B, D) or (B, K, D)
        :param reduced: Multiply matrices in bfloat16
        :return: (B, O) or (B, K, O)
        """
        if x.dim() == 3:
            encoded = encoded.unsqueeze(1)
        _, weight, _ = self.first.weight.split(self.dims, dim=1)
        if not reduced:
            return self.last(self.hidden(encoded + F.linear(x, weight)))
        z = encoded + _linear_bfloat16(x, weight)
        for activation, layer in self._activated_layers():
            # The bias in float32: as part of the product it is rounded, and copied to each row beforehand.
            z = _linear_bfloat16(activation(z), layer.weight) + layer.bias
        return z

    def decode_differences(self, encoded: Tensor, x: Tensor) -> Tensor:
        """Answer many queries about each context in bfloat16, precise to a fraction of the *differences* between answers.

        Rounding a hidden layer costs a fraction of its size, and the context, not the query, makes most of that size. So one
        query of each context, the mean, is answered in full precision, and what the others add to it, layer by layer,
        in bfloat16: ``W h = W h_mean + W (h - h_mean)`` with only the last product in low precision.

        :param encoded: Result of :meth:`encode`, (B, H)
        :param x: Queries, (B, K, D)
        :return: (B, K, O)
        """
        _, weight, _ = self.first.weight.split(self.dims, dim=1)
        centre = x.detach().mean(1, keepdim=True)
        # Pre-activations of the mean query (B, 1, H), and what each query adds to them (B, K, H).
        z = encoded.unsqueeze(1) + F.linear(centre, weight)
        dz = _linear_bfloat16(x - centre, weight)
        layers = self._activated_layers()
        if not layers:
            return z + dz
        for activation, layer in layers[:-1]:
            h = activation(z)
            z, dz = layer(h), _linear_bfloat16(activation(z + dz) - h, layer.weight)
        activation, layer = layers[-1]
        return (activation(z + dz).unsqueeze(-2) * layer.weight).sum(-1) + layer.bias

    def _activated_layers(self) -> list[tuple[nn.Module, nn.Linear]]:
        """The layers after the first, each with the activation before it; none without hidden layers."""
        modules = [*self.hidden, *(self.last if isinstance(self.last, nn.Sequential) else ())]
        return list(zip(modules[0::2], modules[1::2], strict=True))

    def forward(self, context: Tensor, x: Tensor, time: Tensor | None = None) -> Tensor:
        """``decode(at_time(encode(context), time), x)``."""
        encoded = self.encode(context)
        return self.decode(encoded if time is None else self.at_time(encoded, time), x)


def _linear_bfloat16(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` with both rounded to bfloat16."""
    return F.linear(x.bfloat16(), weight.bfloat16()).float()


class TimeEmbedding(nn.Module):
    """Fourier features of the time, ``[cos(pi k t), sin(pi k t)]`` for k = 1, ..., n.

    :param n_frequencies: Number n of frequencies
    """

    frequencies: Tensor

    def __init__(self, n_frequencies: int = 8) -> None:
        super().__init__()
        self.dim = 2 * n_frequencies
        self.register_buffer("frequencies", math.pi * torch.arange(1, n_frequencies + 1), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """(...) → (..., 2 n)"""
        angles = t.unsqueeze(-1) * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)
