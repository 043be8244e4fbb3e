"""The conditional MLP against a plain one, and its reduced precision against double precision."""

import pytest
import torch
from torch import nn

from sb3_rfm.networks import ConditionalMLP, TimeEmbedding


def plain(network: ConditionalMLP) -> nn.Sequential:
    """The same function as one sequence of layers of ``[context, x]``."""
    return nn.Sequential(
        network.first, *network.hidden, *([network.last] if isinstance(network.last, nn.Identity) else network.last)
    )


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("net_arch", [[], [32], [32, 16, 8]])
def test_is_an_mlp_of_context_and_query(net_arch: list[int], layer_norm: bool) -> None:
    torch.manual_seed(0)
    network = ConditionalMLP(5, 3, 2, net_arch, nn.GELU, layer_norm).double()
    assert sum(isinstance(module, nn.LayerNorm) for module in network.modules()) == layer_norm * len(net_arch)
    context, x = torch.randn(4, 5).double(), torch.randn(4, 7, 3).double()
    expected = plain(network)(torch.cat([context[:, None].expand(4, 7, 5), x], dim=-1))
    torch.testing.assert_close(network.decode(network.encode(context), x), expected)
    torch.testing.assert_close(network(context, x[:, 0]), expected[:, 0])


@pytest.mark.parametrize("net_arch", [[], [32, 16]])
def test_time_is_one_more_input(net_arch: list[int]) -> None:
    torch.manual_seed(0)
    network = ConditionalMLP(5, 3, 2, net_arch, time_dim=4).double()
    context, x, time = torch.randn(4, 5).double(), torch.randn(4, 7, 3).double(), torch.randn(4, 4).double()
    everything = torch.cat([context[:, None].expand(4, 7, 5), x, time[:, None].expand(4, 7, 4)], dim=-1)
    expected = plain(network)(everything)
    torch.testing.assert_close(network.decode(network.at_time(network.encode(context), time), x), expected)
    torch.testing.assert_close(network(context, x[:, 0], time), expected[:, 0])
    everything[..., 8:] = time[0]
    torch.testing.assert_close(network(context, x, time[0]), plain(network)(everything))


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("net_arch", [[], [64], [256, 256]])
def test_differences_are_precise_where_values_are_large(net_arch: list[int], layer_norm: bool) -> None:
    """Candidates are compared with each other, so what counts is the error of their differences, with and without gradient."""
    torch.manual_seed(0)
    network = ConditionalMLP(17, 6, 1, net_arch, layer_norm=layer_norm)
    # A critic's state makes most of its value.
    context, x = 10 * torch.randn(16, 17), torch.tanh(torch.randn(16, 12, 6))
    x.requires_grad_(True)
    exact = network.double()(context[:, None].double().expand(16, 12, 17).flatten(0, 1), x.double().flatten(0, 1)).view(16, 12)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), x, retain_graph=True)
    network.float()
    encoded = network.encode(context)
    near = network.decode_differences(encoded, x).squeeze(-1)
    (gradient,) = torch.autograd.grad(near.sum(), x)

    spread = exact.std(dim=1).mean()
    assert _noise(near, exact) < 0.005 * spread
    assert (gradient - exact_gradient).norm() < 0.02 * exact_gradient.norm()
    if net_arch:
        assert _noise(near, exact) < 0.2 * _noise(network.decode(encoded, x, reduced=True).squeeze(-1), exact)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("net_arch", [[], [64], [256, 256]])
def test_reduced_answers_are_those_of_full_precision_to_a_rounding(net_arch: list[int], layer_norm: bool) -> None:
    torch.manual_seed(0)
    network = ConditionalMLP(17, 6, 3, net_arch, layer_norm=layer_norm)
    encoded, x = network.encode(torch.randn(64, 17)), torch.randn(64, 5, 6)
    exact, rounded = network.decode(encoded, x), network.decode(encoded, x, reduced=True)
    assert rounded.dtype == exact.dtype
    # bfloat16 has 8 significant bits: numbers are rounded by up to 2^-8 of themselves.
    assert 0 < (rounded - exact).square().mean().sqrt() < 2**-7 * exact.std()


def test_reduced_answers_have_exact_biases() -> None:
    network = ConditionalMLP(2, 2, 3, [8])
    with torch.no_grad():
        network.output_layer.weight.zero_()
    reduced = network.decode(network.encode(torch.randn(4, 2)), torch.randn(4, 5, 2), reduced=True)
    assert torch.equal(reduced, network.output_layer.bias.expand(4, 5, 3))


def _noise(values: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    error = values - exact
    return (error - error.mean(dim=1, keepdim=True)).std()


def test_output_layer_is_what_answers_are_linear_in() -> None:
    for net_arch, layer_norm in (([], False), ([8], False), ([8], True)):
        network = ConditionalMLP(2, 2, 1, net_arch, layer_norm=layer_norm)
        context, x = torch.randn(3, 2), torch.randn(3, 2)
        before = network(context, x)
        with torch.no_grad():
            network.output_layer.weight.mul_(3)
            network.output_layer.bias.mul_(3)
        torch.testing.assert_close(network(context, x), 3 * before)


def test_time_embedding_tells_times_apart() -> None:
    embedding = TimeEmbedding(4)
    t = torch.linspace(0, 1, 11)
    assert embedding(t).shape == (11, embedding.dim) == (11, 8)
    distances = torch.cdist(embedding(t), embedding(t))
    assert distances[~torch.eye(11, dtype=torch.bool)].min() > 0.3
