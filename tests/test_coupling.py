from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from umiad.nn.coupling import AllInOneFlow, convolutions

PRECISE = 1e-10  # float64; a correct log-determinant or inverse is within about 1e-13 here
ROTATED = 1e-6  # FrEIA keeps its rotations in float32: orthogonal to about 1e-7


def linear_layers(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 7), nn.ReLU(), nn.Linear(7, outputs))


def randomise(module: nn.Module) -> None:
    """Weights large enough that every coupling scales and shifts."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in module.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype) * 0.3)


def flow_of(channels: int, *, kernel: int = 3, blocks: int = 3, **settings) -> AllInOneFlow:
    flow = AllInOneFlow(channels, [convolutions(kernel=kernel)] * blocks, **settings).double()
    randomise(flow)
    return flow


def fibre_flow_of(channels: int, **settings) -> AllInOneFlow:
    flow = AllInOneFlow(channels, [linear_layers] * 3, spatial=False, **settings).double()
    randomise(flow)
    return flow


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_det_by_autograd(flow: AllInOneFlow, z: Tensor, c: Tensor | None) -> float:
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x, c)[0], z)
    return float(np.linalg.slogdet(jacobian.reshape(z.numel(), z.numel()).numpy())[1])


@pytest.mark.parametrize("cells", [(1, 1), (3, 3), (2, 5)])
@pytest.mark.parametrize("condition", [0, 3])
@pytest.mark.parametrize("channels", [4, 5])
def test_log_det_of_maps_equals_autograd(channels, condition, cells):
    flow = flow_of(channels, condition_channels=condition)
    z, c = normal(1, channels, *cells), normal(1, condition, *cells, seed=2) if condition else None
    expected = log_det_by_autograd(flow, z, c)
    log_det = flow(z, c)[1]
    assert log_det.shape == (1,)
    assert abs(log_det.item() - expected) < PRECISE
    assert abs(expected) > 0.01


@pytest.mark.parametrize("condition", [0, 3])
@pytest.mark.parametrize("channels", [4, 5])
def test_log_det_of_fibres_equals_autograd(channels, condition):
    flow = fibre_flow_of(channels, condition_channels=condition)
    z, c = normal(4, channels), normal(4, condition, seed=2) if condition else None
    log_det = flow(z, c)[1]
    assert log_det.shape == (4,)
    for k in range(4):
        expected = log_det_by_autograd(flow, z[k : k + 1], None if c is None else c[k : k + 1])
        assert abs(log_det[k].item() - expected) < PRECISE


@pytest.mark.parametrize("build", [flow_of, fibre_flow_of])
def test_log_det_with_rotations_equals_autograd(build):
    flow = build(6, soft=True)
    z = normal(1, 6) if build is fibre_flow_of else normal(1, 6, 2, 3)
    assert abs(flow(z)[1].item() - log_det_by_autograd(flow, z, None)) < ROTATED


@pytest.mark.parametrize("cells", [(1, 1), (3, 4), (16, 9)])
@torch.no_grad()
def test_one_flow_is_inverted_at_every_height_and_width(cells):
    flow = flow_of(6, condition_channels=3, blocks=8)
    z, c = normal(2, 6, *cells), normal(2, 3, *cells, seed=2)
    u, _ = flow(z, c)
    assert u.shape == z.shape
    assert float((flow.inverse(u, c) - z).abs().max()) < PRECISE
    assert float((u - z).abs().max()) > 0.1


@torch.no_grad()
def test_fibres_and_rotations_are_inverted_too():
    z = normal(5, 6)
    for soft, tolerance in ((False, PRECISE), (True, ROTATED)):
        flow = fibre_flow_of(6, soft=soft)
        assert float((flow.inverse(flow(z)[0]) - z).abs().max()) < tolerance


@torch.no_grad()
def test_the_condition_and_its_place_matter():
    flow = flow_of(4, condition_channels=3)
    z, c = normal(1, 4, 3, 3), normal(1, 3, 3, 3, seed=2)
    assert float((flow(z, c)[0] - flow(z, c + 1)[0]).abs().max()) > 1e-3
    assert float((flow(z, c)[0] - flow(z, c.flip(-1))[0]).abs().max()) > 1e-3


@torch.no_grad()
def test_images_of_a_batch_do_not_mix():
    flow = flow_of(4)
    z = normal(3, 4, 3, 3)
    u, log_det = flow(z)
    for k in range(3):
        alone, its_log_det = flow(z[k : k + 1])
        assert float((alone - u[k]).abs().max()) < PRECISE
        assert float((its_log_det - log_det[k]).abs().max()) < PRECISE


@torch.no_grad()
def test_1x1_kernels_see_one_position_only():
    flow = flow_of(4, kernel=1)
    z = normal(1, 4, 3, 3)
    changed = z.clone()
    changed[..., 1, 1] += 1
    moved = (flow(changed)[0] - flow(z)[0]).abs().amax(1)[0] > 0
    assert moved.nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("soft", [False, True])
def test_the_seed_governs_weights_and_permutations(soft):
    def build(seed: int) -> dict[str, Tensor]:
        return AllInOneFlow(6, [convolutions()] * 2, soft=soft, seed=seed).state_dict()

    first, again, other = build(3), build(3), build(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for part in ("0.subnet.0.weight", "1.subnet.2.weight", "0.w_perm", "1.w_perm"):
        assert not torch.equal(first[f"blocks.{part}"], other[f"blocks.{part}"])
    assert not torch.equal(first["blocks.0.w_perm"], first["blocks.1.w_perm"])


@pytest.mark.parametrize("soft", [False, True])
def test_building_leaves_the_global_random_states_alone(soft):
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    AllInOneFlow(6, [convolutions()] * 2, soft=soft, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpys)


@torch.no_grad()
def test_permutations_are_orders_and_rotations_are_orthogonal():
    for soft in (False, True):
        for block in AllInOneFlow(8, [convolutions()] * 3, soft=soft).blocks:
            matrix = block.w_perm[:, :, 0, 0]
            assert torch.allclose(matrix @ matrix.T, torch.eye(8), atol=1e-6)  # float32
            assert bool((matrix.abs().amax(1) == 1).all()) is not soft


@torch.no_grad()
def test_the_log_scale_is_bounded_by_the_clamp():
    def shouting(inputs: int, outputs: int) -> nn.Module:
        layer = nn.Conv2d(inputs, outputs, 1)
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.get_parameter("bias"), 1e6)
        return layer

    flow = AllInOneFlow(4, [shouting] * 5, clamp=1.5).double()
    log_det = flow(normal(1, 4, 2, 2))[1].item()
    # 5 blocks scale 2 channels at 4 positions each; the learned scales start at 1 up to float32
    assert log_det == pytest.approx(5 * 2 * 4 * 1.5, abs=1e-4)


@torch.no_grad()
def test_an_unfitted_flow_is_near_a_permutation():
    u, log_det = AllInOneFlow(16, [convolutions()] * 8)(normal(2, 16, 4, 4).float())
    assert float(log_det.abs().max()) / 256 < 0.1  # nats per dimension
    assert float(u.std()) == pytest.approx(1, abs=0.2)


def test_every_trainable_parameter_gets_a_gradient_and_permutations_are_fixed():
    flow = flow_of(6)
    u, log_det = flow(normal(2, 6, 3, 3))
    (0.5 * u.square().sum() - log_det.sum()).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.requires_grad is ("w_perm" not in name)
        assert (
            parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        ) == parameter.requires_grad


@torch.no_grad()
def test_learned_scales_count_once_per_position():
    flow = AllInOneFlow(3, [convolutions()]).double()
    z = normal(1, 3, 2, 5)
    before = flow(z)[1]
    block = flow.blocks[0]
    old = block.global_scale_activation(block.global_scale)
    block.global_scale.add_(1)
    grown = (block.global_scale_activation(block.global_scale) / old).log().sum()
    assert float(flow(z)[1] - before) == pytest.approx(10 * float(grown), abs=PRECISE)


@pytest.mark.parametrize(("ratio", "hidden"), [(1.0, 6), (2.0, 12), (0.01, 1)])
def test_the_hidden_width_follows_the_ratio(ratio, hidden):
    first, _, last = convolutions(kernel=3, hidden_ratio=ratio)(6, 10)
    assert (first.in_channels, first.out_channels, last.in_channels, last.out_channels) == (
        6,
        hidden,
        hidden,
        10,
    )


def test_large_rotations_are_built_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow = AllInOneFlow(514, [linear_layers], spatial=False, soft=True)
    assert flow.blocks[0].w_perm.shape == (514, 514)
