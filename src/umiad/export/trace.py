"""From a fitted detector to a graph: torch.export, then ONNX, then OpenVINO where that is wished."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from umiad import onnxfile
from umiad.detectors.contract import Detector, DetectorInfo
from umiad.errors import ConfigError, UmiadError, first_line, require
from umiad.manifest import IR_GRAPH, IR_WEIGHTS

OPSET = 20
MOST_IMAGES = 4096
"""The largest batch that the graph is traced for."""
PURPOSE = "exporting a model"


class _Score(nn.Module):
    """A detector's `score` as a module: images [B,3,S,S] -> anomaly_map [B,S,S], image_score [B], all float32."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector
        self.part = detector.module

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of a batch."""
        scores = self.detector.score(images)
        return scores.anomaly_map.float(), scores.image_score.float()


def why_not(info: DetectorInfo) -> str:
    """Why models of a detector cannot be exported; empty where nothing speaks against it."""
    if info.not_exported:
        return info.not_exported
    if info.uses_size:
        return "it scores the size of an image's file, which an exported graph of pixels does not see"
    return ""


def to_onnx(detector: Detector, example: Tensor) -> bytes:
    """The graph of `detector.score` as ONNX with a free batch. `example`: images [B,3,S,S] with B >= 2, on the CPU.

    Raises ConfigError where scoring cannot be traced, or needs operators that are not read back (`onnxfile.check`),
    MissingExtraError.
    """
    for package in ("onnx", "onnxscript"):
        require(package, extra="onnx", purpose=PURPOSE)
    name = detector.info.name
    wrapped = _Score(detector).eval()
    wrapped(example)  # folds the backbone, which tracing cannot
    try:
        with _quiet(), torch.no_grad():
            batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
            traced = torch.export.export(wrapped, (example,), dynamic_shapes=({0: batch},), strict=False)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[onnxfile.IMAGES],
                output_names=[onnxfile.ANOMALY_MAP, onnxfile.IMAGE_SCORE],
            )
        if program is None:
            raise ConfigError(f"{name} cannot be exported: the exporter returned nothing")
        content = onnxfile.cleaned(resized_in_single(program.model_proto))
        onnxfile.check(content, size=example.shape[-1], source=f"the graph of {name}")
    except ConfigError:
        raise
    except UmiadError as error:
        raise ConfigError(f"{name} cannot be exported: {error}") from error
    except Exception as error:  # the exporter's errors have no common class
        raise ConfigError(
            f"{name} cannot be exported: its scoring cannot be traced: {first_line(error)}"
        ) from error
    return content


def resized_in_single(model: Any) -> Any:
    """The graph with every Resize of float64 maps done in float32: ONNX Runtime has no other. Parity judges the rest.

    `model` is an onnx.ModelProto whose `value_info` tells the types; it is changed in place and returned.
    """
    onnx = require("onnx", extra="onnx", purpose=PURPOSE)
    single, double = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Resize" or types.get(node.input[0]) != double:
            nodes.append(node)
            continue
        given, made = node.input[0], node.output[0]
        node.input[0], node.output[0] = f"{made}_given", f"{made}_made"
        nodes.append(onnx.helper.make_node("Cast", [given], [node.input[0]], to=single))
        nodes.append(node)
        nodes.append(onnx.helper.make_node("Cast", [node.output[0]], [made], to=double))
    nodes = [
        type(node).FromString(node.SerializeToString()) for node in nodes
    ]  # clearing frees those in the graph
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    return model


def to_openvino(graph: bytes) -> dict[str, bytes]:
    """An ONNX graph as OpenVINO's model.xml and model.bin (name -> content), in float32.

    Raises ConfigError where OpenVINO cannot take it, MissingExtraError.
    """
    openvino = require("openvino", extra="openvino", purpose="exporting to OpenVINO")
    try:
        model = openvino.Core().read_model(model=graph)
        with tempfile.TemporaryDirectory(prefix="umiad-export-") as folder:
            openvino.save_model(model, str(Path(folder) / IR_GRAPH), compress_to_fp16=False)
            return {name: (Path(folder) / name).read_bytes() for name in (IR_GRAPH, IR_WEIGHTS)}
    except Exception as error:  # a RuntimeError of its own, or what the disk says
        raise ConfigError(
            f"OpenVINO cannot take this model: {type(error).__name__}: {str(error)[:200]}; --to onnx may do"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks on packages that it does not find, and its warnings on itself, are none of the user's."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
