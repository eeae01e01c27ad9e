"""What `umiad doctor` looks at: versions, devices, weights, space, ceilings, and what is known to break.

Every probe runs apart from the others: one that fails, for whatever reason, becomes a line of the report.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from umiad import __version__, diskfile, tensorfile, weights

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.console import Console

Status = Literal["ok", "warning", "error"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "error")
COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}
MALICIOUS_LIGHTNING = ("2.6.2", "2.6.3")
GIB = 1 << 30
LOW_DISK, LOW_MEMORY = 2 * GIB, 2 * GIB
IMPORT_SECONDS = 60


@dataclass(frozen=True)
class Check:
    """One finding about the installation; `remedy` is what to do about it (may be empty)."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def diagnose() -> list[Check]:
    """Look at the installation; takes seconds, changes nothing, uses no network, never raises."""
    probes: dict[str, Callable[[], Iterable[Check]]] = {
        "python": _python,
        "umiad": _umiad,
        "packages": _packages,
        "torch": _torch,
        "lightning": _lightning,
        "torchvision": _torchvision,
        "devices": _devices,
        "weights": _weights,
        "disk": _disk,
        "memory": _memory,
        "ceilings": _ceilings,
        "extras": _extras,
    }
    return [check for name, probe in probes.items() for check in _guarded(name, probe)]


def render(checks: Sequence[Check], console: Console) -> None:
    """Show the checks as a table, remedies below what they belong to."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("check", "status", "detail"):
        table.add_column(title, overflow="fold", no_wrap=title == "status")
    for check in checks:
        detail = Text(check.detail)
        if check.remedy:
            detail.append(f"\n-> {check.remedy}", style="bold")
        table.add_row(Text(check.name), Text(check.status, style=COLOURS[check.status]), detail)
    console.print(table)


def to_json(checks: Sequence[Check]) -> dict[str, object]:
    """The checks as one JSON object; `status` is the worst of all."""
    worst = max((check.status for check in checks), key=STATUSES.index, default="ok")
    return {"status": worst, "checks": [dataclasses.asdict(check) for check in checks]}


def _guarded(name: str, probe: Callable[[], Iterable[Check]]) -> list[Check]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(probe())
    except Exception as error:  # a broken package may raise anything; the report goes on
        detail = f"could not be examined: {type(error).__name__}: {error}"
        return [Check(name, "error", detail, "reinstall umiad in a fresh environment: pip install umiad")]


def _python() -> Iterable[Check]:
    version = platform.python_version()
    status: Status = "ok" if sys.version_info >= (3, 11) else "error"
    remedy = "" if status == "ok" else "umiad needs Python 3.11 or newer"
    yield Check("python", status, f"{version} on {platform.platform()}, {os.cpu_count()} CPU cores", remedy)


def _umiad() -> Iterable[Check]:
    yield Check("umiad", "ok", f"{__version__} in {Path(__file__).parent}")


def _packages() -> Iterable[Check]:
    """One line for all core dependencies that are as required, one for each that is not."""
    fine: list[str] = []
    for requirement in _requirements(""):
        found = _version(requirement.name)
        if found is not None and requirement.specifier.contains(found, prereleases=True):
            fine.append(f"{requirement.name} {found}")
            continue
        detail = f"{found or 'not installed'}, expected {requirement.specifier or 'any version'}"
        yield Check(f"package {requirement.name}", "error", detail, f"pip install '{requirement}'")
    yield Check("packages", "ok", ", ".join(fine))


def _torch() -> Iterable[Check]:
    import torch

    yield Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _lightning() -> Iterable[Check]:
    for package in ("lightning", "pytorch-lightning"):
        if (found := _version(package)) in MALICIOUS_LIGHTNING:
            remedy = "uninstall it at once and change every secret this machine holds (GHSA-w37p-236h-pfx3)"
            yield Check(package, "error", f"{found} was a malicious upload", remedy)
        elif found is not None:
            yield Check(package, "ok", f"{found}, not one of the malicious uploads {MALICIOUS_LIGHTNING}")


def _torchvision() -> Iterable[Check]:
    """A torchvision that does not fit torch breaks importing lightning; none at all is fine."""
    if importlib.util.find_spec("torchvision") is None:
        yield Check("torchvision", "ok", "not installed, and not needed")
        return
    problem = _import_problem("torchvision")
    if not problem:
        yield Check("torchvision", "ok", "installed and importable; umiad does not use it")
        return
    detail = f"installed, but importing it fails, which breaks training: {problem}"
    yield Check("torchvision", "error", detail, "pip uninstall torchvision (umiad does not need it)")


def _import_problem(module: str) -> str:
    """Import a module in a process of its own; the last line of what went wrong, or an empty text."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=IMPORT_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"not done after {IMPORT_SECONDS} seconds"
    if done.returncode == 0:
        return ""
    return (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]


