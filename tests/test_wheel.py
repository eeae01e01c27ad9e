"""The wheel, built and used as a stranger would: a clean environment, no source tree in sight."""

import json
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SCRIPT = """
import json, numpy as np, umiad
stack = np.random.default_rng(0).random((24, 64, 64), dtype=np.float32)
model = umiad.fit(umiad.build("egmf", preset="paper", weights="random", size=64,
                              settings={"blocks": 1, "training": {"epochs": 1}}), stack, out="model")
print(json.dumps({"file": umiad.__file__, "score": umiad.load("model").score(stack[0])[0].image_score}))
"""


def test_what_scoring_without_torch_needs_is_a_part_of_what_umiad_needs():
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = {*facts["dependencies"], *facts["optional-dependencies"]["onnx"]}
    lines = (ROOT / "requirements-scoring.txt").read_text(encoding="utf-8").splitlines()
    wanted = {line for line in lines if line and not line.startswith("#")}
    assert wanted <= known
    assert not any(line.startswith(("torch", "lightning", "FrEIA")) for line in wanted)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_installs_and_runs_in_a_clean_environment(tmp_path):
    def run(*words):
        return subprocess.run(
            list(map(str, words)), cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    [wheel] = tmp_path.glob("umiad-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "umiad/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "benchmarks", "examples")) for name in names)
    venv.create(tmp_path / "clean", with_pip=True)
    folder = tmp_path / "clean" / ("Scripts" if sys.platform == "win32" else "bin")
    pip = [folder / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    run(*pip, "torch")
    run(*pip, wheel)
    assert run(folder / "umiad", "--version").startswith("umiad 0.")
    assert "check-data" in run(folder / "umiad", "--help")
    result = json.loads(run(folder / "python", "-c", SCRIPT).splitlines()[-1])
    assert str(tmp_path) in result["file"]
    assert result["score"] == pytest.approx(result["score"])
