"""Numbers that are not finite while a detector is fitted: found before they reach the weights, and named."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from umiad.errors import TrainingError

if TYPE_CHECKING:
    from umiad.detectors.contract import Detector

NAMED = 8
"""At most so many images are named in a message."""
ADVICE = "a smaller learning rate or clamp helps; the last saved state is kept"


class NonFiniteError(TrainingError):
    """A loss, gradient, feature or weight is NaN or infinite; nothing of that step is kept."""


def check_features(prepared: Mapping[str, Tensor], hashes: Sequence[str]) -> None:
    """Raise NonFiniteError naming the images (`hashes`, one per row) whose prepared features are not finite."""
    if bad := _bad_rows(prepared):
        rows = sorted({row for each in bad.values() for row in each})
        raise NonFiniteError(
            f"features {', '.join(bad)} not finite for {len(rows)} of {len(hashes)} images "
            f"(content hashes {named([hashes[row] for row in rows])}); look at these images"
        )


def finite_rows(prepared: Mapping[str, Tensor], count: int) -> list[int]:
    """Those of `count` rows whose prepared features are finite."""
    bad = {row for rows in _bad_rows(prepared).values() for row in rows}
    return [row for row in range(count) if row not in bad]


def _bad_rows(prepared: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Name of features -> rows in which some are not finite."""
    found: dict[str, list[int]] = {}
    for name, values in prepared.items():
        if values.is_floating_point() and not bool(values.isfinite().all()):
            found[name] = (~values.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    return found


def check_losses(losses: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError naming the losses of one step that are not finite."""
    if bad := [name for name, value in losses.items() if not bool(torch.isfinite(value).all())]:
        raise NonFiniteError(f"loss {', '.join(bad)} not finite")


def check_gradients(detector: Detector, norm: Tensor) -> None:
    """Raise NonFiniteError naming the parts with gradients that are not finite, if the total `norm` is not."""
    if bool(torch.isfinite(norm).all()):
        return
    bad = [
        name
        for name, part in detector.parts().items()
        if any(p.grad is not None and not bool(p.grad.isfinite().all()) for p in part.parameters())
    ]
    raise NonFiniteError(f"gradient not finite in {', '.join(bad) or 'the sum of all parts'}")


def check_tensors(tensors: Mapping[str, Tensor], *, what: str) -> None:
    """Raise NonFiniteError naming the first of `tensors` that is not finite; `what` says what they are."""
    for name, values in tensors.items():
        if values.is_floating_point() and not bool(values.isfinite().all()):
            count = int((~values.isfinite()).sum())
            raise NonFiniteError(f"{what} {name} has {count} values that are not finite; {ADVICE}")


def check_numbers(row: Mapping[str, float | int | None], *, what: str) -> None:
    """Raise NonFiniteError naming the numbers in `row` that are not finite."""
    if bad := [name for name, value in row.items() if value is not None and not math.isfinite(value)]:
        raise NonFiniteError(f"{what}: {', '.join(bad)} not finite; {ADVICE}")


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments, "exp_avg of parameter 3" -> tensor."""
    states: dict[int, dict[str, Any]] = optimiser.state_dict().get("state", {})
    return {
        f"{name} of parameter {number}": value
        for number, state in states.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def origin(detector: Detector, prepared: dict[str, Tensor], rng: torch.Generator) -> str | None:
    """The first part of the detector ("flow3": that of scale 3) that computes what is not finite, if any does.

    Runs the losses of the batch once more, without gradients; `rng` should start as it did before.
    """
    found: list[str] = []
    with _watching(detector, found), torch.no_grad():
        for losses in detector.steps(prepared, rng):
            if found or not bool(torch.isfinite(losses["total"])):
                break
    return found[0] if found else None


def named(hashes: Sequence[str]) -> str:
    """The first characters of the content hashes of images, those beyond the first few as dots."""
    return ", ".join(each[:12] for each in hashes[:NAMED]) + (", ..." if len(hashes) > NAMED else "")


@contextmanager
def _watching(detector: Detector, found: list[str]) -> Iterator[None]:
    """Inside, the name of each part is added to `found` when a module of it returns what is not finite."""

    def hook(part: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if any(not bool(t.isfinite().all()) for t in _tensors(output)):
                found.append(part)

        return look

    with ExitStack() as stack:
        for name, part in detector.parts().items():
            for module in part.modules():
                stack.callback(module.register_forward_hook(hook(name)).remove)
        yield


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
