"""Parts: immutable files made by many, on a disk and in an object store; what is merged of them; stores read from afar."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import StoreError
from pipeline.stages.extract.stores import take_parts
from pipeline.store import FeatureStore
from pipeline.store.maintain import merge, verify
from pipeline.store.share import PartWriter, pack, part_files, part_folders
from pipeline.store.writer import StoreWriter
from store.harness import DIGESTS, DIM, FEATURES, IDENTITY, PROBE


@pytest.fixture(params=["disk", "memory"])
def somewhere(request, place):
    if request.param == "disk":
        yield str(place / "parts")
        return
    fsspec = pytest.importorskip("fsspec")
    yield f"memory://{place.name}"
    fsspec.filesystem("memory").rm(f"/{place.name}", recursive=True)


def write(somewhere, rows, **others):
    with PartWriter(somewhere, Path("net-1.store"), IDENTITY, DIM, probe=PROBE, **others) as writer:
        wanted = writer.missing(DIGESTS[rows])
        writer.append(DIGESTS[rows][wanted], FEATURES[rows][wanted])
        return int(wanted.sum())


def test_parts_of_many_become_one_store_that_has_each_content_once(place, somewhere):
    assert write(somewhere, slice(0, 10)) == 10
    assert write(somewhere, slice(5, 15)) == 5, "what is there is not asked for again"
    assert write(somewhere, slice(8, 20), look=False) == 12, "who does not look makes some twice"
    assert part_folders(somewhere) == ["net-1"]
    assert len(part_files(somewhere, "net-1")) == 3
    assert take_parts(somewhere, place / "stores") == {"net-1": 20}
    assert take_parts(somewhere, place / "stores") == {"net-1": 0}
    store = FeatureStore.open(place / "stores" / "net-1.store")
    assert store.rows == 20
    assert np.array_equal(store.read(DIGESTS[:20]), FEATURES[:20])
    assert np.array_equal(store.probe, PROBE)
    assert verify(store.path, full=True).ok


def test_the_same_work_done_twice_is_one_file(somewhere):
    for _ in range(2):
        write(somewhere, slice(0, 10), look=False)
    assert len(part_files(somewhere, "net-1")) == 1


def test_a_damaged_part_is_passed_over_and_its_images_are_missing(place, caplog):
    write(place / "parts", slice(0, 10))
    write(place / "parts", slice(10, 20), look=False)
    first, second = sorted(map(Path, part_files(place / "parts", "net-1")))
    data = bytearray(first.read_bytes())
    data[-100] ^= 1  # in the vectors
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-7])
    assert take_parts(place / "parts", place / "stores") == {}
    assert "passed over" in caplog.text
    assert write(place / "parts", slice(0, 20)) == 10, "the head of a part says what it has; a cut one has nothing"


def test_parts_of_another_embedding_are_refused(place):
    write(place / "parts", slice(0, 10))
    with pytest.raises(StoreError, match="is of another embedding"):
        PartWriter(place / "parts", Path("net-1.store"), {"architecture": "other"}, DIM)
    with StoreWriter.open(place / "stores" / "net-1.store", {"architecture": "other"}, DIM):
        pass
    with pytest.raises(StoreError, match="made differently"):
        take_parts(place / "parts", place / "stores")


def test_own_parts_go_when_the_store_has_them(place):
    write(place / "parts", slice(0, 10))
    assert take_parts(place / "parts", place / "stores", remove=True) == {"net-1": 10}
    assert not (place / "parts").exists()


def test_stores_and_packed_files_are_read_from_an_object_store(place):
    fsspec = pytest.importorskip("fsspec")
    with StoreWriter.open(place / "s", IDENTITY, DIM, probe=PROBE) as writer:
        writer.append(DIGESTS, FEATURES)
    pack(FeatureStore.open(place / "s"), place / "features.h5", DIGESTS)
    memory = fsspec.filesystem("memory")
    memory.put(str(place / "s"), "/afar/s", recursive=True)
    memory.put(str(place / "features.h5"), "/afar/features.h5")
    for address in ("memory://afar/s", "memory://afar/features.h5"):
        assert np.array_equal(FeatureStore.open(address).read(DIGESTS[::-1]), FEATURES[::-1])
        assert merge(place / address[-4:], [address]) == {address: len(DIGESTS)}
    with pytest.raises(StoreError, match="there is no feature store"):
        FeatureStore.open("memory://nowhere")
    with pytest.raises(StoreError, match="is not there"):
        FeatureStore.open("memory://nowhere.h5")
    with pytest.raises(StoreError, match=r"nosuch://bucket/s: cannot be opened .*Protocol not known: nosuch"):
        FeatureStore.open("nosuch://bucket/s")


def test_numbers_that_are_not_finite_are_not_merged(place):
    bad = FEATURES[:10].copy()
    bad[3, 1] = np.nan
    with PartWriter(place / "parts", Path("net-1.store"), IDENTITY, DIM) as writer:
        writer.append(DIGESTS[:10], bad)
    with pytest.raises(StoreError, match="not finite; nothing of it was taken"):
        take_parts(place / "parts", place / "stores")
    assert FeatureStore.open(place / "stores" / "net-1.store").rows == 0
