"""Checks of the fit: what it may depend on, and what it must reach."""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor

from umiad.detectors.battery.candidate import (
    BRIEF_STEPS,
    FIT_IMAGES,
    Candidate,
    Exempt,
    copied,
    equal,
    expect,
    fit_prepared,
    fit_quickly,
    same,
    world,
)
from umiad.detectors.contract import CollectingDetector

PARAMETERS = {
    "prepare": {"images", "original_size"},
    "steps": {"prepared", "rng"},
    "collect": {"prepared"},
    "finish": {"rng"},
}
"""What the calls of a fit may be given: no mask, no label, no path."""


def global_random(candidate: Candidate) -> None:
    """Building and fitting neither read nor change the global random states of torch, numpy and Python."""
    first, second = (candidate.brief(seed=0, global_seed=number) for number in (0, 1))
    disturbed = sorted(candidate.disturbed)
    expect(not disturbed, f"building or fitting changes the global random state of {', '.join(disturbed)}")
    if candidate.info.deterministic:
        expect(equal(first.state(), second.state()), "the fitted state depends on a global random state")


def seeds(candidate: Candidate) -> None:
    """The same seed gives the same scores, another seed others (the same where `uses_seed` is False)."""
    images = candidate.images(2, seed=3)
    fits = [candidate.brief(seed=seed, global_seed=number) for seed, number in ((0, 0), (0, 1), (1, 0))]
    first, again, other = (detector.score(images) for detector in fits)
    if candidate.info.deterministic:
        alike = torch.equal(first.anomaly_map, again.anomaly_map)
        expect(
            alike and torch.equal(first.image_score, again.image_score), "the same seed gives other scores"
        )
    alike = torch.equal(first.anomaly_map, other.anomaly_map)
    if candidate.info.uses_seed:
        expect(not alike, "another seed gives the same scores")
    else:
        expect(alike, "another seed gives other scores, but info.uses_seed is False")


def losses(candidate: Candidate) -> None:
    """`steps` yields finite scalars with a "total" to minimise, and leaves what was prepared as it was."""
    _needs_gradients(candidate)
    detector = candidate.new()
    rows = detector.prepare(candidate.images(4, seed=0))
    before = copied(rows)
    detector.module.train()
    found = list(detector.steps(rows, candidate.rng()))
    expect(found, "steps yields nothing")
    for each in found:
        expect("total" in each, f'steps yields {sorted(each)} without "total"')
        expect(each["total"].requires_grad, 'the loss "total" has no gradient')
        for name, value in each.items():
            expect(value.ndim == 0 and torch.isfinite(value), f"the loss {name!r} is no finite scalar")
    expect(equal(rows, before), "steps changes what was prepared")


def gradients(candidate: Candidate) -> None:
    """Every trainable parameter is optimised and gets a gradient, no frozen one does."""
    _needs_gradients(candidate)
    detector = candidate.new()
    named = dict(detector.module.named_parameters())
    names = {id(parameter): name for name, parameter in named.items()}
    groups = [p for group in detector.param_groups() for p in group["params"]]
    expect(all(id(p) in names for p in groups), "param_groups holds parameters that are not in the module")
    optimised = {names[id(p)] for p in groups}
    reached: set[str] = set()
    for parameter in named.values():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: reached.add(names[id(p)]))
    fit_quickly(detector, candidate.images(4, seed=0), steps=BRIEF_STEPS)
    for name, parameter in named.items():
        if parameter.requires_grad:
            expect(name in optimised, f"{name} is trainable but not optimised")
            expect(name in reached, f"{name} gets no gradient")
        else:
            expect(name not in optimised, f"{name} is frozen but optimised")
            expect(parameter.grad is None, f"{name} is frozen but gets a gradient")


def frozen(candidate: Candidate) -> None:
    """The part called "encoder" is frozen, and fitting leaves it bit-equal (exempt: no such part)."""
    detector = candidate.new()
    if "encoder" not in detector.parts():
        raise Exempt('parts() has no "encoder"')
    encoder = detector.parts()["encoder"]
    trainable = [name for name, p in encoder.named_parameters() if p.requires_grad]
    expect(not trainable, f"the encoder is trainable: {', '.join(trainable[:3])}")
    after = candidate.fitted().parts()["encoder"].state_dict()
    expect(equal(encoder.state_dict(), after), "fitting changes the frozen encoder")


def odd_batches(candidate: Candidate) -> None:
    """A last batch of one image can be fitted; a closed form does not depend on how images are batched."""
    detector, rng = candidate.new(), candidate.rng()
    rows = detector.prepare(candidate.images(FIT_IMAGES, seed=0))
    parts = [{k: v[a:b] for k, v in rows.items()} for a, b in ((0, 4), (4, 7), (7, 8))]
    detector.module.train()
    if not candidate.info.closed_form:
        for each in detector.steps(parts[-1], rng):
            expect(torch.isfinite(each["total"]), "the loss of a batch of one image is not finite")
    if isinstance(detector, CollectingDetector):
        for part in parts:
            detector.collect(part)
        detector.finish(torch.Generator().manual_seed(detector.config.seed))
    if candidate.info.closed_form:
        images = candidate.images(2, seed=3)
        whole, split = (each.score(images).image_score for each in (candidate.fitted(), detector))
        expect(same(whole, split, tolerance=1e-3), "the fit depends on how the images were batched")


def labels(candidate: Candidate) -> None:
    """No call of a fit takes a mask or a label, and none hidden among the prepared tensors changes it."""
    detector = candidate.new()
    for call, known in PARAMETERS.items():
        if hasattr(detector, call):
            extra = sorted(inspect.signature(getattr(detector, call)).parameters.keys() - known)
            expect(not extra, f"{call} accepts {', '.join(extra)}, which the contract does not know")
    expected = candidate.brief(seed=0, global_seed=0).state()
    with world(0):
        rows = detector.prepare(candidate.images(FIT_IMAGES, seed=0))
        fit_prepared(detector, {**rows, **_truth(candidate.size)}, steps=BRIEF_STEPS)
    if candidate.info.deterministic:
        expect(equal(expected, detector.state()), 'keys "mask" and "label" among the prepared change the fit')


def monitor(candidate: Candidate) -> None:
    """`monitor` gives finite numbers, also while fitting is under way."""
    under_way, rng = candidate.new(), candidate.rng()
    rows = under_way.prepare(candidate.images(3, seed=0))
    under_way.module.train()
    if candidate.info.closed_form and isinstance(under_way, CollectingDetector):
        under_way.collect(rows)
    for each in under_way.steps(rows, rng):
        each["total"].backward()
    for detector in (under_way, candidate.fitted()):
        for name, value in detector.monitor(rows).items():
            expect(isinstance(value, float) and math.isfinite(value), f"monitor: {name} is {value!r}")


def _needs_gradients(candidate: Candidate) -> None:
    if candidate.info.closed_form:
        raise Exempt("info.closed_form is True")


def _truth(size: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(5)
    return {
        "mask": torch.rand(FIT_IMAGES, size, size, generator=rng) > 0.5,
        "label": torch.arange(FIT_IMAGES) % 2,
    }
