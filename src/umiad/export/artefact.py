"""The folder of an exported model: graph, configuration, card and manifest, written only where parity is proven."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import umiad
from umiad import modelfile, onnxfile, runtimes
from umiad.errors import ConfigError, ModelFileError, require
from umiad.export import parity, quantise, trace
from umiad.exported import ExportedConfig, ExportedModel
from umiad.fitted import FittedModel
from umiad.fitting import Data
from umiad.manifest import CARD, CONFIG, EXPORT, GRAPH
from umiad.preprocess import to_input
from umiad.progress import Reporter, Silent
from umiad.runtimes import Run, Runtime
from umiad.scorer import ScoringConfig
from umiad.strictjson import dump_bytes


def export_model(
    model: FittedModel,
    out: str | os.PathLike[str],
    *,
    to: Runtime = "onnx",
    check: Sequence[str | os.PathLike[str]] = (),
    int8: Sequence[str | os.PathLike[str]] = (),
    accuracy: Data | None = None,
    source_manifest_sha256: str | None = None,
    reporter: Reporter | None = None,
) -> ExportedConfig:
    """Write `model` as a folder for ONNX Runtime ("onnx") or OpenVINO ("openvino"); returns its configuration.

    The graph is compared with the model on the images under `check` (without any: on generated phantoms), in
    batches of 1 and of 3. Nothing is written where maps or image scores differ by more than 1e-4, or a decision does.
    `int8`: normal images on which convolutions are brought to 8 bits afterwards (ONNX Runtime only); how far that
    is from the model is measured on the other images of `check` and bounded (`umiad.exported.Loss`). `accuracy`:
    labelled data on whose test part both are judged; see `umiad.evaluation.evaluate_model` for which that is.
    `source_manifest_sha256` of the saved model is noted in the export. The model is moved to the CPU.

    Raises:
        ConfigError: the detector cannot be exported (it says why), or parity is not kept (with the numbers).
        InputError: something else lies at `out`, or an image that was named cannot be used.
        MissingExtraError: a package of the extras `onnx` and `openvino` is not installed.
        DiskError: writing failed; an older export there is as it was.
    """
    target, reporter = Path(out), reporter or Silent()
    name, preprocessing = model.config.detector, model.config.preprocessing
    if reason := trace.why_not(model.detector.info):
        raise ConfigError(f"{name} cannot be exported: {reason}")
    if int8 and to != "onnx":
        raise ConfigError(f"int8 is for ONNX Runtime (--to onnx), not for {to}")
    modelfile.check_target(target, kind=EXPORT)
    versions = {"umiad": umiad.__version__, "torch": torch.__version__, **_packages(to)}
    model.to("cpu")
    phantoms = parity.phantom_images(preprocessing.size)
    images = parity.named_images(model, check) if check else phantoms
    example = np.stack([to_input(image, preprocessing) for image in phantoms[:2]])
    graph = trace.to_onnx(model.detector, torch.from_numpy(example))
    files = {GRAPH: graph} if to == "onnx" else trace.to_openvino(graph)
    reporter.note(f"traced: {sum(map(len, files.values())) / 1e6:.1f} MB")
    run = _started(to, files, size=preprocessing.size, name=name)
    source: Literal["images", "phantoms"] = "images" if check else "phantoms"
    measured = parity.measure(model, run, images, source=source)
    if not measured.kept:
        raise ConfigError(
            f"{name} is not exported: the exported graph does not score the same: {measured.words()}; "
            "nothing was written; try the other runtime"
        )
    lost = None
    if int8:
        reporter.note("quantising: ranges of 8 bits from normal images")
        normals = [to_input(image, preprocessing) for image in parity.named_images(model, int8)]
        others = parity.others(images, normals, preprocessing)
        files = {GRAPH: quantise.to_int8(graph, np.stack(normals), size=preprocessing.size, name=name)}
        run = _started(to, files, size=preprocessing.size, name=name)
        lost = parity.loss(model, run, others, source=source)
        if not lost.kept:
            raise ConfigError(
                f"{name} is not exported: 8 bits change too much: {lost.words()}; nothing was written; more normal "
                "images may help, or export without int8"
            )
    saved = model.config.canonical()
    config = ExportedConfig.parse(
        {
            **{field: saved[field] for field in ScoringConfig.model_fields},
            "runtime": to,
            "opset": onnxfile.opset(graph, source=GRAPH),
            "versions": versions,
            "source_manifest_sha256": source_manifest_sha256,
            "parity": measured.canonical(),
            "loss": None if lost is None else lost.canonical(),
        }
    )
    if accuracy is not None:
        found = parity.accuracy(model, ExportedModel(config, run), accuracy, reporter=reporter)
        config = config.model_copy(update={"accuracy": found})
    card = _card(model, config).encode("utf-8", errors="backslashreplace")
    content = dump_bytes(config.canonical(), source=CONFIG)
    modelfile.write_folder(target, {**files, CONFIG: content, CARD: card}, kind=EXPORT)
    return config


def _packages(to: Runtime) -> dict[str, str]:
    """Package -> version of what an export needs. Raises MissingExtraError before any work is done."""
    needed = {"onnx": "onnx", "onnxscript": "onnx"}
    needed |= {"onnxruntime": "onnx"} if to == "onnx" else {"openvino": "openvino"}
    return {
        name: str(require(name, extra=extra, purpose=trace.PURPOSE).__version__)
        for name, extra in needed.items()
    }


def _started(to: Runtime, files: dict[str, bytes], *, size: int, name: str) -> Run:
    """The graph as scoring will run it. Raises ConfigError where the runtime, or our own reading, refuses it."""
    try:
        return runtimes.start(to, files, size=size, threads=None, source=f"the graph of {name}")
    except ModelFileError as error:
        raise ConfigError(f"{name} cannot be exported: {error}") from error


def _card(model: FittedModel, config: ExportedConfig) -> str:
    """The model's own card, and what the export adds."""
    versions = ", ".join(f"{name} {number}" for name, number in config.versions.items())
    lost = "" if config.loss is None else f"\n\nConvolutions are in 8 bits. Measured: {config.loss.words()}."
    return (
        f"{model.card()}\n## This export\n\nFor {config.runtime}, made with {versions}. It scores and does nothing "
        f"else: `umiad score FOLDER IMAGES --out RESULTS`.\n\nMeasured when it was made: {config.parity.words()}. "
        f"An image whose score is as near to the threshold as that may fall on its other side.{lost}\n"
    )
