"""Convolutions of an exported graph in 8 bits, their ranges calibrated on normal images."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from umiad import onnxfile
from umiad.errors import ConfigError, UmiadError, first_line, require

AT_ONCE = 4
"""Images that pass the graph together while ranges are collected."""


def to_int8(graph: bytes, inputs: np.ndarray, *, size: int, name: str) -> bytes:
    """The ONNX `graph` with its convolutions in 8 bits; `inputs` float32 [N,3,S,S] are preprocessed normal images.

    Activations as uint8, the ranges between their 0.001st and 99.999th percentile on `inputs`; weights as int8 with
    a scale per channel, of 7 bits, since processors without VNNI saturate sums of more. All else stays float32, so
    densities and distances are exact on what comes out. Source: static quantisation of ONNX Runtime.

    `graph` was made in this process and has passed `onnxfile.check`; what comes back passes it too.

    Raises ConfigError where the graph has no convolution, or cannot be quantised; MissingExtraError.
    """
    onnx = require("onnx", extra="onnx", purpose="quantising a graph")
    require("onnxruntime", extra="onnx", purpose="quantising a graph")
    from onnxruntime import quantization

    model = onnx.ModelProto()
    model.ParseFromString(graph)
    if not any(node.op_type == "Conv" for node in model.graph.node):
        raise ConfigError(f"{name}: int8 is for convolutions, and its graph has none; export it without")
    try:
        with tempfile.TemporaryDirectory(prefix="umiad-export-") as folder, _quiet():
            target = Path(folder) / "int8.onnx"
            quantization.quantize_static(
                model,
                str(target),
                _reader(quantization, inputs),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.Percentile,
            )
            quantised = onnx.ModelProto()
            quantised.ParseFromString(target.read_bytes())
        content = onnxfile.cleaned(quantised)
        onnxfile.check(content, size=size, source=f"the int8 graph of {name}")
    except UmiadError as error:
        raise ConfigError(f"{name} cannot be quantised: {error}") from error
    except Exception as error:  # the library's errors have no common class
        raise ConfigError(f"{name} cannot be quantised: {first_line(error)}") from error
    return content


def _reader(quantization: Any, inputs: np.ndarray) -> Any:
    """The images, a few at a time, in the form that the library asks for."""

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(np.split(inputs, range(AT_ONCE, len(inputs), AT_ONCE)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {onnxfile.IMAGES: batch}

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The library prints and warns; what is wrong with its result, parity tells."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
