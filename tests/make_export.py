"""Exported folders for tests, made without any exporter: the graph is whatever bytes a test wants."""

import hashlib
import json
from pathlib import Path

from umiad import manifest, modelfile
from umiad.exported import ExportedConfig
from umiad.strictjson import dump_bytes

GOLDEN = Path(__file__).parent / "golden" / "model-1"
PARITY = {
    "images": 3,
    "source": "images",
    "batch": 3,
    "map_relative": 1e-6,
    "score_relative": 2e-6,
    "decisions": 12,
    "same_decisions": 12,
    "ties": 0,
    "bound": 1e-4,
}


def export_config(*, runtime="onnx", parity=None, **changes):
    """The configuration of an export of the golden padim model."""
    saved = json.loads((GOLDEN / "padim" / "config.json").read_text(encoding="utf-8"))
    common = {
        name: saved[name]
        for name in ("detector", "preprocessing", "calibration", "map_reference", "provenance")
    }
    return ExportedConfig.parse(
        {
            **common,
            "runtime": runtime,
            "opset": 20,
            "versions": {"umiad": "0.1.0"},
            "source_manifest_sha256": None,
            "parity": {**PARITY, **(parity or {})},
            **changes,
        }
    )


def export_folder(path, *, files=None, config=None):
    """An exported model with these graph files (name -> content)."""
    config = config or export_config()
    contents = {
        manifest.CONFIG: dump_bytes(config.canonical(), source="config.json"),
        manifest.CARD: b"# card\n",
        **({manifest.GRAPH: b"no graph"} if files is None else files),
    }
    return modelfile.write_folder(path, contents, kind=manifest.EXPORT)


def rewrite(folder, name, content):
    """Replace one file of the folder, and its entry in the manifest with it: a consistent alteration."""
    (folder / name).write_bytes(content)
    facts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    facts["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(facts), encoding="utf-8")
