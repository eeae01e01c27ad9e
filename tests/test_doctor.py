import hashlib
import importlib.metadata
import importlib.util
import io
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from umiad import doctor, weights
from umiad.doctor import Check, diagnose, render, to_json


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UMIAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions to pretend, None = not installed."""
    pretended: dict[str, str | None] = {}
    original = importlib.metadata.version

    def version(name: str) -> str:
        if name not in pretended:
            return original(name)
        if (found := pretended[name]) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return pretended


def by_name(name: str) -> list[Check]:
    return [check for check in diagnose() if check.name == name]


def test_every_topic_is_there_and_has_words() -> None:
    checks = diagnose()
    topics = {
        "python",
        "umiad",
        "packages",
        "torch",
        "lightning",
        "torchvision",
        "devices",
        "weights",
        "memory",
    }
    assert topics <= {check.name for check in checks}
    assert all(check.detail and check.status in doctor.STATUSES for check in checks)
    assert all(check.remedy for check in checks if check.status == "error")


def test_this_installation_is_sound() -> None:
    status = {check.name: check.status for check in diagnose()}
    sound = ("python", "umiad", "packages", "torch", "lightning", "torchvision", "devices")
    assert {name: status[name] for name in sound} == dict.fromkeys(sound, "ok")
    assert not [name for name in status if name.startswith("package ")]


def test_a_missing_and_an_old_package_are_errors_with_a_command(versions: dict[str, str | None]) -> None:
    versions.update({"nibabel": None, "pillow": "9.0.0"})
    [missing], [old] = by_name("package nibabel"), by_name("package pillow")
    assert missing.detail.startswith("not installed, expected >=")
    assert old.detail.startswith("9.0.0, expected >=")
    assert old.remedy.startswith("pip install 'pillow>=")
    assert (missing.status, old.status) == ("error", "error")


@pytest.mark.parametrize("package", ["lightning", "pytorch-lightning"])
def test_malicious_uploads_are_called_that(versions: dict[str, str | None], package: str) -> None:
    versions[package] = "2.6.3"
    [check] = by_name(package)
    assert check.status == "error"
    assert "malicious" in check.detail
    assert "uninstall" in check.remedy


def put_torchvision(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    importlib.invalidate_caches()


def test_a_broken_torchvision_is_found_without_importing_it_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_torchvision(tmp_path, monkeypatch, "raise RuntimeError('operator torchvision::nms does not exist')")
    [check] = by_name("torchvision")
    assert check.status == "error"
    assert "operator torchvision::nms does not exist" in check.detail
    assert "pip uninstall torchvision" in check.remedy


def test_a_torchvision_that_works_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_torchvision(tmp_path, monkeypatch, "")
    assert [check.status for check in by_name("torchvision")] == ["ok"]


def test_a_torchvision_that_hangs_or_dies_silently_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())

    def hang(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 60)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "not done after" in by_name("torchvision")[0].detail
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-11, stderr=b""))
    [check] = by_name("torchvision")
    assert (check.status, "no message" in check.detail) == ("error", True)


def test_a_probe_that_breaks_is_one_line_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(torch, "get_num_threads", broken)
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    checks = {check.name: check for check in diagnose()}
    for name in ("torch", "devices"):
        assert checks[name].status == "error"
        assert "OSError: libcudart.so" in checks[name].detail
    assert checks["packages"].status == "ok"


def test_accelerators_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(name="Some GPU", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert by_name("devices")[0].detail == "cpu, cuda:0 (Some GPU, 80 GiB), mps"


def test_weights_in_the_cache(empty_cache: Path) -> None:
    [none] = by_name("weights")
    assert (none.status, none.remedy) == ("warning", weights.WAYS_OUT)
    (empty_cache / "weights").mkdir(parents=True)
    (empty_cache / "weights" / "imagenet.pth").write_bytes(b"cut off")
    damaged, still_none = by_name("weights")
    assert damaged.detail.endswith("imagenet.pth is damaged")
    assert still_none.detail.startswith("no pretrained weights")


def test_intact_weights_are_named(empty_cache: Path) -> None:
    content = b"not parsed here, hashed only"
    digest = hashlib.sha256(content).hexdigest()
    (empty_cache / "weights").mkdir(parents=True)
    (empty_cache / "weights" / f"file-{digest[:8]}.safetensors").write_bytes(content)
    [check] = by_name("weights")
    assert (check.status, check.detail) == ("ok", f"file:{digest[:8]} in {empty_cache}")


@pytest.mark.parametrize(("free", "status"), [(1 << 20, "warning"), (1 << 40, "ok"), (None, "warning")])
def test_disk_space(monkeypatch: pytest.MonkeyPatch, free: int | None, status: str) -> None:
    monkeypatch.setattr("umiad.diskfile.free_bytes", lambda _: free)
    assert {check.status for check in diagnose() if check.name.startswith("disk")} == {status}


@pytest.mark.parametrize(("free", "status"), [(1 << 20, "warning"), (1 << 40, "ok"), (None, "ok")])
def test_memory(monkeypatch: pytest.MonkeyPatch, free: int | None, status: str) -> None:
    monkeypatch.setattr(doctor, "free_memory", lambda: free)
    assert by_name("memory")[0].status == status


def test_free_memory_reads_linux_and_gives_up_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    1234 kB\n")
    assert doctor.free_memory(tmp_path / "meminfo") == 1234 * 1024
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\n")
    assert doctor.free_memory(tmp_path / "meminfo") is None
    assert doctor.free_memory(tmp_path / "none") is None


def test_reader_limits_are_shown_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Limits:
        max_pixels: int = 40_000_000

    monkeypatch.setattr("umiad.io.Limits", Limits, raising=False)
    assert by_name("ceilings, images")[0].detail == "max_pixels 40000000"
    assert "2147483648 bytes" in by_name("ceilings, models")[0].detail


def test_missing_extras_are_fine_and_say_how_to_get_them(versions: dict[str, str | None]) -> None:
    versions["hypothesis"] = None
    [check] = by_name("extra dev")
    assert (check.status, check.detail) == ("ok", "not installed: hypothesis")
    assert "pip install 'umiad[dev]'" in check.remedy


def test_an_old_python_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "sys", SimpleNamespace(version_info=(3, 9), executable="python"))
    assert [check.status for check in doctor._python()] == ["error"]


def test_render_shows_everything_and_no_text_is_markup() -> None:
    checks = [Check("a", "ok", "[red]plain[/nothing]"), Check("b", "error", "broken", "mend it")]
    out = io.StringIO()
    render(checks, Console(file=out, width=80))
    for words in ("[red]plain[/nothing]", "error", "broken", "-> mend it"):
        assert words in out.getvalue()


def test_json_has_the_worst_status() -> None:
    ok, warning, error = (Check("x", status, "y") for status in doctor.STATUSES)
    cases: list[tuple[list[Check], str]] = [
        ([], "ok"),
        ([ok], "ok"),
        ([warning, ok], "warning"),
        ([ok, error, warning], "error"),
    ]
    for checks, worst in cases:
        found: dict[str, Any] = json.loads(json.dumps(to_json(checks)))
        assert found["status"] == worst
        assert len(found["checks"]) == len(checks)
