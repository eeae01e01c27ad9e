"""A fitted model for another runtime (ONNX Runtime, OpenVINO), with proof at export that it scores the same."""

from __future__ import annotations

from umiad.export.artefact import export_model

__all__ = ["export_model"]
