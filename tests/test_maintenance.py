"""Care for the stores of an experiment: what is told in which words, and that repair embeds exactly what was damaged."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import rewrite
from photos import make_photos, small_config
from PIL import Image

import pipeline
from pipeline.config import Config
from pipeline.data import DatasetIndex
from pipeline.embed import records as embedders
from pipeline.errors import PipelineError, StoreError
from pipeline.experiment import Artifacts
from pipeline.io.digests import canonical_json
from pipeline.stages import extract as extract_features
from pipeline.stages import maintenance, train_heads
from pipeline.store import FeatureStore
from pipeline.store.format import compose

BACKBONE = "squeezenet1_1-random-penultimate"


@pytest.fixture
def copy(experiment: Config, tmp_path: Path) -> Config:
    """The finished experiment, for tests that change it."""
    return copy_of(experiment, tmp_path)


def copy_of(experiment: Config, folder: Path) -> Config:
    """The experiment and its stores in another folder."""
    for name in ("output", "features"):
        shutil.copytree(Path(experiment.output).parent / name, folder / name)
    return experiment.model_copy(update={"output": str(folder / "output")})


def store_of(config: Config, name: str = BACKBONE) -> Path:
    files = Artifacts(config.output)
    record = next(record for record in embedders.read_records(files.features) if record.name == name)
    return files.find_store(record.store)


def damage(store: Path) -> None:
    """Flip one bit in the middle of the features of a store's only segment."""
    (segment,) = (store / "segments").glob("*.h5")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.chmod(0o644)
    segment.write_bytes(bytes(data))


def test_status_of_a_complete_experiment(experiment: Config) -> None:
    lines = maintenance.status(experiment)
    assert lines[0] == "36 images in 3 classes, 36 distinct contents that decode"
    assert lines[1] == f"{BACKBONE} (untrained): complete"
    assert lines[2].startswith("  36 vectors of 512 float32 in 1 segment, ")


