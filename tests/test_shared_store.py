"""One folder of feature stores for all experiments around: nothing is embedded twice, and nothing that one still needs goes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from documents import rewrite
from photos import make_photos, small_config

import pipeline
from pipeline import config as configuration
from pipeline.config import Config
from pipeline.data import DatasetIndex
from pipeline.embed import records
from pipeline.embed.records import read_records
from pipeline.errors import ConfigError, PipelineError, StoreError
from pipeline.experiment import Artifacts
from pipeline.images import HASH_STORE
from pipeline.stages import extract as extract_features
from pipeline.stages import maintenance
from pipeline.stages.extract import stores, targets
from pipeline.store import FeatureStore, lock
from pipeline.store.writer import StoreWriter

GOLDEN = Path(__file__).parent / "golden" / "experiment-0.1.tar.xz"
BACKBONE = "squeezenet1_1-random-penultimate"


@pytest.fixture
def first(tmp_path: Path) -> Config:
    """An experiment of 12 images that has been embedded, by a recipe alone, which is faster than a network and no different."""
    config = like(network(tmp_path), tmp_path / "artifacts" / "first", backbones=())
    extract_features.run(config)
    return config


def network(tmp_path: Path) -> Config:
    return small_config(make_photos(tmp_path / "photos", per_class=4), tmp_path / "artifacts" / "first")


def like(config: Config, output: Path | str, **changes: object) -> Config:
    return config.model_copy(update={"output": str(output), **changes})


def folder_of(config: Config) -> Path:
    return Path(config.output).parent / "features"


def vectors(config: Config, name: str = "pixels") -> np.ndarray:
    return np.asarray(pipeline.load(config.output, embedding=name).X)


def all_hashed(config: Config) -> bool:
    """Whether every image has its perceptual hash in a store that is looked at."""
    files = Artifacts(config.output)
    digests = DatasetIndex.read(files.dataset).digests
    missing = [FeatureStore.open(path).missing(digests) for path in files.find_stores(HASH_STORE)]
    return not np.logical_and.reduce(missing).any()


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    real = targets.load

    def refuse(section: object, *arguments: object) -> object:
        assert section is None, "a network was loaded"
        return real(section, *arguments)

    monkeypatch.setattr(targets, "load", refuse)


def test_a_second_experiment_with_other_labels_heads_and_fewer_images_embeds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = network(tmp_path)
    extract_features.run(first)
    photos = Path(str(first.dataset.path))
    for path in sorted(photos.glob("*/0[0-2].png")):  # a subset under other labels
        place = (
            tmp_path
            / "others"
            / ("bright" if path.parent.name == "leaf" else "dark")
            / f"{path.parent.name}.{path.name}"
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    no_network(monkeypatch)
    second = like(
        small_config(tmp_path / "others", tmp_path), folder_of(first).parent / "second", heads=first.heads[1:]
    )
    result = extract_features.run(second)
    assert result.work is None, "0 images went through a network"
    X, y, paths, _ = pipeline.load(second.output, embedding=BACKBONE)
    assert sorted(set(y.tolist())) == ["bright", "dark"]
    own = dict(zip(pipeline.load(first.output, embedding=BACKBONE).paths, vectors(first, BACKBONE), strict=True))
    for path, vector in zip(paths, np.asarray(X), strict=True):
        label, _, name = path.partition("/")[2].partition(".")
        np.testing.assert_array_equal(vector, own[f"{label}/{name}"])
    # Near-duplicates are looked for with the same perceptual hashes.
    assert all_hashed(second)
    assert {path.name for path in folder_of(first).glob("*.store")} == {
        HASH_STORE, *(Artifacts(first.output).find_store(record.store).name for record in result.records)
    }  # fmt: skip


def test_gc_keeps_what_any_experiment_has_an_image_of(first: Config, tmp_path: Path) -> None:
    photos = Path(str(first.dataset.path))
    half = small_config(shutil.copytree(photos, tmp_path / "half"), folder_of(first).parent / "half")
    half = half.model_copy(update={"backbones": ()})
    shutil.rmtree(tmp_path / "half" / "leaf")
    extract_features.run(half)
    before = vectors(first)
    assert maintenance.gc(half)[0].startswith("pixels: 0 vectors removed, 12 kept")
    assert not any("of no image" in line for line in maintenance.status(half))
    np.testing.assert_array_equal(vectors(first), before)
    (photos / "leaf" / "00.png").unlink()
    extract_features.run(first)
    assert [line.partition(", ")[0] for line in maintenance.gc(half)] == [
        "pixels: 1 vector removed", f"{HASH_STORE}: 1 vector removed",
    ]  # fmt: skip
    assert extract_features.run(first).work is None


def test_gc_removes_nothing_while_an_experiment_is_gone_or_cannot_be_read(first: Config, tmp_path: Path) -> None:
    second, third = (like(first, folder_of(first).parent / name) for name in ("second", "third"))
    for config in (second, third):
        extract_features.run(config)
    shutil.rmtree(second.output)
    index = Artifacts(third.output).dataset / "index.csv"
    index.write_text(index.read_text().replace("leaf", "loaf"))
    entries = {name: Artifacts(config.output).entry for name, config in (("second", second), ("third", third))}
    before = {path: path.read_bytes() for path in folder_of(first).glob("*/*/*.h5")}
    with pytest.raises(StoreError) as caught:
        maintenance.gc(first)
    problems = sorted(str(caught.value).splitlines()[1:])
    assert f"{folder_of(first)}: nothing is removed until it is known what all experiments use" in str(caught.value)
    (gone,) = [line for line in problems if "is gone" in line]
    assert gone.strip(" -") == (
        f"{second.output}: is gone, or was moved or renamed; run `manyheads features` with it where it is now, or delete "
        f"{entries['second']} to forget it"
    )
    (unreadable,) = [line for line in problems if "was edited, or is damaged" in line]
    assert unreadable.endswith(f"; or delete {entries['third']} to forget {third.output}")
    assert before == {path: path.read_bytes() for path in folder_of(first).glob("*/*/*.h5")}
    assert sum(line.startswith("warning: ") for line in maintenance.status(first)) == 2
    for entry in entries.values():
        entry.unlink()
    assert maintenance.gc(first)[0].startswith("pixels: 0 vectors removed, 12 kept")


def test_a_damaged_list_is_no_leave_to_remove(first: Config) -> None:
    second = like(first, folder_of(first).parent / "second")
    extract_features.run(second)
    entry = Artifacts(second.output).entry
    data = entry.read_bytes()
    for changed in (data.replace(b"../second", b"../sekond"), data[:-9]):
        entry.write_bytes(changed)
        with pytest.raises(StoreError, match=f"{entry}: is damaged"):
            maintenance.gc(first)
    rewrite(entry, {"format": "manyheads store user", "version": 1, "made_by": "x", "path": 7})
    with pytest.raises(StoreError, match="its path is 7"):
        maintenance.gc(first)


def test_who_enters_while_vectors_are_removed_waits_and_is_told(first: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
import sys
from pathlib import Path
from pipeline.store import lock
held = lock.acquire(Path({str(folder_of(first))!r}))
print("held", flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    monkeypatch.setattr(stores, "PATIENCE", 0.1)
    for work in (extract_features.run, maintenance.gc):
        with pytest.raises(StoreError, match=rf"is being written by process {other.pid} on .*; wait until it ends"):
            work(first)
    other.communicate()
    assert extract_features.run(first).work is None


def test_hashes_written_beside_another_run_are_taken_over(first: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = make_photos(Path(first.output).parents[1] / "more", per_class=3, seed=1)
    second = small_config(photos, folder_of(first).parent / "second").model_copy(update={"backbones": ()})
    monkeypatch.setattr(lock, "holder", lambda path: "process 1" if path.name == HASH_STORE else None)
    extract_features.run(second)
    files = Artifacts(second.output)
    assert FeatureStore.open(files.dataset / HASH_STORE).rows == 9
    assert all_hashed(second)
    monkeypatch.undo()
    extract_features.run(second)
    assert FeatureStore.open(files.stores / HASH_STORE).rows == 21


# ---- moving


def test_an_experiment_that_is_renamed_enters_the_list_anew(first: Config) -> None:
    before, entry = vectors(first), Artifacts(first.output).entry
    renamed = like(first, Path(first.output).rename(folder_of(first).parent / "renamed"))
    np.testing.assert_array_equal(vectors(renamed), before)
    assert entry.exists()
    assert maintenance.gc(renamed)[0].startswith("pixels: 0 vectors removed, 12 kept")
    assert not entry.exists()
    assert Artifacts(renamed.output).entry.exists()
    assert extract_features.run(renamed).work is None


def test_all_artifacts_are_moved_together(first: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = like(first, folder_of(first).parent / "second")
    extract_features.run(second)
    before = vectors(first)
    (tmp_path / "artifacts").rename(tmp_path / "elsewhere")
    no_network(monkeypatch)
    for config in (like(first, tmp_path / "elsewhere" / "first"), like(second, tmp_path / "elsewhere" / "second")):
        np.testing.assert_array_equal(vectors(config), before)
        assert extract_features.run(config).work is None
        assert maintenance.gc(config)[0].startswith("pixels: 0 vectors removed, 12 kept")
    assert len(list((tmp_path / "elsewhere" / "features" / "experiments").iterdir())) == 2


def test_an_experiment_that_leaves_its_stores_behind_reads_them_and_copies_them(
    first: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = vectors(first)
    (tmp_path / "away").mkdir()
    moved = like(first, shutil.move(first.output, tmp_path / "away" / "moved"))
    np.testing.assert_array_equal(vectors(moved), before)
    assert all(check.ok for check in maintenance.verify(moved, full=True))
    for work in (maintenance.gc, maintenance.repair):
        with pytest.raises(
            StoreError, match=r"leads to .*, outside of this experiment and of .*; `manyheads features` takes its"
        ):
            work(moved)
    assert extract_features.run(moved, plan=True).pending == 0
    no_network(monkeypatch)
    assert extract_features.run(moved).work is None
    shutil.rmtree(tmp_path / "artifacts")
    np.testing.assert_array_equal(vectors(moved), before)
    assert all_hashed(moved)


def test_the_config_says_where_the_stores_are(tmp_path: Path) -> None:
    first = network(tmp_path)
    extract_features.run(first)
    path = tmp_path / "configs" / "photos.yaml"
    path.parent.mkdir()
    path.write_text(
        configuration.dump_yaml(like(first, tmp_path / "there" / "out", store=str(folder_of(first))), path.parent)
    )
    config = configuration.load(path)
    assert os.path.samefile(str(config.store), folder_of(first))
    assert extract_features.run(config).work is None
    assert not (tmp_path / "there" / "features").exists()
    np.testing.assert_array_equal(vectors(config), vectors(first))
    assert maintenance.gc(config)[1].startswith("pixels: 0 vectors removed, 12 kept")
    with pytest.raises(ConfigError, match=r"output: .* is the folder of the feature stores; choose another name"):
        configuration.load(path, [f"output={folder_of(first)}"])
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"store: {tmp_path}/file is a file, expected a folder"):
        configuration.load(path, [f"store={tmp_path}/file"])


# ---- experiments of release 0.1


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The experiment that release 0.1 left, whose stores lie in its own folder."""
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(tmp_path / "old", filter="data")
    monkeypatch.chdir(tmp_path / "old")
    config = configuration.parse(configuration.read_yaml(Path("output/config.yaml")), "0.1")
    # What `auto` was where it was made, so that the test is the same on every machine.
    return config.model_copy(update={"extraction": config.extraction.model_copy(update={"precision": "bf16"})})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.store"))


