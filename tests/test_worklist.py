import os

import pytest

from make import grey_png
from umiad import walk
from umiad.errors import ConfigError, InputError
from umiad.worklist import Shard, find_work


def tree(root):
    for name in ("a10.png", "a2.png", "sub/a2.png"):
        grey_png(root / name, (8, 8), seed=len(name))
    return root


def test_a_shard_is_read_from_its_form_and_from_its_folders_name():
    assert Shard.parse("2/8") == Shard(2, 8)
    assert str(Shard(2, 8)) == "2/8"
    assert Shard.of_folder(Shard(2, 8).folder) == Shard(2, 8)
    assert [Shard.of_folder(name) for name in ("9-of-8", "0-of-8", "02-of-8", "2-of-8.old", "lock")] == [
        None
    ] * 5


@pytest.mark.parametrize("text", ["0/3", "4/3", "a/b", "3", "", "1/0", "1/2/3", "-1/3", "1.0/3", "1/9999999"])
def test_another_form_is_a_usage_error_that_names_the_form(text):
    with pytest.raises(ConfigError, match=r"--shard .*expected I/N with I from 1 to N, for example 2/8"):
        Shard.parse(text)


@pytest.mark.parametrize(("total", "of"), [(10, 3), (3, 3), (2, 5), (0, 2), (7, 1)])
def test_shards_share_out_every_file_once_in_equal_parts(total, of):
    parts = [Shard(number, of).indices(total) for number in range(1, of + 1)]
    assert sorted(index for part in parts for index in part) == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_list_is_in_natural_order_whatever_the_disk_says(tmp_path, monkeypatch):
    root = tree(tmp_path)
    work = find_work([root])
    assert [file.relative_to(root).as_posix() for file in work.files] == ["a2.png", "a10.png", "sub/a2.png"]
    scandir = os.scandir

    class Backwards:
        def __init__(self, folder):
            self.entries = list(scandir(folder))[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(walk.os, "scandir", Backwards)
    assert find_work([root]) == work


def test_the_digest_is_the_same_in_another_place_and_by_another_spelling(tmp_path, monkeypatch):
    one, two = tree(tmp_path / "one"), tree(tmp_path / "elsewhere" / "two")
    digest = find_work([one]).sha256
    assert find_work([two]).sha256 == digest
    monkeypatch.chdir(one)
    assert find_work(["."]).sha256 == digest
    assert find_work(["a2.png", "a10.png", "sub"]).sha256 == digest


def test_the_digest_changes_with_names_sizes_order_and_number(tmp_path):
    root = tree(tmp_path / "r")
    seen = {find_work([root]).sha256}
    seen.add(find_work([root / "sub", root / "a2.png", root / "a10.png"]).sha256)
    (root / "a2.png").rename(root / "a3.png")
    seen.add(find_work([root]).sha256)
    with (root / "a3.png").open("ab") as file:
        file.write(b"\0")
    seen.add(find_work([root]).sha256)
    grey_png(root / "a4.png")
    seen.add(find_work([root]).sha256)
    assert len(seen) == 5


def test_folders_that_change_places_are_another_list(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"\x89PNG same size")
    forth, back = find_work([tmp_path / "a", tmp_path / "b"]), find_work([tmp_path / "b", tmp_path / "a"])
    assert forth.sha256 != back.sha256


def test_names_that_are_no_unicode_and_files_without_a_size_have_their_place(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert len(find_work([tmp_path]).files) == 2


def test_nothing_to_score_is_an_error_and_what_is_left_out_a_note(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="no images found"):
        find_work([tmp_path])
    with pytest.raises(InputError, match="does not exist"):
        find_work([tmp_path / "nowhere"])
    grey_png(tmp_path / "a.png")
    notes = []
    find_work([tmp_path], notes=notes)
    assert notes == ["1 files are no images to score and were ignored: notes.txt, ..."]
