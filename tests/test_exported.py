"""Exported folders as files: what is read back, what is refused, and that scoring them leaves torch out."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import umiad
from make import folder_of_images
from make_export import GOLDEN, PARITY, export_config, export_folder, rewrite
from umiad import exported, manifest, modelfile, runtimes
from umiad.batch import score_files
from umiad.cli.app import app
from umiad.errors import ConfigError, InputError, MissingExtraError, ModelFileError
from umiad.exported import ExportedModel, Parity


@pytest.fixture
def folder(tmp_path):
    return export_folder(tmp_path / "export")


def flat(images):
    """A stand-in for a runtime: the mean of an image everywhere."""
    means = images.mean(axis=(1, 2, 3))
    return np.repeat(means, 64 * 64).reshape(-1, 64, 64).astype(np.float32), means.astype(np.float32)


# ---- reading


def test_what_is_written_is_read_back(folder):
    config, files, digest = exported.read(folder)
    assert config == export_config()
    assert files == {"card.md": b"# card\n", "model.onnx": b"no graph"}
    assert digest == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert exported.is_export(folder)
    assert not exported.is_export(GOLDEN / "padim")
    assert not exported.is_export(folder / "nowhere")


def test_an_export_is_replaced_and_nothing_else_is(folder, tmp_path):
    export_folder(folder, files={"model.onnx": b"another"})
    assert exported.read(folder)[1]["model.onnx"] == b"another"
    model = umiad.load(GOLDEN / "padim").save(tmp_path / "model")
    with pytest.raises(InputError, match="expected one of an exported model"):
        export_folder(model)
    with pytest.raises(InputError, match="exported model"):
        umiad.load(GOLDEN / "padim").save(folder)
    assert umiad.load(model).info["detector"] == "padim"
    assert exported.read(folder)[1]["model.onnx"] == b"another"


def test_a_saved_model_s_door_says_what_an_export_is_for(folder):
    with pytest.raises(ModelFileError, match=r"exported model, which can only score \(`umiad score`\)"):
        umiad.load(folder)
    with pytest.raises(ModelFileError, match="of a saved model, expected one of an exported model"):
        exported.read(GOLDEN / "padim")
    with pytest.raises(InputError, match="no such folder"):
        exported.read(folder / "nowhere")


@pytest.mark.parametrize("name", ["model.onnx", "config.json", "card.md"])
def test_M6_a_flipped_byte_is_found(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=f"{name}: SHA-256 is"):
        exported.read(folder)


@pytest.mark.parametrize("name", ["model.onnx", "config.json", "card.md", "manifest.json"])
def test_M6_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelFileError, match=f"{name}: (missing|not there)"):
        exported.read(folder)


@pytest.mark.parametrize("name", ["model.onnx", "config.json"])
def test_M6_a_link_in_place_of_a_file_is_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelFileError, match="symbolic link"):
        exported.read(folder)


def test_M6_another_manifest_than_the_pinned_one_is_refused(folder):
    with pytest.raises(ModelFileError, match="not the model that was pinned"):
        exported.read(folder, manifest_sha256="0" * 64)


def test_M6_a_future_format_names_the_umiad_that_reads_it(folder):
    path = folder / "manifest.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**facts, "format": manifest.EXPORT.format + 1, "umiad_version": "9.0"}))
    with pytest.raises(ModelFileError, match=r"reads up to 1; .* pip install 'umiad>=9.0'"):
        exported.read(folder)


def test_M6_a_graph_beyond_the_ceiling_is_refused_by_its_entry(folder):
    path = folder / "manifest.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["files"]["model.onnx"]["bytes"] = 2 << 30
    path.write_text(json.dumps(facts))
    with pytest.raises(ModelFileError, match=f"expected 0 to {(2 << 30) - 1}"):
        exported.read(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra": 1}, "unknown key 'extra'"),
        ({"runtime": "tensorrt"}, "runtime"),
        ({"runtime": "openvino"}, "lists no model.xml"),
        ({"parity": {**PARITY, "map_relative": 1e-3}}, "the parity it states is not kept"),
        ({"parity": {**PARITY, "score_relative": 1e-3}}, "the parity it states is not kept"),
        ({"parity": {**PARITY, "map_relative": 5.0, "bound": 10.0}}, "the parity it states is not kept"),
        ({"parity": {**PARITY, "same_decisions": 11}}, "the parity it states is not kept"),
    ],
)
def test_M6_a_configuration_that_no_export_writes_is_refused(folder, change, words):
    config = {**export_config().canonical(), **change}
    rewrite(folder, "config.json", json.dumps(config).encode())
    with pytest.raises(ModelFileError, match=words):
        exported.read(folder)


def test_a_decision_within_the_bound_of_the_threshold_is_no_difference():
    tie = Parity(**{**PARITY, "same_decisions": 11, "ties": 1})
    assert tie.kept
    assert "11 of 12 decisions alike, 1 ties" in tie.words()


# ---- loading

NET = b"<net>%s</net>" % b"".join(
    b"<layer type='%s' version='opset1'/>" % kind for kind in (b"Parameter", b"Result", b"Result")
)


@pytest.mark.parametrize(
    ("runtime", "files"),
    [
        ("onnx", {"model.onnx": b"x"}),
        (
            "openvino",
            {"model.xml": NET, "model.bin": b""},
        ),
    ],
)
def test_without_its_runtime_the_extra_is_named(tmp_path, monkeypatch, runtime, files):
    for name in ("onnx", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    path = export_folder(tmp_path / "export", files=files, config=export_config(runtime=runtime))
    with pytest.raises(MissingExtraError, match=rf"pip install 'umiad\[{runtime}\]'"):
        exported.load(path)


def test_only_the_cpu_is_offered(folder):
    with pytest.raises(ConfigError, match="exported models run on the CPU"):
        exported.load(folder, device="cuda")


@pytest.mark.parametrize(
    "results",
    [
        (np.zeros((1, 32, 32), np.float32), np.zeros(1, np.float32)),
        (np.zeros((1, 64, 64), np.float32), np.zeros(2, np.float32)),
    ],
)
def test_M6_results_of_another_shape_are_refused(results):
    run = runtimes.checked(lambda images: results, size=64, source="model.onnx")
    with pytest.raises(ModelFileError, match=r"expected \[B,64,64\] and \[B\]"):
        run(np.zeros((1, 3, 64, 64), np.float32))


def test_M6_a_runtime_that_fails_is_one_kind_of_error():
    def broken(images):
        raise RuntimeError("out of memory " * 100)

    with pytest.raises(ModelFileError, match="RuntimeError: out of memory") as caught:
        runtimes.checked(broken, size=64, source="model.onnx")(np.zeros((1, 3, 64, 64), np.float32))
    assert len(str(caught.value)) < 400


# ---- scoring


def test_an_exported_model_writes_what_a_fitted_one_writes(tmp_path):
    images = folder_of_images(tmp_path / "images", 3)
    model = ExportedModel(export_config(), flat)
    summary = score_files(model, images, tmp_path / "out")
    assert len(summary.findings) == 3
    line = json.loads((tmp_path / "out" / "scores.jsonl").read_text().splitlines()[0])
    assert {"image_score", "p_value", "above_threshold", "regions", "map", "picture"} <= line.keys()
    assert np.load(tmp_path / "out" / line["map"]).shape == (64, 64)
    assert "parity" in (tmp_path / "out" / "report.html").read_text()
    assert [each.image_score for each in model.score(images)] == [
        each.image_score for each in summary.findings
    ]
    assert "runtime=onnx" in repr(model)


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_scoring_files_with_an_exported_model_leaves_torch_out(tmp_path, precision):
    folder_of_images(tmp_path / "images", 2)
    code = (
        "import sys, numpy as np; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from make_export import export_config\n"
        "from umiad.batch import FileScorer; from umiad.exported import ExportedModel\n"
        "def run(images):\n"
        "    return np.zeros((len(images), 64, 64), np.float32), np.zeros(len(images), np.float32)\n"
        "root = Path(sys.argv[1])\n"
        "scorer = FileScorer(ExportedModel(export_config(), run), precision=sys.argv[3])\n"
        "done = scorer.run([root / 'images'], root / 'out')\n"
        "print(len(done.findings), 'torch' in sys.modules, 'lightning' in sys.modules)"
    )
    words = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent), precision]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False", "False"]


# ---- the command line


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + result.stderr
    return result


def test_inspect_shows_an_export_and_where_it_was_compared(folder):
    text = run("inspect", folder).stdout
    assert "runtime" in text
    assert "3 images, batches of 1 and 3" in text
    shown = json.loads(run("inspect", folder, "--json").stdout)
    assert shown["config"]["parity"]["map_relative"] == PARITY["map_relative"]


def test_commands_that_need_the_network_itself_say_so(folder, tmp_path):
    for words in (("calibrate", folder, tmp_path), ("evaluate", folder, tmp_path, "--out", tmp_path / "e")):
        assert "which can only score" in run(*words, code=5).stderr


def test_score_names_what_is_wrong_with_an_export(folder, tmp_path):
    (folder / "model.onnx").write_bytes(b"no grapf")
    folder_of_images(tmp_path / "images", 1)
    result = run("score", folder, tmp_path / "images", "--out", tmp_path / "out", code=5)
    assert "model.onnx: SHA-256" in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_of_export_teaches():
    text = run("export", "--help").stdout
    for word in ("--to", "--check", "umiad score EXPORTED", "1e-4", "umiad[onnx]", "torch"):
        assert word in text


def test_a_folder_of_this_kind_needs_its_files(tmp_path):
    with pytest.raises(ModelFileError, match="lists no card.md"):
        modelfile.write_folder(tmp_path / "x", {"config.json": b"{}"}, kind=manifest.EXPORT)
    assert not (tmp_path / "x").exists()
