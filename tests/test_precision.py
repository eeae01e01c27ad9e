import torch

from umiad.nn.precision import exact


class OnMps:
    """Stands for a tensor on a device without float64, where `double` would raise."""

    device = torch.device("mps")

    def cpu(self):
        return torch.ones(2, dtype=torch.float32)


def test_values_become_float64_and_leave_a_device_that_has_none():
    assert exact(torch.ones(2)).dtype == torch.float64
    moved = exact(OnMps())
    assert (moved.dtype, moved.device.type) == (torch.float64, "cpu")
