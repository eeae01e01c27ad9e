"""What runs an exported graph: ONNX Runtime or OpenVINO, on the CPU, in float32. Neither needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import numpy as np

from umiad import irfile, onnxfile
from umiad.errors import ModelFileError, require
from umiad.manifest import GRAPH, IR_GRAPH, IR_WEIGHTS

Runtime: TypeAlias = Literal["onnx", "openvino"]
Run: TypeAlias = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Images float32 [B,3,S,S] -> maps [B,S,S], image scores [B]."""
FILES: Mapping[str, tuple[str, ...]] = {"onnx": (GRAPH,), "openvino": (IR_GRAPH, IR_WEIGHTS)}
"""Runtime -> the files of its graph, the graph itself first."""
_OUTPUTS = [onnxfile.ANOMALY_MAP, onnxfile.IMAGE_SCORE]


def start(
    runtime: Runtime, files: Mapping[str, bytes], *, size: int, threads: int | None, source: str
) -> Run:
    """Check the graph in `files` (name -> content), load it, and return what runs it.

    Raises:
        ModelFileError: the graph is not one of ours (see `onnxfile`, `irfile`), or the runtime refuses it.
        MissingExtraError: the runtime is not installed.
    """
    graph, *rest = (files[name] for name in FILES[runtime])
    if runtime == "onnx":
        onnxfile.check(graph, size=size, source=source)
        run = _onnx(graph, threads=threads, source=source)
    else:
        irfile.check(graph, rest[0], source=source)
        run = _openvino(graph, rest[0], threads=threads, source=source)
    return checked(run, size=size, source=source)


def _onnx(graph: bytes, *, threads: int | None, source: str) -> Run:
    runtime = require("onnxruntime", extra="onnx", purpose="running an exported ONNX model")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is an exception
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _refused(source, "ONNX Runtime", error) from error

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        maps, scores = session.run(_OUTPUTS, {onnxfile.IMAGES: images})
        return maps, scores

    return run


def _openvino(graph: bytes, weights: bytes, *, threads: int | None, source: str) -> Run:
    openvino = require("openvino", extra="openvino", purpose="running an exported OpenVINO model")
    options: dict[str, object] = {"INFERENCE_PRECISION_HINT": "f32"}  # else some processors take bfloat16
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(model=graph, weights=weights), "CPU", options)
        names = [compiled.output(name) for name in _OUTPUTS]
    except Exception as error:
        raise _refused(source, "OpenVINO", error) from error

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = compiled({onnxfile.IMAGES: images})
        return np.array(found[names[0]]), np.array(found[names[1]])

    return run


def checked(run: Run, *, size: int, source: str) -> Run:
    """The same, with failures and results of another shape as ModelFileError."""

    def guarded(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            maps, scores = run(np.ascontiguousarray(images, dtype=np.float32))
        except Exception as error:
            raise _refused(source, "its runtime", error) from error
        if maps.shape != (len(images), size, size) or scores.shape != (len(images),):
            raise ModelFileError(
                f"{source}: results of shape {list(maps.shape)} and {list(scores.shape)} for {len(images)} images, "
                f"expected [B,{size},{size}] and [B]"
            )
        return maps, scores

    return guarded


def _refused(source: str, who: str, error: Exception) -> ModelFileError:
    return ModelFileError(f"{source}: {who} refuses it: {type(error).__name__}: {str(error)[:200]}")
