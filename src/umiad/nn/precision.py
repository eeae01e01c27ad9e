"""Float64 wherever it is to be had."""

from __future__ import annotations

from torch import Tensor


def exact(values: Tensor) -> Tensor:
    """The values in float64; on the CPU where their device has no float64 (Apple's mps)."""
    return (values.cpu() if values.device.type == "mps" else values).double()