def _devices() -> Iterable[Check]:
    import torch

    found = ["cpu"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            found.append(f"cuda:{index} ({facts.name}, {facts.total_memory / GIB:.0f} GiB)")
    if torch.backends.mps.is_available():
        found.append("mps")
    yield Check("devices", "ok", ", ".join(found))


def _weights() -> Iterable[Check]:
    folder = weights.cache_folder()
    entries = weights.listing()
    for entry in entries:
        if entry.label == weights.DAMAGED:
            remedy = "delete it, then `umiad weights fetch` or `umiad weights add FILE`"
            yield Check("weights", "warning", f"{entry.path} is damaged", remedy)
    labels = [entry.label for entry in entries if entry.label != weights.DAMAGED]
    if labels:
        yield Check("weights", "ok", f"{', '.join(labels)} in {folder}")
    else:
        yield Check("weights", "warning", f"no pretrained weights in {folder}", weights.WAYS_OUT)


def _disk() -> Iterable[Check]:
    for name, folder in (("disk, working folder", Path.cwd()), ("disk, cache", weights.cache_folder())):
        free = diskfile.free_bytes(folder)
        if free is None:
            yield Check(name, "warning", f"free space of {folder} is unknown")
            continue
        low = free < LOW_DISK
        remedy = f"models and caches want {LOW_DISK / GIB:.0f} GiB; free some space" if low else ""
        yield Check(name, "warning" if low else "ok", f"{free / GIB:.1f} GiB free for {folder}", remedy)


def _memory() -> Iterable[Check]:
    free = free_memory()
    if free is None:
        yield Check("memory", "ok", "free memory is unknown on this platform")
        return
    low = free < LOW_MEMORY
    remedy = "close other programs, or fit at a smaller --size" if low else ""
    yield Check("memory", "warning" if low else "ok", f"{free / GIB:.1f} GiB free", remedy)


def free_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that a process can still get, by Linux's own estimate; None on other platforms."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _ceilings() -> Iterable[Check]:
    model = f"model file {tensorfile.MAX_FILE_BYTES} bytes, weights file {weights.MAX_BYTES} bytes"
    yield Check("ceilings, models", "ok", model)
    make_limits = getattr(import_module("umiad.io"), "Limits", None)
    if make_limits is None:
        return
    limits = make_limits()
    facts = ", ".join(f"{each.name} {getattr(limits, each.name)}" for each in dataclasses.fields(limits))
    yield Check("ceilings, images", "ok", facts)


def _extras() -> Iterable[Check]:
    for extra in metadata.metadata("umiad").get_all("Provides-Extra") or []:
        wanted = _requirements(extra)
        missing = [each.name for each in wanted if _version(each.name) is None]
        detail = f"not installed: {', '.join(missing)}" if missing else "installed"
        remedy = f"if you want it: pip install 'umiad[{extra}]'" if missing else ""
        yield Check(f"extra {extra}", "ok", detail, remedy)


def _requirements(extra: str) -> list[Requirement]:
    """The declared requirements of the core (extra "") or of one extra, without the core's."""
    from packaging.requirements import Requirement

    declared = [Requirement(text) for text in metadata.requires("umiad") or []]
    core = [each for each in declared if each.marker is None or each.marker.evaluate({"extra": ""})]
    if not extra:
        return core
    chosen = [each for each in declared if each.marker and each.marker.evaluate({"extra": extra})]
    return [each for each in chosen if each not in core and each.name != "umiad"]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
