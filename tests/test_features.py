import numpy as np
import pytest
import torch

from umiad.errors import DiskError, TrainingError
from umiad.features import FeatureCache


class Doubling:
    """A detector whose frozen part doubles; it counts how many images it prepared."""

    def __init__(self):
        self.module = torch.nn.BatchNorm1d(1)
        self.seen = 0

    def prepare(self, images, *, original_size=None):
        self.seen += len(images)
        return {"twice": images * 2, "mean": images.flatten(1).mean(1)}


def images(count, *, seed=0):
    rng = np.random.default_rng(seed)
    return [(f"key{k}", rng.normal(size=(3, 4, 4)).astype(np.float32), (4, 4)) for k in range(count)]


@pytest.mark.parametrize("memory_limit", [1 << 30, 0])
def test_rows_are_what_prepare_returned_in_memory_and_on_disk(tmp_path, memory_limit):
    pairs = images(7)
    with FeatureCache([k for k, _, _ in pairs], memory_limit=memory_limit, folder=tmp_path) as cache:
        cache.fill(Doubling(), pairs, batch_size=3)
        assert cache.on_disk == (memory_limit == 0)
        rows = cache.rows([5, 0])
        assert torch.equal(rows["twice"][0], torch.from_numpy(pairs[5][1]) * 2)
        assert torch.allclose(rows["mean"][1], torch.tensor(pairs[0][1].mean()))
    assert list(tmp_path.iterdir()) == []


def test_equal_images_are_prepared_once():
    pairs = images(3)
    keys = ["key0", "key1", "key0", "key2", "key1"]
    by_key = {item[0]: item for item in pairs}
    detector, seen = Doubling(), []
    cache = FeatureCache(keys)
    cache.fill(detector, (by_key[k] for k in keys), batch_size=2, progress=lambda n, of: seen.append((n, of)))
    assert (detector.seen, cache.unique, len(cache)) == (3, 3, 5)
    assert torch.equal(cache.rows([2])["twice"], cache.rows([0])["twice"])
    assert seen[-1] == (3, 3)


@pytest.mark.parametrize("memory_limit", [1 << 30, 0])
def test_compact_rows_are_the_features_rounded_to_float16(tmp_path, memory_limit):
    pairs = images(5)
    with FeatureCache(
        [k for k, _, _ in pairs], memory_limit=memory_limit, folder=tmp_path, compact=True
    ) as cache:
        cache.fill(Doubling(), pairs, batch_size=2)
        held = sum(file.stat().st_size for file in tmp_path.rglob("*.bin"))
        assert held == (0 if memory_limit else 5 * (3 * 16 + 1) * 2)
        rows = cache.rows([4, 1])
        for row, k in enumerate((4, 1)):
            exact = torch.from_numpy(pairs[k][1]) * 2
            assert rows["twice"].dtype == torch.float32
            assert torch.equal(rows["twice"][row], exact.half().float())
            assert torch.allclose(rows["twice"][row], exact, rtol=2**-11)


def test_whole_numbers_are_not_rounded():
    detector = Doubling()
    detector.prepare = lambda images, original_size=None: {"count": original_size * 100_001}
    cache = FeatureCache(["key0"], compact=True).fill(detector, images(1))
    assert cache.rows([0])["count"].tolist() == [[400_004, 400_004]]


def test_features_that_float16_cannot_hold_are_refused():
    [(key, image, size)] = images(1)
    with pytest.raises(TrainingError, match=r"features 'twice' reach .* fit without compact features"):
        FeatureCache([key], compact=True).fill(Doubling(), [(key, image * 1e6, size)])


def test_a_full_disk_is_said_before_anything_is_computed_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    cache = FeatureCache(["key0"], memory_limit=0, folder=tmp_path)
    with pytest.raises(DiskError, match="caching features needs"):
        cache.fill(Doubling(), images(1))
    assert list(tmp_path.iterdir()) == []