def test_status_counts_stale_and_missing_vectors(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", per_class=6)
    config = small_config(photos, tmp_path / "output")
    extract_features.run(config)
    (photos / "leaf" / "00.png").unlink()
    Image.new("RGB", (9, 9), (1, 2, 3)).save(photos / "leaf" / "new.png")
    extract_features.run(config)
    assert "  1 vector of no image; `manyheads store gc` removes them" in maintenance.status(config)
    gone = maintenance.gc(config)
    assert gone[0].startswith(f"{BACKBONE}: 1 vector removed, 18 kept")
    assert extract_features.run(config).work is None


@pytest.fixture
def tiny(tmp_path: Path) -> Config:
    """An experiment on thumbnails alone, whose images tests change."""
    photos = make_photos(tmp_path / "photos", per_class=4)
    config = small_config(photos, tmp_path / "output")
    extract_features.run(config)
    return config


def test_status_looks_at_the_images_and_changes_nothing(tiny: Config, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.rmtree(photos / "土")
    (photos / "leaf" / "00.png").rename(photos / "sky, blue" / "moved.png")
    Image.new("RGB", (9, 9), (1, 2, 3)).save(photos / "leaf" / "new.png")
    Image.new("RGB", (9, 9), (3, 2, 1)).save(photos / "leaf" / "01.png")
    (photos / "leaf" / "02.png").write_bytes(b"")
    before = {path: path.read_bytes() for path in tmp_path.glob("[!p]*/**/*") if path.is_file()}
    lines = maintenance.status(tiny)
    assert lines[:4] == [
        "8 images in 2 classes, 8 distinct contents that decode",
        "since the last `manyheads features`: 1 added, 1 changed, 1 renamed, 5 removed; run it again",
        "1 files cannot be used; `manyheads check` says why",
        f"{BACKBONE} (untrained): 2 missing: run `manyheads features`",
    ]
    assert lines == maintenance.status(tiny)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("[!p]*/**/*") if path.is_file()}
    assert {path.relative_to(tmp_path).parts[0] for path in before} == {"output", "features"}
    # What is said of the stale ones is what helps: gc goes by the index of the last run.
    (stale,) = {line for line in lines if "of no image" in line}
    assert stale == "  6 vectors of no image; `manyheads store gc` after `manyheads features` removes them"
    maintenance.gc(tiny)
    assert stale in maintenance.status(tiny)
    (photos / "leaf" / "02.png").unlink()
    extract_features.run(tiny)
    assert "  6 vectors of no image; `manyheads store gc` removes them" in maintenance.status(tiny)
    maintenance.gc(tiny)
    assert not any("of no image" in line for line in maintenance.status(tiny))


def test_status_of_images_that_are_gone_tells_what_is_cached(tiny: Config, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "photos")
    lines = maintenance.status(tiny)
    assert lines[0] == "12 images in 3 classes, 12 distinct contents that decode"
    assert lines[1].startswith(
        f"warning: the images cannot be used as they are now: {tmp_path}/photos: there is no such"
    )
    assert lines[2] == f"{BACKBONE} (untrained): complete"


def test_status_names_backbones_not_embedded_yet(tiny: Config) -> None:
    (section,) = tiny.backbones
    other = tiny.model_copy(
        update={"backbones": (section.model_copy(update={"pooling": ("max",), "layers": ("stage1",)}),)}
    )
    assert (
        "squeezenet1_1 (random): not embedded as the config says now: run `manyheads features`"
        in maintenance.status(other)
    )
    extract_features.run(other)
    assert not any("not embedded" in line for line in maintenance.status(other))


def test_a_sample_embedded_anew_gives_the_stored_vectors(experiment: Config) -> None:
    checks = maintenance.verify(experiment, full=True, sample=5)
    assert [check.ok for check in checks] == [True, True]
    assert "  embedded 5 images anew: 5 give the stored vector" in list(checks[0].lines())


def test_a_vector_that_is_not_the_images_is_found_by_the_sample(copy: Config) -> None:
    store = store_of(copy)
    opened = FeatureStore.open(store)
    index = DatasetIndex.read(Artifacts(copy.output).dataset)
    swapped = opened.read(index.digests)[::-1].copy()
    shutil.rmtree(store)
    from pipeline.store.writer import StoreWriter

    with StoreWriter.open(store, opened.identity, opened.dim) as writer:
        writer.append(index.digests, swapped)
    check = next(check for check in maintenance.verify(copy, full=True, sample=4) if check.name == BACKBONE)
    assert check.report.ok
    assert not check.ok
    assert len(check.deviating_images) == 4


def test_damage_is_named_and_repair_embeds_exactly_the_damaged_images(tmp_path: Path) -> None:
    copy = small_config(make_photos(tmp_path / "photos", per_class=14), tmp_path / "output")
    extract_features.run(copy)
    store = store_of(copy)
    index = DatasetIndex.read(Artifacts(copy.output).dataset)
    before = FeatureStore.open(store).read(index.digests)
    damage(store)
    check = next(check for check in maintenance.verify(copy, full=True) if check.name == BACKBONE)
    assert not check.ok
    assert 0 < len(check.damaged_images) < 42
    assert any("DAMAGED" in line for line in check.lines())
    maintenance.repair(copy)
    work = extract_features.run(copy).work
    assert work is not None
    assert work.vectors == {BACKBONE: len(check.damaged_images)}
    np.testing.assert_allclose(FeatureStore.open(store).read(index.digests), before, rtol=1e-4, atol=1e-4)
    assert all(check.ok for check in maintenance.verify(copy, full=True))


def test_a_packed_file_reads_like_the_store_and_alone(experiment: Config, tmp_path: Path) -> None:
    import h5py

    maintenance.pack(experiment, tmp_path / "all.h5", embedding=BACKBONE)
    index = DatasetIndex.read(Artifacts(experiment.output).dataset)
    stored = FeatureStore.open(store_of(experiment)).read(index.digests)
    np.testing.assert_array_equal(FeatureStore.open(tmp_path / "all.h5").read(index.digests), stored)
    with h5py.File(tmp_path / "all.h5") as file:
        rows = file["row"][:]
        np.testing.assert_array_equal(file["features"][:][rows], stored)
        assert [label.decode() for label in file["label"][:]] == list(index.labels)


def test_export_writes_rows_in_the_order_of_the_index(experiment: Config, tmp_path: Path) -> None:
    maintenance.export(experiment, tmp_path / "x.npy", embedding=BACKBONE)
    index = DatasetIndex.read(Artifacts(experiment.output).dataset)
    np.testing.assert_array_equal(
        np.load(tmp_path / "x.npy"), FeatureStore.open(store_of(experiment)).read(index.digests)
    )


def test_an_unknown_embedding_is_refused_with_the_known_ones(experiment: Config, tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        maintenance.pack(experiment, tmp_path / "x.h5", embedding="resnet50")
    assert str(caught.value) == f"name one embedding with --embedding; this experiment has {BACKBONE}, pixels"


def records_of(config: Config) -> tuple[Path, dict[str, Any]]:
    """features.json and its content."""
    path = Artifacts(config.output).features
    return path, json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("place", ["../other/pixels.store", "/tmp/pixels.store", "features/../../pixels.store", ""])
def test_a_record_whose_store_lies_outside_is_refused(copy: Config, place: str) -> None:
    path, document = records_of(copy)
    document["embeddings"][0]["store"] = place
    rewrite(path, document)
    with pytest.raises(StoreError) as caught:
        maintenance.gc(copy)
    assert str(caught.value) == f"embedding {BACKBONE!r}: its store {place!r} lies outside of its experiment"


def test_a_store_behind_a_link_is_read_and_never_emptied(copy: Config, tmp_path: Path) -> None:
    store = store_of(copy)
    elsewhere = store.rename(tmp_path / "another.store")
    store.symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    assert all(check.ok for check in maintenance.verify(copy))
    for work in (maintenance.gc, maintenance.repair):
        with pytest.raises(
            StoreError, match=f"leads to {elsewhere}, outside of this experiment and of .*, and stays as it is"
        ):
            work(copy)
    assert before == {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}


def test_heads_gc_pack_export_and_load_want_the_index_that_the_features_were_made_of(
    copy: Config, tmp_path: Path
) -> None:
    files = Artifacts(copy.output)
    index = DatasetIndex.read(files.dataset)
    index.rows(np.arange(1, len(index))).write(files.dataset)
    text = (
        f"{files.dataset}/index.csv: is not the index that the features were made of; run `manyheads features` again, which "
        "embeds only what is new"
    )
    for work in (
        lambda: maintenance.gc(copy),
        lambda: maintenance.pack(copy, tmp_path / "x.h5", embedding="pixels"),
        lambda: maintenance.export(copy, tmp_path / "x.npy", embedding="pixels"),
        lambda: train_heads.run(copy),
        lambda: pipeline.load(copy.output, embedding="pixels"),
    ):
        with pytest.raises(PipelineError) as caught:
            work()
        assert str(caught.value) == text
    assert f"  {text}" in maintenance.verify_files(copy)[1]


def test_verify_names_every_damaged_file(copy: Config) -> None:
    files = Artifacts(copy.output)
    assert maintenance.verify_files(copy) == (True, ["other files: ok; 27 documents, journals and files of weights"])
    head = files.bundle("pixels", "logistic_regression")
    changed = [
        files.leaderboard,
        files.audit,
        head / "bundle.json",
        head / "predictions.npz",
        files.trials("pixels", "logistic_regression"),
    ]
    for path in changed:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    ok, lines = maintenance.verify_files(copy)
    assert not ok
    assert lines[0] == "other files: DAMAGED; 27 documents, journals and files of weights"
    assert [any(str(path) in line for line in lines[1:]) for path in changed] == [True, True, True, False, True]
    assert all("is damaged" in line for line in lines[1:])


def test_a_pack_that_status_refuses_does_not_verify(experiment: Config, tmp_path: Path) -> None:
    path = tmp_path / "all.h5"
    index = DatasetIndex.read(Artifacts(experiment.output).dataset)
    store = FeatureStore.open(store_of(experiment, "pixels"))
    arrays = {
        "content": index.digests,
        "identity_json": np.frombuffer(canonical_json(store.identity).encode(), np.uint8),
        "canary": store.probe,
        "row": np.full(len(index), 10**6, "<u8"),
    }
    features = store.read(index.digests)
    path.write_bytes(b"".join(compose("pack", store.store_type, len(index), arrays, lambda: [features])[1]))
    with pytest.raises(StoreError, match="'row' points outside"):
        maintenance.status_of_pack(path)
    check = maintenance.verify_pack(path, full=True)
    assert not check.ok
    assert list(check.lines())[1:] == ["  all.h5: not a valid feature store file: 'row' points outside"]


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder that a user without rights reaches, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Be a user whom file permissions hold for."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if before == 0:
            os.seteuid(before)


def test_what_may_not_be_read_is_not_damaged(experiment: Config, unprivileged: Path) -> None:
    config = copy_of(experiment, unprivileged)
    for name in ("segments/*.h5", "snapshot-*.h5"):
        hidden = sorted(store_of(config).glob(name))
        for path in hidden:
            path.chmod(0)
        with as_nobody():
            for work in (lambda: maintenance.verify(config), lambda: pipeline.load(config.output, embedding=BACKBONE)):
                with pytest.raises(PermissionError) as caught:
                    work()
                assert Path(str(caught.value.filename)) in hidden
        for path in hidden:
            path.chmod(0o644)
    assert all(check.ok for check in maintenance.verify(config))


def test_the_status_of_an_experiment_that_cannot_be_written(unprivileged: Path) -> None:
    output = unprivileged / "output"
    config = small_config(make_photos(unprivileged / "photos", per_class=3), output)
    extract_features.run(config)
    expected = maintenance.status(config)
    made = [path for folder in (output, unprivileged / "features") for path in (folder, *folder.rglob("*"))]
    for path in reversed(made):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with as_nobody():
        assert maintenance.status(config) == expected
        assert pipeline.load(output, embedding="pixels").X.shape[0] == 9
    for path in made:
        path.chmod(0o755)
