import hashlib
import http.client
import io
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch

from umiad import weights
from umiad.errors import ConfigError, InputError, ModelFileError
from umiad.tensorfile import to_bytes
from umiad.weights import IMAGENET, Published

SHARED = Path(__file__).resolve().parents[2] / "shared" / "weights"
REAL = SHARED / "resnet18-imagenet1k-v1-layer4-shortcut.safetensors"


def state() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in weights.resnet18_shapes().items()}


@pytest.fixture(scope="module")
def safetensors_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "mine.safetensors"
    path.write_bytes(to_bytes(state()))
    return path


@pytest.fixture(scope="module")
def published_content() -> bytes:
    content = io.BytesIO()
    extra = {"fc.weight": torch.zeros(1000, 512), "bn1.num_batches_tracked": torch.tensor(7)}
    torch.save(state() | extra, content)
    return content.getvalue()


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, published_content: bytes) -> Published:
    digest = hashlib.sha256(published_content).hexdigest()
    fake = Published("imagenet", "https://weights.example/r.pth", len(published_content), digest)
    monkeypatch.setattr(weights, "IMAGENET", fake)
    return fake


class Response(io.BytesIO):
    def __init__(self, content: bytes, url: str) -> None:
        super().__init__(content)
        self.url = url

    def geturl(self) -> str:
        return self.url


def serve(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | Exception, *, url: str = "https://x/r.pth"
) -> list[Any]:
    calls: list[Any] = []

    def urlopen(address: str, *, timeout: float) -> Response:
        calls.append(address)
        if isinstance(answer, Exception):
            raise answer
        return Response(answer, url)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return calls


def small(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"conv1.weight": torch.zeros(64, 3, 7, 7)} | changes


def test_random_needs_nothing(tmp_path: Path) -> None:
    found = weights.resolve("random", cache=tmp_path)
    assert (found.label, found.state, found.sha256) == ("random", None, None)
    assert not list(tmp_path.iterdir())


def test_shapes_are_those_of_resnet18() -> None:
    shapes = weights.resnet18_shapes()
    assert len(shapes) == 100
    trainable = [shape for name, shape in shapes.items() if "running" not in name]
    # torchvision's resnet18 has 11,689,512 parameters, 513,000 of them in the classifier
    assert sum(int(torch.Size(shape).numel()) for shape in trainable) == 11_689_512 - 513_000


def test_a_file_is_labelled_by_its_hash(safetensors_file: Path) -> None:
    found = weights.resolve(str(safetensors_file))
    digest = hashlib.sha256(safetensors_file.read_bytes()).hexdigest()
    assert found.label == f"file:{digest[:8]}"
    assert found.sha256 == digest
    assert found.origin == str(safetensors_file)
    assert found.state is not None
    assert found.state.keys() == weights.resnet18_shapes().keys()


def test_known_hashes_have_labels() -> None:
    assert weights.label_of(IMAGENET.sha256) == "imagenet"
    assert weights.label_of(weights.L4_SHORTCUT_SHA256) == "imagenet-l4shortcut"
    assert IMAGENET.url.startswith("https://")


def test_added_files_are_found_by_label(tmp_path: Path, safetensors_file: Path) -> None:
    assert weights.listing(cache=tmp_path / "none") == []
    entry = weights.add(safetensors_file, cache=tmp_path)
    assert weights.add(safetensors_file, cache=tmp_path) == entry
    assert weights.listing(cache=tmp_path) == [entry]
    assert entry.bytes == safetensors_file.stat().st_size
    assert weights.resolve(entry.label, cache=tmp_path).sha256 == entry.sha256
    assert weights.available(cache=tmp_path) == "random"  # which of one's own files is best is not known


def test_a_damaged_cache_is_seen_and_named(tmp_path: Path, safetensors_file: Path) -> None:
    entry = weights.add(safetensors_file, cache=tmp_path)
    content = bytearray(entry.path.read_bytes())
    content[-1] ^= 1
    entry.path.write_bytes(content)
    assert [each.label for each in weights.listing(cache=tmp_path)] == ["damaged"]
    with pytest.raises(ModelFileError, match=r"damaged, SHA-256 .* delete it, then fetch or add it again"):
        weights.resolve(entry.label, cache=tmp_path)


def test_foreign_things_in_the_cache_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "weights" / "folder.pth").mkdir(parents=True)
    (tmp_path / "weights" / "notes.txt").write_text("mine")
    assert weights.listing(cache=tmp_path) == []


