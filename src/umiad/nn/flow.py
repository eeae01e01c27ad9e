"""The conditional flow of one scale, and the position encoding that conditions it."""

from __future__ import annotations

import torch
from FrEIA.modules import GLOWCouplingBlock, PermuteRandom
from torch import Tensor, nn

from umiad.errors import ConfigError
from umiad.nn.encoder import seeded


def position_encoding(channels: int, h: int, w: int) -> Tensor:
    """Sinusoidal code of every cell of an h x w grid: float32 [channels,h,w] in -1..1.

    The first half of the channels encodes the column, the second the row; even channels are sines, odd
    ones cosines, at frequencies 10000^(-2i / (channels / 2)), i = 0 .. channels / 4 - 1.
    Source: Vaswani et al., 2017, in two dimensions as in CFLOW-AD (Gudovskiy et al., WACV 2022).

    Raises:
        ConfigError: `channels` is not a positive multiple of 4.
    """
    if channels <= 0 or channels % 4:
        raise ConfigError(
            f"position encoding of {channels} channels: expected a positive multiple of 4, "
            f"such as {max(4, round(channels / 4) * 4)}"
        )
    steps = torch.arange(channels // 4, dtype=torch.float64)
    frequencies = 10000.0 ** (-4 * steps / channels)
    column = _waves(w, frequencies)[:, None, :].expand(-1, h, -1)
    row = _waves(h, frequencies)[:, :, None].expand(-1, -1, w)
    return torch.cat([column, row]).to(torch.float32)


def _waves(length: int, frequencies: Tensor) -> Tensor:
    """[2F,length] for F frequencies: sine and cosine of each, alternating."""
    angles = frequencies[:, None] * torch.arange(length, dtype=torch.float64)
    return torch.stack([angles.sin(), angles.cos()], dim=1).flatten(0, 1)


class LocalCoupling(GLOWCouplingBlock):
    """FrEIA's GLOW coupling whose log-determinant is kept per position: [B,h,w] instead of [B].

    Both halves are scaled elementwise, so the log-determinant is a sum over channels and positions; this
    block sums over the channels only.
    """

    def _coupling1(self, x1: Tensor, u2: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        return self._affine(x1, self.subnet2(u2), inverse=rev)

    def _coupling2(self, x2: Tensor, u1: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        return self._affine(x2, self.subnet1(u1), inverse=rev)

    def _affine(self, active: Tensor, coefficients: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        raw_scale, shift = coefficients.chunk(2, dim=1)
        log_scale: Tensor = self.clamp * self.f_clamp(raw_scale)
        log_det = log_scale.sum(dim=1)
        if inverse:
            return (active - shift) * torch.exp(-log_scale), -log_det
        return torch.exp(log_scale) * active + shift, log_det


class ConditionalFlow(nn.Module):
    """An invertible map of features z [B,C,h,w] to latents u [B,C,h,w], given a condition c [B,P,h,w].

    `blocks` affine couplings, each followed by a fixed random permutation of the channels; every subnet is
    conv - ReLU - conv with `hidden` channels (C / 8 unless given). At the start the last convolutions are
    zero, so u is z up to a permutation. `clamp` bounds each log-scale to about -clamp .. clamp. Weights and
    permutations are drawn from `seed`. Works at every h, w; keep it in float32 or float64.

    Source: paper, Eq. 10-11 and "two sets of double 3x3 convolutions"; FrEIA 0.2.
    Deviation: Eq. 11 writes the decoder from latent to data; ours runs from data to latent, as it is used.
    """

    def __init__(
        self,
        channels: int,
        *,
        condition_channels: int = 64,
        blocks: int = 8,
        clamp: float = 1.9,
        hidden: int | None = None,
        kernel: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        width = max(1, channels // 8) if hidden is None else hidden

        def subnet(inputs: int, outputs: int) -> nn.Sequential:
            last = nn.Conv2d(width, outputs, kernel, padding=kernel // 2)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.get_parameter("bias"))
            return nn.Sequential(nn.Conv2d(inputs, width, kernel, padding=kernel // 2), nn.ReLU(), last)

        shape, condition = (channels, 1, 1), (condition_channels, 1, 1)  # FrEIA: any h, w if declared 1 x 1
        with seeded(seed):
            self.couplings = nn.ModuleList(
                LocalCoupling(
                    [shape], [condition], subnet_constructor=subnet, clamp=clamp, clamp_activation="ATAN"
                )
                for _ in range(blocks)
            )
            self.permutations = nn.ModuleList(
                PermuteRandom([shape], seed=(seed * blocks + index) % 2**32) for index in range(blocks)
            )

    def forward(self, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Map z [B,C,h,w], c [B,P,h,w] -> (u [B,C,h,w], log_det [B,h,w]).

        `log_det` is the natural log of abs(det du/dz), shared out over the positions; the sum is the image's.
        """
        log_det = z.new_zeros((z.shape[0], *z.shape[-2:]))
        for coupling, permutation in zip(self.couplings, self.permutations, strict=True):
            (z,), part = coupling((z,), c=(c,))
            (z,), _ = permutation((z,))
            log_det = log_det + part
        return z, log_det

    def inverse(self, u: Tensor, c: Tensor) -> Tensor:
        """The z [B,C,h,w] that `forward` maps to u [B,C,h,w] under the same condition c [B,P,h,w]."""
        for coupling, permutation in zip(reversed(self.couplings), reversed(self.permutations), strict=True):
            (u,), _ = permutation((u,), rev=True)
            (u,), _ = coupling((u,), c=(c,), rev=True)
        return u
