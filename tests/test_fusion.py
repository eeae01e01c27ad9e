from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from umiad.errors import ConfigError
from umiad.nn.encoder import pooled_size
from umiad.nn.fusion import (
    FUSIONS,
    CouplingFusion,
    MultiScaleFusion,
    NoFusion,
    ResidualFusion,
    cell_mean,
    cell_sum,
    upsample,
)

PRECISE = 1e-10  # float64; a correct log-determinant or inverse is within about 1e-12 at these sizes
PAPER = (64, 128, 256, 512)
# few channels, and fewer the finer the grids, so that the Jacobian stays small
CHANNELS = {64: (4, 4, 4, 6), 96: (4, 2, 4, 6), 160: (2, 2, 3, 4), 224: (1, 1, 2, 4)}
COUPLING_CHANNELS = CHANNELS | {224: (2, 2, 2, 3)}
CASES = [(MultiScaleFusion, {"activation": a}, CHANNELS) for a in ("linear", "tanh")]
CASES.append((CouplingFusion, {}, COUPLING_CHANNELS))


def randomise(module: nn.Module, scale: float = 0.4) -> None:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype) * scale)


def latents(size: int, channels: tuple[int, ...], *, batch: int = 1, seed: int = 1) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    shapes = [(batch, c, *cells) for c, cells in zip(channels, pooled_size(size), strict=True)]
    return tuple(torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)


def autograd_log_det(fusion: nn.Module, us: tuple[Tensor, ...]) -> float:
    """Log abs det of the whole map, by numpy's LAPACK on autograd's Jacobian."""
    shapes = [u.shape for u in us]
    counts = [u.numel() for u in us]

    def flat(vector: Tensor) -> Tensor:
        parts = vector.split(counts)
        ys, _ = fusion(tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))
        return torch.cat([y.flatten() for y in ys])

    jacobian = torch.autograd.functional.jacobian(flat, torch.cat([u.flatten() for u in us]))
    return float(np.linalg.slogdet(jacobian.numpy())[1])


@pytest.mark.parametrize("size", [64, 96, 160, 224])
@pytest.mark.parametrize(("kind", "options", "channels"), CASES, ids=["linear", "tanh", "coupling"])
def test_log_det_equals_autograd(
    kind: type[nn.Module], options: dict[str, str], channels: dict[int, tuple[int, ...]], size: int
) -> None:
    fusion = kind(channels[size], **options).double()
    randomise(fusion)
    us = latents(size, channels[size])
    _, log_det = fusion(us)
    assert log_det.shape == (1, *pooled_size(size)[3])
    expected = autograd_log_det(fusion, us)
    assert abs(log_det.sum().item() - expected) < PRECISE
    assert abs(expected) > 1e-2


def test_log_det_at_the_papers_width_equals_autograd() -> None:
    # hidden 240: the size at which batched factorisations go wrong; one cell keeps the Jacobian at 960 x 960
    fusion = MultiScaleFusion(PAPER, seed=0).double()
    randomise(fusion, 0.03)
    us = tuple(torch.zeros(1, c, 1, 1, dtype=torch.float64) for c in PAPER)
    _, log_det = fusion(us)
    assert abs(log_det.item() - autograd_log_det(fusion, us)) < PRECISE


@torch.no_grad()
def test_tanh_log_det_serves_each_image_and_cell_apart() -> None:
    channels = (2, 2, 4, 8)
    fusion = MultiScaleFusion(channels, activation="tanh").double()
    randomise(fusion)
    us = latents(96, channels, batch=3)
    _, together = fusion(us)
    for index in range(3):
        _, alone = fusion(tuple(u[index : index + 1] for u in us))
        assert float((alone - together[index]).abs().max()) < PRECISE
    assert float(together.std()) > 1e-3


