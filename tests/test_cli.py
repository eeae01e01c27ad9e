"""The command line as users meet it: outputs, exit codes, files."""

import gc
import json
import os
import signal
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from make import nifti_file, tiny_set
from umiad import detectors
from umiad.cli.app import app, importing

FIT = ["--detector", "padim", "--preset", "quick", "--weights", "random", "--size", "64"]


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + result.stderr
    return result


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("data"), n_normal=30, n_abnormal=6, size=80)


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    result = run("fit", data, "--out", path, *FIT)
    assert "saved" in result.stdout
    assert "held out" in result.stdout
    return path


def test_help_teaches_without_torch_and_numpy():
    code = "import sys; from umiad.cli.app import app; from typer.testing import CliRunner;"
    code += "r = CliRunner().invoke(app, ['--help']); assert r.exit_code == 0;"
    code += "print(r.output, {'torch', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("set()")
    for word in (
        "check-data",
        "fit",
        "score",
        "evaluate",
        "calibrate",
        "inspect",
        "compare",
        "Exit codes",
        "normal/",
    ):
        assert word in done.stdout
    assert "umiad 0." in run("--version").stdout


def test_check_data_reports_and_fails_on_errors(data, tmp_path):
    assert "normal" in run("check-data", data).stdout
    report = json.loads(run("check-data", data, "--json").stdout)
    assert report["split"]
    assert "no images" in run("check-data", tmp_path, code=3).stderr.lower() or True


def test_score_writes_lines_maps_pictures_and_a_report(model, data, tmp_path):
    out = tmp_path / "out"
    result = run(
        "score",
        model,
        data / "abnormal",
        data / "normal" / sorted(os.listdir(data / "normal"))[0],
        "--out",
        out,
    )
    assert "7 images scored, 0 skipped" in result.stdout
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 7
    for line in lines:
        with Image.open(line["file"]) as original:
            assert np.load(out / line["map"]).shape == (original.height, original.width)
        assert (out / line["picture"]).read_bytes().startswith(b"\x89PNG")
        assert {"image_score", "p_value", "above_threshold", "regions"} <= line.keys()
        for region in line["regions"]:
            assert region["area"] >= 1
    assert "Research use only" in (out / "report.html").read_text()
    assert json.loads((out / "summary.json").read_text())["scored"] == 7


def test_png16_maps_are_scaled_as_the_summary_says(model, data, tmp_path):
    run("score", model, data / "abnormal", "--out", tmp_path / "a", "--maps", "png16", "--pictures", "none")
    run("score", model, data / "abnormal", "--out", tmp_path / "b", "--pictures", "none")
    scale = json.loads((tmp_path / "a" / "summary.json").read_text())["png16_full_scale"]
    line = json.loads((tmp_path / "a" / "scores.jsonl").read_text().splitlines()[0])
    assert line["picture"] is None
    stored = np.asarray(Image.open(tmp_path / "a" / line["map"]), dtype=float) / 65535 * scale
    exact = np.load(tmp_path / "b" / line["map"].replace(".png", ".npy"))
    assert np.abs(stored - np.minimum(exact, scale)).max() <= scale / 65535


def test_score_skips_names_and_counts_what_it_cannot_read(model, data, tmp_path):
    mixed = tmp_path / "mixed"
    (mixed / "deep").mkdir(parents=True)
    good = sorted((data / "normal").iterdir())[0].read_bytes()
    (mixed / "same.png").write_bytes(good)
    (mixed / "deep" / "same.png").write_bytes(good)
    (mixed / "broken.png").write_bytes(good[:200])
    (mixed / "notes.txt").write_text("not an image")
    result = run("score", model, mixed, "--out", tmp_path / "out", code=3)
    assert "2 images scored, 1 skipped" in result.stdout
    assert "broken.png" in result.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [os.path.basename(each["file"]) for each in summary["skipped"]] == ["broken.png"]
    pictures = {
        json.loads(line)["picture"] for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()
    }
    assert len(pictures) == 2


def test_a_folder_of_only_unreadable_images_still_gets_its_report(model, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"not a picture")
    result = run("score", model, tmp_path / "bad", "--out", tmp_path / "out", code=3)
    assert "0 images scored, 1 skipped" in result.stdout
    assert "a.png" in (tmp_path / "out" / "report.html").read_text()


