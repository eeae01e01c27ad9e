import math

import torch

from umiad.nn.kan import POINTS, KanLayer, kan


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def direct(layer, x):
    """y_o = sum over inputs and centres, one number at a time."""
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    weights = layer.weights.weight.tolist()
    y = []
    for row in weights:
        total = 0.0
        for i, value in enumerate(x):
            z = (value - mean) / math.sqrt(variance + layer.norm.eps)
            z = z * float(layer.norm.weight[i].detach()) + float(layer.norm.bias[i].detach())
            for g in range(POINTS):
                centre = -2 + 4 * g / 7
                total += row[i * POINTS + g] * (1 - math.tanh((z - centre) / 0.33) ** 2)
        y.append(total)
    return y


def test_a_layer_equals_a_direct_evaluation_of_its_basis():
    layer = KanLayer(5, 3).double()
    layer.points = torch.linspace(-2, 2, 8, dtype=torch.float64)  # in float32 the centres are 1e-7 off
    with torch.no_grad():
        layer.norm.weight.copy_(drawn(5, seed=1))
        layer.norm.bias.copy_(drawn(5, seed=2))
    x = 3 * drawn(4, 5)
    expected = torch.tensor([direct(layer, row.tolist()) for row in x], dtype=torch.float64)
    assert torch.allclose(layer(x), expected, atol=1e-10)


def test_a_layer_has_no_bias_and_works_on_any_leading_axes():
    layer = KanLayer(6, 4)
    assert sorted(dict(layer.named_parameters())) == ["norm.bias", "norm.weight", "weights.weight"]
    assert list(layer.state_dict()) == ["norm.weight", "norm.bias", "weights.weight"]
    x = drawn(2, 3, 5, 6).float()
    assert layer(x).shape == (2, 3, 5, 4)
    assert torch.allclose(layer(x)[1, 2], layer(x[1, 2]), atol=1e-6)


def test_a_bump_is_one_at_its_centre_and_gone_three_widths_away():
    layer = KanLayer(2, 2 * POINTS).double()
    with torch.no_grad():
        layer.weights.weight.copy_(torch.eye(2 * POINTS))
        layer.norm.weight.zero_()
        layer.norm.bias.copy_(torch.tensor([2.0, 0.0]))
    bumps = layer(drawn(1, 2))[0]
    assert float(bumps[POINTS - 1].detach()) == 1  # the last centre is 2
    assert float(bumps[0].detach()) < 1e-9
    assert torch.allclose(bumps[POINTS:], bumps[POINTS:].flip(0), atol=1e-6)  # 0 is in the middle


def test_a_kan_is_layers_one_after_another():
    network = kan([4, 8, 4])
    assert [layer.weights.weight.shape for layer in network] == [(8, 32), (4, 64)]
    x = drawn(3, 4).float()
    assert torch.equal(network(x), network[1](network[0](x)))
