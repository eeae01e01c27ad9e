import contextlib
import hashlib
import io
import json
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umiad import tensorfile
from umiad.errors import DiskError, InputError, ModelFileError
from umiad.tensorfile import check_header, from_bytes, read_tensors, to_bytes, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    return {
        "float32": torch.linspace(-1, 1, 7),
        "strided": base.T,
        "shared": base[1:3],
        "counter": torch.tensor(3),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([[True], [False]]),
        "empty": torch.zeros(0, 4),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "größe/λ": torch.ones(1, requires_grad=True),
    }


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    digest = write_tensors(tmp_path / "t.safetensors", tensors())
    found = read_tensors(tmp_path / "t.safetensors", sha256=digest)
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        found[name].zero_() if found[name].numel() else None  # writable memory of its own


def test_equal_tensors_give_equal_bytes_in_any_order() -> None:
    backwards = dict(reversed(tensors().items()))
    assert to_bytes(tensors()) == to_bytes(backwards)
    assert from_bytes(to_bytes({}), source="x") == {}


def test_saving_does_not_touch_the_tensors() -> None:
    given_tensors = tensors()
    to_bytes(given_tensors)
    assert given_tensors["größe/λ"].requires_grad
    assert not given_tensors["strided"].is_contiguous()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"a": torch.tensor([1.0, float("nan"), float("inf")])}, "'a' has 2 values NaN or infinite"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "dtype torch.complex64, expected one of"),
        ({"a": [1.0]}, "'a' (list): expected a named torch.Tensor"),
        ({"__metadata__": torch.ones(2)}, "expected a named torch.Tensor"),
        ({"a" * tensorfile.MAX_HEADER_BYTES: torch.ones(2)}, "the ceiling is"),
    ],
)
def test_what_would_not_load_is_not_written(tmp_path: Path, bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        write_tensors(tmp_path / "t.safetensors", bad)
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_infinity_only_where_it_is_allowed() -> None:
    content = to_bytes({"best": torch.tensor(float("inf"))}, finite=False)
    assert from_bytes(content, source="x", finite=False)["best"].isinf()
    with pytest.raises(ModelFileError, match="'best' has 1 values NaN or infinite, expected none"):
        from_bytes(content, source="x")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_values_whose_sum_overflows_are_taken_and_what_is_hidden_among_them_is_not(
    dtype: torch.dtype,
) -> None:
    most = torch.finfo(dtype).max
    large = torch.full((64,), most, dtype=dtype)
    assert from_bytes(to_bytes({"a": large}), source="x")["a"].equal(large)
    large[7], large[8] = float("inf"), float("-inf")
    with pytest.raises(ModelFileError, match="'a' has 2 values NaN or infinite"):
        from_bytes(to_bytes({"a": large}, finite=False), source="x")


def test_missing_wrong_hash_and_unwritable(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(InputError, match="no such file"):
        read_tensors(path)
    write_tensors(path, {"a": torch.ones(2)})
    with pytest.raises(ModelFileError, match=r"expected 0000.*damaged or was altered"):
        read_tensors(path, sha256="0" * 64)
    with pytest.raises(DiskError):
        write_tensors(path / "below-a-file", {"a": torch.ones(2)})


class Canary:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("unpickled",)


def foreign_files() -> dict[str, bytes]:
    torch_zip, legacy, objects = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"a": Canary()}, torch_zip)
    torch.save({"a": Canary()}, legacy, _use_new_zipfile_serialization=False)
    np.save(objects, np.array([Canary()], dtype=object), allow_pickle=True)
    pickles = {f"pickle{n}": pickle.dumps(Canary(), protocol=n) for n in range(pickle.HIGHEST_PROTOCOL + 1)}
    compressed = zlib.compress(pickle.dumps(Canary()))
    polyglot = pickle.dumps(Canary()) + torch_zip.getvalue()
    named = {"zip": torch_zip, "legacy": legacy, "npy": objects}
    return (
        {name: each.getvalue() for name, each in named.items()}
        | pickles
        | {
            "zlib": compressed,
            "polyglot": polyglot,
            "gzip": b"\x1f\x8b\x08" + bytes(30),
            "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(30),
            "text": b"version https://git-lfs.github.com/spec/v1\n",
            "nothing": b"",
            "tiny": b"abc",
        }
    )


@pytest.mark.parametrize("name", sorted(foreign_files()))
def test_M1_foreign_formats_are_refused_and_never_unpickled(tmp_path: Path, name: str) -> None:
    path = tmp_path / "renamed.safetensors"
    path.write_bytes(foreign_files()[name])
    with pytest.raises(ModelFileError, match="never unpickles; convert the file beforehand"):
        read_tensors(path)


def test_M1_the_kind_of_foreign_file_is_named() -> None:
    with pytest.raises(ModelFileError, match="this is a zip archive"):
        from_bytes(foreign_files()["zip"], source="x")
    with pytest.raises(ModelFileError, match="this is a pickled object"):
        from_bytes(foreign_files()["pickle4"], source="x")


