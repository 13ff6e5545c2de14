import errno
import os

import pytest

from smalti.core import files
from smalti.core.errors import UserError


def test_a_file_is_whole_or_absent(tmp_path):
    target = tmp_path / "deep" / "file.bin"
    files.write_bytes(target, b"first")

    def half():
        with files.atomic_write(target) as file:
            file.write(b"second, cut")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert target.read_bytes() == b"first"
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, "no disk space left to write {}: free some and run the same command again"),
        (errno.EDQUOT, "no disk space left to write {}: free some and run the same command again"),
        (errno.EROFS, "{} cannot be written: Read-only file system"),
    ],
)
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, code, sentence):
    target = tmp_path / "file.json"
    files.write_json(target, {"kept": True})

    def full(_descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError) as caught:
        files.write_json(target, {"kept": False})
    assert str(caught.value) == sentence.format(target)
    assert files.read_json(target, "a test") == {"kept": True}
    assert len(list(tmp_path.iterdir())) == 1


def test_what_killed_writers_leave_is_removed(tmp_path):
    with files.atomic_write(tmp_path / "a" / "file") as file:
        (left,) = (tmp_path / "a").iterdir()
        file.write(b"x")
        copy = left.with_name(f".other{files.TEMPORARY}")
        copy.write_bytes(b"half")
        (tmp_path / f".folder{files.TEMPORARY}").mkdir()
        (tmp_path / f".folder{files.TEMPORARY}" / f".file{files.TEMPORARY}").write_bytes(b"half")
    files.remove_temporaries(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]


def test_unreadable_json(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match=r"x.json does not exist; expected a layout there$"):
        files.read_json(path, "a layout")
    path.write_text('{"cut": ')
    with pytest.raises(UserError, match=r"x.json is damaged, expected a layout: "):
        files.read_json(path, "a layout")


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with files.atomic_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    with pytest.raises(UserError, match="exists already and is not empty"), files.atomic_folder(tmp_path / "a"):
        pytest.fail("the block must not run")
    with pytest.raises(UserError, match="file exists already"), files.atomic_folder(tmp_path / "a" / "b" / "file"):
        pytest.fail("the block must not run")

    def stop() -> None:
        with files.atomic_folder(tmp_path / "c" / "d") as folder:
            (folder / "file").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        stop()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\xfd", b"[" * 100_000, b"1" * 5000])
def test_damaged_json(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        files.read_json(path, "numbers")
    assert str(caught.value).startswith(f"{path} is damaged, expected numbers: ")


def test_a_sentence_is_one_line_that_steers_no_terminal():
    assert str(UserError("\x1b[31mred\ntwo\ud800 café")) == "\\x1b[31mred\\ntwo\\ud800 café"


def test_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "deeper" / "new", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=r"^.* cannot be written: (Not a directory|File name too long)$"):
            files.write_text(path, "x")
    with pytest.raises(UserError, match=r"^.* cannot be written: (File exists|Not a directory)$"):
        files.write_text(tmp_path / "file" / "new", "x")
    with pytest.raises(UserError, match=r"^.* cannot be written: Is a directory$"):
        files.write_text(tmp_path, "x")
    with (
        pytest.raises(UserError, match=r"^.* cannot be written: Not a directory$"),
        files.atomic_folder(tmp_path / "file" / "new"),
    ):
        pytest.fail("the block must not run")
