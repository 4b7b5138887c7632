"""Archives, tables with images in them and remote folders give what a folder gives, and are read as carefully."""

from __future__ import annotations

import csv
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from inputs import add, images_of, parquet, serving, shard, shards, tarred, zipped
from photos import make_photos

from pipeline import config as configuration
from pipeline.config import ARCHIVES, Config, DatasetConfig
from pipeline.config.sections import source_of
from pipeline.data import DatasetIndex, reading
from pipeline.data.scan import ScanResult, scan
from pipeline.embed import baselines
from pipeline.embed.loader import Item, Lane, embed
from pipeline.errors import DatasetError
from pipeline.images import ImageProblem, archives, open_file
from pipeline.io import remote
from pipeline.report.pictures import small
from pipeline.stages import extract, predict, settings
from pipeline.stages.load import load


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files written a moment ago are trusted, as if they were old."""
    monkeypatch.setattr(reading, "RACY_NS", 0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("inputs") / "photos", per_class=7)


def section(path: Path | str, **keys: Any) -> dict[str, Any]:
    return {"source": "folder", "path": str(path), **keys}


def table(path: Path | str) -> dict[str, Any]:
    return section(path, source="manifest")


def look(found: dict[str, Any], folder: Path) -> ScanResult:
    return scan(DatasetConfig(**found), 0, folder)


def told(index: DatasetIndex) -> dict[bytes, tuple[str, str]]:
    """What the index says of each content."""
    rows = zip(index.digests, index.labels, index.splits, strict=True)
    return {digest.tobytes(): (label, split) for digest, label, split in rows}


def vectors(index: DatasetIndex) -> dict[bytes, bytes]:
    """The thumbnail of each content, read and decoded as stage one does it."""
    items = [Item(row, str(path), index.digests[row].tobytes(), (0,)) for row, path in enumerate(index.paths)]
    made = {}
    for batch, (part,) in embed([Lane(baselines.load("pixels"), 8)], items, index.root, 10**6, workers=4):
        assert part is not None
        assert not batch.problems
        made |= {
            batch.items[row].digest: vector.tobytes() for row, vector in zip(part.rows, part.vectors[0], strict=True)
        }
    return made


def to_memory(path: Path, name: str) -> str:
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").put(str(path), f"/{name}", recursive=True)
    return f"memory://{name}"


Pack = Callable[[Path, Path], dict[str, Any]]

KINDS: dict[str, Pack] = {
    "zip": lambda photos, at: section(zipped(photos, at / "p.zip")),
    "a stored zip": lambda photos, at: section(zipped(photos, at / "p.zip", method=zipfile.ZIP_STORED)),
    "a zip by lzma": lambda photos, at: section(zipped(photos, at / "p.zip", method=zipfile.ZIP_LZMA)),
    "a folder zipped as a whole": lambda photos, at: section(zipped(photos, at / "p.zip", below="photos/")),
    "a folder in a zip": lambda photos, at: section(f"{zipped(photos, at / 'p.zip', below='a/photos/')}/a/photos"),
    "tar": lambda photos, at: section(tarred(photos, at / "p.tar")),
    "tar.gz": lambda photos, at: section(tarred(photos, at / "p.tar.gz", "w:gz")),
    "tar.xz": lambda photos, at: section(tarred(photos, at / "p.tar.xz", "w:xz")),
    "tar.bz2": lambda photos, at: section(tarred(photos, at / "p.tar.bz2", "w:bz2")),
    "WebDataset, cls": lambda photos, at: section(shards(photos, at / "s") / "s-{0..2}.tar"),
    "WebDataset, json": lambda photos, at: section(shards(photos, at / "s", "json")),
    "WebDataset, txt": lambda photos, at: section(shards(photos, at / "s", "txt")),
    "Parquet of Hugging Face": lambda photos, at: table(parquet(photos, at / "p.parquet")),
    "Parquet with bytes": lambda photos, at: table(parquet(photos, at / "p.parquet", as_struct=False)),
    "a remote folder": lambda photos, at: section(to_memory(photos, "inputs/photos")),
    "a remote folder called train": lambda photos, at: section(to_memory(photos, "inputs/train")),
    "a remote zip": lambda photos, at: section(to_memory(zipped(photos, at / "p.zip"), "inputs/p.zip")),
    "remote shards": lambda photos, at: section(to_memory(shards(photos, at / "s"), "inputs/s") + "/s-{0..2}.tar"),
    "remote Parquet": lambda photos, at: table(to_memory(parquet(photos, at / "p.parquet"), "inputs/p.parquet")),
}


@pytest.fixture(scope="module")
def of_the_folder(
    photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[bytes, Any], dict[bytes, bytes]]:
    index = look(section(photos), tmp_path_factory.mktemp("plain")).index
    return told(index), vectors(index)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_the_vectors_labels_and_splits_of_the_folder(
    kind: str, photos: Path, tmp_path: Path, of_the_folder: tuple[dict[bytes, Any], dict[bytes, bytes]]
) -> None:
    found = KINDS[kind](photos, tmp_path)
    first = look(found, tmp_path / "index")
    assert first.entries == ()
    assert first.warnings == ()
    assert (told(first.index), vectors(first.index)) == of_the_folder
    assert sorted(first.index.sizes) == sorted(path.stat().st_size for path in images_of(photos))
    again = look(found, tmp_path / "index")
    assert again.unchanged
    assert again.read == 0


def test_only_members_that_changed_are_read_again(photos: Path, tmp_path: Path) -> None:
    path = zipped(photos, tmp_path / "p.zip")
    look(section(path), tmp_path / "index")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("leaf/new.png", images_of(photos)[-1].read_bytes())
    later = look(section(path), tmp_path / "index")
    assert later.read == 1
    assert "leaf/new.png" in later.index.paths
    two = shards(photos, tmp_path / "s") / "s-1.tar"
    look(section(tmp_path / "s"), tmp_path / "shards")
    shard(two, images_of(photos)[4:12])
    later = look(section(tmp_path / "s"), tmp_path / "shards")
    assert later.read == 8  # a tar has no sums of what is in it: one that was written again is read as a whole
    assert sum(path.startswith(two.name) for path in later.index.paths) == 8


def test_a_tar_that_is_cut_off_says_so_and_what_is_before_is_used(photos: Path, tmp_path: Path) -> None:
    whole = tarred(photos, tmp_path / "p.tar").read_bytes()
    with tarfile.open(tmp_path / "p.tar") as file:
        last = [member for member in file if member.isreg()][-2]
    (tmp_path / "p.tar").write_bytes(whole[: last.offset_data + 5])
    found = look(section(tmp_path / "p.tar"), tmp_path / "index")
    assert len(found.index) == 19
    archive, member = sorted(found.entries, key=lambda entry: entry.path != "p.tar")
    assert (archive.path, archive.status) == ("p.tar", "truncated")
    assert archive.reason.startswith("it is cut off (unexpected end of data); the ")
    assert (member.path, member.reason) == (
        last.name.removeprefix("./"),
        "it cannot be read: damaged in the archive: the archive ends before the file",
    )
    assert any("p.tar: it is cut off" in line for line in found.summary_lines())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data, at: data[:at], "its end mark is missing: it may be cut off, or was not closed"),
        (lambda data, at: data[: at + 100], "its end mark is missing: it may be cut off, or was not closed"),
        (lambda data, at: data[:at] + b"x" * 512 + data[at + 512 :], "what follows is not read"),
    ],
    ids=["between members", "in a header", "a header is damaged"],
)
def test_a_tar_that_ends_where_none_ends_says_so(
    damage: Callable[[bytes, int], bytes], reason: str, photos: Path, tmp_path: Path
) -> None:
    path = tarred(photos, tmp_path / "p.tar")
    with tarfile.open(path) as file:
        at = [member for member in file if member.isreg()][-3].offset
    path.write_bytes(damage(path.read_bytes(), at))
    found = look(section(path), tmp_path / "index")
    assert len(found.index) == 18
    (entry,) = found.entries
    assert reason in entry.reason


@pytest.mark.parametrize("mode", ["gz", "xz"])
def test_a_compressed_tar_that_is_cut_off_keeps_what_came_out(mode: str, photos: Path, tmp_path: Path) -> None:
    path = tarred(photos, tmp_path / f"p.tar.{mode}", f"w:{mode}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    found = look(section(path), tmp_path / "index")
    assert 7 < len(found.index) < 21
    assert any("it is damaged or cut off" in entry.reason for entry in found.entries)


def test_archives_that_cannot_be_used_are_a_line(photos: Path, tmp_path: Path) -> None:
    cut = zipped(photos, tmp_path / "cut.zip")
    cut.write_bytes(cut.read_bytes()[:-300])
    (tmp_path / "text.zip").write_text("no archive")
    pq.write_table(pa.table({"label": ["a"]}), tmp_path / "p.parquet")
    for path, line in {
        "cut.zip": "cut.zip: it is damaged or cut off (File is not a zip file); copy it again, or make it anew",
        "text.zip": "text.zip: it is no zip, tar or Parquet file",
        "gone.zip": "gone.zip: there is no such folder",
        "s-{0..2}.tar": "s-{0..2}.tar: 3 of 3 files are not there",
    }.items():
        with pytest.raises(DatasetError) as error:
            look(section(tmp_path / path), tmp_path / "index")
        assert line in str(error.value)


def test_a_tar_that_is_cut_off_before_any_image_says_so(photos: Path, tmp_path: Path) -> None:
    path = tarred(photos, tmp_path / "p.tar")
    with tarfile.open(path) as file:
        at = next(member.offset for member in file if member.isreg())
    path.write_bytes(path.read_bytes()[:at])
    with pytest.raises(DatasetError, match=r"p.tar: holds no class folders .*\n  its end mark is missing"):
        look(section(tmp_path / "p.tar"), tmp_path / "index")


@pytest.mark.parametrize("below", ["", "photos"])
def test_of_several_tars_the_one_that_is_cut_off_is_named(below: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    zipped(photos, tmp_path / "parts" / "a.zip")
    with tarfile.open(tmp_path / "parts" / "b.tar", "w") as file:
        file.add(photos / "leaf", f"{below}/leaf")
        file.add(photos / "土", f"{below}/土")
    data = (tmp_path / "parts" / "b.tar").read_bytes()
    (tmp_path / "parts" / "b.tar").write_bytes(data.rstrip(b"\0"))
    for place in (tmp_path / "parts", to_memory(tmp_path / "parts", f"inputs/parts{below}")):
        (entry,) = look(section(place), tmp_path / f"index {str(place)[:3]}").entries
        assert (entry.path, entry.status) == ("b.tar", "truncated")


def test_rows_without_bytes_are_named(photos: Path, tmp_path: Path) -> None:
    path = parquet(photos, tmp_path / "p.parquet")
    rows = pq.read_table(path).to_pylist()
    rows[2]["image"] = {"bytes": None, "path": "elsewhere/2.png"}
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)
    found = look(table(path), tmp_path / "index")
    assert len(found.index) == 20
    assert [(entry.path, entry.reason) for entry in found.entries] == [
        (
            "p.parquet/00000002-2.png",
            "it cannot be read: damaged in the archive: its row has no bytes, only the path elsewhere/2.png",
        )
    ]


def test_of_several_columns_of_images_one_is_named(photos: Path, tmp_path: Path) -> None:
    path = parquet(photos, tmp_path / "p.parquet")
    found = pq.read_table(path)
    pq.write_table(found.append_column("mask", found["image"].combine_chunks().field("bytes")[::-1]), path)
    with pytest.raises(
        DatasetError, match=r"p.parquet: has images in image, mask; set dataset.path_column to the one to read"
    ):
        look(table(path), tmp_path / "index")
    index = look(table(path) | {"path_column": "mask"}, tmp_path / "index").index
    assert index.paths[1] == "p.parquet/mask/00000001"
    assert open_file(index.root, "p.parquet/mask/00000001") == images_of(photos)[-2].read_bytes()
    assert open_file(index.root, "p.parquet/image/00000001-01.png") == images_of(photos)[1].read_bytes()


def test_one_member_that_is_damaged_is_one_failure(photos: Path, tmp_path: Path) -> None:
    path = zipped(photos, tmp_path / "p.zip", method=zipfile.ZIP_STORED)
    image = images_of(photos)[3]
    data = path.read_bytes()
    at = data.index(image.read_bytes()) + 60
    path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    found = look(section(path), tmp_path / "index")
    assert len(found.index) == 20
    (entry,) = found.entries
    assert entry.path == str(image.relative_to(photos))
    assert "Bad CRC-32" in entry.reason


def test_names_that_lead_elsewhere_links_and_bombs_do_no_harm(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MOST_BYTES", 100_000)
    (tmp_path / "secret.png").write_bytes(images_of(photos)[0].read_bytes())
    with zipfile.ZipFile(zipped(photos, tmp_path / "p.zip"), "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../secret.png", b"x")
        file.writestr("/leaf/absolute.png", images_of(photos)[0].read_bytes())
        file.writestr("leaf/bomb.png", bytes(1_000_000))
        link = zipfile.ZipInfo("leaf/link.png")
        link.external_attr = 0o120777 << 16
        file.writestr(link, str(tmp_path / "secret.png"))
    with tarfile.open(tarred(photos, tmp_path / "p.tar"), "a") as tar:
        add(tar, "../secret.png", b"x")
        add(tar, "/leaf/absolute.png", images_of(photos)[0].read_bytes())
        add(tar, "leaf/bomb.png", bytes(1_000_000))
        for name, kind, target in (
            ("leaf/link.png", tarfile.SYMTYPE, str(tmp_path / "secret.png")),
            ("leaf/twin.png", tarfile.LNKTYPE, "./leaf/00.png"),
            ("leaf/pipe.png", tarfile.FIFOTYPE, ""),
        ):
            about = tarfile.TarInfo(name)
            about.type, about.linkname = kind, target
            tar.addfile(about)
    for name in ("p.zip", "p.tar"):
        found = look(section(tmp_path / name), tmp_path / f"{name} index")
        reasons = {entry.path: entry.reason for entry in found.entries}
        assert reasons["leaf/bomb.png"] == "it has 1,000,000 bytes; more than 100,000 are not read"
        assert reasons["leaf/link.png"].startswith("it is a symbolic link in an archive")
        assert "leaf/absolute.png" in found.index.paths
        assert not any("secret" in path for path in found.index.paths)
        for path in ("../secret.png", "leaf/../../secret.png"):
            with pytest.raises(ImageProblem, match=r"outside|no such file|leaves the archive"):
                open_file(found.index.root, path)
    assert "leaf/twin.png" in found.index.paths


def test_an_index_that_names_an_address_opens_no_connection(photos: Path, tmp_path: Path) -> None:
    with serving(photos) as (address, asked):
        with pytest.raises(ImageProblem, match=r"no such file|No such file"):
            open_file(tmp_path, f"{address}/leaf/00.png")
        with pytest.raises(ImageProblem, match="outside"):
            open_file(Path(f"{address}/leaf"), "../leaf/00.png")
        assert asked == []


def test_the_page_on_inputs_is_as_it_says() -> None:
    page = (Path(__file__).parents[1] / "docs" / "inputs.md").read_text(encoding="utf-8")
    for found in re.findall(r"```yaml\ndataset:\n(.*?)```", page, re.DOTALL):
        keys = DatasetConfig(**yaml.safe_load(found))
        assert source_of(str(keys.path)) == keys.source
    endings = {ending for ending in ARCHIVES if re.search(rf"\w{re.escape(ending)}\b|`{re.escape(ending)}`", page)}
    assert endings == {*ARCHIVES} - {".tgz", ".tbz2", ".txz"}  # short names of those that are there


@pytest.mark.parametrize("path", ["p.zip", "p.parquet", "memory://inputs/of-a-command"])
def test_a_command_takes_data_in_place_of_a_config(path: str, photos: Path, tmp_path: Path) -> None:
    make = {"p.zip": zipped, "p.parquet": parquet}.get(path)
    given = Path(to_memory(photos, "inputs/of-a-command")) if make is None else make(photos, tmp_path / path)
    config = settings.load(given)
    assert config.output == f"artifacts/{'of-a-command' if make is None else 'p'}"
    assert len(scan(config.dataset, 0, tmp_path / "index").index) == 21
    written = configuration.dump_yaml(config, tmp_path)
    (tmp_path / "config.yaml").write_text(written, encoding="utf-8")
    again = settings.load(tmp_path / "config.yaml")
    assert len(scan(again.dataset, 0, tmp_path / "again").index) == 21


@pytest.mark.parametrize("kind", ["p.zip", "p.tar.gz", "p.parquet"])
def test_threads_read_one_archive_at_once(kind: str, photos: Path, tmp_path: Path) -> None:
    make = {"p.zip": zipped, "p.tar.gz": lambda photos, at: tarred(photos, at, "w:gz"), "p.parquet": parquet}[kind]
    make(photos, tmp_path / kind)
    members = sorted(archives.open_archive(str(tmp_path / kind)).members) * 20
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda name: archives.read_elsewhere(f"{tmp_path / kind}/{name}"), members))
    assert read[: len(members) // 20] == [path.read_bytes() for path in images_of(photos)]
    assert read == read[: len(members) // 20] * 20


def test_several_archives_are_splits_or_parts_by_their_names(photos: Path, tmp_path: Path) -> None:
    zipped(photos / "leaf", tmp_path / "leaf.zip")
    with pytest.raises(DatasetError, match=r"leaf.zip: holds no class folders \(7 images at its top\)"):
        look(section(tmp_path / "{leaf,leaf}.zip"), tmp_path / "none")
    other = make_photos(tmp_path / "other", per_class=3, seed=5)
    zipped(photos, tmp_path / "train-photos.zip")
    zipped(other, tmp_path / "test.zip", below="other/")
    given = look(section(tmp_path / "{train-photos,test}.zip"), tmp_path / "given").index
    assert {(path.partition("/")[0], split) for path, split in zip(given.paths, given.splits, strict=True)} == {
        ("train-photos.zip", "train"),
        ("test.zip", "test"),
    }
    (tmp_path / "parts").mkdir()
    zipped(photos, tmp_path / "parts" / "a.zip")
    tarred(other, tmp_path / "parts" / "b.tar")
    parts = look(section(tmp_path / "parts"), tmp_path / "index").index
    assert len(parts) == 30
    assert sorted(set(parts.labels)) == ["leaf", "sky, blue", "土"]
    (tmp_path / "tables").mkdir()
    parquet(photos, tmp_path / "tables" / "train-00000-of-00001.parquet", part=slice(0, None, 2))
    parquet(photos, tmp_path / "tables" / "test-00000-of-00001.parquet", part=slice(1, None, 2))
    tables = look(table(tmp_path / "tables"), tmp_path / "tables-index").index
    assert {(path[:5], split) for path, split in zip(tables.paths, tables.splits, strict=True)} == {
        ("train", "train"),
        ("test-", "test"),
    }


def test_images_of_shards_without_a_label_are_named(photos: Path, tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", images_of(photos))
    with tarfile.open(path, "a") as file:
        add(file, "alone.jpg", b"x")
        add(file, "odd.jpg", b"x")
        add(file, "odd.json", b"{")
    found = look(section(path), tmp_path / "index")
    told_of = {entry.path: entry.reason for entry in found.entries}
    assert told_of == dict.fromkeys(
        ["alone.jpg", "odd.jpg"], "it has no label: no .cls, .json or .txt of its key says one"
    )


def test_a_manifest_lies_beside_an_archive_or_in_it(photos: Path, tmp_path: Path) -> None:
    lines = [f'"{path.relative_to(photos)}","{path.parent.name}"' for path in images_of(photos)]
    text = "\n".join(["path,label", *lines, "leaf/gone.png,leaf"])
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    with zipfile.ZipFile(zipped(photos, tmp_path / "p.zip"), "a") as file:
        file.writestr("m.csv", text)
    remote = to_memory(photos, "inputs/of-a-manifest")
    for number, found in enumerate([
        table(tmp_path / "m.csv") | {"root": str(tmp_path / "p.zip")},
        table(tmp_path / "p.zip" / "m.csv"),
        table(tmp_path / "m.csv") | {"root": remote},
    ]):  # fmt: skip
        result = look(found, tmp_path / str(number))
        assert told(result.index) == told(look(section(photos), tmp_path / "plain").index)
        assert [(entry.path, entry.status) for entry in result.entries] == [("leaf/gone.png", "missing")]


def test_an_experiment_is_of_one_archive(photos: Path, tmp_path: Path) -> None:
    other = make_photos(tmp_path / "other", per_class=3, seed=5)
    look(section(zipped(photos, tmp_path / "one.zip")), tmp_path / "index")
    with pytest.raises(DatasetError, match=r"holds an experiment on the images in .*one.zip, and this config is about"):
        look(section(zipped(other, tmp_path / "two.zip")), tmp_path / "index")
    os.rename(tmp_path / "one.zip", tmp_path / "moved.zip")
    assert look(section(tmp_path / "moved.zip"), tmp_path / "index").read == 0


def test_an_experiment_on_an_archive_is_that_on_the_folder(photos: Path, tmp_path: Path) -> None:
    """From the bundled network to the thumbnails of the page."""
    with tarfile.open(tarred(photos, tmp_path / "p.tar"), "a") as file:
        add(file, "leaf/broken.png", b"no image")
    raw = {
        "backbones": [{"name": "bundled", "weights": "bundled", "preprocessing": {"resize": 32, "crop": 32}}],
        "baselines": ["majority", "pixels"],
    }
    made = []
    for name, path in (("folder", photos), ("tar", tmp_path / "p.tar")):
        own = {"output": str(tmp_path / name), "store": str(tmp_path / f"of-{name}"), "dataset": section(path)}
        config = configuration.parse(raw | own, "test")
        extract.run(config)
        found = [load(config.output, embedding=one) for one in ("bundled-bundled-penultimate", "pixels")]
        made.append([(each.paths.tolist(), each.y.tolist(), np.asarray(each.X).tobytes()) for each in found])
    assert made[0] == made[1]
    again = extract.run(config)
    assert (again.work, again.scan.read) == (None, 0)
    listed = Path(config.output, "dataset", "failures.csv").read_text(encoding="utf-8")
    assert "leaf/broken.png" in listed
    assert "it is not an image of a known format" in listed
    index = again.scan.index
    assert small(index.root, str(index.paths[0]), 56) is not None
    assert small(index.root, "leaf/broken.png", 56) is None


def test_predict_reads_what_a_data_set_may_be(experiment: Config, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "new", per_class=2, seed=1)
    out = tmp_path / "out.csv"

    def labels(*given: Path | str) -> dict[str, str]:
        predict.run(Path(experiment.output), [Path(each) for each in given], output=out)
        with out.open(encoding="utf-8", newline="") as file:
            return {row["path"]: row["label"] for row in csv.DictReader(file)}

    path, table, packed = (
        make(photos, tmp_path / name) for make, name in ((zipped, "p.zip"), (parquet, "p.parquet"), (shards, "s"))
    )
    found = labels(photos, path, table, packed / "s-{0..2}.tar")
    plain, renamed, rows, members = (
        {name: label for name, label in found.items() if name.startswith(f"{place}/")}
        for place in (photos, path, table, packed)
    )
    ordered = [plain[str(image)] for image in images_of(photos)]
    assert renamed == {str(path / name.relative_to(photos)): plain[str(name)] for name in map(Path, plain)}
    assert list(rows.values()) == ordered
    assert sorted(members.values()) == sorted(ordered)
    one = path / "leaf" / "00.png"
    assert labels(one, path / "leaf") == {
        str(path / "leaf" / f"0{number}.png"): renamed[str(path / "leaf" / f"0{number}.png")] for number in range(2)
    }
    with pytest.raises(DatasetError, match=r"no such file or folder\n  .*p.zip/nothing"):
        labels(path / "nothing")
    with serving(tmp_path) as (address, _):
        pytest.importorskip("fsspec")
        assert labels(f"{address}/new", f"{address}/p.zip/leaf/00.png") == {
            **{f"{address}/new/{name.relative_to(photos)}": plain[str(name)] for name in map(Path, plain)},
            f"{address}/p.zip/leaf/00.png": renamed[str(one)],
        }


class TestRemote:
    @pytest.fixture
    def served(self, tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
        pytest.importorskip("fsspec")
        photos = make_photos(tmp_path / "served" / "photos", per_class=4)
        with serving(tmp_path / "served") as (address, asked):
            yield photos, f"{address}/photos", asked

    def test_over_a_socket_what_is_unchanged_is_not_fetched_again(
        self, served: tuple[Path, str, list[str]], tmp_path: Path
    ) -> None:
        photos, address, asked = served
        first = look(section(address), tmp_path / "index")
        plain = look(section(photos), tmp_path / "plain")
        assert (told(first.index), vectors(first.index)) == (told(plain.index), vectors(plain.index))
        asked.clear()
        assert look(section(address), tmp_path / "index").read == 0
        assert [line for line in asked if line.startswith("OPEN")] == []
        (photos / "leaf" / "00.png").write_bytes((photos / "土" / "00.png").read_bytes())
        (photos / "leaf" / "new.png").write_bytes((photos / "leaf" / "01.png").read_bytes())
        assert look(section(address), tmp_path / "index").read == 2

    def test_of_a_tar_members_are_fetched_and_not_the_whole(
        self, served: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(archives, "SMALL", 100)
        photos, address, asked = served
        shards(photos, photos.parent / "s")
        found = look(section(address.replace("/photos", "/s/s-{0..2}.tar")), tmp_path / "index")
        assert told(found.index) == told(look(section(photos), tmp_path / "plain").index)
        assert [line for line in asked if line.startswith("OPEN")].count(
            "OPEN s-0.tar"
        ) == 1 + 4  # the index, and 4 images
        asked.clear()
        open_file(found.index.root, str(found.index.paths[0]))
        assert [line for line in asked if line.startswith("OPEN")] == ["OPEN s-0.tar"]

    def test_what_is_not_there_or_goes_away_is_said(self, served: tuple[Path, str, list[str]], tmp_path: Path) -> None:
        photos, address, _ = served
        with pytest.raises(DatasetError, match=f"^{address}/nothing: "):
            look(section(f"{address}/nothing"), tmp_path / "none")
        index = look(section(address), tmp_path / "index").index
        (photos / "leaf" / "00.png").unlink()
        with pytest.raises(ImageProblem, match="it cannot be read") as problem:
            open_file(index.root, "leaf/00.png")
        assert problem.value.status == "unavailable"
        (photos / "leaf" / "01.png").write_bytes(b"other")
        with pytest.raises(ImageProblem, match="it changed after the scan; run again"):
            open_file(index.root, "leaf/01.png", index.digests[1].tobytes())

    def test_a_server_that_sends_the_whole_in_place_of_a_range_is_understood(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = SimpleNamespace(cat_file=lambda name, start, end: b"0123456789")
        monkeypatch.setattr(remote, "file_system", lambda address: (server, address))
        assert remote.read_remote("https://host/p.tar", 2, 5) == b"234"
        assert remote.read_remote("https://host/p.tar") == b"0123456789"

    def test_what_needs_an_extra_says_which(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(DatasetError, match=r"^nowhere://bucket: cannot be opened"):
            look(section("nowhere://bucket"), tmp_path / "index")
        monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
        with pytest.raises(
            DatasetError, match=r"^s3://bucket/p: remote files need fsspec; pip install 'manyheads\[remote\]'"
        ):
            look(section("s3://bucket/p"), tmp_path / "index")
