from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from umiad.errors import ModelFileError
from umiad.nn.encoder import BACKBONES, CHANNELS, Pyramid, grid, pool, pooled_size, seeded

WEIGHTS = (
    Path(__file__).resolve().parents[2]
    / "shared"
    / "weights"
    / "resnet18-imagenet1k-v1-layer4-shortcut.safetensors"
)
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def torchvision_shapes() -> dict[str, tuple[int, ...]]:
    """The 122 names and shapes of torchvision's resnet18, written down independently of any library."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        shapes.update({f"{name}.{part}": () if part == BN[-1] else (channels,) for part in BN})

    shapes["conv1.weight"] = (64, 3, 7, 7)
    norm("bn1", 64)
    before = 64
    for layer, channels in enumerate(CHANNELS, start=1):
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            shapes[f"{name}.conv1.weight"] = (channels, before if block == 0 else channels, 3, 3)
            norm(f"{name}.bn1", channels)
            shapes[f"{name}.conv2.weight"] = (channels, channels, 3, 3)
            norm(f"{name}.bn2", channels)
            if block == 0 and layer > 1:
                shapes[f"{name}.downsample.0.weight"] = (channels, before, 1, 1)
                norm(f"{name}.downsample.1", channels)
        before = channels
    shapes["fc.weight"], shapes["fc.bias"] = (1000, 512), (1000,)
    return shapes


def random_state(seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in torchvision_shapes().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var") or ("bn" in name and name.endswith("weight")):
            state[name] = torch.rand(shape, generator=rng) + 0.5
        else:
            state[name] = torch.randn(shape, generator=rng) * 0.05
    return state


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def pyramid(state: dict[str, Tensor]) -> Pyramid:
    return Pyramid(state, seed=0)


def reference_forward(state: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    """ResNet18 by hand from the state alone."""
    functional = nn.functional

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, var, weight, bias)

    x = functional.conv2d(images, state["conv1.weight"], stride=2, padding=3)
    x = functional.max_pool2d(norm(x, "bn1").relu(), 3, 2, 1)
    maps = []
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            skip = x
            if f"{name}.downsample.0.weight" in state:
                skip = functional.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
                skip = norm(skip, f"{name}.downsample.1")
            y = functional.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = functional.conv2d(norm(y, f"{name}.bn1").relu(), state[f"{name}.conv2.weight"], padding=1)
            x = (norm(y, f"{name}.bn2") + skip).relu()
        maps.append(x)
    return maps


def test_equals_resnet18_written_out_by_hand(pyramid: Pyramid, state: dict[str, Tensor]) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for got, expected in zip(pyramid(images), reference_forward(state, images), strict=True):
        # the same float32 operations; 1e-5 relative leaves room for another convolution kernel
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("size", [64, 96, 256])
def test_shapes(pyramid: Pyramid, size: int) -> None:
    maps = pyramid(torch.zeros(1, 3, size, size))
    assert [m.shape[1:] for m in maps] == [
        (c, size // s, size // s) for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)
    ]


def test_names_are_torchvisions_and_load_strictly_both_ways(
    pyramid: Pyramid, state: dict[str, Tensor]
) -> None:
    own = pyramid.state_dict()
    assert set(own) == {name for name in torchvision_shapes() if not name.startswith("fc.")}
    assert all(torch.equal(own[name], state[name]) for name in own)
    again = Pyramid(own, seed=5)
    assert all(torch.equal(value, own[name]) for name, value in again.state_dict().items())
    again.load_state_dict(own, strict=True)


def test_classifier_and_batch_counters_may_be_missing(state: dict[str, Tensor]) -> None:
    reduced = {
        k: v for k, v in state.items() if not k.startswith("fc.") and not k.endswith("num_batches_tracked")
    }
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Pyramid(reduced, seed=0)(images)[3], Pyramid(state, seed=0)(images)[3])


def test_missing_unknown_and_misshapen_keys_are_named(state: dict[str, Tensor]) -> None:
    broken = dict(state)
    del broken["layer3.0.conv1.weight"]
    broken["layer9.weight"] = torch.zeros(1)
    broken["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    with pytest.raises(ModelFileError, match=r"1 missing: layer3\.0\.conv1\.weight") as caught:
        Pyramid(broken, seed=0)
    assert "1 unknown: layer9.weight" in str(caught.value)
    assert "conv1.weight (64, 1, 7, 7) instead of (64, 3, 7, 7)" in str(caught.value)


def test_long_lists_of_problems_are_cut() -> None:
    with pytest.raises(ModelFileError, match=r"100 missing: (\S+, ){5}\.\.\."):
        Pyramid({}, seed=0)


def test_frozen_and_always_in_evaluation_mode(pyramid: Pyramid) -> None:
    assert not any(parameter.requires_grad for parameter in pyramid.parameters())
    assert pyramid.train() is pyramid
    assert not any(module.training for module in pyramid.modules())
    nn.Sequential(pyramid).train()
    assert not any(module.training for module in pyramid.modules())
    before = pyramid.bn1.running_mean.clone()
    pyramid(torch.ones(1, 3, 64, 64))
    assert torch.equal(pyramid.bn1.running_mean, before)


def test_random_weights_follow_the_seed_and_touch_no_global_state() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, same, other = (Pyramid(None, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_seeded_restores_the_global_states_after_an_error() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()

    def fail() -> None:
        with seeded(1):
            torch.rand(3), np.random.rand(3)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize("size", [64, 96, 160, 224, 256, 288])
def test_pooled_size_is_what_pool_yields(size: int) -> None:
    assert pooled_size(size) == tuple(
        grid(pool(torch.zeros(1, 2, size // s, size // s))) for s in (4, 8, 16, 32)
    )


def test_pooled_size_of_the_paper() -> None:
    assert pooled_size(256) == ((32, 32), (16, 16), (8, 8), (4, 4))


def test_pool_averages_nine_cells_and_counts_the_border_as_zeros() -> None:
    pooled = pool(torch.ones(1, 1, 4, 4))
    expected = torch.tensor([[4.0, 6.0], [6.0, 9.0]]) / 9
    torch.testing.assert_close(pooled[0, 0], expected)  # a sum of at most nine float32 ones


def test_pool_of_no_channels_keeps_the_grid() -> None:
    assert pool(torch.zeros(2, 0, 3, 4)).shape == (2, 0, 2, 2)


@pytest.mark.real
@pytest.mark.skipif(not WEIGHTS.is_file(), reason="the shared weights file is not here")
def test_the_shared_weights_file_loads() -> None:
    state = load_file(WEIGHTS)
    pyramid = Pyramid(state, seed=0)
    assert torch.equal(pyramid.layer3[1].conv2.weight, state["layer3.1.conv2.weight"])
    maps = pyramid(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert all(torch.isfinite(m).all() and m.std() > 0 for m in maps)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_lies_deeper_is_not_run(pyramid: Pyramid, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    whole = pyramid(images)
    monkeypatch.setattr(pyramid.layer4, "forward", lambda _: pytest.fail("layer 4 was run"))
    maps = pyramid(images, depth=depth)
    assert len(maps) == depth
    assert all(torch.equal(first, second) for first, second in zip(maps, whole, strict=False))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_lies_deeper_is_not_kept(pyramid: Pyramid, state: dict[str, Tensor], depth: int) -> None:
    """A full state fills it; its maps and tensors are the first of the whole pyramid's."""
    shallow = Pyramid(state, seed=0, depth=depth)
    deeper = tuple(f"layer{k}." for k in range(depth + 1, 5))
    whole = pyramid.state_dict()
    assert shallow.state_dict().keys() == {key for key in whole if not key.startswith(deeper)}
    assert all(torch.equal(value, whole[key]) for key, value in shallow.state_dict().items())
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    maps = shallow(images, depth=depth)
    assert len(maps) == depth
    assert all(torch.equal(first, second) for first, second in zip(maps, pyramid(images), strict=False))


