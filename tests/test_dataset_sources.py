from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from pipeline.config import DatasetConfig
from pipeline.data import manifest
from pipeline.data.failures import shown
from pipeline.data.folder import Listing, list_folder
from pipeline.data.sources import torchvision_manifest, written_once
from pipeline.errors import ConfigError, DatasetError
from pipeline.images import NO_IMAGE


def list_manifest(path: Path, **keys: object) -> Listing:
    return manifest.list_manifest(path, DatasetConfig(source="manifest", path=str(path), **keys))  # type: ignore[arg-type]


def put(root: Path, *paths: str) -> Path:
    """Files that hold their own path."""
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.fsencode(path))
    return root


def rows(listing: Listing) -> list[tuple[str, ...]]:
    """Path, label, and split and group where any image has one."""
    images = sorted(listing.images)
    kept = [0, 1, *(place for place in (2, 3) if any(image[place] for image in images))]
    return [tuple(image[place] for place in kept) for image in images]


def entries(listing: Listing) -> list[tuple[str, str]]:
    return sorted((entry.path, entry.status) for entry in listing.entries)


JPEG, PNG = b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"


class TestFolder:
    def test_where_a_name_says_nothing_the_content_decides(self, tmp_path: Path) -> None:
        put(tmp_path, "cat/a.jfif", "cat/b.PJPEG", "cat/c.mpo", "cat/d.apng", "dog/1.png")
        contents = {
            "cat/no_ending": JPEG,
            "cat/e.dat": PNG,
            "cat/phone.heic": JPEG,
            "cat/f.avif": b"\0\0\0\x1cftypavif",
            "cat/g.xyz": b"FUJIFILMCCD-RAW",
            "cat/h.xyz": b"%PDF-1.7",
            "cat/i.xyz": b"",
            "j.xyz": PNG,
        }
        for path, content in contents.items():
            (tmp_path / path).write_bytes(content)
        listing = list_folder(tmp_path)
        assert [path for path, _ in rows(listing)] == [
            "cat/a.jfif", "cat/b.PJPEG", "cat/c.mpo", "cat/d.apng", "cat/e.dat", "cat/f.avif", "cat/no_ending",
            "cat/phone.heic", "dog/1.png",
        ]  # fmt: skip
        assert sorted((entry.path, entry.status, entry.reason) for entry in listing.entries) == [
            ("cat/g.xyz", "unsupported_format", "it is a camera's raw file; save it as JPEG or PNG"),
            ("cat/h.xyz", "not_an_image", NO_IMAGE),
            ("cat/i.xyz", "not_an_image", NO_IMAGE),
            ("j.xyz", "not_in_a_class", "it is in no class folder, so it has no label"),
        ]

    def test_sub_folders_are_classes_at_any_depth(self, tmp_path: Path) -> None:
        put(tmp_path, "cat/b.PNG", "cat/deep/er/a.jpeg", "dog/c.webp", "dog/d.TIF")
        assert rows(list_folder(tmp_path)) == [
            ("cat/b.PNG", "cat"),
            ("cat/deep/er/a.jpeg", "cat"),
            ("dog/c.webp", "dog"),
            ("dog/d.TIF", "dog"),
        ]

    def test_splits_above_classes_are_found(self, tmp_path: Path) -> None:
        put(tmp_path, "Train/cat/1.png", "val/cat/2.png", "valid/dog/3.png", "testing/dog/4.png")
        assert rows(list_folder(tmp_path)) == [
            ("Train/cat/1.png", "cat", "train"),
            ("testing/dog/4.png", "dog", "test"),
            ("val/cat/2.png", "cat", "validation"),
            ("valid/dog/3.png", "dog", "validation"),
        ]

    def test_a_class_called_train_beside_others_is_a_class(self, tmp_path: Path) -> None:
        put(tmp_path, "train/1.png", "bus/2.png", "test/3.png")
        assert [label for _, label in rows(list_folder(tmp_path))] == ["bus", "test", "train"]

    def test_splits_with_something_else_beside_them_are_refused(self, tmp_path: Path) -> None:
        put(tmp_path, "train/cat/1.png", "test/cat/2.png", "meta/list.txt")
        with pytest.raises(DatasetError) as caught:
            list_folder(tmp_path)
        assert str(caught.value) == (
            f"{tmp_path}: test, train look like splits above class folders, but meta beside them does not; move it "
            "elsewhere, or list the images in a CSV manifest with dataset.source: manifest"
        )

    def test_split_folders_without_classes_are_refused(self, tmp_path: Path) -> None:
        put(tmp_path, "train/1.png", "test/2.png")
        with pytest.raises(DatasetError, match=r"test: holds no class folders \(1 image at its top\)"):
            list_folder(tmp_path)

    def test_labels_may_have_any_sign_and_one_unicode_form(self, tmp_path: Path) -> None:
        put(tmp_path, 'a, "b"\nc/1.png', "кот/2.png", "猫/3.png", "e\u0301/4.png")
        assert {label for _, label in rows(list_folder(tmp_path))} == {'a, "b"\nc', "кот", "猫", "\u00e9"}

    def test_hidden_things_are_counted_and_other_files_are_named(self, tmp_path: Path) -> None:
        put(
            tmp_path,
            "cat/1.png",
            "dog/2.png",
            "cat/.DS_Store",
            "cat/Thumbs.db",
            "dog/desktop.ini",
            "dog/._2.png",
            ".git/x.png",
        )
        put(
            tmp_path, "__MACOSX/cat/1.png", "cat/notes.txt", "cat/phone.HEIC", "README.md", "stray.png", "dog/no_ending"
        )
        listing = list_folder(tmp_path)
        assert [path for path, _ in rows(listing)] == ["cat/1.png", "dog/2.png"]
        assert listing.ignored == {"hidden files and folders": 6}
        assert entries(listing) == [
            ("README.md", "not_an_image"),
            ("cat/notes.txt", "not_an_image"),
            ("cat/phone.HEIC", "not_an_image"),
            ("dog/no_ending", "not_an_image"),
            ("stray.png", "not_in_a_class"),
        ]

    def test_stray_files_below_a_split_are_named_with_it(self, tmp_path: Path) -> None:
        put(tmp_path, "train/cat/1.png", "train/stray.png", "test/cat/2.png")
        assert entries(list_folder(tmp_path)) == [("train/stray.png", "not_in_a_class")]

    def test_a_class_folder_without_images_is_a_warning(self, tmp_path: Path) -> None:
        put(tmp_path, "cat/1.png", "dog/notes.txt")
        (tmp_path / "empty").mkdir()
        assert list_folder(tmp_path).warnings == [
            "class folder dog holds no images",
            "class folder empty holds no images",
        ]

    @pytest.mark.skipif(sys.platform == "darwin", reason="macOS takes only UTF-8 names")
    def test_names_that_are_not_text_are_named_escaped(self, tmp_path: Path) -> None:
        put(tmp_path, "cat/1.png", os.fsdecode(b"cat/caf\xe9.png"), os.fsdecode(b"d\xf6g/2.png"))
        listing = list_folder(tmp_path)
        assert [path for path, _ in rows(listing)] == ["cat/1.png"]
        assert entries(listing) == [("cat/caf\\xe9.png", "bad_name"), ("d\\xf6g/2.png", "bad_name")]

    def test_a_pipe_is_not_opened(self, tmp_path: Path) -> None:
        put(tmp_path, "cat/1.png")
        os.mkfifo(tmp_path / "cat/2.png")
        assert entries(list_folder(tmp_path)) == [("cat/2.png", "unreadable")]

    def test_symbolic_links_stay_inside_and_never_loop(self, tmp_path: Path) -> None:
        root = put(tmp_path / "data", "cat/1.png", "dog/2.png", ".store/deep/5.png")
        put(tmp_path, "secret/9.png")
        (root / "cat/3.png").symlink_to("1.png")
        (root / "cat/loop").symlink_to("..")
        (root / "cat/out.png").symlink_to(tmp_path / "secret/9.png")
        (root / "cat/gone.png").symlink_to("nothing.png")
        (root / "bird").symlink_to(".store/deep")
        (root / "fish").symlink_to(tmp_path / "secret")
        listing = list_folder(root)
        assert rows(listing) == [
            ("cat/1.png", "cat"),
            ("cat/3.png", "cat"),
            ("dog/2.png", "dog"),
        ]
        assert entries(listing) == [
            (path, "unreadable") for path in ("bird", "cat/gone.png", "cat/loop", "cat/out.png", "fish")
        ]

    def test_a_folder_without_classes_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            DatasetError, match=r"holds no class folders \(2 images at its top\); put the images of each"
        ):
            list_folder(put(tmp_path, "1.png", "2.png", "x.txt"))

    def test_a_missing_folder_and_a_file_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"there is no such folder; dataset.path is the folder"):
            list_folder(tmp_path / "nowhere")
        put(tmp_path, "list.csv")
        with pytest.raises(DatasetError, match=r"is a file; .*dataset.source: manifest"):
            list_folder(tmp_path / "list.csv")

    def test_an_unreadable_folder_is_named(self, tmp_path: Path) -> None:
        put(tmp_path, "cat/1.png", "dog/2.png")
        (tmp_path / "dog").chmod(0)
        if os.access(tmp_path / "dog", os.R_OK):
            pytest.skip("this user may read everything")
        assert entries(list_folder(tmp_path)) == [("dog", "unreadable")]