def test_a_header_length_that_looks_like_a_pickle_is_fine() -> None:
    text = json.dumps({}).encode().ljust(0x0280)  # little-endian 80 02: the start of a pickle, protocol 2
    assert file_of(text).startswith(b"\x80\x02")
    assert from_bytes(file_of(text), source="x") == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (struct.pack("<Q", 2**63) + b"{}", "header of 9223372036854775808 bytes"),
        (struct.pack("<Q", 200 << 20) + b"{}", "the ceiling is 1048576 bytes and the file has 10 bytes"),
        (struct.pack("<Q", 3) + b"{}", "header of 3 bytes"),
        (file_of(b""), "not acceptable JSON"),
        (file_of(b"\xff"), "not UTF-8"),
        (file_of(b"[" * 10_000), "nested too deep"),
        (file_of([]), "a JSON list at the top"),
        (file_of(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":0}'), "'a' appears twice"),
        (file_of({"__metadata__": {"a": 1}}), "__metadata__ must map names to strings"),
        (file_of({"__metadata__": []}), "__metadata__ must map names to strings"),
        (file_of({"a": 3}), "malformed header entry"),
        (file_of({"a": entry(more=1)}, bytes(8)), "malformed header entry"),
        (file_of({"a": entry(dtype="F8_E5M2")}, bytes(8)), "dtype 'F8_E5M2', expected one of"),
        (file_of({"a": entry(dtype=["F32"])}, bytes(8)), "expected one of"),
        (file_of({"a": entry(shape=2)}, bytes(8)), "shape must be"),
        (file_of({"a": entry(shape=[2.0])}, bytes(8)), "shape must be"),
        (file_of({"a": entry(shape=[True, 2])}, bytes(8)), "shape must be"),
        (file_of({"a": entry(shape=[-1, -2])}, bytes(8)), "shape must be"),
        (file_of({"a": entry(shape=[2**62, 4])}, bytes(8)), "shape must be"),
        (file_of({"a": entry(shape=[2] + [1] * 16)}, bytes(8)), "shape must be"),
        (file_of({"a": entry(shape=[2**31, 2**31, 2**31])}, bytes(8)), "8 bytes, but F32"),
        (file_of({"a": entry(data_offsets=[8, 0])}, bytes(8)), "data_offsets must be"),
        (file_of({"a": entry(data_offsets=[-8, 0])}, bytes(8)), "data_offsets must be"),
        (file_of({"a": entry(data_offsets=[0, 8, 16])}, bytes(8)), "data_offsets must be"),
        (file_of({"a": entry(data_offsets=[0, 4])}, bytes(4)), "4 bytes, but F32 [2] needs 8 bytes"),
        (file_of({"a": entry()}), "take 8 bytes, the file holds 0"),
        (file_of({"a": entry()}, bytes(9)), "take 8 bytes, the file holds 9"),
        (file_of({"a": entry(), "b": entry(data_offsets=[4, 12])}, bytes(12)), "overlaps the one before"),
        (file_of({"a": entry(), "b": entry()}, bytes(8)), "overlaps the one before"),
        (file_of({"a": entry(data_offsets=[4, 12])}, bytes(12)), "leaves a hole before it"),
        (file_of({"a": entry(), "b": entry(data_offsets=[12, 20])}, bytes(20)), "leaves a hole"),
    ],
)
def test_M2_malformed_files_are_refused_by_our_own_check(content: bytes, words: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        check_header(content, total=len(content), source="x.safetensors")
    assert str(caught.value).startswith("x.safetensors")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_M2_a_file_larger_than_the_ceiling_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.truncate(tensorfile.MAX_FILE_BYTES + 1)
    with pytest.raises(ModelFileError, match="the ceiling is"):
        read_tensors(path)
    with pytest.raises(ModelFileError, match="the ceiling is"):
        check_header(b"", total=tensorfile.MAX_FILE_BYTES + 1, source="x")


def test_M2_a_lying_header_of_a_large_file_costs_only_the_head(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    path.write_bytes(file_of({"a": entry()}, bytes(8)))
    with path.open("r+b") as file:
        file.truncate(tensorfile.MAX_FILE_BYTES)  # sparse: reading it whole would need 2 GiB of memory
    with pytest.raises(ModelFileError, match="take 8 bytes, the file holds"):
        read_tensors(path)


def test_M2_every_cut_is_refused() -> None:
    content = to_bytes(tensors())
    for length in range(len(content)):
        with pytest.raises(ModelFileError):
            from_bytes(content[:length], source="cut")


def test_what_the_library_refuses_becomes_our_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: bytes) -> None:
        raise ValueError("no")

    monkeypatch.setattr("safetensors.torch.load", refuse)
    with pytest.raises(ModelFileError, match="x: refused by safetensors: no"):
        from_bytes(file_of({}), source="x")


@settings(max_examples=200)
@given(st.data())
def test_M2_one_changed_byte_gives_tensors_or_one_kind_of_error(data: st.DataObject) -> None:
    content = bytearray(to_bytes({"a": torch.ones(3), "b": torch.arange(4)}))
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255))
    found: dict[str, torch.Tensor] = {}
    with contextlib.suppress(ModelFileError):
        found = from_bytes(bytes(content), source="x")
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_M2_every_flipped_bit_is_seen_by_the_hash(tmp_path: Path) -> None:
    path, content = tmp_path / "t.safetensors", to_bytes({"a": torch.ones(40)})
    digest = hashlib.sha256(content).hexdigest()
    for position in range(0, len(content), 3):
        altered = bytearray(content)
        altered[position] ^= 1 << (position % 8)
        path.write_bytes(altered)
        with pytest.raises(ModelFileError):
            read_tensors(path, sha256=digest)