@pytest.mark.parametrize("source", ["imagnet", "imagenet-l4shortcut", "file:00000000"])
def test_an_unknown_label_tells_the_known_ones_and_the_ways_out(tmp_path: Path, source: str) -> None:
    with pytest.raises(InputError, match="neither a weights file nor a label") as caught:
        weights.resolve(source, cache=tmp_path)
    for words in (
        "imagenet",
        "umiad weights fetch",
        "umiad weights add FILE",
        "--weights PATH",
        "--weights random",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("source", ["none.safetensors", "folder/none", "none.pth"])
def test_a_missing_file_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        weights.resolve(source, cache=tmp_path)


class Canary:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".safetensors"])
def test_M1_foreign_pickled_files_are_refused_with_the_way_out(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"foreign{suffix}"
    torch.save({"state_dict": Canary()}, path)
    with pytest.raises(
        ModelFileError, match=r"a zip archive.*convert the file beforehand.*weights_only=True"
    ):
        weights.resolve(str(path))
    with pytest.raises(ModelFileError, match="never unpickles"):
        weights.add(path, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "'bn1.weight' is missing"),
        (
            {"conv1.weight": torch.zeros(64, 1, 7, 7)},
            r"'conv1.weight' is torch.float32 \[64, 1, 7, 7\], expected",
        ),
        (
            {"layer4.1.conv2.weight": torch.zeros(512, 512, 1, 1)},
            r"'layer4.1.conv2.weight' .* expected .*3, 3\]",
        ),
        ({"bn1.weight": torch.zeros(64, dtype=torch.float64)}, "'bn1.weight' is torch.float64"),
        ({"layer5.0.weight": torch.zeros(1)}, "'layer5.0.weight' is unknown"),
    ],
)
def test_what_is_no_resnet18_is_refused(tmp_path: Path, changes: dict[str, torch.Tensor], words: str) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(to_bytes(state() | changes if changes else small()))
    with pytest.raises(ModelFileError, match=words):
        weights.add(path, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_nonfinite_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "nan.safetensors"
    path.write_bytes(to_bytes(small(**{"bn1.weight": torch.full((64,), float("nan"))}), finite=False))
    with pytest.raises(ModelFileError, match="NaN or infinite"):
        weights.resolve(str(path))


def test_the_published_pth_is_read_by_its_hash_alone(
    tmp_path: Path, published: Published, published_content: bytes
) -> None:
    path = tmp_path / "any name"
    path.write_bytes(published_content)
    found = weights.resolve(str(path))
    assert found.label == "imagenet"
    assert found.state is not None
    assert found.state.keys() == weights.resnet18_shapes().keys()  # no classifier, no counters
    assert weights.add(path, cache=tmp_path).path.name == "imagenet.pth"
    assert weights.available(cache=tmp_path) == "imagenet"
    path.write_bytes(published_content + b"\0")
    with pytest.raises(ModelFileError, match="never unpickles"):
        weights.resolve(str(path))


def test_M8_imagenet_is_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Published, published_content: bytes
) -> None:
    calls = serve(monkeypatch, published_content)
    seen: list[tuple[int, int]] = []
    first = weights.resolve("imagenet", cache=tmp_path, progress=lambda now, total: seen.append((now, total)))
    assert calls == [published.url]
    assert seen[-1] == (published.bytes, published.bytes)
    assert seen == sorted(seen)
    again = weights.fetch(cache=tmp_path)
    assert (again.sha256, again.label) == (first.sha256, "imagenet")
    assert weights.resolve("imagenet", cache=tmp_path, download=False).label == "imagenet"
    assert len(calls) == 1


def test_a_damaged_download_in_the_cache_is_replaced_by_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Published, published_content: bytes
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "imagenet.pth").write_bytes(published_content[:-1])
    serve(monkeypatch, published_content)
    with pytest.raises(ModelFileError, match="damaged"):
        weights.resolve("imagenet", cache=tmp_path)
    assert weights.fetch(cache=tmp_path).label == "imagenet"
    assert weights.resolve("imagenet", cache=tmp_path).label == "imagenet"


@pytest.mark.parametrize("answer", ["other", "short", "endless"])
def test_M8_a_mismatch_keeps_and_reads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(weights, "IMAGENET", Published("imagenet", "https://x/r.pth", 1000, "0" * 64))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded before the hash was known"))
    serve(monkeypatch, {"other": bytes(1000), "short": bytes(10), "endless": bytes(64 << 20)}[answer])
    with pytest.raises(ModelFileError, match=r"expected 1000 bytes with 0000.*nothing was kept"):
        weights.fetch(cache=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "failure", [URLError("no network"), TimeoutError("slow"), http.client.IncompleteRead(b"")], ids=str
)
def test_M8_no_network_tells_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    serve(monkeypatch, failure)
    with pytest.raises(InputError, match="download failed") as caught:
        weights.resolve("imagenet", cache=tmp_path)
    for words in ("umiad weights fetch", "umiad weights add FILE", "--weights PATH", "--weights random"):
        assert words in str(caught.value)


