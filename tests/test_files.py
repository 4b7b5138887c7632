"""Atomic writes: the name shows the old content or the new, and nothing is left behind."""

import errno
import os

import pytest

from pipeline.io import files


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


def refuse_with(number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("name", ["open", "write", "rename"])
def test_a_refusal_names_the_file_that_the_user_knows_and_what_to_do(tmp_path, monkeypatch, name):
    monkeypatch.setitem(files.SYSTEM, name, refuse_with(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_text_atomic(tmp_path / "x.txt", "new")
    assert files.refusal(caught.value) == (
        f"{tmp_path}/x.txt: cannot be used (No space left on device); free some space there, or write to another place"
    )


def test_what_may_be_a_bug_of_ours_is_no_refusal(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        files.write_text_atomic(tmp_path / "nowhere" / "x.txt", "new")
    assert files.refusal(caught.value) is None
    assert files.refusal(OSError("a text alone")) is None


def test_a_place_is_asked_for_before_the_work_and_nothing_is_left_there(tmp_path):
    files.require_place(tmp_path / "a" / "b" / "x.csv")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]
    (tmp_path / "x.csv").write_text("old")
    files.require_place(tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == "old"


def test_a_place_that_cannot_be_written_is_refused_in_words(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    expected = {
        tmp_path: "(Is a directory); it is a folder, expected the name of a file",
        tmp_path / "file" / "x.csv": "(Not a directory); a file is where a folder was expected; choose another place",
        tmp_path / "pipe": "(It is not an ordinary file); allow it, or choose another place",
        tmp_path / ("n" * 300): "(File name too long); choose a shorter name",
    }
    for path, words in expected.items():
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the words are looked at below
            files.require_place(path)
        named = path.parent if path.parent.name == "file" else path
        assert files.refusal(caught.value) == f"{named}: cannot be used {words}"
    monkeypatch.setitem(files.SYSTEM, "open", refuse_with(errno.EROFS))
    with pytest.raises(OSError, match="Read-only") as caught:
        files.require_place(tmp_path / "x.csv")
    assert files.refusal(caught.value) == (
        f"{tmp_path}/x.csv: cannot be used (Read-only file system); write to another place"
    )


def test_a_growing_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("old")
    with files.growing(path) as file:
        file.add(b"one")
        assert file.path.read_bytes() == b"one"
        assert path.read_text() == "old"
        file.add(b"two")
    assert path.read_bytes() == b"onetwo"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["write", "fsync", "rename"])
def test_what_a_growing_file_holds_outlives_a_failure(tmp_path, monkeypatch, name):
    path = tmp_path / "x.csv"

    def write():
        with files.growing(path) as file:
            file.add(b"one")
            monkeypatch.setitem(files.SYSTEM, name, refuse_with(errno.ENOSPC))
            file.add(b"two")

    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert caught.value.filename == str(path)
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith("x.csv.")
    assert partial.suffix == ".partial"
    assert partial.read_bytes().startswith(b"one")


def test_an_error_of_the_block_keeps_its_own_name_and_an_empty_file_is_not_left(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, files.growing(tmp_path / "x.csv"):
        (tmp_path / "other").read_bytes()
    assert caught.value.filename == str(tmp_path / "other")
    assert list(tmp_path.iterdir()) == []