def test_without_layer_4_there_are_no_weights_of_layer_4(state: dict[str, Tensor]) -> None:
    for given in (state, None):
        pyramid = Pyramid(given, seed=0, depth=3)
        assert not [key for key in pyramid.state_dict() if "layer4" in key]
        assert sum(p.numel() for p in pyramid.parameters()) == 2_782_784  # conv1 to layer 3
        assert not pyramid.train().training


def test_random_weights_do_not_depend_on_the_depth() -> None:
    whole, shallow = Pyramid(None, seed=3).state_dict(), Pyramid(None, seed=3, depth=3).state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in shallow.items())


def test_a_state_must_be_whole_whatever_the_depth(state: dict[str, Tensor]) -> None:
    lacking = {key: value for key, value in state.items() if key != "layer4.1.conv2.weight"}
    with pytest.raises(ModelFileError, match=r"1 missing: layer4\.1\.conv2\.weight"):
        Pyramid(lacking, seed=0, depth=3)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_has_its_channels_and_the_same_strides(backbone: str) -> None:
    pyramid = Pyramid(None, seed=0, backbone=backbone)
    assert pyramid.channels == BACKBONES[backbone]
    maps = pyramid(torch.zeros(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == list(BACKBONES[backbone])
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]


def test_weights_of_another_backbone_are_refused_by_its_name(state: dict[str, Tensor]) -> None:
    with pytest.raises(ModelFileError, match="weights do not fit ResNet34"):
        Pyramid(state, seed=0, backbone="resnet34")
