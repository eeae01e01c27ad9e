import subprocess
import sys

import pytest

import umiad
from umiad.errors import InputError, MissingExtraError, require


def test_an_input_error_names_file_reason_and_remedy():
    error = InputError("scan.png", "2 channels, expected 1, 3 or 4", "convert it to grey")
    assert str(error) == "scan.png: 2 channels, expected 1, 3 or 4 (hint: convert it to grey)"
    assert (error.path, error.exit_code) == ("scan.png", 3)


def test_a_missing_extra_names_the_command_that_installs_it():
    with pytest.raises(
        MissingExtraError, match=r"writing SEG needs no_such_module: pip install 'umiad\[dicom\]'"
    ):
        require("no_such_module", extra="dicom", purpose="writing SEG")


def test_require_returns_the_module():
    assert require("json", extra="none", purpose="tests").loads("1") == 1


def test_at_most_nine_public_names():
    assert len(umiad.__all__) <= 9
    assert set(umiad.__all__) <= set(dir(umiad))
    with pytest.raises(AttributeError, match="nothing_there"):
        umiad.nothing_there  # noqa: B018


@pytest.mark.parametrize(
    "code", ["import umiad", "import umiad.cli.app", "import umiad.types, umiad.config, umiad.data"]
)
def test_importing_leaves_torch_and_other_heavy_packages_out(code):
    heavy = ("torch", "monai", "lightning", "matplotlib", "sklearn")
    check = f"{code}; import sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