@pytest.mark.parametrize("size", [64, 96, 160, 224, 256])
@torch.no_grad()
def test_coupling_inverse_undoes_forward(size: int) -> None:
    channels = (2, 3, 4, 5)
    fusion = CouplingFusion(channels).double()
    randomise(fusion)
    us = latents(size, channels, batch=2)
    ys, _ = fusion(us)
    worst = max(float((back - u).abs().max()) for back, u in zip(fusion.inverse(ys), us, strict=True))
    assert worst < PRECISE
    assert max(float((y - u).abs().max()) for y, u in zip(ys, us, strict=True)) > 0.1


@pytest.mark.parametrize("size", [64, 96, 256])
@pytest.mark.parametrize("name", FUSIONS)
@torch.no_grad()
def test_every_fusion_starts_as_the_identity(name: str, size: int) -> None:
    fusion = FUSIONS[name](channels=PAPER, seed=3).double()
    us = latents(size, PAPER, batch=2)
    ys, log_det = fusion(us)
    assert all(torch.equal(y, u) for y, u in zip(ys, us, strict=True))
    assert log_det.shape == (2, *pooled_size(size)[3])
    assert float(log_det.abs().max()) == 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), activation=st.sampled_from(["linear", "tanh"]))
def test_mff_with_zero_outer_weights_is_the_identity(seed: int, activation: str) -> None:
    fusion = MultiScaleFusion((2, 2, 2, 2), seed=seed, activation=activation).double()
    us = latents(96, (2, 2, 2, 2), seed=seed)
    ys, log_det = fusion(us)
    assert all(torch.equal(y, u) for y, u in zip(ys, us, strict=True))
    assert float(log_det.detach().abs().max()) == 0


@pytest.mark.parametrize("size", range(64, 289, 32))
def test_averaging_undoes_upsampling_at_every_size(size: int) -> None:
    cells = pooled_size(size)
    coarse = torch.randn(2, 3, *cells[3], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for fine in cells:
        back = cell_mean(upsample(coarse, fine), cells[3])
        assert float((back - coarse).abs().max()) < 1e-13  # means of at most 100 equal float64 values


@settings(max_examples=60, deadline=None)
@given(data=st.data(), h=st.integers(1, 9), w=st.integers(1, 9))
def test_cells_partition_the_fine_grid(data: st.DataObject, h: int, w: int) -> None:
    fine = data.draw(st.integers(h, 40)), data.draw(st.integers(w, 40))
    counts = cell_sum(torch.ones(fine, dtype=torch.float64), (h, w))
    assert bool((counts >= 1).all())
    assert float(counts.sum()) == fine[0] * fine[1]
    coarse = torch.randn(h, w, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float((cell_mean(upsample(coarse, fine), (h, w)) - coarse).abs().max()) < 1e-13


def test_cells_are_those_of_nearest_upsampling_and_of_block_means() -> None:
    rng = torch.Generator().manual_seed(0)
    coarse, fine = torch.randn(1, 1, 4, 4, generator=rng), torch.randn(1, 1, 32, 32, generator=rng)
    nearest = nn.functional.interpolate(coarse, size=(32, 32), mode="nearest")
    assert torch.equal(upsample(coarse, (32, 32)), nearest)
    torch.testing.assert_close(cell_mean(fine, (4, 4)), nn.functional.avg_pool2d(fine, 8))


def test_mff_is_the_documented_formula_at_the_papers_sizes() -> None:
    fusion = MultiScaleFusion(PAPER).double()
    randomise(fusion, 0.05)
    us = latents(256, PAPER)
    pooled = [nn.functional.avg_pool2d(u, k) for u, k in zip(us, (8, 4, 2, 1), strict=True)]
    added = fusion.expand(fusion.reduce(torch.cat(pooled, dim=1))).split(PAPER, dim=1)
    ys, _ = fusion(us)
    for y, u, part in zip(ys, us, added, strict=True):
        up = nn.functional.interpolate(part, size=u.shape[-2:], mode="nearest")
        torch.testing.assert_close(y, u + up)


@pytest.mark.parametrize("name", ["mff", "coupling", "residual"])
@torch.no_grad()
def test_every_scale_hears_of_every_other(name: str) -> None:
    channels = (4, 4, 4, 4)
    fusion = FUSIONS[name](channels=channels, seed=0).double()
    randomise(fusion)
    us, changes = latents(96, channels), latents(96, channels, seed=2)
    ys, _ = fusion(us)
    for changed in range(4):
        other = tuple(changes[k] if k == changed else u for k, u in enumerate(us))
        for y, z in zip(ys, fusion(other)[0], strict=True):
            assert float((y - z).abs().max()) > 1e-6


@pytest.mark.parametrize("options", [{"activation": "linear"}, {"activation": "tanh"}])
def test_every_mff_parameter_gets_a_gradient(options: dict[str, str]) -> None:
    fusion = MultiScaleFusion((2, 2, 4, 8), **options).double()
    randomise(fusion)
    ys, log_det = fusion(latents(96, (2, 2, 4, 8), batch=2))
    (sum(0.5 * y.square().sum() for y in ys) - log_det.sum()).backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in fusion.parameters())


@pytest.mark.parametrize("kind", [CouplingFusion, ResidualFusion])
def test_every_other_parameter_gets_a_gradient(kind: type[nn.Module]) -> None:
    fusion = kind((4, 4, 4, 8)).double()
    randomise(fusion)
    ys, log_det = fusion(latents(96, (4, 4, 4, 8), batch=2))
    (sum(0.5 * y.square().sum() for y in ys) - log_det.sum()).backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in fusion.parameters())


