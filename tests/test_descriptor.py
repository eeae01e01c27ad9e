import math

import torch

from umiad.nn.descriptor import ChannelAttention, Descriptor, coordinates


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_coordinates_run_from_minus_one_to_one_along_columns_and_rows():
    columns, rows = coordinates(3, 5)
    assert columns.tolist() == [[-1, -0.5, 0, 0.5, 1]] * 3
    assert rows.tolist() == [[-1] * 5, [0] * 5, [1] * 5]


def test_channel_attention_by_hand():
    attention, maps = ChannelAttention(), draw(2, 12, 3, 4)
    kernel = attention.conv.weight.detach().flatten().tolist()
    assert len(kernel) == 9
    found = attention(maps)
    for image in range(2):
        mean = maps[image].mean((1, 2)).tolist()
        most = maps[image].amax((1, 2)).tolist()
        for channel in range(12):
            near = [(channel + k - 4, weight) for k, weight in enumerate(kernel)]
            total = sum(weight * (mean[c] + most[c]) for c, weight in near if 0 <= c < 12)
            gate = 1 / (1 + math.exp(-total))
            expected = gate * maps[image, channel]
            # sums of nine float32 products
            assert torch.allclose(found[image, channel], expected, rtol=1e-5, atol=1e-6)


def test_a_descriptor_is_a_linear_map_of_the_fibre_and_its_place_plus_a_tenth_of_attention():
    descriptor, features = Descriptor(40, seed=3), draw(2, 40, 3, 4)
    weight, bias = (each.detach() for each in (descriptor.conv.weight[:, :, 0, 0], descriptor.conv.bias))
    assert weight.shape == (10, 42)
    phi = torch.empty(2, 10, 3, 4)
    for row in range(3):
        for column in range(4):
            place = torch.tensor([2 * column / 3 - 1, row - 1.0]).expand(2, 2)
            fibre = torch.cat([features[:, :, row, column], place], dim=1)
            phi[:, :, row, column] = fibre @ weight.T + bias
    expected = phi + 0.1 * descriptor.attention(phi)
    assert torch.allclose(descriptor(features), expected, atol=1e-5)
    assert torch.equal(
        Descriptor(40, seed=3, strength=0.0)(features),
        descriptor.conv(torch.cat([features, coordinates(3, 4).expand(2, -1, -1, -1)], dim=1)),
    )


def test_weights_come_from_the_seed_alone():
    before = torch.get_rng_state()
    first, again, other = (Descriptor(16, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv.weight"], other["conv.weight"])
    assert not torch.equal(first["attention.conv.weight"], other["attention.conv.weight"])


def test_every_parameter_is_used():
    descriptor = Descriptor(16, seed=0)
    descriptor(draw(2, 16, 4, 4)).square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in descriptor.parameters())
