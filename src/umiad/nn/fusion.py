"""Slot `fusion`: the latents of the four scales inform each other.

Every fusion is called with (u1, u2, u3, u4), each [B,C_k,h_k,w_k], finest first, and returns (ys, log_det):
ys of the same shapes, and log_det [B,h_4,w_4], the natural log of abs(det dy/du) shared out over the cells
of the coarsest grid; its sum is the image's. All start as the identity.

Cells: fine row i of H belongs to coarse row floor(i * h / H), which is what nearest upsampling copies.
Averaging over exactly those cells makes averaging after upsampling the identity at every size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umiad.config import nearest
from umiad.errors import ConfigError
from umiad.nn.encoder import CHANNELS, grid, seeded

Fused = tuple[tuple[Tensor, ...], Tensor]
Bound = Callable[[Tensor, float], Tensor]
CouplingNet = Callable[[Sequence[int], Sequence[int]], nn.Module]


def cell_index(fine: int, coarse: int) -> Tensor:
    """The coarse row (or column) that each of `fine` rows belongs to: int64 [fine]; needs fine >= coarse."""
    return torch.arange(fine) * coarse // fine


def cell_sum(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Sum over the cells of a coarse grid: [...,H,W] -> [...,h,w], (h, w) = `size`."""
    rows, columns = (_membership(f, c).to(maps) for f, c in zip(maps.shape[-2:], size, strict=True))
    return rows @ maps @ columns.T


