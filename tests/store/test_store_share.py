"""Files to share and old versions: pack, export, merge, status, load; and the golden store of each version."""

import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.errors import StoreError
from pipeline.io.digests import digests_to_hex, fingerprint
from pipeline.store import FeatureStore, StoredRows
from pipeline.store.maintain import merge, verify
from pipeline.store.share import export, pack, read_packed_index
from pipeline.store.writer import StoreWriter
from store.harness import DIGESTS, DIM, FEATURES, IDENTITY, PROBE

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def store(place):
    with StoreWriter.open(place / "s", IDENTITY, DIM, probe=PROBE) as writer:
        writer.append(DIGESTS, FEATURES)
    return place / "s"


@pytest.mark.parametrize("version", ["store-v1"])
def test_golden_stores_open_for_ever(place, version):
    sys.path.insert(0, str(GOLDEN))
    import make_store as golden

    path = place / version
    shutil.copytree(GOLDEN / version, path)
    assert verify(path, full=True).ok
    old = FeatureStore.open(path, fingerprint(golden.IDENTITY))
    assert np.array_equal(old.read(golden.DIGESTS), golden.FEATURES)
    assert np.array_equal(old.probe, golden.PROBE)


def test_the_format_has_not_changed_without_a_new_version(place):
    """The same rows give the bytes of the golden store; if this fails, the version needs a new number."""
    if h5py.version.hdf5_version_tuple[:2] != (2, 0):
        pytest.skip("another HDF5 may lay out the same datasets differently")
    sys.path.insert(0, str(GOLDEN))
    import make_store as golden

    for rows in (slice(0, 4), slice(4, 7)):
        with StoreWriter.open(place / "s", golden.IDENTITY, golden.DIM, probe=golden.PROBE) as writer:
            writer.append(golden.DIGESTS[rows], golden.FEATURES[rows])
    names = {str(path.relative_to(GOLDEN / "store-v1")) for path in (GOLDEN / "store-v1").rglob("*.h5")}
    assert names == {str(path.relative_to(place / "s")) for path in (place / "s").rglob("*.h5")}


def test_a_packed_file_is_for_h5py_and_for_us(store, place):
    images = np.array([3, 1, 3, 0])  # one content twice
    columns = {"paths": ["a/ä.png", "b.png", "c.png", "d.png"], "labels": ["x", "y", "x", "日本"]}
    assert pack(FeatureStore.open(store), place / "p.h5", DIGESTS[images], columns).rows == 3
    with h5py.File(place / "p.h5") as file:
        X = file["features"][:][file["row"][:]]
        y = [label.decode() for label in file["label"][:]]
    assert np.array_equal(X, FEATURES[images])
    assert y == columns["labels"]
    packed = FeatureStore.open(place / "p.h5", fingerprint(IDENTITY))
    assert np.array_equal(packed.read(DIGESTS[images]), FEATURES[images])
    index = read_packed_index(place / "p.h5")
    assert np.array_equal(index.digests, DIGESTS[images])
    assert {name: list(values) for name, values in index.columns.items()} == columns
    assert verify(place / "p.h5", full=True).ok
    assert pack(FeatureStore.open(store), place / "q.h5", DIGESTS[images], columns).digest == packed.digest


def test_an_anonymous_pack_has_no_paths(store, place):
    pack(
        FeatureStore.open(store),
        place / "p.h5",
        DIGESTS[:2],
        {"paths": ["secret.png", "b"], "labels": ["x", "y"]},
        anonymous=True,
    )
    assert list(read_packed_index(place / "p.h5").columns) == ["labels"]
    assert b"secret" not in (place / "p.h5").read_bytes()


def test_export(store, place):
    import pyarrow.parquet as pq

    export(FeatureStore.open(store), place / "x.npy", DIGESTS[[2, 0, 2]], {})
    assert np.array_equal(np.load(place / "x.npy"), FEATURES[[2, 0, 2]])
    export(FeatureStore.open(store), place / "x.parquet", DIGESTS[[2, 0]], {"label": ["a", "b"]})
    table = pq.read_table(place / "x.parquet").to_pydict()
    assert np.array_equal(np.array(table["features"], np.float32), FEATURES[[2, 0]])
    assert (table["label"], table["content"]) == (["a", "b"], digests_to_hex(DIGESTS[[2, 0]]))
    with pytest.raises(StoreError, match=r"cannot export to '\.csv'; use \.npy or \.parquet"):
        export(FeatureStore.open(store), place / "x.csv", DIGESTS, {})


def test_merge_takes_what_is_new_and_refuses_what_is_different(place):
    for name, rows in (("a", slice(0, 10)), ("b", slice(5, 15))):
        with StoreWriter.open(place / name, IDENTITY, DIM, probe=PROBE) as writer:
            writer.append(DIGESTS[rows], FEATURES[rows])
    assert merge(place / "all", [place / "a", place / "b"]) == {place / "a": 10, place / "b": 5}
    assert np.array_equal(FeatureStore.open(place / "all").read(DIGESTS[:15]), FEATURES[:15])
    StoreWriter.open(place / "other", {"architecture": "other"}, DIM).close()
    with pytest.raises(StoreError, match="made differently"):
        merge(place / "all", [place / "other"])


def test_load_makes_no_copy_of_rows_that_lie_together(store):
    X = StoredRows.of(FeatureStore.open(store), DIGESTS[3:9])[:]
    assert np.array_equal(X, FEATURES[3:9])
    assert not X.flags.owndata
    assert not X.flags.writeable
    assert np.array_equal(StoredRows.of(FeatureStore.open(store), DIGESTS[::-1])[:], FEATURES[::-1])


def test_what_is_missing_is_said(place, store):
    with pytest.raises(StoreError, match=r"has no features for 1 of 2 images .*; run 'manyheads features' first"):
        FeatureStore.open(store).read(np.array([DIGESTS[0], [1, 2]], np.uint64))
    with pytest.raises(StoreError, match="there is no feature store; run 'manyheads features' first"):
        FeatureStore.open(place / "nowhere")
    with pytest.raises(StoreError, match="expected ffffffff"):
        FeatureStore.open(store, "f" * 64)
