"""The battery that every detector passes; public, so that detectors written elsewhere can use it too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from umiad.detectors.contract import CollectingDetector, Detector
from umiad.errors import InputError, NotFittedError

Make: TypeAlias = Callable[[int], Detector]
"""Builds an unfitted detector from a seed, at the size the battery is run with."""


class CheckError(AssertionError):
    """A detector broke the contract; the message names the check and what was found."""


def check_detector(make: Make, *, size: int = 64) -> list[str]:
    """Run every check on `make(seed)`; returns the names of the checks that ran. Raises CheckError."""
    ran = []
    for name, check in CHECKS.items():
        try:
            check(make, size)
        except CheckError as error:
            raise CheckError(f"{name}: {error}") from error
        ran.append(name)
    return ran


def clean_images(count: int, *, size: int, seed: int = 0) -> Tensor:
    """Smooth random images [B,3,size,size], alike enough to have an anomaly among them."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 8, 8, generator=rng)
    grey = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
    return (
        (0.3 * grey + 0.05 * torch.randn(count, 1, size, size, generator=rng))
        .expand(-1, 3, -1, -1)
        .contiguous()
    )


def with_blob(images: Tensor, *, value: float = 1.0) -> Tensor:
    """The images with a bright checkered square in the middle: what anyone would call abnormal."""
    marked, edge = images.clone(), images.shape[-1]
    low, high = edge // 2 - edge // 8, edge // 2 + edge // 8
    board = torch.arange(low, high)
    marked[:, :, low:high, low:high] = value * ((board[:, None] // 2 + board) % 2).float()
    return marked


def fit_quickly(detector: Detector, images: Tensor, *, steps: int = 12) -> Detector:
    """Fit without the training layer: a few plain gradient steps, or collect and finish."""
    rng = torch.Generator().manual_seed(0)
    prepared = detector.prepare(images)
    if detector.info.closed_form:
        if not isinstance(detector, CollectingDetector):
            raise CheckError("info.closed_form is set, but collect and finish are missing")
        detector.collect(prepared)
        detector.finish(rng)
        return detector
    optimizer = torch.optim.Adam(detector.param_groups(), lr=1e-3)
    detector.module.train()
    for _ in range(steps):
        for losses in detector.steps(prepared, rng):
            optimizer.zero_grad()
            losses["total"].backward()
            optimizer.step()
    return detector


def _fitted(make: Make, size: int, *, seed: int = 0) -> Detector:
    return fit_quickly(make(seed), clean_images(8, size=size))


def _expect(condition: object, message: str) -> None:
    if not condition:
        raise CheckError(message)


def _same(first: Tensor, second: Tensor, *, tolerance: float = 1e-5) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=tolerance, atol=tolerance)


def _check_shapes(make: Make, size: int) -> None:
    scores = _fitted(make, size).score(clean_images(3, size=size, seed=1))
    _expect(scores.anomaly_map.shape == (3, size, size), f"map of shape {tuple(scores.anomaly_map.shape)}")
    _expect(scores.image_score.shape == (3,), f"image scores of shape {tuple(scores.image_score.shape)}")
    for values in (scores.anomaly_map, scores.image_score):
        _expect(values.dtype == torch.float32, f"dtype {values.dtype}, expected float32")
        _expect(torch.isfinite(values).all(), "values that are not finite")


def _check_not_fitted(make: Make, size: int) -> None:
    detector = make(0)
    for call in (detector.score, lambda images: detector.score_prepared(detector.prepare(images))):
        try:
            call(clean_images(1, size=size))
        except NotFittedError:
            continue
        raise CheckError("scores before fitting, expected NotFittedError")


def _check_wrong_input(make: Make, size: int) -> None:
    detector = _fitted(make, size)
    for shape in ((1, 1, size, size), (1, 3, size + 32, size), (3, size, size), (0, 3, size, size)):
        try:
            detector.score(torch.zeros(shape))
        except InputError as error:
            _expect(str(size) in str(error), f"the message {error} does not name the expected size")
        else:
            raise CheckError(f"accepts images of shape {shape}, expected InputError")


def _check_leaves_alone(make: Make, size: int) -> None:
    detector = _fitted(make, size)
    images = clean_images(2, size=size, seed=2)
    before, state, random = images.clone(), _copied(detector), torch.get_rng_state()
    detector.module.train()
    modes = [part.training for part in detector.module.modules()]
    detector.score(images)
    _expect(torch.equal(images, before), "score changes its input")
    _expect(torch.equal(torch.get_rng_state(), random), "score changes the global random state")
    _expect([p.training for p in detector.module.modules()] == modes, "score changes train/eval modes")
    now = detector.state()
    _expect(all(torch.equal(now[key], value) for key, value in state.items()), "score changes the state")


def _check_seeds(make: Make, size: int) -> None:
    images = clean_images(2, size=size, seed=3)
    first, again, other = (_fitted(make, size, seed=seed).score(images) for seed in (0, 0, 1))
    if make(0).info.deterministic:
        _expect(torch.equal(first.anomaly_map, again.anomaly_map), "the same seed gives other scores")
    _expect(not torch.equal(first.anomaly_map, other.anomaly_map), "another seed gives the same scores")


def _check_batches(make: Make, size: int) -> None:
    detector = _fitted(make, size)
    images = clean_images(5, size=size, seed=4)
    whole = detector.score(images)
    parts = [detector.score(images[k : k + 2]) for k in (0, 2, 4)]
    for name in ("anomaly_map", "image_score"):
        split = torch.cat([getattr(part, name) for part in parts])
        _expect(_same(getattr(whole, name), split), f"{name} depends on the batch split")
    order = torch.tensor([3, 0, 4, 1, 2])
    mixed = detector.score(images[order])
    _expect(_same(mixed.image_score, whole.image_score[order]), "scores depend on the order of images")


def _check_prepared(make: Make, size: int) -> None:
    detector = _fitted(make, size)
    images = clean_images(3, size=size, seed=5)
    prepared = detector.prepare(images)
    _expect(all(len(values) == 3 for values in prepared.values()), "prepared tensors lack the batch axis")
    _expect(not any(v.requires_grad for v in prepared.values()), "prepared tensors carry gradients")
    cached = detector.score_prepared(prepared)
    _expect(
        _same(detector.score(images).anomaly_map, cached.anomaly_map), "score differs from score_prepared"
    )


def _check_round_trip(make: Make, size: int) -> None:
    detector, images = _fitted(make, size), clean_images(2, size=size, seed=6)
    fresh = type(detector)(type(detector.config).parse(detector.config.canonical()), None)  # type: ignore[call-arg]
    _expect(fresh.config == detector.config, "the configuration changes through plain values")
    fresh.load_state(_copied(detector))
    kept = fresh.state()
    _expect(all(torch.equal(kept[k], v) for k, v in detector.state().items()), "the state is not bit-equal")
    scores = fresh.score(images).anomaly_map
    _expect(torch.equal(scores, detector.score(images).anomaly_map), "a reloaded detector scores differently")
    twin = copy.deepcopy(detector).score(images).anomaly_map
    _expect(torch.equal(scores, twin), "a deep copy scores differently")


def _check_gradients(make: Make, size: int) -> None:
    detector = make(0)
    if detector.info.closed_form:
        return
    fit_quickly(detector, clean_images(4, size=size), steps=2)
    wanted = {id(p) for group in detector.param_groups() for p in group["params"]}
    for name, parameter in detector.module.named_parameters():
        _expect(
            (id(parameter) in wanted) == parameter.requires_grad, f"{name} is trainable but not optimised"
        )
        if parameter.requires_grad:
            _expect(parameter.grad is not None, f"{name} gets no gradient")
        else:
            _expect(parameter.grad is None, f"{name} is frozen but gets a gradient")


def _check_frozen(make: Make, size: int) -> None:
    detector = make(0)
    before = {k: v.clone() for k, v in detector.parts()["encoder"].state_dict().items()}
    fit_quickly(detector, clean_images(4, size=size), steps=2)
    after = detector.parts()["encoder"].state_dict()
    _expect(all(torch.equal(after[k], v) for k, v in before.items()), "fitting changes the frozen encoder")


def _check_blob(make: Make, size: int) -> None:
    detector = make(0)
    if not detector.info.uses_pixels:
        return
    fit_quickly(detector, clean_images(16, size=size), steps=100)
    normal = clean_images(4, size=size, seed=7)
    clean, marked = detector.score(normal), detector.score(with_blob(normal))
    _expect(
        marked.image_score.min() > clean.image_score.max(), "a planted blob does not rank above clean images"
    )
    if detector.info.localises:
        middle = slice(size // 2 - size // 8, size // 2 + size // 8)
        inside = marked.anomaly_map[:, middle, middle].mean()
        _expect(inside > marked.anomaly_map.mean(), "the map is not higher at the planted blob")


def _copied(detector: Detector) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in detector.state().items()}


CHECKS: dict[str, Callable[[Make, int], None]] = {
    "shapes": _check_shapes,
    "not_fitted": _check_not_fitted,
    "wrong_input": _check_wrong_input,
    "leaves_alone": _check_leaves_alone,
    "seeds": _check_seeds,
    "batches": _check_batches,
    "prepared": _check_prepared,
    "round_trip": _check_round_trip,
    "gradients": _check_gradients,
    "frozen": _check_frozen,
    "blob": _check_blob,
}
