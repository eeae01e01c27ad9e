"""Edges from SAM: the recipe on masks that are known, and the whole path with a tiny SAM of random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import umiad
from make import blob_image
from make_sam import sam_checkpoint
from umiad import sam
from umiad.detectors.check import CHECKS, Candidate, Exempt, fit_quickly
from umiad.errors import ConfigError, InputError, MissingExtraError, ModelFileError
from umiad.nn.edge import EDGES
from umiad.nn.sam import SamBoundaries, SamEdges, distinct, mask_boundaries, point_grid

SIZE = 64
BATTERY = (
    *(
        "contract",
        "kind",
        "not_fitted",
        "losses",
        "gradients",
        "wrong_input",
        "prepared",
        "batches",
        "frozen",
    ),
    *("leaves_alone", "no_files", "global_random", "seeds", "wrong_state", "monitor"),
)
"""Not here: checks that rebuild a detector from its configuration or save it (see `umiad.sam.NOT_SAVED`), slow ones,
and whether it localises, which a SAM of random weights does not."""


class Discs(nn.Module):
    """Stands for SAM where its masks must be known: every prompt yields a disc round the point, and nothing else."""

    def __init__(self, radius: float = 6.0, side: int = 32) -> None:
        super().__init__()
        self.config = SimpleNamespace(vision_config=SimpleNamespace(image_size=4 * side))
        self.radius, self.side = radius, side
        self.prompts = 0

    def get_image_embeddings(self, images: Tensor) -> Tensor:
        assert images.shape[-2:] == (4 * self.side, 4 * self.side)
        return images

    def forward(self, *, image_embeddings: Tensor, input_points: Tensor, multimask_output: bool) -> Any:
        assert multimask_output
        self.prompts += input_points.shape[1]
        rows, columns = torch.meshgrid(*[torch.arange(self.side) + 0.5] * 2, indexing="ij")
        masks = []
        for x, y in input_points[0, :, 0] / 4:
            distance = ((rows - y) ** 2 + (columns - x) ** 2).sqrt()
            masks.append((self.radius - distance) * 4)
        stack = torch.stack(masks)[None, :, None].expand(-1, -1, 3, -1, -1)
        return SimpleNamespace(pred_masks=stack, iou_scores=torch.ones(1, len(masks), 3))


def test_points_are_the_centres_of_equal_cells_with_x_first() -> None:
    points = point_grid(2, size=8)
    assert points.tolist() == [[2, 2], [6, 2], [2, 6], [6, 6]]


def test_of_masks_with_one_box_the_better_rated_stays_and_empty_ones_go() -> None:
    masks = torch.zeros(4, 16, 16, dtype=torch.bool)
    masks[0, 2:8, 2:8] = True
    masks[1, 2:8, 2:9] = True  # intersection over union 36 / 42
    masks[2, 10:14, 10:14] = True
    assert distinct(masks, torch.tensor([0.5, 0.9, 0.1, 1.0])).tolist() == [1, 2]
    assert distinct(masks[3:], torch.ones(1)).tolist() == []


def test_a_mask_gives_its_outline_and_nothing_inside() -> None:
    probabilities = torch.zeros(1, 16, 16)
    probabilities[0, 4:12, 4:12] = 1.0
    found = mask_boundaries(probabilities, torch.ones(1))
    assert found.max() == 1.0
    assert float(found[6:10, 6:10].max()) == 0.0
    assert (
        float(found[3:5, 6:10].min()) > 0.9
    )  # a straight step, from both sides; its corners are the strongest
    assert float(found[:2].max()) == 0.0


def test_no_mask_and_a_mask_of_the_whole_image_give_zeros() -> None:
    for value in (0.0, 1.0):
        assert not mask_boundaries(torch.full((2, 8, 8), value), torch.ones(2)).any()


def test_boundaries_lie_where_the_masks_end() -> None:
    model = Discs()
    part = SamBoundaries(model, points_per_side=1)
    found = part(torch.rand(2, 3, SIZE, SIZE))
    assert found.shape == (2, 1, SIZE // 8, SIZE // 8)
    assert model.prompts == 2
    assert float(found.min()) == 0.0
    centre, ring = found[0, 0, 3:5, 3:5].mean(), found[0, 0, 2, 3:5].mean()
    assert ring > 2 * centre
    torch.testing.assert_close(found, found.flip(-1))  # one disc in the middle


def test_every_point_of_the_grid_is_asked_in_parts() -> None:
    model = Discs()
    SamBoundaries(model, points_per_side=9)(torch.rand(1, 3, SIZE, SIZE))
    assert model.prompts == 81


def test_a_batch_is_its_images_one_by_one() -> None:
    part, images = SamBoundaries(Discs(), points_per_side=2), torch.rand(3, 3, SIZE, SIZE)
    torch.testing.assert_close(part(images), torch.cat([part(each[None]) for each in images]), rtol=0, atol=0)


def test_sam_is_frozen_and_stays_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    part = SamBoundaries(model).train()
    assert not part.training
    assert not model.training
    assert not any(p.requires_grad for p in part.parameters())


def test_edges_are_features_where_there_is_a_boundary() -> None:
    f1, f2 = torch.ones(1, 64, 16, 16), torch.full((1, 128, 8, 8), 3.0)
    boundaries = torch.zeros(1, 1, 8, 8)
    boundaries[..., 2, 2] = 0.5
    f_edge = SamEdges()(f1, f2, boundaries)
    assert f_edge.shape == f2.shape
    assert f_edge[0, :, 2, 2].unique().tolist() == [1.0]  # 0.5 * (1 + 3) / 2
    assert int(f_edge.count_nonzero()) == 128
    assert sam.EDGE not in EDGES  # nothing stands in for it without a checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SAM of 32 thousand random weights in the form of a published one."""
    return sam_checkpoint(tmp_path_factory.mktemp("sam"), size=SIZE)