def test_the_stores_of_release_0_1_are_moved_to_where_others_find_them(
    old: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, found = vectors(old), names(Path("output/features"))
    monkeypatch.setattr(records, "choice_inputs", lambda: {})  # as if it were another machine's list of networks
    assert extract_features.run(old, plan=True).pending == 0
    assert names(Path("output/features")) == found, "a plan changes nothing"
    assert extract_features.run(old).work is None
    assert names(Path("features")) == found
    assert not Path("output/features").exists()
    np.testing.assert_array_equal(vectors(old), before)
    assert all(check.ok for check in maintenance.verify(old, full=True))


def test_a_kill_after_a_store_was_moved_loses_nothing(old: Config) -> None:
    before = vectors(old)
    Path("features").mkdir()
    for path in sorted(Path("output/features").iterdir())[:1]:
        path.rename(Path("features") / path.name)
    for name in ("resnet18-random-penultimate", "pixels"):
        assert len(vectors(old, name)) == len(before)
    assert extract_features.run(old).work is None
    np.testing.assert_array_equal(vectors(old), before)


@pytest.mark.parametrize("why", ["another has some", "it cannot be written", "a link"])
def test_what_cannot_be_moved_is_copied(old: Config, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = vectors(old)
    own = Path("output/features")
    if why == "another has some":
        for path in own.glob("*.store"):
            source = FeatureStore.open(path)
            with StoreWriter.open(
                Path("features") / path.name, source.identity, source.dim, probe=source.probe
            ) as writer:
                content = source.table.in_file_order()[:5]
                writer.append(content, source.read(content))
    elif why == "a link":
        own.rename("elsewhere")
        own.symlink_to(Path("elsewhere").absolute())
    else:

        def refuse(source: Path, target: Path) -> None:
            if Path(source).suffix == ".store":
                raise PermissionError(13, "Permission denied", str(source))
            os.rename(source, target)

        monkeypatch.setitem(stores.system.SYSTEM, "rename", refuse)
    kept = {path: path.read_bytes() for path in own.glob("*/*/*.h5")}
    assert extract_features.run(old).work is None
    assert {path: path.read_bytes() for path in own.glob("*/*/*.h5")} == kept
    np.testing.assert_array_equal(vectors(old), before)
    assert (
        FeatureStore.open(Artifacts("output").find_store(read_records(Path("output/features.json"))[0].store)).rows
        == 18
    )


def test_vectors_that_differ_are_not_taken_over(old: Config, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = Path("output/features").glob("pixels-*.store")
    source = FeatureStore.open(path)
    with StoreWriter.open(Path("features") / path.name, source.identity, source.dim, probe=source.probe + 1) as writer:
        writer.append(source.table.in_file_order()[:5], np.ones((5, source.dim), np.float32))
    with pytest.raises(PipelineError, match="does not give the features it gave when this store was made"):
        extract_features.run(old)
    assert any("its vectors are not taken over" in message for message in caplog.messages)


def test_the_names_of_commands_up_to_0_1_are_told_the_new_ones(first: Config, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from pipeline.cli import cli, store

    path = tmp_path / "config.yaml"
    path.write_text(configuration.dump_yaml(like(network(tmp_path), first.output), tmp_path))
    assert set(store.commands) == {"status", "verify", "repair", "gc", "pack", "merge", "export"}
    for name, arguments in (("status", []), ("verify", ["--full"])):
        now = CliRunner().invoke(cli, ["store", name, str(path), *arguments])
        then = CliRunner().invoke(cli, [name, str(path), *arguments])
        assert then.exit_code == now.exit_code == 0, then.output
        assert then.stderr == f"note: `manyheads {name}` is `manyheads store {name}` from now on\n"
        assert then.stdout == now.stdout
    shown = CliRunner().invoke(cli, ["--help"]).output
    assert not re.search(r"^  (status|verify|repair|gc|pack|merge) ", shown, re.MULTILINE)
    assert re.search("^  store ", shown, re.MULTILINE)