class TestManifest:
    def write(self, root: Path, text: str, name: str = "list.csv") -> Path:
        put(root, "a/1.png", "a/2.png", "b/3.jpg")
        path = root / name
        path.write_text(text, encoding="utf-8", newline="")
        return path

    def test_path_and_label(self, tmp_path: Path) -> None:
        listing = list_manifest(self.write(tmp_path, "path,label\nb/3.jpg,dog\na/1.png,cat\n"))
        assert rows(listing) == [("a/1.png", "cat"), ("b/3.jpg", "dog")]
        assert listing.root == tmp_path

    def test_all_columns_in_any_order_with_a_bom_and_semicolons(self, tmp_path: Path) -> None:
        text = '\ufeffGroup;label;Split;path;note\np1;cat;TRAIN;./a/1.png;x\np1;cat;val;a//2.png;y\n;"d;o\ng";test;b/3.jpg;z\n'
        listing = list_manifest(self.write(tmp_path, text))
        assert rows(listing) == [
            ("a/1.png", "cat", "train", "p1"),
            ("a/2.png", "cat", "validation", "p1"),
            ("b/3.jpg", "d;o\ng", "test", ""),
        ]
        assert listing.warnings == [f"{tmp_path}/list.csv: columns not used: note"]

    def test_empty_split_and_group_columns_are_as_good_as_none(self, tmp_path: Path) -> None:
        listing = list_manifest(self.write(tmp_path, "path,label,split,group\na/1.png,cat,,\nb/3.jpg,dog,,\n"))
        assert rows(listing) == [("a/1.png", "cat"), ("b/3.jpg", "dog")]

    def test_every_problem_is_told_with_its_line(self, tmp_path: Path) -> None:
        text = (
            "path,label,split\n/etc/passwd,a,train\n../x.png,a,train\nC:/x.png,a,train\na\\1.png,a,train\n,a,train\n"
            'a/1.png,,train\na/2.png,"x\ny",tset\na/2.png,a,train\nb/3.jpg,a\na/9.png,a,\n./,a,test\n'
        )
        with pytest.raises(DatasetError) as caught:
            list_manifest(self.write(tmp_path, text))
        assert caught.value.message == f"{tmp_path}/list.csv: 11 problems"
        assert sorted(caught.value.problems) == sorted(
            [
                "line 2: path '/etc/passwd' is not inside the manifest's folder; set dataset.root to the folder that holds all images",
                "line 3: path '../x.png' is not inside the manifest's folder; set dataset.root to the folder that holds all images",
                "line 4: path 'C:/x.png' is not inside the manifest's folder; set dataset.root to the folder that holds all images",
                "line 5: path 'a\\\\1.png' has a backslash or a NUL character; write it with '/'",
                "line 6: path '' names no file",
                "line 7: the label is empty",
                "line 8: unknown split 'tset', expected train, validation, test or excluded",
                "line 10: path 'a/2.png' is listed before, at line 8",
                "line 11: 2 values, expected 3; quote values that hold a comma",
                "2 rows have no split, though others have one",
                "line 13: path './' names no file",
            ]
        )

    def test_a_thousand_problems_are_cut_short(self, tmp_path: Path) -> None:
        text = "path,label\n" + "".join(f"../{number},x\n" for number in range(1000))
        with pytest.raises(DatasetError) as caught:
            list_manifest(self.write(tmp_path, text))
        assert caught.value.message.endswith("1,000 problems")
        assert len(caught.value.problems) == 51
        assert caught.value.problems[-1] == "… and 950 more"

    def test_missing_files_are_named_as_failures(self, tmp_path: Path) -> None:
        (tmp_path / "a/dir.png").mkdir(parents=True)
        listing = list_manifest(
            self.write(tmp_path, "path,label\na/1.png,x\na/9.png,x\nq/1.png,y\na/dir.png,y\na/1.png/z,y\n")
        )
        assert rows(listing) == [("a/1.png", "x")]
        assert [image[5:] for image in listing.images] == [(7, *_times(tmp_path / "a/1.png"))]
        assert entries(listing) == [
            ("a/1.png/z", "missing"),
            ("a/9.png", "missing"),
            ("a/dir.png", "unreadable"),
            ("q/1.png", "missing"),
        ]

    def test_links_are_followed_to_what_lies_inside(self, tmp_path: Path) -> None:
        root = tmp_path / "data"
        path = self.write(root, "path,label\nin.png,x\nout.png,x\nfolder/1.png,y\naway/s.png,y\n")
        put(tmp_path, "secret/s.png")
        (root / "in.png").symlink_to("a/1.png")
        (root / "out.png").symlink_to(tmp_path / "secret/s.png")
        (root / "folder").symlink_to("a")
        (root / "away").symlink_to(tmp_path / "secret")
        listing = list_manifest(path)
        assert [row[0] for row in rows(listing)] == ["folder/1.png", "in.png"]
        assert entries(listing) == [("away/s.png", "unreadable"), ("out.png", "unreadable")]

    def test_parquet_says_the_same_as_csv(self, tmp_path: Path) -> None:
        self.write(tmp_path, "")
        table = pa.table(
            {
                "path": ["a/1.png", "b/3.jpg"],
                "label": pa.array([0, 1]),
                "split": ["train", "test"],
                "group": ["g", None],
            }
        )
        pyarrow.parquet.write_table(table, tmp_path / "list.parquet")
        assert rows(list_manifest(tmp_path / "list.parquet")) == [
            ("a/1.png", "0", "train", "g"),
            ("b/3.jpg", "1", "test", ""),
        ]

    def test_parquet_problems_are_told_by_row(self, tmp_path: Path) -> None:
        table = pa.table({"path": ["a/1.png", "../x"], "label": ["x", None]})
        pyarrow.parquet.write_table(table, tmp_path / "list.parquet")
        with pytest.raises(DatasetError) as caught:
            list_manifest(tmp_path / "list.parquet")
        assert caught.value.problems == (
            "row 2: path '../x' is not inside the manifest's folder; set dataset.root to the folder that holds all images",
            "row 2: the label is empty",
        )

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ("path,label\na,\u00e9\n".encode("latin-1"), "line 1: is no CSV in UTF-8"),
            (b'path,label\na,"x\n', "line 2: is no CSV in UTF-8"),
        ],
    )
    def test_a_file_that_is_no_manifest_is_refused(self, tmp_path: Path, data: bytes, message: str) -> None:
        (tmp_path / "list.csv").write_bytes(data)
        with pytest.raises(DatasetError) as caught:
            list_manifest(tmp_path / "list.csv")
        assert message in str(caught.value)
        assert caught.value.problems == ()

    @pytest.mark.parametrize(
        ("header", "problems"),
        [
            ("file,label", ["there is no column 'path'; set dataset.path_column to its name"]),
            (
                "filepath,lable",
                [
                    "there is no column 'path', did you mean 'filepath'?; set dataset.path_column to its name",
                    "there is no column 'label', did you mean 'lable'?; set dataset.label_columns to its name",
                ],
            ),
            (
                "path,label,Label,Group,group ",
                [
                    "column 'group' appears 2 times; set dataset.group_column to a unique name",
                ],
            ),
        ],
    )
    def test_columns_that_are_not_there_are_told_at_once(
        self, tmp_path: Path, header: str, problems: list[str]
    ) -> None:
        with pytest.raises(DatasetError) as caught:
            list_manifest(self.write(tmp_path, f"{header}\n"))
        assert caught.value.problems == (*problems, f"its columns are {', '.join(header.split(','))}")

    def test_columns_are_those_that_the_config_names(self, tmp_path: Path) -> None:
        text = "file,split,Fold,patient,species,age\na/1.png,x,train,p1,cat,007\nb/3.jpg,y,test,p2,,3.50\n"
        path = self.write(tmp_path, text)
        listing = list_manifest(
            path, path_column="file", split_column="fold", group_column="patient", label_columns=("species", "age")
        )
        assert listing.names == ("species", "age")
        assert rows(listing) == [("a/1.png", ("cat", "007"), "train", "p1"), ("b/3.jpg", ("", "3.50"), "test", "p2")]
        assert listing.warnings == [f"{path}: columns not used: split"]
        alone = list_manifest(path, path_column="file", split_column="Fold", label_columns=("age",))
        assert alone.names == ("label",)
        assert rows(alone) == [("a/1.png", "007", "train"), ("b/3.jpg", "3.50", "test")]
        with pytest.raises(DatasetError) as caught:
            list_manifest(path, split_column="folds", label_columns=("speices", "age"))
        assert caught.value.problems == (
            "there is no column 'path'; set dataset.path_column to its name",
            "there is no column 'folds', did you mean 'Fold'?; set dataset.split_column to its name",
            "there is no column 'speices', did you mean 'species'?; set dataset.label_columns to its name",
            "its columns are file, split, Fold, patient, species, age",
        )

    def test_paths_are_relative_to_the_root_or_absolute_and_inside_it(self, tmp_path: Path) -> None:
        put(tmp_path / "photos", "a/1.png", "b/2.png")
        (tmp_path / "link").symlink_to("photos")
        text = f"path,label\n{tmp_path}/photos/a/1.png,x\nb/2.png,y\n{tmp_path}/photos/../secret.png,x\n/etc/passwd,y\n"
        path = self.write(tmp_path / "lists", text)
        for root in ("photos", "link"):
            with pytest.raises(DatasetError) as caught:
                list_manifest(path, root=str(tmp_path / root))
            told = str(tmp_path / root)
            assert caught.value.problems == (
                f"line 4: path '../secret.png' is not inside {told}; set dataset.root to the folder that holds all images",
                f"line 5: path '/etc/passwd' is not inside {told}; set dataset.root to the folder that holds all images",
            )
        path.write_text("\n".join(text.splitlines()[:3]))
        listing = list_manifest(path, root=str(tmp_path / "link"))
        assert rows(listing) == [("a/1.png", "x"), ("b/2.png", "y")]
        assert listing.root == tmp_path / "link"
        with pytest.raises(
            DatasetError, match=r"photo: there is no such folder; set dataset.root to the one that holds"
        ):
            list_manifest(path, root=str(tmp_path / "photo"))

    def test_several_labels_of_an_image_may_be_none(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "path,label\na/1.png,cat; dog;;cat\nb/3.jpg,\n")
        assert rows(list_manifest(path, label_separator=";")) == [("a/1.png", "cat|dog"), ("b/3.jpg", "")]
        with pytest.raises(DatasetError, match="line 3: the label is empty"):
            list_manifest(path)
        path.write_text("path,label\na/1.png,cat; a|b\n")
        with pytest.raises(DatasetError, match=r"line 2: a label holds '\|', which stands between labels in the index"):
            list_manifest(path, label_separator=";")
        path.write_text("path,tags,note\na/1.png,cat;dog,a;b\nb/3.jpg,,\n")
        listing = list_manifest(
            path, label_separator=";", label_columns=("tags", "note"), target={"tags": "multilabel"}
        )
        assert [image[1] for image in listing.images] == [("cat|dog", "a;b"), ("", "")]
        with pytest.raises(ValueError, match=r"label_separator: only for multilabel columns; mark them with target"):
            list_manifest(path, label_separator=";", label_columns=("tags", "note"))
        path.write_text("path,a,b\na/1.png,,x\nb/3.jpg,,\n")
        with pytest.raises(DatasetError, match="line 3: the label is empty"):
            list_manifest(path, label_columns=("a", "b"))

    def test_a_table_from_python_does_what_a_file_does(self, tmp_path: Path) -> None:
        self.write(tmp_path, "")
        columns = {
            "file": [f"{tmp_path}/a/1.png", "b/3.jpg"],
            "tags": [["cat", "dog"], []],
            "Age": [3, 3.5],
            "photo": [{"bytes": b""}, None],
        }
        keys = {
            "path_column": "file",
            "label_columns": ["tags", "age"],
            "label_separator": ";",
            "target": {"tags": "multilabel"},
            "root": str(tmp_path),
        }
        path = tmp_path / "new" / "table.parquet"
        section = manifest.manifest(columns, path, **keys)
        assert section == {"source": "manifest", "path": str(path), **keys}
        listing = manifest.list_manifest(path, DatasetConfig(**section))
        assert listing.names == ("tags", "age")
        assert rows(listing) == [("a/1.png", ("cat|dog", "3")), ("b/3.jpg", ("", "3.5"))]
        before = path.read_bytes()
        columns["file"][1] = "../x"
        columns["tags"][1] = ["cat;dog"]
        with pytest.raises(DatasetError) as caught:
            manifest.manifest(columns, path, **keys)
        assert caught.value.problems == (
            "a label of column 'tags' holds ';'; set dataset.label_separator to what none holds",
            f"row 2: path '../x' is not inside {tmp_path}; set dataset.root to the folder that holds all images",
        )
        assert path.read_bytes() == before
        with pytest.raises(ConfigError, match=r"dataset\.label_colums: unknown key, did you mean 'label_columns'\?"):
            manifest.manifest(columns, path, label_colums=["tags"])
        with pytest.raises(DatasetError, match=r"a table is written as Parquet; give a name that ends in \.parquet"):
            manifest.manifest(columns, tmp_path / "table.csv")

    def test_other_mistakes_with_the_path(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"list.csv: cannot be read \(there is no such file\)"):
            list_manifest(tmp_path / "list.csv")
        with pytest.raises(DatasetError, match=r"is no file, .*dataset.source: folder"):
            list_manifest(tmp_path)
        (tmp_path / "list.parquet").write_bytes(b"not parquet")
        with pytest.raises(DatasetError, match="cannot be read as Parquet"):
            list_manifest(tmp_path / "list.parquet")


