"""Atomic writes: the name shows the old content or the new, and nothing is left behind."""

import errno
import os

import pytest

from pipeline import files


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    files.write_text_atomic(path, "one\r\nü")
    files.write_text_atomic(path, "two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("name", ["open", "write", "fsync", "rename"])
def test_a_failure_keeps_the_old_content(tmp_path, monkeypatch, name):
    path = tmp_path / "x.txt"
    files.write_text_atomic(path, "old")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setitem(files.SYSTEM, name, fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.txt"]


def test_publish_never_replaces(tmp_path):
    files.publish(files.write_temporary(tmp_path, [b"one"]), tmp_path / "x")
    with pytest.raises(FileExistsError):
        files.publish(files.write_temporary(tmp_path, [b"two"]), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_publish_works_without_hard_links(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setitem(files.SYSTEM, "link", refuse)
    files.publish(files.write_temporary(tmp_path, [b"one"]), tmp_path / "x")
    with pytest.raises(FileExistsError):
        files.publish(files.write_temporary(tmp_path, [b"two"]), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"one"


def test_short_writes_are_continued_and_no_progress_is_an_error(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setitem(files.SYSTEM, "write", lambda descriptor, data: real(descriptor, data[:3]))
    files.write_atomic(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"
    monkeypatch.setitem(files.SYSTEM, "write", lambda descriptor, data: 0)
    with pytest.raises(OSError, match="wrote nothing"):
        files.write_atomic(tmp_path / "x", b"abc")


def test_make_folder_syncs_every_new_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
