"""Checks of what a fitted detector says: shapes, independence of the batch, and whether it is right at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from umiad.detectors.battery.candidate import Candidate, CheckError, Exempt, expect, same
from umiad.detectors.battery.images import blob_window, with_blob
from umiad.detectors.contract import Detector
from umiad.errors import InputError, NotFittedError
from umiad.scoring import common
from umiad.types import Scores

EFFORTS = ((8, 12), (16, 40), (16, 100))
"""Images and steps after which a planted blob must be found; the first that suffices ends the check."""


def shapes(candidate: Candidate) -> None:
    """Scores are finite float32: a map [B,S,S] and an image score [B]."""
    size, scores = candidate.size, candidate.fitted().score(candidate.images(3, seed=1))
    _check_scores(scores, count=3, size=size)


def not_fitted(candidate: Candidate) -> None:
    """Scoring before fitting raises NotFittedError."""
    detector, images = candidate.new(), candidate.images(1, seed=1)
    for call in (detector.score, lambda images: detector.score_prepared(detector.prepare(images))):
        try:
            call(images)
        except NotFittedError:
            continue
        raise CheckError("scores before fitting, expected NotFittedError")


def wrong_input(candidate: Candidate) -> None:
    """Images of another shape raise InputError, whose message names the found and the expected shape."""
    detector, size = candidate.fitted(), candidate.size
    wrong = (
        (1, 1, size, size),
        (1, 5, size, size),
        (1, 3, size + 32, size),
        (3, size, size),
        (0, 3, size, size),
    )
    for shape in wrong:
        for call in (detector.score, detector.prepare):
            try:
                call(torch.zeros(shape))
            except InputError as error:
                named = all(str(number) in str(error) for number in (*shape, 3, size))
                expect(named, f"shape {shape}: the message {str(error)!r} does not name both shapes")
            else:
                raise CheckError(f"accepts images of shape {shape}, expected InputError")


def prepared(candidate: Candidate) -> None:
    """`score(images)` equals `score_prepared(prepare(images))`, and prepared tensors can be cached by row."""
    detector, images = candidate.fitted(), candidate.images(3, seed=5)
    rows = detector.prepare(images)
    expect(all(len(values) == 3 for values in rows.values()), "prepared tensors lack the batch axis")
    expect(not any(v.requires_grad for v in rows.values()), "prepared tensors carry gradients")
    _check_same(detector.score(images), detector.score_prepared(rows), "score differs from score_prepared")


def batches(candidate: Candidate) -> None:
    """Scores of an image do not depend on the others of its batch, their number or their order."""
    detector, images = candidate.fitted(), candidate.images(5, seed=4)
    whole = detector.score(images)
    for starts in ((0, 2, 4, 5), (0, 1, 2, 3, 4, 5)):
        parts = [detector.score(images[a:b]) for a, b in itertools.pairwise(starts)]
        joined = Scores(
            torch.cat([part.anomaly_map for part in parts]), torch.cat([part.image_score for part in parts])
        )
        _check_same(whole, joined, f"scores depend on the batch split (parts of at most {starts[1]})")
    order = torch.tensor([3, 0, 4, 1, 2])
    ordered = Scores(whole.anomaly_map[order], whole.image_score[order])
    _check_same(ordered, detector.score(images[order]), "scores depend on the order of images")


def sizes(candidate: Candidate) -> None:
    """`original_size` changes a score where `info.uses_size` says so, cached or not, and nowhere else."""
    detector, images = candidate.fitted(), candidate.images(2, seed=8)
    usual = torch.full((2, 2), candidate.size)
    other = torch.tensor([[300, 1000], [90, 700]])
    scored = detector.score(images, original_size=other)
    cached = detector.score_prepared(detector.prepare(images, original_size=other))
    _check_same(scored, cached, "with original_size, score differs from score_prepared")
    unlike = not torch.equal(detector.score(images, original_size=usual).image_score, scored.image_score)
    if candidate.info.uses_size:
        expect(unlike, "info.uses_size is set, but original_size changes no score")
    else:
        expect(not unlike, "original_size changes the scores, but info.uses_size is not set")
        bare = detector.score(images)
        expect(torch.equal(bare.image_score, scored.image_score), "scores differ without original_size")


def post_processing(candidate: Candidate) -> None:
    """`umiad.scoring.common` works on the scores, and `config.sigma` is the smoothing of the map."""
    detector, images = candidate.fitted(), candidate.images(3, seed=1)
    try:
        sigma = float(detector.config.sigma)
        found = common(detector.score(images), smoothed=sigma)
    except Exception as error:
        raise CheckError(f"the common post-processing fails: {type(error).__name__}: {error}") from error
    _check_scores(found, count=3, size=candidate.size)
    if candidate.info.localises:
        changed = candidate.with_settings(sigma=0.0 if sigma else 4.0)
        changed.load_state(detector.state())
        alike = torch.equal(changed.score(images).anomaly_map, detector.score(images).anomaly_map)
        expect(not alike, "another config.sigma gives the same map")


def blob(candidate: Candidate) -> None:
    """Images with a planted blob score above all clean ones (exempt: `uses_pixels` False)."""
    if not candidate.info.uses_pixels:
        raise Exempt("info.uses_pixels is False")
    for detector in _ever_better(candidate):
        clean, marked = _clean_and_marked(candidate, detector)
        if marked.image_score.min() > clean.image_score.max():
            return
    raise CheckError("a planted blob does not rank above clean images")


def localises(candidate: Candidate) -> None:
    """The map is higher at a planted blob; where `info.localises` is False, it is constant in each image."""
    if not candidate.info.localises:
        flat = candidate.fitted().score(candidate.images(2, seed=7)).anomaly_map.flatten(1)
        expect(
            torch.equal(flat.amin(1), flat.amax(1)), "info.localises is False, but the map is not constant"
        )
        return
    window = blob_window(candidate.size)
    for detector in _ever_better(candidate):
        _, marked = _clean_and_marked(candidate, detector)
        if marked.anomaly_map[:, window, window].mean() > marked.anomaly_map.mean():
            return
    raise CheckError("the map is not higher at the planted blob")


def _ever_better(candidate: Candidate) -> Iterator[Detector]:
    """Detectors fitted with ever more effort, none before it is asked for; a closed form has one."""
    for images, steps in EFFORTS[:1] if candidate.info.closed_form else EFFORTS:
        yield candidate.fitted(images=images, steps=steps)


def _clean_and_marked(candidate: Candidate, detector: Detector) -> tuple[Scores, Scores]:
    normal = candidate.images(4, seed=7)
    return detector.score(normal), detector.score(with_blob(normal))


def _check_scores(scores: Scores, *, count: int, size: int) -> None:
    wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "map": (scores.anomaly_map, (count, size, size)),
        "image scores": (scores.image_score, (count,)),
    }
    for name, (values, shape) in wanted.items():
        expect(values.shape == shape, f"{name} of shape {tuple(values.shape)}, expected {shape}")
        expect(values.dtype == torch.float32, f"{name} of dtype {values.dtype}, expected float32")
        expect(torch.isfinite(values).all(), f"{name} with values that are not finite")


def _check_same(first: Scores, second: Scores, message: str) -> None:
    for name in ("image_score", "anomaly_map"):
        expect(same(getattr(first, name), getattr(second, name)), f"{message}: {name}")
