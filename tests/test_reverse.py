import pytest
import torch
from torch import nn

from umiad.nn.encoder import BACKBONES, Pyramid, seeded
from umiad.nn.reverse import ReverseNetwork, expansion


def millions(*parts):
    return sum(p.numel() for part in parts for p in part.parameters()) / 1e6


@pytest.mark.parametrize(
    ("backbone", "total"), [("resnet18", 18.17), ("resnet34", 30.34), ("resnet50", 55.19)]
)
def test_parameters_are_as_published_without_the_layer_that_is_never_called(backbone, total):
    with torch.device("meta"):
        teacher = Pyramid(None, seed=0, backbone=backbone, depth=3)
        network = ReverseNetwork(backbone, seed=0)
    assert millions(teacher, network) == pytest.approx(total, abs=0.005)


def test_parameters_of_the_parts_with_resnet18():
    with torch.device("meta"):
        network = ReverseNetwork("resnet18", seed=0)
    assert millions(network.embedding) == pytest.approx(11.68, abs=0.005)
    assert millions(network.decoder) == pytest.approx(3.70, abs=0.005)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet-tiny"])
@pytest.mark.parametrize("cells", [8, 16])
def test_restored_maps_have_the_shapes_of_the_teachers(backbone, cells):
    with torch.device("meta"):
        network = ReverseNetwork(backbone, seed=0)
        features = [
            torch.zeros(2, channels, cells // 2**k, cells // 2**k)
            for k, channels in enumerate(BACKBONES[backbone][:3])
        ]
        embedding = network.embedding(features)
        restored = network(features)
    assert embedding.shape == (2, 512 * expansion(backbone), cells // 8, cells // 8)
    assert [each.shape for each in restored] == [each.shape for each in features]


def test_all_parameters_get_a_gradient_and_no_convolution_has_a_bias():
    network = ReverseNetwork("resnet-tiny", seed=0)
    rng = torch.Generator().manual_seed(0)
    features = [torch.rand(2, 64 * 2**k, 16 // 2**k, 16 // 2**k, generator=rng) for k in range(3)]
    sum(each.square().mean() for each in network(features)).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.parameters())
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert {type(m).__name__ for m in convolutions} == {"Conv2d", "ConvTranspose2d"}
    assert all(m.bias is None for m in convolutions)


def test_restored_maps_are_not_negative_and_do_not_depend_on_global_random_states():
    networks = []
    for state in (1, 2):
        with seeded(state):
            networks.append(ReverseNetwork("resnet-tiny", seed=3).eval())
    features = [torch.ones(1, 64 * 2**k, 16 // 2**k, 16 // 2**k) for k in range(3)]
    with torch.no_grad():
        first, second = (network(features) for network in networks)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert min(float(each.min()) for each in first) >= 0


def test_convolutions_start_with_kaimings_variance():
    network = ReverseNetwork("resnet-tiny", seed=0)
    [first] = [m for m in network.embedding.reduce[1].modules() if isinstance(m, nn.Conv2d)]
    fan_out = first.out_channels * 9
    assert float(first.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.01)


def test_the_decoder_doubles_by_transposed_convolutions_of_2_x_2():
    network = ReverseNetwork("resnet-tiny", seed=0)
    doubling = [m for m in network.decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert len(doubling) == 6  # path and shortcut of three stages
    assert {(m.kernel_size, m.stride) for m in doubling} == {((2, 2), (2, 2))}