@pytest.mark.parametrize("name", ["mff", "coupling", "residual"])
def test_training_can_leave_the_start(name: str) -> None:
    fusion = FUSIONS[name](channels=(2, 2, 4, 8), seed=0).double()
    ys, log_det = fusion(latents(96, (2, 2, 4, 8), batch=2))
    (sum(0.5 * y.square().sum() for y in ys) - log_det.sum()).backward()
    assert any(bool(p.grad.abs().max() > 0) for p in fusion.parameters() if p.grad is not None)


def test_log_det_gradient_equals_finite_differences() -> None:
    fusion = MultiScaleFusion((2, 2, 2, 2), activation="tanh").double()
    randomise(fusion)
    us = latents(64, (2, 2, 2, 2))
    fusion(us)[1].sum().backward()
    weight, step = fusion.reduce.weight, 1e-6
    assert weight.grad is not None
    with torch.no_grad():
        expected = weight.grad[0, 3, 0, 0].item()
        weight[0, 3, 0, 0] += step
        above = fusion(us)[1].sum().item()
        weight[0, 3, 0, 0] -= 2 * step
        below = fusion(us)[1].sum().item()
    assert (above - below) / (2 * step) == pytest.approx(expected, rel=1e-5, abs=1e-8)  # central difference


def test_parameter_counts() -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(MultiScaleFusion()) == 462_000
    assert count(ResidualFusion()) == 4_148_400
    assert count(NoFusion()) == 0


def test_unknown_activation_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"activation 'tanhh' is unknown.*'tanh'"):
        MultiScaleFusion(activation="tanhh")


def test_coupling_refuses_a_scale_that_cannot_be_halved() -> None:
    with pytest.raises(ConfigError, match=r"\(1, 2, 2, 2\) channels: every scale needs 2 or more"):
        CouplingFusion((1, 2, 2, 2))


@pytest.mark.parametrize("name", FUSIONS)
def test_weights_follow_the_seed_and_touch_no_global_state(name: str) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, same, other = (FUSIONS[name](channels=(2, 2, 4, 8), seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not first or any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", FUSIONS)
def test_copy_gives_the_same_latents(name: str) -> None:
    fusion = FUSIONS[name](channels=(4, 4, 4, 4), seed=0).double()
    randomise(fusion)
    us = latents(64, (4, 4, 4, 4))
    for a, b in zip(fusion(us)[0], copy.deepcopy(fusion)(us)[0], strict=True):
        assert torch.equal(a, b)
