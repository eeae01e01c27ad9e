import pytest
import torch
from torch import nn

from umiad.nn.aggregate import SqueezeGate
from umiad.nn.mlfeu import (
    ENHANCEMENTS,
    NECKS,
    RATES,
    Enhancement,
    Fusion,
    MlfeuNet,
    high_pass,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def count(module):
    return sum(p.numel() for p in module.parameters())


def close(gate):
    """Weights of 0 for every channel."""
    with torch.no_grad():
        gate.excite[-1].weight.zero_()
        gate.excite[-1].bias.fill_(-1e4)


def unet_by_hand(width):
    """Weights of a 5-level U-Net: two 3x3 convolutions without bias and two norms a block, 2x2 up-convolutions."""
    total, before = 0, 1
    for level in range(5):
        after = width << level
        total += 9 * before * after + 9 * after * after + 4 * after
        before = after
    for level in range(4):
        after = width << level
        total += 4 * 2 * after * after + after  # up
        total += 9 * 2 * after * after + 9 * after * after + 4 * after
    return total + width + 1


@pytest.mark.parametrize(("width", "millions"), [(32, 7.76), (40, 12.13)])
def test_without_the_publications_parts_it_is_a_plain_unet(width, millions):
    network = MlfeuNet(width=width, branch=8, enhance="none", neck="none", seed=0)
    assert count(network) == unet_by_hand(width)
    assert round(count(network) / 1e6, 2) == millions


def test_the_parts_add_their_weights():
    width, branch = 8, 12
    plain, enhanced, fused, both = (
        count(MlfeuNet(width=width, branch=branch, enhance=enhance, neck=neck, seed=0))
        for enhance, neck in (("none", "none"), ("lfeb", "none"), ("none", "pmff"), ("lfeb", "pmff"))
    )
    by_hand = 0
    for c in (8, 16):
        by_hand += 2 * (9 * c * c + 2 * c) + 3 * c * c + c  # two views, their mixture
        by_hand += c * (c // 4) + c // 4 + (c // 4) * c + c  # the gate
    assert enhanced - plain == by_hand
    shallow, deep = 24, 128
    by_hand = 4 * (9 * deep * branch + 2 * branch) + shallow * branch + 2 * branch
    by_hand += deep * branch + branch + (5 * branch + deep) * deep + 2 * deep
    assert fused - plain == by_hand
    assert both - plain == enhanced - plain + fused - plain


@pytest.mark.parametrize("enhance", ENHANCEMENTS)
@pytest.mark.parametrize("neck", NECKS)
def test_every_combination_keeps_the_shape_and_trains_all_weights(enhance, neck):
    network = MlfeuNet(width=4, branch=4, enhance=enhance, neck=neck, seed=0)
    values = network(torch.randn(2, 1, 64, 96, generator=rng()))
    assert values.shape == (2, 1, 64, 96)
    values.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_the_seed_decides_the_weights_and_nothing_else_does():
    before = torch.get_rng_state()
    first, again, other = (MlfeuNet(width=4, branch=4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.end.weight, other.end.weight)


def test_a_batch_of_one_trains_on_the_smallest_images():
    network = MlfeuNet(width=4, branch=4, seed=0)
    network(torch.randn(1, 1, 64, 64, generator=rng())).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_the_high_pass_is_the_difference_to_the_neighbourhood():
    maps = torch.zeros(1, 2, 5, 5)
    maps[0, 0, 2, 2] = 9.0
    maps[0, 1] = 3.0
    found = high_pass(maps)
    expected = torch.zeros(5, 5)
    expected[1:4, 1:4] = -1.0
    expected[2, 2] = 8.0
    assert torch.allclose(found[0, 0], expected)
    assert torch.allclose(found[0, 1], torch.zeros(5, 5), atol=1e-6)  # no edge at the border of the image


def test_the_gate_by_hand():
    gate = SqueezeGate(4, reduction=2)
    maps = torch.randn(3, 4, 6, 5, generator=rng())
    with torch.no_grad():
        hidden = (maps.mean((2, 3)) @ gate.excite[0].weight[:, :, 0, 0].T + gate.excite[0].bias).relu()
        expected = torch.sigmoid(hidden @ gate.excite[2].weight[:, :, 0, 0].T + gate.excite[2].bias)
        found = gate(maps)
    assert found.shape == (3, 4, 1, 1)
    assert torch.allclose(found[:, :, 0, 0], expected, atol=1e-6)


def test_the_enhancement_by_hand():
    part = Enhancement(8).eval()
    maps = torch.randn(2, 8, 12, 12, generator=rng())
    with torch.no_grad():
        views = [part.near(maps), part.far(maps), high_pass(maps)]
        details = part.mix(torch.cat(views, dim=1))
        expected = maps + part.gate(details) * details
        assert torch.allclose(part(maps), expected, atol=1e-6)
        assert not torch.allclose(part(maps), maps, atol=1e-3)


def test_the_enhancement_with_a_closed_gate_is_the_identity():
    part = Enhancement(8).eval()
    close(part.gate)
    maps = torch.randn(2, 8, 12, 12, generator=rng())
    with torch.no_grad():
        assert torch.equal(part(maps), maps)


def reach(view, channels, *, side=33):
    """Rows, and columns, of the input cells that the output cell in the middle looks at."""
    maps = torch.randn(1, channels, side, side, generator=rng()).requires_grad_()
    conv = view[0]  # without the normalisation, whose statistics see the whole map
    conv(maps)[0, :, side // 2, side // 2].sum().backward()
    seen = maps.grad.abs().sum((0, 1)) > 0
    return seen.any(1).nonzero()[:, 0].tolist(), seen.any(0).nonzero()[:, 0].tolist()


def test_each_dilation_reaches_as_far_as_it_says():
    neck = Fusion(12, 16, branch=4)
    assert RATES == (1, 2, 4, 8)
    for rate, view in zip(RATES, neck.views, strict=True):
        rows, columns = reach(view, 16)
        assert rows == columns == [16 - rate, 16, 16 + rate]
    part = Enhancement(8)
    assert reach(part.near, 8)[0] == [15, 16, 17]
    assert reach(part.far, 8)[0] == [14, 16, 18]


@torch.no_grad()
def test_the_neck_lets_shallow_maps_through_where_its_gate_is_open():
    neck = Fusion(12, 16, branch=4).eval()
    deep = torch.randn(2, 16, 4, 4, generator=rng())
    shallow = [torch.randn(2, 4, 32, 32, generator=rng(1)), torch.randn(2, 8, 16, 16, generator=rng(2))]
    other = [maps + 1 for maps in shallow]
    assert neck(shallow, deep).shape == deep.shape
    assert not torch.allclose(neck(shallow, deep), neck(other, deep), atol=1e-4)
    nn.init.zeros_(neck.gate.weight)
    nn.init.constant_(neck.gate.bias, -1e4)
    assert torch.equal(neck(shallow, deep), neck(other, deep))


@torch.no_grad()
def test_the_neck_keeps_the_deep_maps_beside_the_views():
    neck = Fusion(12, 16, branch=4).eval()
    deep = torch.rand(2, 16, 4, 4, generator=rng()) + 0.5
    nn.init.zeros_(neck.mix[0].weight)
    neck.mix[0].weight[:, -16:, 0, 0] = torch.eye(16)  # the last channels are the deep maps
    assert torch.allclose(neck([torch.randn(2, 12, 8, 8, generator=rng())], deep), deep, rtol=1e-4)


@torch.no_grad()
def test_closed_gates_and_a_copying_neck_leave_a_plain_unet():
    full = MlfeuNet(width=4, branch=4, seed=0).eval()
    plain = MlfeuNet(width=4, branch=4, enhance="none", neck="none", seed=0).eval()
    plain.load_state_dict({k: v for k, v in full.state_dict().items() if k in plain.state_dict()})
    for part in full.enhance:
        close(part.gate)
    nn.init.zeros_(full.neck.mix[0].weight)
    full.neck.mix[0].weight[:, -64:, 0, 0] = (1 + 1e-5) ** 0.5 * torch.eye(64)  # BatchNorm's epsilon undone
    images = torch.rand(2, 1, 64, 64, generator=rng())
    assert torch.allclose(full(images), plain(images), atol=1e-5)
