from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DatasetConfig
from pipeline.data import (
    DatasetIndex,
    Failure,
    check_failures,
    failed_digests,
    read_failures,
    reading,
    record_failures,
)
from pipeline.data.scan import ScanResult, class_counts, fold_warnings, missing_side, scan
from pipeline.errors import DatasetError, HeadError
from pipeline.heads.tuning import make_folds
from pipeline.images import NO_IMAGE
from pipeline.io.digests import content_digest, digests_to_hex


def write(root: Path, **files: str) -> None:
    for path, content in files.items():
        put(root, path, content)


def put(root: Path, path: str, content: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of ten images each; what is in them matters to nobody here."""
    root = tmp_path / "photos"
    for label in ("cat", "dog"):
        for number in range(10):
            put(root, f"{label}/{number}.png", f"{label} {number}")
    return root


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files written before a scan count as old, so that tests need not wait two seconds."""
    monkeypatch.setattr(reading, "RACY_NS", 0)


def run(root: Path, seed: int = 0, rehash: bool = False, **settings: object) -> ScanResult:
    config = DatasetConfig(source="folder", path=str(root), **settings)  # type: ignore[arg-type]
    return scan(config, seed, root.parent / "dataset", rehash=rehash)


def sides(result: ScanResult) -> dict[str, str]:
    return dict(zip(result.index.paths, result.index.splits, strict=True))


class TestIncremental:
    def test_a_first_scan_reads_everything_and_a_second_nothing(self, photos: Path, calm: None) -> None:
        first = run(photos)
        assert (first.read, first.unchanged, first.difference, len(first.index)) == (20, False, None, 20)
        assert not any("since the last scan" in line for line in first.summary_lines())
        assert first.index.digests.tobytes()[:16] == content_digest(b"cat 0")
        assert first.index.sizes.tolist() == [5] * 20
        folder = photos.parent / "dataset"
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        second = run(photos)
        assert (second.read, second.unchanged, str(second.difference)) == (0, True, "")
        assert "nothing changed since the last scan" in second.summary_lines()
        assert second.index.fingerprint() == first.index.fingerprint()
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
        assert DatasetIndex.read(folder).fingerprint() == first.index.fingerprint()

    def test_only_what_changed_is_read(self, photos: Path, calm: None) -> None:
        first = sides(run(photos))
        put(photos, "cat/new.png", "a new one")
        put(photos, "cat/1.png", "changed")
        put(photos, "cat/2.png", "CAT 2")  # as long as before
        (photos / "dog/3.png").rename(photos / "dog/renamed.png")
        (photos / "dog/4.png").unlink()
        os.utime(photos / "dog/5.png")
        result = run(photos)
        assert result.read == 5
        assert not result.unchanged
        found = result.difference
        assert (found.added, found.changed, found.renamed, found.removed) == (1, 2, 1, 1)
        now = sides(result)
        assert now["dog/renamed.png"] == first["dog/3.png"]
        assert all(now[path] == side for path, side in first.items() if path in now)
        assert "since the last scan: 1 added, 2 changed, 1 renamed, 1 removed" in result.summary_lines()

    def test_a_file_with_its_old_size_and_time_restored_is_noticed(self, photos: Path, calm: None) -> None:
        run(photos)
        old = (photos / "cat/2.png").stat()
        put(photos, "cat/2.png", "CAT 2")
        os.utime(photos / "cat/2.png", ns=(old.st_atime_ns, old.st_mtime_ns))
        assert run(photos).difference.changed == 1

    def test_files_written_within_two_seconds_of_a_scan_are_read_again(self, photos: Path) -> None:
        assert run(photos).read == 20
        again = run(photos)
        assert (again.read, again.unchanged) == (20, True)
        cache = reading.read_cache(photos.parent / "dataset")
        assert cache.racy().all()
        assert reading.RACY_NS == 2_000_000_000

    def test_rehash_trusts_nothing(self, photos: Path, calm: None) -> None:
        run(photos)
        assert run(photos, rehash=True).read == 20
        assert run(photos).read == 0

    @pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip", None])
    def test_the_stat_cache_may_be_lost(self, photos: Path, calm: None, damage: bytes | None) -> None:
        first = run(photos)
        cache = photos.parent / "dataset" / reading.CACHE_FILE
        cache.unlink()
        if damage is not None:
            cache.write_bytes(damage)
        second = run(photos)
        assert (second.read, second.unchanged) == (20, True)
        assert second.index.fingerprint() == first.index.fingerprint()
        assert run(photos).read == 0

    def test_a_moved_class_folder_changes_labels_and_reads_only_what_moved(self, photos: Path, calm: None) -> None:
        first = run(photos)
        (photos / "dog").rename(photos / "wolf")
        result = run(photos)
        assert result.difference.renamed == 10
        assert result.index.classes == ("cat", "wolf")
        assert sorted(digests_to_hex(result.index.digests)) == sorted(digests_to_hex(first.index.digests))
        was = dict(zip(digests_to_hex(first.index.digests), first.index.splits, strict=True))
        now = dict(zip(digests_to_hex(result.index.digests), result.index.splits, strict=True))
        assert now == was

    def test_an_edited_index_keeps_its_splits(self, photos: Path, calm: None) -> None:
        first = sides(run(photos))
        moved = next(path for path, side in first.items() if side == "train")
        index = photos.parent / "dataset" / "index.csv"
        lines = index.read_text().splitlines()
        index.write_text(
            "\n".join(line.replace(",train,", ",test,") if line.startswith(moved) else line for line in lines)
        )
        result = run(photos)
        assert result.read == 0
        assert sides(result) == {**first, moved: "test"}
        told = "index.csv was edited, or is damaged, since it was written; its splits are kept, delete it"
        assert result.warnings == (f"{told} to have them made anew",)
        assert run(photos).warnings == ()

    def test_an_unreadable_file_is_tried_again(self, photos: Path, calm: None, monkeypatch: pytest.MonkeyPatch) -> None:
        from pipeline.images import reading as images_reading

        real_open = os.open

        def failing(path: object, *arguments: object, **options: object) -> int:
            if str(path).endswith("cat/3.png"):
                raise PermissionError(13, "Permission denied")
            return real_open(path, *arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(images_reading.os, "open", failing)
        result = run(photos)
        assert [(entry.path, entry.status) for entry in result.failures] == [("cat/3.png", "unavailable")]
        assert result.failures[0].reason == "it cannot be read: Permission denied"
        assert (len(result.index), result.total) == (19, 20)
        assert run(photos).read == 1
        monkeypatch.undo()
        assert len(run(photos).index) == 20
        assert read_failures(photos.parent / "dataset") == []

    def test_a_file_that_changes_while_it_is_read_is_not_indexed(
        self, photos: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from pipeline.images import reading as images_reading

        real_read = os.read

        def growing(descriptor: int, size: int) -> bytes:
            data = real_read(descriptor, size)
            if data.startswith(b"cat 3"):
                with (photos / "cat/3.png").open("ab") as file:
                    file.write(b".")
            return data

        monkeypatch.setattr(images_reading.os, "read", growing)
        (entry,) = run(photos).failures
        assert (entry.path, entry.status, entry.reason) == ("cat/3.png", "unavailable", "it changes while it is read")

    def test_empty_files_are_named(self, photos: Path) -> None:
        put(photos, "cat/none.png", "")
        put(photos, "dog/none.png", "")
        result = run(photos)
        assert [(entry.path, entry.status) for entry in result.failures] == [
            ("cat/none.png", "empty"),
            ("dog/none.png", "empty"),
        ]
        assert not result.copies.conflicts
        assert len(result.index) == 20


class TestSplitsOfAScan:
    def test_the_users_splits_are_kept_as_they_are(self, tmp_path: Path) -> None:
        root = tmp_path / "photos"
        write(root, **{"train/a/1.png": "1", "train/b/2.png": "2", "val/a/3.png": "3", "test/b/4.png": "4"})
        result = run(root)
        assert sides(result) == {
            "test/b/4.png": "test",
            "train/a/1.png": "train",
            "train/b/2.png": "train",
            "val/a/3.png": "validation",
        }
        assert class_counts(result.index) == {
            "a": {"train": 1, "validation": 1, "test": 0, "excluded": 0},
            "b": {"train": 1, "validation": 0, "test": 1, "excluded": 0},
        }
        assert result.warnings == ("no test images in class 'a'",)

    def test_a_test_split_is_made_from_train_alone(self, tmp_path: Path) -> None:
        root = tmp_path / "photos"
        for label in "ab":
            for number in range(20):
                put(root, f"train/{label}/{number}.png", f"{label}{number}")
                put(root, f"val/{label}/{number}.png", f"val {label}{number}")
        put(root, "val/a/copy.png", "a0")
        result = run(root, test_fraction=0.25)
        counts = class_counts(result.index)["b"]
        assert (counts["train"], counts["validation"], counts["test"]) == (15, 20, 5)
        assert class_counts(result.index)["a"]["test"] == 5
        assert sides(result)["train/a/0.png"] == "train"  # its copy is the user's validation image
        assert not result.copies.leaks

    def test_a_new_seed_or_fraction_reshuffles_only_when_asked(self, photos: Path, calm: None) -> None:
        first = run(photos, seed=0)
        assert first.warnings == ()
        kept = run(photos, seed=1, test_fraction=0.4)
        assert sides(kept) == sides(first)
        assert kept.warnings == (
            "the test split made with seed 0 and test_fraction 0.2 is kept, though the config now says seed 1 and "
            "test_fraction 0.4; delete index.csv to have it made anew",
        )
        (photos.parent / "dataset" / "index.csv").unlink()
        anew = run(photos, seed=1, test_fraction=0.4)
        assert class_counts(anew.index)["cat"]["test"] == 4
        assert anew.warnings == ()
        assert sides(run(photos, seed=1, test_fraction=0.4)) == sides(anew)
        (photos.parent / "dataset" / "index.csv").unlink()
        assert sides(run(photos, seed=0)) == sides(first)

    def test_another_data_set_in_the_same_output_is_refused_or_starts_afresh(self, photos: Path) -> None:
        first = run(photos)
        other = photos.parent / "other"
        for path in first.index.paths:
            put(other, path, f"other {path}")
        folder = photos.parent / "dataset"
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(DatasetError) as caught:
            run(other)
        assert str(caught.value) == (
            f"the output folder holds an experiment on the images in {photos}, and this config is about those in {other}; set "
            "output to another folder, or delete dataset/index.json there to go on in this one, whose splits and features are kept"
        )
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        (folder / "index.json").unlink()
        second = run(other)
        alone = scan(DatasetConfig(source="folder", path=str(other)), 0, photos.parent / "elsewhere")
        assert sides(second) == sides(alone)

    def test_groups_of_a_manifest_stay_together(self, tmp_path: Path) -> None:
        lines = ["path,label,group"]
        for patient in range(20):
            for number in range(3):
                path = f"{patient}-{number}.png"
                put(tmp_path, path, path)
                lines.append(f"{path},{'ab'[number % 2]},patient {patient}")
        (tmp_path / "list.csv").write_text("\n".join(lines))
        result = scan(DatasetConfig(source="manifest", path=str(tmp_path / "list.csv")), 0, tmp_path / "dataset")
        index = result.index
        assert index.groups is not None
        test = set(index.groups[index.splits == "test"])
        assert test & set(index.groups[index.splits == "train"]) == set()
        assert len(test) == 4
        assert class_counts(result.index)["a"]["test"] == 8

    def test_users_groups_on_both_sides_are_pointed_out(self, tmp_path: Path) -> None:
        text = "path,label,split,group\n1.png,a,train,p\n2.png,b,train,q\n3.png,a,test,p\n4.png,b,test,\n"
        for number in range(1, 5):
            put(tmp_path, f"{number}.png", str(number))
        (tmp_path / "list.csv").write_text(text)
        result = scan(DatasetConfig(source="manifest", path=str(tmp_path / "list.csv")), 0, tmp_path / "dataset")
        assert result.warnings == ("group 'p' in training and in test: test scores may be too good",)


class TestCopies:
    @pytest.fixture
    def leaky(self, tmp_path: Path) -> Path:
        root = tmp_path / "photos"
        for split in ("train", "test"):
            for label in "ab":
                for number in range(4):
                    put(root, f"{split}/{label}/{number}.png", f"{split} {label} {number}")
        put(root, "train/a/leak.png", "test a 1")
        put(root, "val/a/leak.png", "test a 1")
        put(root, "train/b/twin.png", "train b 2")
        put(root, "train/b/wrong.png", "train a 3")
        return root

    def excluded(self, result: ScanResult) -> list[str]:
        return [path for path, side in sides(result).items() if side == "excluded"]

    def test_the_training_copy_leaves_and_both_paths_are_told(self, leaky: Path) -> None:
        result = run(leaky)
        assert self.excluded(result) == ["train/a/leak.png", "val/a/leak.png"]
        paths = result.index.paths
        assert [(paths[one], paths[other]) for one, other in result.copies.leaks] == [
            ("train/a/leak.png", "test/a/1.png"),
            ("val/a/leak.png", "test/a/1.png"),
        ]
        lines = result.summary_lines()
        told = "the same content is in the test as test/a/1.png; the training copy is left out"
        assert lines[-3:] == ["leak: 2 files", f"  train/a/leak.png: {told}", f"  val/a/leak.png: {told}"]
        listed = read_failures(leaky.parent / "dataset")
        assert [entry for entry in listed if entry.status == "leak"] == [
            Failure(path, "", "leak", "the same content is in the test as test/a/1.png; the training copy is left out")
            for path in ("train/a/leak.png", "val/a/leak.png")
        ]
        assert result.failures == ()

    def test_a_second_scan_says_the_same(self, leaky: Path, calm: None) -> None:
        first, second = run(leaky), run(leaky)
        assert second.read == 0
        assert [vars(second.copies)[name] for name in ("leaks", "conflicts", "duplicates")] == [
            vars(first.copies)[name] for name in ("leaks", "conflicts", "duplicates")
        ]
        assert second.index.fingerprint() == first.index.fingerprint()

    def test_a_leak_that_is_mended_comes_back_into_training(self, leaky: Path, calm: None) -> None:
        run(leaky)
        (leaky / "test/a/1.png").unlink()
        assert sides(run(leaky))["train/a/leak.png"] == "train"

    def test_the_other_choices(self, leaky: Path, calm: None) -> None:
        assert self.excluded(run(leaky, leaks="drop_test")) == ["test/a/1.png"]
        kept = run(leaky, leaks="keep")
        assert self.excluded(kept) == []
        assert len(kept.copies.leaks) == 2
        with pytest.raises(DatasetError) as caught:
            run(leaky, leaks="error")
        assert str(caught.value) == (
            "2 training images are in the test set as well; remove one of each pair, or set dataset.leaks: drop_train\n"
            "  train/a/leak.png = test/a/1.png\n  val/a/leak.png = test/a/1.png"
        )

    def test_one_content_under_two_labels_is_told_and_kept(self, leaky: Path) -> None:
        result = run(leaky)
        paths, labels = result.index.paths, result.index.labels
        assert [[(paths[row], labels[row]) for row in pair] for pair in result.copies.conflicts] == [
            [("train/a/3.png", "a"), ("train/b/wrong.png", "b")]
        ]
        assert sides(result)["train/b/wrong.png"] == "train"
        told = "  train/b/wrong.png: labelled 'b'; the same content is train/a/3.png, labelled 'a'"
        assert told in result.summary_lines()

    def test_copies_on_one_side_are_counted_and_share_a_fold(self, leaky: Path) -> None:
        result = run(leaky)
        assert result.copies.duplicates == 3  # the leak twice, the twin, the wrong label
        train = result.index.select("train")
        groups = train.fold_groups()
        assert groups is not None
        by_path = dict(zip(train.paths, groups, strict=True))
        assert by_path["train/b/twin.png"] == by_path["train/b/2.png"]
        assert len(set(groups.tolist())) == len(train) - 2

    def test_a_made_split_never_parts_copies(self, photos: Path) -> None:
        for number in range(10):
            put(photos, f"cat/copy {number}.png", f"cat {number}")
        result = run(photos)
        assert not result.copies.leaks
        assert class_counts(result.index)["cat"]["test"] == 4


class TestFailures:
    def entry(self, path: str, content: str, policy: str = "p1") -> Failure:
        return Failure(path, content_digest(content.encode()).hex(), "truncated", "its end is missing", policy)

    def test_failures_are_remembered_by_content_and_policy(self, photos: Path, calm: None) -> None:
        folder = photos.parent / "dataset"
        run(photos)
        record_failures(folder, [self.entry("cat/1.png", "cat 1"), self.entry("dog/2.png", "dog 2")], "p1")
        assert sorted(digests_to_hex(failed_digests(folder, "p1"))) == sorted(
            content_digest(c).hex() for c in (b"cat 1", b"dog 2")
        )
        assert failed_digests(folder, "p2").shape == (0, 2)
        result = run(photos)
        assert result.remembered == 2
        assert "images known not to decode, see failures.csv: 2" in result.summary_lines()

    def test_a_renamed_failure_keeps_its_entry_and_a_mended_one_loses_it(self, photos: Path, calm: None) -> None:
        folder = photos.parent / "dataset"
        run(photos)
        record_failures(folder, [self.entry("cat/1.png", "cat 1"), self.entry("dog/2.png", "dog 2")], "p1")
        (photos / "cat/1.png").rename(photos / "cat/one.png")
        put(photos, "dog/2.png", "mended")
        run(photos)
        assert read_failures(folder) == [self.entry("cat/one.png", "cat 1")]

    def test_a_failure_under_a_new_policy_replaces_all_of_the_old(self, tmp_path: Path) -> None:
        record_failures(tmp_path, [self.entry("a", "1", "p1"), self.entry("b", "2", "p1")], "p1")
        record_failures(tmp_path, [self.entry("a", "1", "p2")], "p2")
        assert read_failures(tmp_path) == [self.entry("a", "1", "p2")]
        record_failures(tmp_path, [self.entry("b", "2", "p2")], "p2")
        assert read_failures(tmp_path) == [self.entry("a", "1", "p2"), self.entry("b", "2", "p2")]

    def test_a_file_that_could_not_be_read_is_listed_until_the_next_scan(self, photos: Path, calm: None) -> None:
        folder = photos.parent / "dataset"
        run(photos)
        gone = self.entry("cat/1.png", "cat 1")._replace(
            status="unavailable", reason="it cannot be read: Input/output error"
        )
        record_failures(folder, [self.entry("dog/2.png", "dog 2")], "p1")
        record_failures(folder, [gone], "p1")
        assert [entry.path for entry in read_failures(folder)] == ["cat/1.png", "dog/2.png"]
        assert digests_to_hex(failed_digests(folder, "p1")) == [content_digest(b"dog 2").hex()]
        run(photos)
        assert [entry.path for entry in read_failures(folder)] == ["dog/2.png"]

    def test_a_damaged_list_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "failures.csv").write_text("path,reason\na,b\n")
        with pytest.raises(
            DatasetError, match=r"expected the columns path, digest, status, reason, policy\); delete it"
        ):
            read_failures(tmp_path)

    def test_odd_files_are_listed_with_their_reasons(self, photos: Path) -> None:
        put(photos, "cat/notes.txt", "x")
        put(photos, "stray.png", "x")
        put(photos, "cat/.DS_Store", "x")
        for number in range(5):
            put(photos, f"dog/{number}.txt", "x")
        result = run(photos)
        listed = read_failures(photos.parent / "dataset")
        assert [(entry.path, entry.status) for entry in listed][:2] == [
            ("cat/notes.txt", "not_an_image"),
            ("dog/0.txt", "not_an_image"),
        ]
        assert len(listed) == 7
        assert result.failures == ()
        reason = "it is not an image of a known format (JPEG, PNG, GIF, WEBP, BMP, TIFF, AVIF, HEIF)"
        assert result.summary_lines()[-8:] == [
            "not an image: 6 files",
            f"  cat/notes.txt: {reason}",
            f"  dog/0.txt: {reason}",
            f"  dog/1.txt: {reason}",
            "  … and 3 more, see failures.csv",
            "not in a class: 1 file",
            "  stray.png: it is in no class folder, so it has no label",
            "ignored hidden files and folders: 1",
        ]

    @pytest.mark.parametrize(
        ("failed", "total", "limit", "stops"),
        [
            (0, 0, 0.1, False),
            (10, 100, 0.1, False),
            (11, 100, 0.1, True),
            (1, 100, 0, True),
            (0, 100, 0, False),
            (1, 9, 1, False),
            (2, 9, 1, True),
        ],
    )
    def test_max_failures_is_a_share_below_one_and_a_number_from_one(
        self, failed: int, total: int, limit: float, stops: bool
    ) -> None:
        if not stops:
            check_failures(failed, total, limit, Path("failures.csv"))
            return
        with pytest.raises(DatasetError, match=f"{failed} of {total} images failed, dataset.max_failures allows"):
            check_failures(failed, total, limit, Path("failures.csv"))

    def test_the_text_of_too_many_failures(self) -> None:
        with pytest.raises(DatasetError) as caught:
            check_failures(1200, 2000, 0.5, Path("out/failures.csv"))
        assert str(caught.value) == (
            "1,200 of 2,000 images failed, dataset.max_failures allows 50% of them; out/failures.csv names each with its reason: "
            "mend or remove them, or raise dataset.max_failures"
        )


class TestRefused:
    def refused(self, root: Path, **settings: object) -> str:
        with pytest.raises(DatasetError) as caught:
            run(root, **settings)
        return str(caught.value)

    def test_one_class_alone(self, tmp_path: Path) -> None:
        root = tmp_path / "photos"
        write(root, **{"cat/1.png": "1", "cat/2.png": "2"})
        assert self.refused(root) == (
            f"{root}: all 2 images are of one class, 'cat'; expected at least 2 classes; if the folders in it are the classes, give it "
            "as dataset.path"
        )

    @pytest.mark.parametrize(
        ("rows", "words"),
        [
            ("", "holds no image that can be read"),
            ("a.png,cat\n", "holds no image that can be read\n  a.png: there is no such file"),
            ("b.png,cat\n", "all 1 images are of one class, 'cat'; expected at least 2 classes"),
        ],
    )
    def test_a_manifest_is_named_itself_and_not_its_folder(self, tmp_path: Path, rows: str, words: str) -> None:
        put(tmp_path, "b.png", "1")
        path = tmp_path / "list.csv"
        path.write_text(f"path,label\n{rows}")
        with pytest.raises(DatasetError) as caught:
            scan(DatasetConfig(source="manifest", path=str(path)), 0, tmp_path / "dataset")
        assert str(caught.value) == f"{path}: {words}"

    def test_no_image_at_all(self, tmp_path: Path) -> None:
        root = tmp_path / "photos"
        write(root, **{"cat/1.heic": "1", "dog/2.png": ""})
        assert self.refused(root) == (
            f"{root}: holds no image that can be read\n  cat/1.heic: {NO_IMAGE}\n  dog/2.png: the file is empty"
        )

    def test_of_many_images_that_cannot_be_read_the_first_are_named_and_the_rest_counted(self, tmp_path: Path) -> None:
        root = tmp_path / "photos"
        write(root, **{f"cat/{number:02d}.png": "" for number in range(23)})
        lines = self.refused(root).splitlines()
        assert lines[1] == "  cat/00.png: the file is empty"
        assert lines[20:] == ["  cat/19.png: the file is empty", "  … and 3 more"]

    def test_no_training_image(self, tmp_path: Path) -> None:
        root = tmp_path / "photos"
        write(root, **{"test/cat/1.png": "1", "test/dog/2.png": "2"})
        assert self.refused(root) == f"{root}: every image is in the test split; expected training images as well"

    def test_digits_with_a_path(self, tmp_path: Path) -> None:
        with pytest.raises(
            DatasetError, match=r"takes no dataset.path; for your own images say dataset.source: folder"
        ):
            scan(DatasetConfig(path=str(tmp_path)), 0, tmp_path / "dataset")


def test_a_class_with_fewer_training_images_than_folds_is_named(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for number in range(8):
        put(root, f"many/{number}.png", f"many {number}")
        put(root, f"copies/{number}.png", f"copy {number // 4}")
    for number in range(3):
        put(root, f"few/{number}.png", f"few {number}")
    index = run(root).index
    assert fold_warnings(index, 2) == []
    assert fold_warnings(index, 3) == [
        "fewer training images, groups or distinct contents than the 3 folds in classes 'copies', 'few': some folds lack them; add "
        "images or set tuning.folds lower"
    ]


def test_more_folds_than_the_images_allow_are_one_line(photos: Path) -> None:
    assert fold_warnings(run(photos).index, 1000) == [
        "tuning.folds is 1000, but the training images allow 8: heads are tuned with 8, and some folds lack "
        "the smallest classes"
    ]


NO_FOLDS = (
    "cross-validation is not possible: every class has 1 training image, or all are of one group; give more images"
)


class TestMissingSide:
    """Each text is also what really happens: the test set is empty, or the folds cannot be made."""

    def of_manifest(self, tmp_path: Path, rows: list[str]) -> str | None:
        for row in rows:
            put(tmp_path, row.partition(",")[0], row)
        (tmp_path / "list.csv").write_text("\n".join(["path,label,split,group", *rows]))
        result = scan(DatasetConfig(source="manifest", path=str(tmp_path / "list.csv")), 0, tmp_path / "dataset")
        found = missing_side(result.index)
        if found and found.startswith("no image"):
            assert len(result.index.select("test")) == 0
            assert found in result.warnings
        elif found:
            train = result.index.select("train", "validation")
            with pytest.raises(HeadError):
                make_folds(train.labels.astype(str), 5, 0, train.fold_groups())
        return found

    def test_nothing_is_missing(self, photos: Path) -> None:
        assert missing_side(run(photos).index) is None

    @pytest.mark.parametrize(("group", "most"), [("", 2), ("g", 1)])
    def test_few_images_or_groups(self, tmp_path: Path, group: str, most: int) -> None:
        rows = [f"{label}{number}.png,{label},,{group and label}" for label in "ab" for number in range(2)]
        assert self.of_manifest(tmp_path, rows) == (
            f"no image is left for the test, and every leaderboard needs some: no class has more than {most} distinct images, or groups "
            "that must stay together; add images, make groups smaller, raise dataset.test_fraction, or name the images of each side in "
            "a manifest's `split` column, or in folders train/ and test/"
        )

    def test_one_class_to_train_on(self, tmp_path: Path) -> None:
        rows = ["a.png,a,train,", "b.png,a,train,", "c.png,b,test,"]
        found = self.of_manifest(tmp_path, rows)
        assert found is not None
        assert found.startswith("the training images are of 1 class, and a classifier needs at least 2; ")

    def test_one_image_of_each_class_to_train_on(self, tmp_path: Path) -> None:
        rows = ["a.png,a,train,", "b.png,b,train,", "c.png,b,test,"]
        assert self.of_manifest(tmp_path, rows) == NO_FOLDS

    def test_one_group_to_train_on(self, tmp_path: Path) -> None:
        rows = [*(f"{label}{number}.png,{label},train,g" for label in "ab" for number in range(4)), "c.png,b,test,"]
        assert self.of_manifest(tmp_path, rows) == NO_FOLDS


def test_the_digits_are_written_once_and_split_by_class(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    result = scan(DatasetConfig(), 0, tmp_path / "dataset")
    index = result.index
    assert (len(index), index.classes, index.root) == (1797, tuple("0123456789"), tmp_path / "images")
    bunch = load_digits()
    for number in (0, 1, 999, 1796):
        path = f"{bunch.target[number]}/{number:04d}.png"
        with Image.open(tmp_path / "images" / path) as image:
            np.testing.assert_array_equal(np.asarray(image), np.round(bunch.images[number] * 255 / 16))
        assert path in index.paths
    for count in class_counts(result.index).values():
        assert count["test"] == round(0.2 * (count["test"] + count["train"]))
    marker = (tmp_path / "images").stat().st_mtime_ns
    again = scan(DatasetConfig(), 0, tmp_path / "dataset")
    assert again.unchanged
    assert (tmp_path / "images").stat().st_mtime_ns == marker
    assert result.summary_lines()[0] == "1,797 images in 10 classes: 1,438 train, 359 test"


@pytest.mark.parametrize(
    ("labels", "question"),
    [
        ([f"{20 + 179 * row // 200 / 10}" for row in range(200)], "is this a number to predict?"),
        ([f"{row // 4}" for row in range(200)], "is this a number to predict?"),
        ([f"person {row}" for row in range(190)] + ["person 1"] * 10, "are these the labels, or names of the images?"),
        ([f"{row // 10}" for row in range(300)], None),
        ([f"{row % 9 / 2}" for row in range(200)], None),
        ([f"bird {row // 2}" for row in range(200)], None),
        (["cat", "dog", "cat|dog"] * 4, "are these several labels per image? Then set dataset.target: multilabel"),
        (["cat|", "|dog"] * 4, None),
    ],
    ids=["decimals", "few of each number", "names", "numbered classes", "half steps", "pairs", "several", "bars"],
)
def test_labels_that_are_hardly_classes_are_asked_about(
    tmp_path: Path, labels: list[str], question: str | None
) -> None:
    for row in range(len(labels)):
        put(tmp_path, f"{row}.png", f"{row}")
    rows = "\n".join(f"{row}.png,{label}" for row, label in enumerate(labels))
    (tmp_path / "list.csv").write_text(f"path,label\n{rows}")
    config = DatasetConfig(source="manifest", path=str(tmp_path / "list.csv"))
    if question is not None:
        with pytest.raises(DatasetError) as caught:
            scan(config, 0, tmp_path / "dataset")
        asked = 1 if "several" in question else len(set(labels))
        assert f"{asked} classes of {len(labels)} images, such as '" in caught.value.message
        assert question in caught.value.message
        assert "?." not in caught.value.message
        assert caught.value.message.endswith("If they are classes, set dataset.target: classification")
        assert not (tmp_path / "dataset").exists()
        config = config.model_copy(update={"target": "classification"})
    assert len(scan(config, 0, tmp_path / "dataset").index.classes) == len(set(labels))


class TestSeveralColumns:
    def scan(self, root: Path, species: list[str], age: list[str], **keys: object) -> ScanResult:
        lines = ["path,species,age"]
        for row, labels in enumerate(zip(species, age, strict=True)):
            put(root, f"{row:03}.png", f"{row}")
            lines.append(f"{row:03}.png,{','.join(labels)}")
        (root / "list.csv").write_text("\n".join(lines))
        settings = {"source": "manifest", "path": str(root / "list.csv"), "label_columns": ["species", "age"], **keys}
        return scan(DatasetConfig(**settings), 0, root / "dataset")  # type: ignore[arg-type]

    def test_the_test_split_keeps_each_and_their_combination_in_proportion(self, tmp_path: Path) -> None:
        species, age = ["cat"] * 60 + ["dog"] * 30 + ["ox"] * 10, (["old"] + ["young"] * 4) * 20
        index = self.scan(tmp_path, species, age).index
        assert index.names == ("species", "age")
        pairs = list(zip(species, age, strict=True))
        for kept in (species, age, pairs):
            test = Counter(label for label, split in zip(kept, index.splits, strict=True) if split == "test")
            assert all(abs(test[label] - count / 5) <= 1 for label, count in Counter(kept).items())
        assert DatasetIndex.read(tmp_path / "dataset").labels.tolist() == index.labels.tolist()
        assert self.scan(tmp_path, species, age).unchanged

    def test_what_is_told_names_the_column(self, tmp_path: Path) -> None:
        put(tmp_path, "003.png", "0")
        result = self.scan(tmp_path, ["cat", "dog"] * 10, ["old", "young", "", "Old"] * 5)
        assert result.summary_lines()[:6] == [
            "20 images with 2 labels each: 16 train, 4 test",
            "  species: in 2 classes",
            "    cat: 8 train, 2 test",
            "    dog: 8 train, 2 test",
            "  age: in 3 classes",
            "    Old: 4 train, 1 test",
        ]
        assert result.warnings == ("age: 5 images have no label, and are left out of its training",)
        assert fold_warnings(result.index, 5, result.kinds) == [
            "age: tuning.folds is 5, but the training images allow 4: heads are tuned with 4, and some folds lack the smallest classes"
        ]

    def test_copies_under_other_labels_are_told_with_all_of_them(self, tmp_path: Path) -> None:
        self.scan(tmp_path, ["cat", "dog"] * 4, ["old"] * 4 + ["young"] * 4)
        (tmp_path / "007.png").write_bytes((tmp_path / "000.png").read_bytes())
        scan(
            DatasetConfig(source="manifest", path=str(tmp_path / "list.csv"), label_columns=("species", "age")),
            0, tmp_path / "dataset",
        )  # fmt: skip
        (conflict,) = (entry for entry in read_failures(tmp_path / "dataset") if entry.status == "conflict")
        assert conflict.reason == "labelled 'dog, young'; the same content is 000.png, labelled 'cat, old'"

    def test_all_columns_that_cannot_be_used_are_told(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError) as caught:
            self.scan(tmp_path, ["cat"] * 30, [f"{row / 4}" for row in range(30)])
        assert caught.value.message == f"{tmp_path}/list.csv: 2 of 2 label columns cannot be used"
        first, second = caught.value.problems
        assert first == "species: all 30 images are of one class, 'cat'; expected at least 2 classes"
        assert second.startswith(
            "age: 30 classes of 30 images, such as '0.0', '0.25', '0.5': is this a number to predict?"
        )