def test_M8_a_redirect_away_from_https_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, b"", url="http://x/r.pth")
    with pytest.raises(ModelFileError, match="without https"):
        weights.fetch(cache=tmp_path)


def test_M8_a_pickle_from_the_server_is_neither_loaded_nor_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Published
) -> None:
    hostile = io.BytesIO()
    torch.save({"state_dict": Canary()}, hostile)
    serve(monkeypatch, hostile.getvalue())
    with pytest.raises(ModelFileError, match="nothing was kept"):
        weights.resolve("imagenet", cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_M8_what_is_pinned_is_one_https_address() -> None:
    assert IMAGENET.url.startswith("https://")
    assert len(IMAGENET.sha256) == len(weights.L4_SHORTCUT_SHA256) == 64


def test_downloading_can_be_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = serve(monkeypatch, b"")
    with pytest.raises(InputError, match=r"downloading is off.*umiad weights fetch"):
        weights.resolve("imagenet", cache=tmp_path, download=False)
    assert not calls


def test_the_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("UMIAD_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    expected = {
        "linux": ".cache/umiad",
        "darwin": "Library/Caches/umiad",
        "win32": "AppData/Local/umiad/cache",
    }
    for system, place in expected.items():
        monkeypatch.setattr(sys, "platform", system)
        assert weights.cache_folder() == tmp_path / place
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert weights.cache_folder() == tmp_path / "xdg" / "umiad"
    monkeypatch.setenv("UMIAD_CACHE", str(tmp_path / "own"))
    assert weights.cache_folder() == tmp_path / "own"
    assert weights.listing() == []


@pytest.mark.real
@pytest.mark.skipif(not REAL.exists(), reason="the weights file beside the repository is absent")
def test_the_real_file_has_its_label(tmp_path: Path) -> None:
    entry = weights.add(REAL, cache=tmp_path)
    assert entry.label == "imagenet-l4shortcut" == weights.available(cache=tmp_path)
    assert entry.path.name == "imagenet-l4shortcut.safetensors"
    assert weights.resolve(entry.label, cache=tmp_path).state is not None


@pytest.mark.parametrize(("backbone", "millions"), [("resnet34", 21_797_672), ("resnet50", 25_557_032)])
def test_shapes_of_other_backbones(backbone: str, millions: int) -> None:
    shapes = weights.backbone_shapes(backbone)
    trainable = [shape for name, shape in shapes.items() if "running" not in name]
    classifier = 513_000 if backbone == "resnet34" else 2_049_000
    assert sum(int(torch.Size(shape).numel()) for shape in trainable) == millions - classifier


def test_another_backbone_takes_a_file_that_fits_it(tmp_path: Path) -> None:
    state = {name: torch.zeros(shape) for name, shape in weights.backbone_shapes("resnet34").items()}
    path = tmp_path / "resnet34.safetensors"
    path.write_bytes(to_bytes(state))
    found = weights.resolve(str(path), backbone="resnet34")
    assert found.label.startswith("file:")
    assert found.state is not None
    assert found.state.keys() == state.keys()
    with pytest.raises(ModelFileError, match="not a ResNet50"):
        weights.resolve(str(path), backbone="resnet50")
    with pytest.raises(ModelFileError, match="not a ResNet18"):
        weights.resolve(str(path))


def test_another_backbone_without_a_file_says_what_it_takes(tmp_path: Path) -> None:
    assert weights.resolve("random", backbone="resnet50", cache=tmp_path).state is None
    with pytest.raises(InputError, match="resnet34 takes 'random' or a .safetensors file"):
        weights.resolve("imagenet", backbone="resnet34", cache=tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        weights.resolve("random", backbone="resnet19", cache=tmp_path)


def test_the_tiny_backbone_is_for_tests_and_takes_random_weights_only(tmp_path: Path) -> None:
    assert weights.resolve("random", backbone=weights.TINY, cache=tmp_path).state is None
    for source in ("imagenet", str(tmp_path / "mine.safetensors")):
        with pytest.raises(InputError, match="resnet-tiny is for tests and takes 'random' only"):
            weights.resolve(source, backbone=weights.TINY, cache=tmp_path)
    assert weights.TINY not in weights.BLOCKS