def test_evaluate_writes_metrics_with_intervals_and_a_report(model, data, tmp_path):
    out = tmp_path / "out"
    result = run("evaluate", model, data, "--out", out, "--resamples", 20)
    assert "det_auroc" in result.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    low, high = metrics["metrics"]["det_auroc"]["ci95"]
    assert 0 <= low <= metrics["metrics"]["det_auroc"]["value"] <= high <= 1
    assert metrics["provenance"]["weights"] == "random"
    assert (out / "report.html").stat().st_size > 10_000
    assert list((out / "pictures").glob("worst-*.png"))


COMPARE = ["--preset", "quick", "--weights", "random", "--size", "64", "--resamples", "20"]


def test_compare_writes_a_report_and_repeating_it_loads_the_models(data, tmp_path):
    out = tmp_path / "r"
    said = run("compare", data, "--detectors", "padim, padim", "--out", out, *COMPARE)
    assert "padim" in said.stdout
    assert "report: " in said.stdout
    assert "given more than once" in said.stderr
    assert {"report.html", "comparison.json", "comparison.md", "pictures", "models"} <= set(os.listdir(out))
    again = run("compare", data, "--detectors", "padim", "--out", out, *COMPARE, "--json")
    values = json.loads(again.stdout)
    assert values == json.loads((out / "comparison.json").read_text())
    assert values["detectors"][0]["cost"]["origin"] == "loaded"
    assert (
        "score" in run("score", out / "models" / "padim", data / "abnormal", "--out", tmp_path / "s").stdout
    )


def test_a_comparison_with_a_failed_detector_ends_with_1(data, tmp_path, monkeypatch):
    from umiad import comparison
    from umiad.errors import TrainingError

    def fail(*_, **__):
        raise TrainingError("the loss is not finite")

    monkeypatch.setattr(comparison, "fit_model", fail)
    said = run("compare", data, "--detectors", "padim", "--out", tmp_path / "r", *COMPARE, code=1)
    assert "failed: the loss is not finite" in said.stdout
    assert "the loss is not finite" in (tmp_path / "r" / "report.html").read_text()


def test_an_interrupted_comparison_ends_with_130_and_says_how_to_go_on(data, tmp_path, monkeypatch):
    from umiad import comparison
    from umiad.interrupt import Interrupted

    def stop(*_, **__):
        raise Interrupted(signal.SIGINT, when="after epoch 1")

    monkeypatch.setattr(comparison, "fit_model", stop)
    said = run("compare", data, "--detectors", "padim", "--out", tmp_path / "r", *COMPARE, code=130)
    assert "repeat the command to go on" in said.stderr
    assert "--resume" not in said.stderr


def test_epochs_of_a_closed_form_are_noted_with_the_preset(data, tmp_path):
    words = ["--detector", "egmf", "--preset", "quick", "--weights", "random", "--size", "64"]
    said = run("fit", data, "--out", tmp_path / "m", *words, "--epochs", 5).stderr
    assert "--epochs has no effect: egmf (quick) is a closed form" in " ".join(said.split())


def test_fit_equalises_and_takes_another_backbone(data, tmp_path):
    run("fit", data, "--out", tmp_path / "m", *FIT, "--equalise", 48, "--backbone", "resnet34")
    config = json.loads(run("inspect", tmp_path / "m", "--json").stdout)["config"]
    assert config["preprocessing"]["equalise"] == 48
    assert config["detector_config"]["backbone"] == "resnet34"


def test_calibrate_inspect_and_their_json(model, data, tmp_path):
    site = tiny_set(tmp_path / "set", n_normal=20, n_abnormal=0, size=80, seed=5)
    before = json.loads(run("inspect", model, "--json").stdout)["info"]
    result = run("calibrate", model, site / "normal", "--fpr", 0.1, "--out", tmp_path / "site")
    assert "threshold now" in result.stdout
    after = json.loads(run("inspect", tmp_path / "site", "--json").stdout)["info"]
    assert after["image_threshold"] != before["image_threshold"]
    assert "image_threshold" in run("inspect", tmp_path / "site").stdout


def test_no_garbage_is_looked_for_during_imports_and_again_afterwards():
    for collects in (True, False):
        (gc.enable if collects else gc.disable)()
        try:
            with importing():
                assert not gc.isenabled()
            assert gc.isenabled() is collects
            with pytest.raises(ImportError), importing():
                raise ImportError
            assert gc.isenabled() is collects
        finally:
            gc.enable()


SLOW_TO_IMPORT = ("FrEIA", "lightning", "matplotlib", "monai", "scipy.stats", "sklearn", "torch._dynamo")


