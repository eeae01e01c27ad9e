from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from umiad.errors import ConfigError
from umiad.nn.encoder import pooled_size
from umiad.nn.flow import ConditionalFlow, position_encoding

PRECISE = 1e-10  # float64; a correct log-determinant or inverse is within about 1e-13 here


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights large enough that every coupling scales and shifts."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype) * 0.1)


def inputs(channels: int, h: int, w: int, *, batch: int = 1, condition: int = 4) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    z = torch.randn(batch, channels, h, w, generator=rng, dtype=torch.float64)
    return z, torch.randn(batch, condition, h, w, generator=rng, dtype=torch.float64)


def flow_of(channels: int, *, blocks: int = 3, condition: int = 4, seed: int = 0) -> ConditionalFlow:
    flow = ConditionalFlow(
        channels, condition_channels=condition, blocks=blocks, hidden=3, seed=seed
    ).double()
    randomise(flow)
    return flow


def small_grids() -> list[tuple[int, int]]:
    grids = {cells for size in (64, 96, 160, 224) for cells in pooled_size(size) if cells[0] <= 8}
    return sorted(grids)


@pytest.mark.parametrize("cells", small_grids())
@pytest.mark.parametrize("channels", [4, 5])
def test_log_det_equals_autograd(cells: tuple[int, int], channels: int) -> None:
    flow = flow_of(channels)
    z, c = inputs(channels, *cells)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x, c)[0], z).reshape(z.numel(), z.numel())
    expected = np.linalg.slogdet(jacobian.numpy())[1]
    _, log_det = flow(z, c)
    assert log_det.shape == (1, *cells)
    assert abs(log_det.sum().item() - expected) < PRECISE
    assert abs(expected) > 0.1


@pytest.mark.parametrize("cells", [(1, 1), (3, 3), (4, 7), (28, 28)])
@torch.no_grad()
def test_inverse_undoes_forward(cells: tuple[int, int]) -> None:
    flow = flow_of(6, blocks=8)
    z, c = inputs(6, *cells, batch=2)
    u, _ = flow(z, c)
    assert float((flow.inverse(u, c) - z).abs().max()) < PRECISE
    assert float((u - z).abs().max()) > 0.1


@torch.no_grad()
def test_log_det_per_position_is_local_for_1x1_kernels() -> None:
    flow = ConditionalFlow(6, condition_channels=4, blocks=4, hidden=5, kernel=1).double()
    randomise(flow)
    z, c = inputs(6, 3, 4)
    _, log_det = flow(z, c)
    for row in range(3):
        for column in range(4):
            one = (..., slice(row, row + 1), slice(column, column + 1))
            assert abs(float(flow(z[one], c[one])[1]) - float(log_det[0, row, column])) < PRECISE


@torch.no_grad()
def test_images_of_a_batch_do_not_mix() -> None:
    flow = flow_of(4)
    z, c = inputs(4, 3, 3, batch=3)
    u, log_det = flow(z, c)
    for index in range(3):
        alone_u, alone_log_det = flow(z[index : index + 1], c[index : index + 1])
        assert float((alone_u - u[index]).abs().max()) < PRECISE
        assert float((alone_log_det - log_det[index]).abs().max()) < PRECISE


@torch.no_grad()
def test_starts_as_a_permutation_of_the_channels() -> None:
    flow = ConditionalFlow(16, condition_channels=4)
    z = torch.randn(2, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    u, log_det = flow(z, torch.zeros(2, 4, 3, 3))
    assert float(log_det.abs().max()) == 0
    order = [int((z[0, :, 0, 0] == value).nonzero()) for value in u[0, :, 0, 0]]
    assert sorted(order) == list(range(16))
    assert order != list(range(16))
    assert torch.equal(u, z[:, order])


@pytest.mark.parametrize(
    ("channels", "expected"), [(64, 185_472), (128, 592_128), (256, 2_068_992), (512, 7_676_928)]
)
def test_parameter_count_of_the_literal_reading(channels: int, expected: int) -> None:
    flow = ConditionalFlow(channels)
    assert sum(p.numel() for p in flow.parameters() if p.requires_grad) == expected


def test_every_trainable_parameter_gets_a_gradient() -> None:
    flow = flow_of(6)
    u, log_det = flow(*inputs(6, 4, 4))
    (0.5 * u.square().sum() - log_det.sum()).backward()
    trainable = [p for p in flow.parameters() if p.requires_grad]
    assert trainable
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in trainable)


