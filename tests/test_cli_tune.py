"""`umiad tune` as users meet it: outputs, exit codes, files."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from make import tiny_set
from umiad import tuning
from umiad.cli.app import app
from umiad.errors import TrainingError

EXAMPLE = Path(__file__).parents[1] / "examples" / "tune.toml"
FAST = ["--size", "64", "--weights", "random", "--per-image", "1", "--folds", "2"]


def run(*words, code=0):
    result = CliRunner().invoke(app, ["tune", *map(str, words)])
    assert result.exit_code == code, result.output + result.stderr
    return result


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("data"), n_normal=14, n_abnormal=3, size=80)


def test_the_help_says_what_is_read_and_what_the_numbers_are_not():
    text = " ".join(run("--help").stdout.split())
    for words in (
        "NORMAL images of the training part",
        "and not used",
        "not an estimate of accuracy",
        "--set",
    ):
        assert words in text


def test_presets_and_settings_are_compared_and_repeating_loads(data, tmp_path):
    words = [data, "--out", tmp_path / "t", "--detector", "intensity", "--set", "sigma=0", *FAST]
    result = run(*words)
    lines = result.stdout.splitlines()
    assert lines[0].split() == [
        *(
            "candidate",
            "rank_score",
            "detection",
            "AUROC",
            "pixel",
            "AUROC",
            "AUPRO",
            "gap",
            "fit",
            "s",
            "result",
        )
    ]
    assert {line.split()[0] for line in lines[1:3]} == {"default", "default+sigma=0"}
    assert "computed" in lines[1]
    assert "not an estimate of accuracy" in result.stdout
    assert f"best: umiad fit {data} --out MODEL --detector intensity" in result.stdout.replace("\n", "")
    assert f"report: {tmp_path / 't' / 'report.html'}" in result.stdout.replace("\n", "")
    assert {"report.html", "tuning.json", "tuning.md", "best.toml"} <= set(os.listdir(tmp_path / "t"))
    again = run(*words)
    assert again.stdout.count("loaded") == 2
    assert "computed" not in again.stdout


def test_a_file_of_candidates_and_machine_readable_output(data, tmp_path):
    result = run(data, "--out", tmp_path / "t", "--candidates", EXAMPLE, "--json", *FAST)
    values = json.loads(result.stdout)
    assert values == json.loads((tmp_path / "t" / "tuning.json").read_text())
    assert {each["name"] for each in values["candidates"]} == {
        *("padim-quick", "posgauss-sharp", "posgauss-smooth", "brightness")
    }
    assert not values["failures"]


def test_the_best_can_be_tuned_again(data, tmp_path):
    run(data, "--out", tmp_path / "t", "--detector", "intensity", *FAST)
    again = run(data, "--out", tmp_path / "u", "--candidates", tmp_path / "t" / "best.toml", "--json", *FAST)
    assert json.loads(again.stdout)["best"]["name"] == "default"


def test_a_candidate_that_fails_gives_exit_code_1_and_the_others_their_report(data, tmp_path, monkeypatch):
    real = tuning.fit_model

    def fit_model(detector, *rest, **words):
        if detector.info.name == "posgauss":
            raise TrainingError("the covariance has no inverse")
        return real(detector, *rest, **words)

    monkeypatch.setattr(tuning, "fit_model", fit_model)
    result = run(data, "--out", tmp_path / "t", "--candidates", EXAMPLE, *FAST, code=1)
    assert "failed: the covariance has no inverse" in " ".join(result.stdout.split())
    assert result.stderr.count("failed: the covariance") == 2
    page = (tmp_path / "t" / "report.html").read_text(encoding="utf-8")
    assert "posgauss-sharp failed" in page
    assert "padim-quick" in page


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["DATA", "--out", "OUT", "--detector", "posgaus"], 2, "did you mean 'posgauss'"),
        (["DATA", "--out", "OUT", "--detector", "padim", "--preset", "quik"], 2, "did you mean 'quick'"),
        (["DATA", "--out", "OUT", "--detector", "padim", "--set", "chanels=2"], 2, "did you mean 'channels'"),
        (["DATA", "--out", "OUT", "--detector", "padim", "--set", "channels"], 2, "expected name=value"),
        (["DATA", "--out", "OUT", "--detector", "padim", "--set", "size=64"], 2, "no setting of a candidate"),
        (["DATA", "--out", "OUT", "--candidates", "EXAMPLE", "--set", "a=1"], 2, "leave out"),
        (["DATA", "--out", "OUT", "--candidates", "EXAMPLE", "--detector", "padim"], 2, "leave out"),
        (["DATA", "--out", "OUT", "--candidates", "NOWHERE"], 3, "NOWHERE"),
        (["NOWHERE", "--out", "OUT", "--detector", "intensity"], 3, "NOWHERE"),
        (["DATA", "--out", "OUT", "--detector", "intensity", "--folds", "9"], 3, "folds need at least 18"),
        (["DATA", "--out", "OUT", "--folds", "1"], 2, "folds"),
        (["DATA", "--detector", "intensity"], 2, "--out"),
        (["DATA", "--out", "OUT", "--size", "70"], 2, "nearest is 64"),
    ],
)
def test_errors_have_their_exit_code_and_say_what_to_do(data, tmp_path, words, code, said):
    places = {"DATA": data, "OUT": tmp_path / "out", "NOWHERE": tmp_path / "NOWHERE", "EXAMPLE": EXAMPLE}
    sized = [] if "--size" in words else ["--size", "64"]
    result = run(*(places.get(word, word) for word in words), "--weights", "random", *sized, code=code)
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_code_4(data, tmp_path):
    (tmp_path / "file").write_text("")
    run(data, "--out", tmp_path / "file" / "t", "--detector", "intensity", *FAST, code=4)


@pytest.mark.slow
def test_ctrl_c_stops_with_130_and_repeating_goes_on(data, tmp_path):
    """A real process, a real signal: the first candidate is kept, the second is computed later."""
    (tmp_path / "c.toml").write_text(
        '[[candidate]]\nname = "first"\ndetector = "intensity"\n'
        '[[candidate]]\nname = "second"\ndetector = "egmf"\npreset = "paper"\n'
        "settings = { blocks = 1, training.epochs = 2 }\n"
    )
    words = [sys.executable, "-m", "umiad", "tune", data, "--out", tmp_path / "t", "--threads", "1"]
    words = [*map(str, words), "--candidates", str(tmp_path / "c.toml"), *FAST]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as child:
        for line in child.stderr:
            if "epoch 1/2" in line:
                child.send_signal(signal.SIGINT)
                break
        rest = child.stderr.read()
    assert child.returncode == 130, rest
    assert "repeat the command to go on" in rest
    assert os.listdir(tmp_path / "t") == ["candidates"]
    assert sorted(os.listdir(tmp_path / "t" / "candidates")) == ["first.json", "first.npy"]
    result = run(*words[4:], "--json")
    values = {each["name"]: each for each in json.loads(result.stdout)["candidates"]}
    assert set(values) == {"first", "second"}
    assert values["second"]["gap"] is not None
    assert "loaded" in result.stderr