def _times(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_ctime_ns


def test_names_are_shown_without_control_characters() -> None:
    assert shown("a\x1b[31mb\nc\udce9é猫") == "a\\x1b[31mb\\nc\\xe9é猫"


class TestMaterialised:
    def test_a_killed_run_leaves_nothing_that_counts(self, tmp_path: Path) -> None:
        def killed(folder: Path) -> None:
            put(folder, "half.png")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            written_once(tmp_path / "images", killed)
        assert not (tmp_path / "images").exists()
        done = written_once(tmp_path / "images", lambda folder: put(folder, "whole.png") and None)
        assert [path.name for path in done.iterdir()] == ["whole.png"]
        assert [path.name for path in tmp_path.iterdir()] == ["images"]

    def test_what_is_there_is_not_written_again(self, tmp_path: Path) -> None:
        def never(folder: Path) -> None:
            raise AssertionError

        put(tmp_path, "images/1.png")
        assert written_once(tmp_path / "images", never) == tmp_path / "images"


class TestTorchvision:
    @pytest.fixture
    def cifar(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
        """A CIFAR10 archive of 12 images where torchvision would download it to; returns their pixels."""
        pytest.importorskip("torch")
        from pipeline.io.vision import torchvision

        pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
        names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
        files: dict[str, bytes] = {}
        for number, name in enumerate(names):
            part = pixels[number * 2 : number * 2 + 2].transpose(0, 3, 1, 2).reshape(2, -1)
            files[name] = pickle.dumps({"data": part, "labels": [number % 2, 9]})
        classes = ["airplane", "auto, mobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck/lorry"]
        files["batches.meta"] = pickle.dumps({"label_names": classes})
        archive = tmp_path / "cifar-10-python.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        digests = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
        target = torchvision.datasets.CIFAR10
        monkeypatch.setattr(target, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        monkeypatch.setattr(target, "train_list", [[name, digests[name]] for name in names[:5]])
        monkeypatch.setattr(target, "test_list", [["test_batch", digests["test_batch"]]])
        monkeypatch.setattr(
            target, "meta", {"filename": "batches.meta", "key": "label_names", "md5": digests["batches.meta"]}
        )
        return pixels

    def test_cifar10_becomes_png_files_once(self, tmp_path: Path, cifar: np.ndarray) -> None:
        written = torchvision_manifest("CIFAR10", tmp_path)
        listing = list_manifest(written)
        paths, labels, splits, *_ = map(list, zip(*listing.images, strict=True))
        assert splits == ["train"] * 10 + ["test"] * 2
        assert labels == ["airplane", "truck/lorry", "auto, mobile", "truck/lorry"] * 2 + [
            "airplane",
            "truck/lorry",
        ] + ["auto, mobile", "truck/lorry"]
        assert paths[2] == "train/000002.png"
        for path, expected in zip(paths, cifar, strict=True):
            with Image.open(written.parent / path) as image:
                np.testing.assert_array_equal(np.asarray(image), expected)
        before = written.stat().st_mtime_ns
        (tmp_path / "cifar-10-python.tar.gz").unlink()
        assert torchvision_manifest("CIFAR10", tmp_path) == written
        assert written.stat().st_mtime_ns == before

    def test_without_network_the_file_to_fetch_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("torch")
        from pipeline.io.vision import torchvision

        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
        with pytest.raises(DatasetError) as caught:
            torchvision_manifest("CIFAR10", tmp_path)
        assert str(caught.value).startswith("CIFAR10 cannot be downloaded (")
        assert str(caught.value).endswith(
            f"fetch http://127.0.0.1:9/cifar-10-python.tar.gz yourself, put it into {tmp_path} as torchvision.datasets.CIFAR10 "
            "describes, and run again"
        )
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "CIFAR10-images").exists()

    def test_an_unknown_or_unfit_name_lists_the_known(self, tmp_path: Path) -> None:
        pytest.importorskip("torch")
        for name, near in {"CIFAR11": ", did you mean 'CIFAR10", "FakeData": ""}.items():
            with pytest.raises(
                DatasetError, match=f"{name}': torchvision has no data set of this name that it downloads{near}"
            ):
                torchvision_manifest(name, tmp_path)