def test_training_can_leave_the_start_and_lowers_the_loss() -> None:
    flow = ConditionalFlow(8, condition_channels=4, blocks=2)
    optimiser = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], lr=1e-2)
    z = 3 * torch.randn(8, 8, 4, 4, generator=torch.Generator().manual_seed(0)) + 1
    losses = []
    for _ in range(15):
        u, log_det = flow(z, torch.ones(8, 4, 4, 4))
        loss = (0.5 * u.square().sum() - log_det.sum()) / z.numel()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@torch.no_grad()
def test_depends_on_the_condition_and_works_without_one() -> None:
    flow = flow_of(4)
    z, c = inputs(4, 3, 3)
    assert float((flow(z, c)[0] - flow(z, c + 1)[0]).abs().max()) > 1e-3
    alone = flow_of(4, condition=0)
    u, _ = alone(z, z[:, :0])
    assert float((alone.inverse(u, z[:, :0]) - z).abs().max()) < PRECISE


@torch.no_grad()
def test_log_scale_is_clamped() -> None:
    flow = ConditionalFlow(4, condition_channels=4, blocks=1, clamp=1.9).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            if parameter.requires_grad:
                parameter.fill_(1e6)
    z, c = inputs(4, 2, 2)
    _, log_det = flow(z.abs(), c.abs())
    assert float(log_det.max()) <= 4 * 1.9
    assert float(log_det.max()) > 4 * 1.8


def test_weights_and_permutations_follow_the_seed_and_touch_no_global_state() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, same, other = (ConditionalFlow(16, condition_channels=4, seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(first[key], same[key]) for key in first)
    for part in ("couplings.0.subnet1.0.weight", "permutations.0.perm"):
        assert not torch.equal(first[part], other[part])
    assert not torch.equal(first["permutations.0.perm"], first["permutations.1.perm"])


@pytest.mark.parametrize("seed", [0, 2**40])
def test_any_seed_builds(seed: int) -> None:
    assert ConditionalFlow(4, condition_channels=4, blocks=1, seed=seed)


def test_copy_and_state_round_trip_give_the_same_latents() -> None:
    flow = flow_of(6)
    z, c = inputs(6, 3, 3)
    expected = flow(z, c)[0]
    filled = ConditionalFlow(6, condition_channels=4, blocks=3, hidden=3, seed=99).double()
    filled.load_state_dict(flow.state_dict(), strict=True)
    for twin in (copy.deepcopy(flow), filled):
        assert torch.equal(twin(z, c)[0], expected)


@pytest.mark.parametrize(("h", "w"), [(1, 1), (3, 5), (32, 32)])
@pytest.mark.parametrize("channels", [4, 64])
def test_position_encoding_is_the_documented_formula(channels: int, h: int, w: int) -> None:
    code = position_encoding(channels, h, w)
    assert code.shape == (channels, h, w)
    assert code.dtype == torch.float32
    half = channels // 2
    for i in range(channels // 4):
        omega = 10000 ** (-2 * i / half)
        for y, x in ((0, 0), (h - 1, w - 1), (h // 2, w // 3)):
            got = [float(code[k, y, x]) for k in (2 * i, 2 * i + 1, half + 2 * i, half + 2 * i + 1)]
            expected = [math.sin(x * omega), math.cos(x * omega), math.sin(y * omega), math.cos(y * omega)]
            assert got == pytest.approx(expected, abs=1e-7)  # one rounding to float32


def test_every_position_has_its_own_code() -> None:
    code = position_encoding(64, 16, 16).flatten(1).T
    distance = torch.cdist(code, code) + 10 * torch.eye(256)
    assert float(distance.min()) > 0.1


@pytest.mark.parametrize("channels", [0, -4, 2, 66])
def test_position_encoding_refuses_other_channel_counts(channels: int) -> None:
    with pytest.raises(ConfigError, match=f"of {channels} channels: expected a positive multiple of 4"):
        position_encoding(channels, 2, 2)