def cell_mean(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """P: mean over the cells of a coarse grid, [...,H,W] -> [...,h,w]; block means where h divides H."""
    rows, columns = (_membership(f, c).to(maps) for f, c in zip(maps.shape[-2:], size, strict=True))
    counts = rows.sum(dim=1)[:, None] * columns.sum(dim=1)
    return cell_sum(maps, size) / counts


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """U: every fine position takes its cell's value, [...,h,w] -> [...,H,W], (H, W) = `size`."""
    rows, columns = (cell_index(f, c).to(maps.device) for f, c in zip(size, maps.shape[-2:], strict=True))
    return maps.index_select(-2, rows).index_select(-1, columns)


def _membership(fine: int, coarse: int) -> Tensor:
    """[coarse,fine]: 1 where the fine row belongs to the coarse one."""
    return cell_index(fine, coarse) == torch.arange(coarse)[:, None]


def _gather(us: Sequence[Tensor]) -> Tensor:
    """All scales on the coarsest grid, concatenated: [B,sum C_k,h_4,w_4]."""
    return torch.cat([cell_mean(u, grid(us[-1])) for u in us], dim=1)


class Linear:
    """s(x) = x: one determinant serves every cell of every image."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """The hidden values themselves."""
        return hidden

    def log_det(self, hidden: Tensor, product: Tensor) -> Tensor:
        """Hidden [B,M,h,w], product W1 W2 [M,M] -> log abs det(I + W1 W2), the same in all [B,h,w]."""
        value = _log_abs_det(product)
        return value.expand(hidden.shape[0], *hidden.shape[-2:])


class Tanh:
    """s(x) = tanh x: one determinant per cell and image; bounds what fusion can add, slower."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden values in -1..1."""
        return torch.tanh(hidden)

    def log_det(self, hidden: Tensor, product: Tensor) -> Tensor:
        """Hidden [B,M,h,w], product W1 W2 [M,M] -> log abs det(I + diag(s') W1 W2), [B,h,w]."""
        slopes = (1 - torch.tanh(hidden) ** 2).movedim(1, -1)
        values = [_log_abs_det(slope[:, None] * product) for slope in slopes.flatten(0, -2)]
        return torch.stack(values).reshape(slopes.shape[:-1])


def _log_abs_det(update: Tensor) -> Tensor:
    """Log abs det(I + update) of one matrix [M,M].

    Never batched: batched LU of matrices above about 150 x 150 can be silently wrong (pytorch#142815).
    """
    identity = torch.eye(update.shape[0], dtype=update.dtype, device=update.device)
    return torch.linalg.slogdet(identity + update).logabsdet


ACTIVATIONS: dict[str, type[Linear] | type[Tanh]] = {"linear": Linear, "tanh": Tanh}


class MultiScaleFusion(nn.Module):
    """MFF: pool to the coarsest grid, 1x1 convolutions 960 -> 240 -> 960, upsample, add to every scale.

    Paper, Eq. 9 and Table 2. y = u + U(W2 s(W1 P u + b1) + b2), with P = `cell_mean`, U = `upsample` and s
    the `activation` ("linear" or "tanh"). P U = I, so by Sylvester's identity the log-determinant is exact
    and small: log abs det(I + diag(s') W1 W2), 240 x 240, per cell. W1 is drawn from `seed`, the rest is 0.

    Deviation: Table 2's pooling (kernel 3, strides 8/4/2) does not give the sizes it prints, and the text's
    3x3 convolutions have no tractable determinant; ours are cell means and Table 2's 1x1. The paper's loss
    leaves this determinant out, which rewards collapse.

    Raises:
        ConfigError: `activation` is unknown.
    """

    def __init__(
        self, channels: Sequence[int] = CHANNELS, *, seed: int = 0, activation: str = "linear"
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation {activation!r} is unknown{nearest(activation, list(ACTIVATIONS))}")
        total = sum(channels)
        middle = max(1, total // 4)
        self.channels = tuple(channels)
        self.activation = ACTIVATIONS[activation]()
        with seeded(seed):
            self.reduce = nn.Conv2d(total, middle, 1)
            self.expand = nn.Conv2d(middle, total, 1)
        nn.init.zeros_(self.reduce.get_parameter("bias"))
        _zero(self.expand)

    def forward(self, us: tuple[Tensor, ...]) -> Fused:
        """(u1..u4) -> (ys, log_det [B,h_4,w_4])."""
        hidden = self.reduce(_gather(us))
        added = self.expand(self.activation(hidden)).split(self.channels, dim=1)
        ys = tuple(u + upsample(part, grid(u)) for u, part in zip(us, added, strict=True))
        product = self.reduce.weight.flatten(1) @ self.expand.weight.flatten(1)
        return ys, self.activation.log_det(hidden, product)


def tanh_bound(raw: Tensor, clamp: float) -> Tensor:
    """Log-scale within -clamp .. clamp: clamp tanh(raw)."""
    return clamp * torch.tanh(raw)


def atan_bound(raw: Tensor, clamp: float) -> Tensor:
    """Log-scale within about -clamp .. clamp, of slope 0.636 at 0: 0.636 clamp atan(raw / clamp) (FrEIA)."""
    return 0.636 * clamp * torch.atan(raw / clamp)


class CouplingFusion(nn.Module):
    """An exact alternative: each half of the channels is scaled and shifted by what the other half says.

    Two networks, each pool, convolution, LayerNorm (over channels and cells), ReLU, convolution, bilinear
    upsampling; the first sees the first halves of all scales and changes the second halves, the second the
    reverse. `kernel` 3 is what the paper's text says of MFF. Weights are drawn from `seed`, the last
    convolutions are zero. `net` builds other networks from the channels of the passive and of the active
    halves; they take the passive halves of all scales and return raw log-scale and shift of the active ones,
    [B,2*C_k,h_k,w_k] each. `bound` keeps the log-scales within `clamp`.

    Source: affine coupling, Dinh et al., ICLR 2017. Deviation: the paper fuses all channels at once, which
    is not invertible with these convolutions.

    Raises:
        ConfigError: a scale has fewer than two channels.
    """

    def __init__(
        self,
        channels: Sequence[int] = CHANNELS,
        *,
        seed: int = 0,
        kernel: int = 3,
        clamp: float = 1.9,
        net: CouplingNet | None = None,
        bound: Bound = tanh_bound,
    ) -> None:
        super().__init__()
        if min(channels) < 2:
            raise ConfigError(f"coupling fusion of {tuple(channels)} channels: every scale needs 2 or more")
        self.first = tuple(count // 2 for count in channels)
        self.second = tuple(count - count // 2 for count in channels)
        self.clamp = clamp
        self.bound = bound
        build = partial(_CouplingNet, kernel=kernel) if net is None else net
        with seeded(seed):
            self.from_first = build(self.first, self.second)
            self.from_second = build(self.second, self.first)

    def forward(self, us: tuple[Tensor, ...]) -> Fused:
        """(u1..u4) -> (ys, log_det [B,h_4,w_4])."""
        first, second = self._halves(us)
        second, log_det_second = self._couple(second, self.from_first(first))
        first, log_det_first = self._couple(first, self.from_second(second))
        return _join(first, second), log_det_first + log_det_second

    def inverse(self, ys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The latents that `forward` maps to `ys`."""
        first, second = self._halves(ys)
        first = self._uncouple(first, self.from_second(second))
        second = self._uncouple(second, self.from_first(first))
        return _join(first, second)

    def _halves(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        sizes = zip(self.first, self.second, strict=True)
        parts = [m.split(size, dim=1) for m, size in zip(maps, sizes, strict=True)]
        return [a for a, _ in parts], [b for _, b in parts]

    def _log_scale(self, raw: Tensor) -> Tensor:
        return self.bound(raw, self.clamp)

    def _couple(self, active: list[Tensor], coefficients: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        size = grid(active[-1])
        out, log_det = [], active[-1].new_zeros((active[-1].shape[0], *size))
        for values, both in zip(active, coefficients, strict=True):
            raw, shift = both.chunk(2, dim=1)
            log_scale = self._log_scale(raw)
            out.append(torch.exp(log_scale) * values + shift)
            log_det = log_det + cell_sum(log_scale.sum(dim=1), size)
        return out, log_det

    def _uncouple(self, active: list[Tensor], coefficients: list[Tensor]) -> list[Tensor]:
        pairs = ((values, both.chunk(2, dim=1)) for values, both in zip(active, coefficients, strict=True))
        return [(values - shift) * torch.exp(-self._log_scale(raw)) for values, (raw, shift) in pairs]


class _CouplingNet(nn.Module):
    """Passive halves of all scales -> raw log-scale and shift for the active halves, [B,2*C_k,h_k,w_k]."""

    def __init__(self, passive: Sequence[int], active: Sequence[int], kernel: int) -> None:
        super().__init__()
        middle = max(1, sum(passive) // 4)
        self.outputs = [2 * count for count in active]
        self.reduce = nn.Conv2d(sum(passive), middle, kernel, padding=kernel // 2)
        self.norm = nn.GroupNorm(1, middle)
        self.expand = nn.Conv2d(middle, sum(self.outputs), kernel, padding=kernel // 2)
        _zero(self.expand)

    def forward(self, passive: list[Tensor]) -> list[Tensor]:
        hidden = torch.relu(self.norm(self.reduce(_gather(passive))))
        parts = self.expand(hidden).split(self.outputs, dim=1)
        return [
            F.interpolate(part, size=grid(maps), mode="bilinear", align_corners=True)
            for part, maps in zip(parts, passive, strict=True)
        ]


class ResidualFusion(nn.Module):
    """The paper's text to the letter: as `MultiScaleFusion`, with 3x3 convolutions and log_det = 0.

    Warning: the objective is ill-posed. This map is not volume-preserving, so what comes out is no
    likelihood: the flows inflate what the fusion then cancels, without bound. For comparison only.
    """

    def __init__(self, channels: Sequence[int] = CHANNELS, *, seed: int = 0) -> None:
        super().__init__()
        total = sum(channels)
        middle = max(1, total // 4)
        self.channels = tuple(channels)
        with seeded(seed):
            self.reduce = nn.Conv2d(total, middle, 3, padding=1)
            self.expand = nn.Conv2d(middle, total, 3, padding=1)
        _zero(self.expand)

    def forward(self, us: tuple[Tensor, ...]) -> Fused:
        """(u1..u4) -> (ys, zeros [B,h_4,w_4])."""
        added = self.expand(self.reduce(_gather(us))).split(self.channels, dim=1)
        ys = tuple(u + upsample(part, grid(u)) for u, part in zip(us, added, strict=True))
        return ys, _no_log_det(us)


class NoFusion(nn.Module):
    """Null object of the slot: ys = us, log_det = 0; the arguments are taken for the same call, not used."""

    def __init__(self, channels: Sequence[int] = CHANNELS, *, seed: int = 0) -> None:
        super().__init__()

    def forward(self, us: tuple[Tensor, ...]) -> Fused:
        """(u1..u4) -> (us, zeros [B,h_4,w_4])."""
        return us, _no_log_det(us)


FUSIONS: dict[str, Callable[..., nn.Module]] = {
    "mff": MultiScaleFusion,
    "mff-tanh": partial(MultiScaleFusion, activation="tanh"),
    "coupling": CouplingFusion,
    "residual": ResidualFusion,
    "none": NoFusion,
}


def _no_log_det(us: tuple[Tensor, ...]) -> Tensor:
    return us[-1].new_zeros((us[-1].shape[0], *grid(us[-1])))


def _join(first: list[Tensor], second: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(pair, dim=1) for pair in zip(first, second, strict=True))


def _zero(convolution: nn.Conv2d) -> None:
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.get_parameter("bias"))