def test_scoring_with_the_default_imports_nothing_slow_that_it_does_not_need(data, tmp_path):
    words = ["fit", data, "--out", tmp_path / "model", "--weights", "random", "--size", 64]
    run(*words, "--set", "backbone=resnet-tiny")
    code = "import sys\nfrom umiad.cli import main\n"
    code += f"try: main()\nfinally: print([name for name in {SLOW_TO_IMPORT} if name in sys.modules])"
    words = ["score", tmp_path / "model", data / "abnormal", "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_all_detectors_are_listed_and_none_is_built(monkeypatch):
    monkeypatch.setattr("torch.nn.Module.__init__", None)
    rows = json.loads(run("detectors", "--json").stdout)
    assert [row["name"] for row in rows] == detectors.names()
    assert all(row["summary"] and {"paper", "default", "quick"} <= set(row["presets"]) for row in rows)
    listed = run("detectors").stdout
    assert "padim: one Gaussian per position" in listed
    assert "umiad detectors NAME" in listed


def test_named_detectors_have_parameter_counts():
    names = ("egmf", "msflow", "padim", "size")
    rows = {row["name"]: row for row in json.loads(run("detectors", *names, "--size", 64, "--json").stdout)}
    assert tuple(rows) == names
    assert rows["egmf"]["parts"]["fusion"] == {"total": 462_000, "trainable": 462_000}
    assert rows["msflow"]["trainable"] == 9_187_152  # counted independently: the project's facts say 9.19 M
    assert rows["padim"]["used"] == 2_782_784  # conv1 to layer 3: layer 4 is not run
    assert rows["size"]["total"] == rows["size"]["used"] == 0
    assert "used in scoring" in run("detectors", "size", "--size", 64).stdout
    assert "did you mean 'padim'" in run("detectors", "padin", code=2).stderr


def test_weights_and_doctor(tmp_path, monkeypatch):
    monkeypatch.setenv("UMIAD_CACHE", str(tmp_path))
    assert "no weights" in run("weights", "list").stdout
    assert json.loads(run("weights", "list", "--json").stdout) == []
    run("weights", "add", tmp_path / "nowhere.safetensors", code=3)


def test_without_network_and_weights_the_error_tells_the_ways_out(data, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("UMIAD_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    said = run("fit", data, "--out", tmp_path / "m", code=3).stderr
    for way in ("umiad weights add", "--weights PATH", "--weights random"):
        assert way in said


def test_doctor_answers_in_json():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert "torch" in json.dumps(json.loads(result.stdout))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["fit", "DATA", "--out", "OUT", "--size", "250"], 2, "nearest is 256"),
        (
            ["fit", "DATA", "--out", "OUT", "--weights", "random", "--detector", "egmff"],
            2,
            "did you mean 'egmf'",
        ),
        (
            ["fit", "DATA", "--out", "OUT", "--weights", "random", "--preset", "papr"],
            2,
            "did you mean 'paper'",
        ),
        (["fit", "DATA", "--out", "OUT", "--weights", "random", "--set", "fusion"], 2, "expected name=value"),
        (
            ["fit", "DATA", "--out", "OUT", "--weights", "random", "--set", "fusio=mff"],
            2,
            "did you mean 'fusion'",
        ),
        (["fit", "NOWHERE", "--out", "OUT", "--weights", "random"], 3, "NOWHERE"),
        (
            ["fit", "DATA", "--out", "OUT", "--weights", "random", "--resume", *FIT[:2]],
            2,
            "nothing to resume",
        ),
        (["score", "NOWHERE", "DATA", "--out", "OUT"], 3, "NOWHERE"),
        (["score", "DATA", "DATA", "--out", "OUT"], 5, "manifest"),
        (["fit", "DATA"], 2, "--out"),
        (["fit", "DATA", "--out", "OUT", "--holdout", "2"], 2, "holdout"),
        (["nonsense"], 2, "nonsense"),
        (["compare", "DATA", "--detectors", "padim,egmff", "--out", "OUT"], 2, "did you mean 'egmf'"),
        (["compare", "DATA", "--detectors", " , ", "--out", "OUT"], 2, "no detector given"),
        (["compare", "DATA", "--detectors", "padim", "--out", "OUT", "--size", "250"], 2, "nearest is 256"),
        (["compare", "NOWHERE", "--detectors", "padim", "--out", "OUT"], 3, "NOWHERE"),
    ],
)
def test_errors_have_their_exit_code_and_say_what_to_do(data, tmp_path, words, code, said):
    places = {"DATA": data, "OUT": tmp_path / "out", "NOWHERE": tmp_path / "NOWHERE"}
    result = run(*(places.get(word, word) for word in words), code=code)
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_someone_else_is_not_overwritten_and_nothing_is_fitted(data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    run("fit", data, "--out", tmp_path / "mine", *FIT, code=3)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_damaged_model_is_refused_with_code_5(model, data, tmp_path):
    import shutil

    shutil.copytree(model, tmp_path / "m")
    content = bytearray((tmp_path / "m" / "weights.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "m" / "weights.safetensors").write_bytes(bytes(content))
    assert "weights.safetensors" in run("score", tmp_path / "m", data, "--out", tmp_path / "o", code=5).stderr


def test_an_output_folder_that_cannot_be_written_is_code_4(model, data, tmp_path):
    (tmp_path / "file").write_text("")
    run("score", model, data / "abnormal", "--out", tmp_path / "file" / "out", code=4)


@pytest.mark.slow  # test_faults has the same with smaller processes (T6)
def test_ctrl_c_stops_with_130_and_resume_goes_on(data, tmp_path):
    """A real process, a real signal: the state is left, and the resumed model equals an uninterrupted one."""
    words = [
        sys.executable,
        "-m",
        "umiad",
        "fit",
        data,
        "--detector",
        "egmf",
        "--preset",
        "paper",
        "--size",
        "64",
    ]
    words += ["--weights", "random", "--epochs", "3", "--set", "blocks=1", "--threads", "1", "--out"]
    whole = subprocess.run(
        [*map(str, words), str(tmp_path / "whole")], capture_output=True, text=True, check=True
    )
    assert "epoch 3/3" in whole.stderr
    with subprocess.Popen(
        [*map(str, words), str(tmp_path / "m")], stderr=subprocess.PIPE, text=True
    ) as child:
        for line in child.stderr:
            if "epoch 1/3" in line:
                child.send_signal(signal.SIGINT)
                break
        rest = child.stderr.read()
    assert child.returncode == 130, rest
    assert "--resume" in rest
    assert not (tmp_path / "m").exists()
    subprocess.run([*map(str, words), str(tmp_path / "m"), "--resume"], capture_output=True, check=True)
    assert not (tmp_path / "m.work").exists()
    kept = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "m")]
    assert kept[0] == kept[1]


def test_window_and_frames_are_remembered_by_the_model(tmp_path):
    for index in range(8):
        volume = np.random.default_rng(index).integers(0, 900, (40, 44, 36)).astype(np.int16)
        nifti_file(tmp_path / "set" / "normal" / f"n{index}.nii.gz", volume)
        nifti_file(tmp_path / "set" / "abnormal" / f"a{index}.nii.gz", volume[::-1] // 2)
    words = (
        "--detector",
        "intensity",
        "--size",
        "64",
        "--holdout",
        "0",
        "--frame",
        "1:3",
        "--window",
        "400,800",
    )
    run("fit", tmp_path / "set", "--out", tmp_path / "model", *words, "--axis", "coronal")
    config = json.loads(run("inspect", tmp_path / "model", "--json").stdout)["config"]
    assert config["preprocessing"]["reading"] == {"window": [400.0, 800.0], "axis": "coronal", "nan": "error"}
    assert config["preprocessing"]["frames"] == "1:3"
    run("evaluate", tmp_path / "model", tmp_path / "set", "--out", tmp_path / "report", "--resamples", "20")
    counts = json.loads((tmp_path / "report" / "metrics.json").read_text())["counts"]
    assert counts["n_abnormal"] == 16
    without = run("check-data", tmp_path / "set", code=3).stdout
    assert "holds 36 frames or slices" in without
    assert "n_train" in run("inspect", tmp_path / "model").stdout
    compared = ("--detectors", "intensity,size", "--size", "64", "--frame", "2", "--resamples", "20")
    run("compare", tmp_path / "set", "--out", tmp_path / "compared", *compared, "--weights", "random")
    again = run("compare", tmp_path / "set", "--out", tmp_path / "compared", *compared, "--weights", "random")
    assert "loaded" in again.stdout


@pytest.mark.parametrize("window", ["wide", "1", "1,2,3", "10,0", "nan,4"])
def test_a_window_that_is_none_is_a_usage_error(data, window, tmp_path):
    assert "--window" in run("check-data", data, "--window", window, code=2).stderr


def test_a_pinned_manifest_refuses_any_other(model, data, tmp_path):
    digest = json.loads(run("inspect", model, "--json").stdout)["manifest_sha256"]
    picture = data / "normal" / sorted(os.listdir(data / "normal"))[0]
    run("score", model, picture, "--out", tmp_path / "a", "--manifest-sha256", digest)
    refused = run("score", model, picture, "--out", tmp_path / "b", "--manifest-sha256", "0" * 64, code=5)
    assert "manifest" in refused.stderr
    assert not (tmp_path / "b").exists()
