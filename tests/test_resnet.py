"""The plain ResNet against MONAI's, bit by bit where numbers are drawn, and the folded one against the plain one."""

import copy

import pytest
import torch
from torch import Tensor, nn

from umiad.config import TINY
from umiad.nn.encoder import Pyramid, seeded
from umiad.nn.resnet import PLANS, Folded, ResNet, padded_shortcut

NAMES = list(PLANS)


def monai_network(name: str) -> nn.Module:
    """The library's network of the same name, its weights from torch's global generator."""
    from monai.networks import nets
    from monai.networks.nets.resnet import ResNet as MonaiResNet
    from monai.networks.nets.resnet import ResNetBottleneck

    common = {"spatial_dims": 2, "n_input_channels": 3, "conv1_t_size": 7, "conv1_t_stride": 2}
    if name != TINY:
        build = getattr(nets, name)
        return build(**common, num_classes=1000, shortcut_type="B", bias_downsample=False)

    class Bottleneck(ResNetBottleneck):
        expansion = 16

    planes = list(PLANS[TINY].planes)
    return MonaiResNet(Bottleneck, [1, 1, 1, 1], planes, shortcut_type="A", feed_forward=False, **common)


def monai_maps(network: nn.Module, images: Tensor) -> list[Tensor]:
    maps = [network.maxpool(network.act(network.bn1(network.conv1(images))))]
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        maps.append(layer(maps[-1]))
    return maps[1:]


def trained_like(network: nn.Module) -> nn.Module:
    """The same network with statistics and factors as after training, so that folding has something to do."""
    rng = torch.Generator().manual_seed(3)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low, high in (
                (part.weight.data, 0.5, 1.5),
                (part.bias.data, -0.5, 0.5),
                (part.running_mean, -0.5, 0.5),
                (part.running_var, 0.2, 2.0),
            ):
                tensor.copy_(torch.empty_like(tensor).uniform_(low, high, generator=rng))
    return network


def images(batch: int = 2, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_draws_the_same_weights_as_monai(name: str) -> None:
    with seeded(5):
        ours = ResNet(name)
    with seeded(5):
        theirs = monai_network(name).state_dict()
    own = ours.state_dict()
    assert list(own) == [key for key in theirs if not key.startswith("fc.")]
    assert all(torch.equal(value, theirs[key]) for key, value in own.items())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_network_computes_what_monais_does(name: str) -> None:
    with seeded(0):
        theirs = trained_like(monai_network(name)).eval()
    ours = ResNet(name).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    for got, expected in zip(ours(images()), monai_maps(theirs, images()), strict=True):
        assert_close(got, expected, 1e-6)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_folding_changes_the_result_by_rounding_only(name: str) -> None:
    with seeded(0):
        network = trained_like(ResNet(name)).eval()
    exact = copy.deepcopy(network).double()
    for depth in (1, 4):
        maps = Folded(network, depth=depth)(images(), depth=depth)
        assert len(maps) == depth
        for got, expected in zip(maps, exact(images().double(), depth=depth), strict=True):
            assert got.dtype == torch.float32
            assert_close(got.double(), expected, 1e-5)


@torch.no_grad()
def test_bfloat16_is_near_and_comes_back_as_float32() -> None:
    with seeded(0):
        network = trained_like(ResNet("resnet18")).eval()
    for got, expected in zip(
        Folded(network, dtype=torch.bfloat16)(images(), depth=4), network(images()), strict=True
    ):
        assert got.dtype == torch.float32
        assert_close(got, expected, 0.05)


def test_stages_that_are_left_out_change_no_number_of_the_others() -> None:
    with seeded(0):
        whole = ResNet(TINY).eval()
    with seeded(0):
        part = ResNet(TINY, depth=2).eval()
    assert not any(name.startswith(("layer3", "layer4")) for name in part.state_dict())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(part(images()), whole(images(), depth=2), strict=True))


def test_training_moves_the_statistics_and_gives_every_weight_a_gradient() -> None:
    with seeded(0):
        network = ResNet("resnet18")
    before = network.bn1.running_mean.clone()
    sum(each.mean() for each in network(images())).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert not torch.equal(network.bn1.running_mean, before)


def test_the_pyramid_notices_that_its_weights_have_changed() -> None:
    pyramid, other = Pyramid(None, seed=0), Pyramid(None, seed=1)
    before = pyramid(images())
    pyramid.load_state_dict(other.state_dict())
    assert all(torch.equal(got, new) for got, new in zip(pyramid(images()), other(images()), strict=True))
    pyramid.get_submodule("layer1.0.bn1").running_mean.add_(1)
    assert not torch.equal(pyramid(images())[0], other(images())[0])
    assert all(torch.equal(a, b) for a, b in zip(Pyramid(None, seed=0)(images()), before, strict=True))
    twin = copy.deepcopy(other).double()
    assert len(twin.state_dict()) == len(other.state_dict())


def test_folded_weights_are_no_part_of_the_state() -> None:
    pyramid = Pyramid(None, seed=0, depth=2)
    names = set(pyramid.state_dict())
    pyramid(images(), depth=2)
    assert set(pyramid.state_dict()) == names
    assert not any(name.startswith("layer3") for name in names)


def test_a_shortcut_without_weights_drops_cells_and_pads_channels() -> None:
    maps = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    found = padded_shortcut(maps, 3, 2)
    assert torch.equal(found[:, :2], maps[:, :, ::2, ::2])
    assert not found[:, 2].any()
    assert padded_shortcut(maps, 2, 1) is maps