@pytest.fixture
def altered(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "sam"))


def small(folder: Path, **overrides: Any) -> sam.SamEGMF:
    settings = {"sam_points": 3, "blocks": 2, "training": {"epochs": 1}, **overrides.pop("settings", {})}
    return sam.build(folder, weights="random", size=SIZE, settings=settings, **overrides)


def test_a_checkpoint_is_read_whole_and_named_by_its_hash(checkpoint: Path) -> None:
    first, second = sam.read_checkpoint(checkpoint), sam.read_checkpoint(checkpoint)
    assert first.label == f"file:{first.sha256[:8]}"
    assert len(first.sha256) == 64
    for one, two in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)
        assert not one.requires_grad
        assert one.dtype == torch.float32


def test_fit_and_score_with_edges_from_sam(checkpoint: Path) -> None:
    detector = small(checkpoint)
    model = umiad.fit(detector, [blob_image(seed=k).pixels[0] for k in range(8)])
    first, second = model.score([blob_image(seed=9).pixels[0], blob_image(seed=9, blob=True).pixels[0]])
    assert np.isfinite(first.anomaly_map).all()
    assert first.image_score != second.image_score
    assert model.config.detector_config["edge"] == "sam"
    assert model.config.detector_config["sam"] == detector.config.sam


def test_boundaries_are_prepared_once_and_change_the_scores(checkpoint: Path) -> None:
    detector = small(checkpoint)
    fit_quickly(detector, torch.rand(4, 3, SIZE, SIZE), steps=1)
    prepared = detector.prepare(torch.rand(2, 3, SIZE, SIZE))
    assert prepared["boundaries"].shape == (2, 1, SIZE // 8, SIZE // 8)
    with_sam = detector.score_prepared(prepared).image_score
    without = detector.score_prepared(
        {**prepared, "boundaries": torch.zeros_like(prepared["boundaries"])}
    ).image_score
    assert not torch.equal(with_sam, without)


@pytest.mark.parametrize("name", BATTERY)
def test_the_detector_passes_the_battery(name: str, checkpoint: Path) -> None:
    try:
        CHECKS[name](Candidate(lambda seed: small(checkpoint, seed=seed), SIZE))
    except Exempt as reason:
        pytest.skip(str(reason))


def test_sams_weights_are_frozen_and_no_part_of_the_state(checkpoint: Path) -> None:
    detector = small(checkpoint)
    assert not any(key.startswith("sam.") for key in detector.state())
    frozen = {id(p) for p in detector.parts()["encoder"].parameters()}
    assert {id(p) for p in detector.boundaries.parameters()} <= frozen
    assert not frozen & {id(p) for group in detector.param_groups() for p in group["params"]}
    detector.load_state(detector.state())
    with pytest.raises(ModelFileError):
        detector.load_state({})


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_checkpoint_says_what_is_expected(missing: str, altered: Path) -> None:
    (altered / missing).unlink()
    with pytest.raises(InputError, match=missing):
        sam.read_checkpoint(altered)
    with pytest.raises(InputError, match="sam-vit-base"):
        sam.read_checkpoint(altered / "nowhere")


def test_pickled_weights_are_not_read(altered: Path) -> None:
    (altered / "model.safetensors").rename(altered / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        sam.read_checkpoint(altered)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "clip"}, "expected 'sam'"),
        ({"auto_map": {"AutoModel": "other--code.Model"}}, "auto_map"),
        ({"vision_config": {"_attn_implementation": "kernels-community/flash"}}, "_attn_implementation"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config"),
        ({"vision_config": {"hidden_size": 48, "image_size": SIZE}}, "no SAM can be read|keys"),
    ],
)
def test_another_model_and_a_call_for_code_are_refused(
    change: dict[str, Any], reason: str, altered: Path
) -> None:
    path = altered / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelFileError, match=reason):
        sam.read_checkpoint(altered)


