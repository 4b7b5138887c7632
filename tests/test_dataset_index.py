from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import DatasetIndex
from pipeline.data.index import WrittenIndex, texts
from pipeline.errors import DatasetError
from pipeline.io.digests import content_digest, digests_from_hex


def make_index(
    rows: list[tuple[str, str, str]], contents: list[str] | None = None, groups: list[str] | None = None
) -> DatasetIndex:
    """Rows of (path, label, split), sorted by path; contents differ unless given."""
    contents = contents if contents is not None else [path for path, _, _ in rows]
    return DatasetIndex(
        Path("photos"),
        *(texts([row[column] for row in rows]) for column in range(3)),
        texts(groups) if groups is not None else None,
        digests_from_hex(content_digest(content.encode("utf-8", "surrogatepass")).hex() for content in contents),
        np.arange(1, len(rows) + 1, dtype=np.int64),
    )


def assert_same(first: DatasetIndex, second: DatasetIndex) -> None:
    assert first.root == second.root
    for name in ("paths", "labels", "splits", "groups"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None)
        assert one is None or one.tolist() == other.tolist()
    np.testing.assert_array_equal(first.digests, second.digests)
    np.testing.assert_array_equal(first.sizes, second.sizes)


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            TEXT, TEXT, st.sampled_from(["train", "validation", "test", "excluded"]), st.one_of(st.just(""), TEXT)
        ),
        unique_by=lambda row: row[0],
        min_size=1,
        max_size=8,
    )
)
def test_index_file_returns_any_path_label_and_group(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("index")
    rows.sort()
    groups = [group for *_, group in rows]
    index = make_index([row[:3] for row in rows], groups=groups if any(groups) else None)
    index.write(folder)
    back = DatasetIndex.read(folder)
    assert_same(index, back)
    assert back.fingerprint() == index.fingerprint()


def test_index_file_is_plain_csv(tmp_path: Path) -> None:
    index = make_index([("cat/1.png", "cat", "train"), ("dog/2.png", "dog", "test")])
    index.write(tmp_path)
    first, second, third = (tmp_path / "index.csv").read_text().splitlines()
    assert first == "path,label,split,group,digest,size"
    assert second == f"cat/1.png,cat,train,,{content_digest(b'cat/1.png').hex()},1"
    assert third == f"dog/2.png,dog,test,,{content_digest(b'dog/2.png').hex()},2"


def with_columns(index: DatasetIndex, **columns: list[str]) -> DatasetIndex:
    labels = np.array(list(columns.values()), dtype=object).T
    return replace(index, labels=labels, names=tuple(columns))


def test_several_label_columns_stand_where_the_one_would(tmp_path: Path) -> None:
    rows = [("1.png", "", "train"), ("2.png", "", "test"), ("3.png", "", "train")]
    index = with_columns(make_index(rows), species=["cat", "dog", "cat"], **{"age, years": ["007", "", "=1.50"]})
    index.write(tmp_path)
    first, second, *_, last = (tmp_path / "index.csv").read_text().splitlines()
    assert first == 'path,species,"age, years",split,group,digest,size'
    assert next(csv.reader([second]))[:5] == ["1.png", "cat", "007", "train", ""]
    assert next(csv.reader([last]))[2] == "'=1.50"
    back = DatasetIndex.read(tmp_path)
    assert back.names == ("species", "age, years")
    assert back.labels.tolist() == [["cat", "007"], ["dog", ""], ["cat", "=1.50"]]
    assert back.fingerprint() == index.fingerprint()
    assert back.select("train").column("age, years").tolist() == ["007", "=1.50"]
    assert back.has_labels().tolist() == [True, False, True]
    assert back.has_labels("multilabel").all()
    assert [(name, kind, len(part)) for name, kind, part in back.by_target(("auto", "regression"))] == [
        ("species: ", "auto", 3),
        ("age, years: ", "regression", 2),
    ]
    with pytest.raises(KeyError, match="speices"):
        back.column("speices")


def test_one_of_several_label_columns_is_as_if_there_were_no_other(tmp_path: Path) -> None:
    rows = [("1.png", "cat", "train"), ("2.png", "dog", "test")]
    alone = make_index(rows)
    index = with_columns(alone, size=["7", "8"], species=["cat", "dog"], path=["f", "m"])
    index.write(tmp_path)
    assert DatasetIndex.read(tmp_path).column("size").tolist() == ["7", "8"]
    assert index.only("species").names == ("label",)
    assert index.only("species").fingerprint() == alone.fingerprint() != index.fingerprint()
    assert index.only("species").classes == ("cat", "dog")
    both = index.only("path", "size")
    assert (both.names, both.labels.tolist()) == (("path", "size"), [["f", "7"], ["m", "8"]])


def test_empty_index_returns(tmp_path: Path) -> None:
    index = make_index([])
    index.write(tmp_path)
    assert_same(index, DatasetIndex.read(tmp_path))
    assert index.fold_groups() is None
    assert index.classes == ()


def test_select_keeps_order_and_takes_several_splits() -> None:
    index = make_index(
        [("a", "x", "train"), ("b", "y", "test"), ("c", "x", "validation"), ("d", "z", "excluded")],
        groups=["g", "", "h", ""],
    )
    chosen = index.select("validation", "train")
    assert chosen.paths.tolist() == ["a", "c"]
    assert chosen.groups is not None
    assert chosen.groups.tolist() == ["g", "h"]
    np.testing.assert_array_equal(chosen.digests, index.digests[[0, 2]])
    assert index.select("test").classes == ("y",)
    assert index.classes == ("x", "y", "z")
    with pytest.raises(ValueError, match="unknown splits \\['tset'\\]"):
        index.select("tset")


def test_fold_groups_are_none_where_every_image_is_free() -> None:
    assert make_index([("a", "x", "train"), ("b", "x", "train")]).fold_groups() is None


def test_fold_groups_keep_copies_together() -> None:
    index = make_index([(name, "x", "train") for name in "abcd"], contents=["1", "2", "1", "3"])
    groups = index.fold_groups()
    assert groups is not None
    assert groups[0] == groups[2]
    assert len(set(groups.tolist())) == 3


def test_fold_groups_join_groups_that_share_a_content() -> None:
    # a and b are of one patient, c is a copy of b under another patient, d is of c's patient; e and f have no group
    index = make_index(
        [(name, "x", "train") for name in "abcdef"],
        contents=["1", "2", "2", "4", "5", "6"],
        groups=["p", "p", "q", "q", "", ""],
    )
    groups = index.fold_groups()
    assert groups is not None
    assert len(set(groups[:4].tolist())) == 1
    assert len(set(groups.tolist())) == 3


def test_fingerprint_depends_on_every_column_and_not_on_the_root() -> None:
    index = make_index([("a", "x", "train"), ("b", "y", "test")])
    others = [
        make_index([("a", "y", "train"), ("b", "y", "test")]),
        make_index([("a", "x", "test"), ("b", "y", "test")]),
        make_index([("a", "x", "train"), ("c", "y", "test")], contents=["a", "b"]),
        make_index([("a", "x", "train"), ("b", "y", "test")], contents=["a", "c"]),
        make_index([("a", "x", "train"), ("b", "y", "test")], groups=["g", ""]),
    ]
    assert len({index.fingerprint(), *(other.fingerprint() for other in others)}) == 6
    moved = DatasetIndex(Path("elsewhere"), index.paths, index.labels, index.splits, None, index.digests, index.sizes)
    assert moved.fingerprint() == index.fingerprint()


GOOD = "path,label,split,group,digest,size\na.png,x,train,,00000000000000000000000000000001,5\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,x\n", "has columns path, label, expected path, label, split, group, digest, size"),
        (GOOD.replace("train", "tain"), "unknown split 'tain', expected one of train, validation, test, excluded"),
        (GOOD.replace("0001", "001g"), "a digest is not 32 hexadecimal digits"),
        (GOOD + GOOD.splitlines()[1] + "\n", "the rows are not sorted by path, or a path is there twice"),
        (GOOD.replace(",5", ",five"), "cannot be read"),
        (GOOD + "b.png,x\n", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    make_index([]).write(tmp_path)
    (tmp_path / "index.csv").write_text(text)
    with pytest.raises(DatasetError) as caught:
        assert WrittenIndex.read(tmp_path).index is None
    assert message in str(caught.value)
    assert "index.csv" in str(caught.value)


def test_a_file_saved_by_a_spreadsheet_is_read(tmp_path: Path) -> None:
    make_index([]).write(tmp_path)
    (tmp_path / "index.csv").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    found = WrittenIndex.read(tmp_path).index
    assert found is not None
    assert found.paths.tolist() == ["a.png"]


def test_an_index_that_is_not_the_one_written_is_told(tmp_path: Path) -> None:
    make_index([("a", "x", "train"), ("b", "y", "test")]).write(tmp_path)
    path = tmp_path / "index.csv"
    path.write_text(path.read_text().replace("a,x,train", "a,y,train"))
    with pytest.raises(DatasetError) as caught:
        DatasetIndex.read(tmp_path)
    assert str(caught.value) == (
        f"{path}: was edited, or is damaged, since it was written; run `manyheads features`, which keeps its "
        "splits, or delete it to have it made anew"
    )


def test_a_kill_between_the_two_files_of_an_index_is_no_damage(tmp_path: Path) -> None:
    old, new = make_index([("a", "x", "train")]), make_index([("a", "y", "train")])
    old.write(tmp_path)
    rows = (tmp_path / "index.csv").read_bytes()
    new.write(tmp_path)
    assert DatasetIndex.read(tmp_path).labels.tolist() == ["y"]
    (tmp_path / "index.csv").write_bytes(rows)  # as if the run had been killed before the second file
    assert DatasetIndex.read(tmp_path).labels.tolist() == ["x"]


def test_what_a_spreadsheet_would_run_is_text_in_the_file_and_itself_when_read(tmp_path: Path) -> None:
    names = ["'quoted", "+1", "-1", "-2+3", "=1+1", "@SUM(A1)", "\tx", "plain"]
    names.sort()
    index = make_index([(name, name, "train") for name in names], groups=names)
    index.write(tmp_path)
    rows = list(csv.reader((tmp_path / "index.csv").open(encoding="utf-8", newline="")))
    cells = {cell for row in rows[1:] for cell in (row[0], row[1], row[3])}
    assert cells == {"''quoted", "+1", "-1", "'-2+3", "'=1+1", "'@SUM(A1)", "'\tx", "plain"}
    back = DatasetIndex.read(tmp_path)
    assert back.paths.tolist() == back.labels.tolist() == names
    assert back.groups is not None
    assert back.groups.tolist() == names
    assert back.fingerprint() == index.fingerprint()


def test_no_index_and_an_index_of_another_format(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"holds no index; run `manyheads features`"):
        DatasetIndex.read(tmp_path)
    make_index([]).write(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"format": "manyheads index", "version": 9, "root": ""}))
    with pytest.raises(DatasetError, match="version 9, expected 'manyheads index' version 2"):
        DatasetIndex.read(tmp_path)
