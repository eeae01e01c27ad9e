"""Folders that nobody vouches for: links, loops, depth, special files."""

import os

import pytest

from make import dicom_file, grey_array, grey_png
from umiad.data import list_images, load_data
from umiad.errors import InputError
from umiad.types import FileOptions
from umiad.walk import DEEPEST, Walk


def test_I14_links_out_of_the_folder_are_named_and_taken_only_on_request(tmp_path):
    outside = grey_png(tmp_path / "outside" / "a.png")
    grey_png(tmp_path / "set" / "normal" / "b.png", seed=1)
    (tmp_path / "set" / "normal" / "a.png").symlink_to(outside)
    (tmp_path / "set" / "normal" / "c.png").symlink_to(tmp_path / "set" / "normal" / "b.png")
    data = load_data(tmp_path / "set")
    assert [case.path.name for case in data.cases] == ["b.png", "c.png"]
    assert any("normal/a.png (--follow takes them)" in note for note in data.notes)
    assert len(load_data(tmp_path / "set", files=FileOptions(follow=True)).cases) == 3
    notes: list[str] = []
    assert len(list_images([tmp_path / "set"], notes=notes)[0]) == 2
    assert any("--follow" in note for note in notes)


def test_I14_loops_of_links_end_with_a_note(tmp_path):
    grey_png(tmp_path / "normal" / "a.png")
    (tmp_path / "normal" / "again").symlink_to(tmp_path / "normal")
    (tmp_path / "normal" / "loop.png").symlink_to(tmp_path / "normal" / "loop.png")
    data = load_data(tmp_path)
    assert any("a link to a folder is not followed" in note for note in data.notes)
    assert any("loop.png: a link that leads nowhere" in note for note in data.notes)
    assert {case.path.name for case in data.cases} == {"a.png"}


def test_I14_very_deep_folders_are_left_out_with_a_note(tmp_path):
    folder = tmp_path
    for _ in range(DEEPEST + 3):
        folder = folder / "d"
    grey_png(folder / "deep.png")
    grey_png(tmp_path / "a.png")
    walk = Walk(tmp_path)
    assert [path.name for path in walk.images_under(tmp_path)] == ["a.png"]
    assert any("deeper than 64" in note for note in walk.remarks())


def test_I13_a_pipe_with_the_name_of_an_image_is_listed_and_reading_it_says_why(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    os.mkfifo(tmp_path / "pipe")
    grey_png(tmp_path / "a.png")
    images, stray = list_images([tmp_path])
    assert [path.name for path in images] == ["a.png", "x.png"]
    assert [path.name for path in stray] == ["pipe"]


def test_a_dicomdir_is_no_image(tmp_path):
    dicom_file(tmp_path / "DICOMDIR", grey_array())
    dicom_file(tmp_path / "IM0001", grey_array())
    images, stray = list_images([tmp_path])
    assert [path.name for path in images] == ["IM0001"]
    assert [path.name for path in stray] == ["DICOMDIR"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_folder_that_cannot_be_listed_is_an_input_error(tmp_path):
    (tmp_path / "normal").mkdir(mode=0)
    try:
        with pytest.raises(InputError, match="cannot be listed"):
            load_data(tmp_path)
    finally:
        (tmp_path / "normal").chmod(0o700)