def test_an_adapter_is_refused(altered: Path) -> None:
    (altered / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFileError, match="adapter"):
        sam.read_checkpoint(altered)


def test_damaged_and_incomplete_weights_are_refused(altered: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = altered / "model.safetensors"
    tensors = load_file(path)
    first = min(name for name in tensors if name.startswith("vision_encoder.layers"))
    save_file({k: v for k, v in tensors.items() if k != first}, path, metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match="missing keys"):
        sam.read_checkpoint(altered)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelFileError, match="no SAM can be read"):
        sam.read_checkpoint(altered)


def test_wrong_settings_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="affine|network"):
        small(checkpoint, preset="default")
    with pytest.raises(ConfigError, match="unknown preset"):
        small(checkpoint, preset="papr")
    with pytest.raises(ConfigError, match="unknown part"):
        small(checkpoint, settings={"aggregate": "eamm"})
    with pytest.raises(ConfigError, match="sam_points"):
        small(checkpoint, settings={"sam_points": 0})


def test_without_the_extra_the_command_that_installs_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "sam"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"umiad\[sam\]"):
        sam.read_checkpoint(tmp_path)


def test_the_public_function_builds_it_and_asks_for_the_folder(checkpoint: Path) -> None:
    settings = {"edge": "sam", "sam": str(checkpoint), "sam_points": 2}
    detector = umiad.build("egmf", preset="paper", weights="random", size=SIZE, settings=settings)
    assert isinstance(detector, sam.SamEGMF)
    assert str(checkpoint) not in str(detector.config.canonical())
    with pytest.raises(ConfigError, match="sam-vit-base"):
        umiad.build("egmf", preset="paper", weights="random", size=SIZE, settings={"edge": "sam"})


def test_it_is_not_saved_and_that_is_told_before_fitting(checkpoint: Path, tmp_path: Path) -> None:
    images = [blob_image(seed=k).pixels[0] for k in range(8)]
    with pytest.raises(ConfigError, match="cannot be saved"):
        umiad.fit(small(checkpoint), images, out=tmp_path / "model")
    with pytest.raises(ConfigError, match="cannot be saved"):
        umiad.fit(small(checkpoint), images).save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
