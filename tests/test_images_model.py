"""Any order of doings to a folder of images: after each run the store equals a fresh build, nothing is embedded twice."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from numpy.typing import NDArray
from PIL import Image
from store.harness import rounds

from pipeline import config as configuration
from pipeline.config import Config
from pipeline.data import DatasetIndex, read_failures, reading
from pipeline.embed import baselines
from pipeline.embed.records import read_records
from pipeline.embed.spec import probe_images
from pipeline.experiment import Artifacts
from pipeline.stages import extract as extract_features
from pipeline.stages import maintenance
from pipeline.store import FeatureStore

CLASSES = ("ant", "bee")
SIZE = 4
BROKEN = 1000
"""Contents from this number on are no images."""

names = st.sampled_from([f"{number}.bmp" for number in range(5)])
classes = st.sampled_from(CLASSES)
numbers = st.integers(0, 30)
which = st.integers(0, 100)


def content(number: int) -> bytes:
    """The bytes of image `number`; all have one length, so that only times and content can betray a change."""
    with tempfile.SpooledTemporaryFile() as file:
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "bmp")
        file.seek(0)
        data = file.read()
    return data if number < BROKEN else b"\0\0" + data[2:]


CONTENTS = {number: content(number) for number in (*range(31), *range(BROKEN, BROKEN + 31))}


class Embedded:
    """The pixels recipe, counting every image it is given."""

    def __init__(self) -> None:
        self.counts: Counter[bytes] = Counter()
        self.table = dict(baselines._TABLE)
        *rest, self.recipe = self.table["pixels"]
        self.table["pixels"] = (*rest, self.count)  # type: ignore[assignment]
        self.probes = {pixels.tobytes() for pixels in probe_images((baselines.THUMBNAIL, baselines.THUMBNAIL))}

    def count(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.counts.update(key for key in (image.tobytes() for image in pixels) if key not in self.probes)
        return self.recipe(pixels)


def experiment(photos: Path, output: Path) -> Config:
    raw = {
        "output": str(output),
        "dataset": {"source": "folder", "path": str(photos), "max_failures": 1000.0},
        "backbones": [{"name": "resnet18"}],
        "baselines": ["pixels"],
        "extraction": {"device": "cpu", "workers": 1, "batch_size": 4},
        "heads": ["nearest_centroid"],
    }
    # Only the recipe: a network would make the proof slow, and no different.
    return configuration.parse(raw, "test").model_copy(update={"backbones": ()})


def opened(config: Config) -> FeatureStore:
    files = Artifacts(config.output)
    (record,) = read_records(files.features)
    return FeatureStore.open(files.find_store(record.store), record.fingerprint)


class Images(RuleBasedStateMachine):
    """`files` is what the folder holds: path -> number of the content."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.photos = self.folder / "photos"
        self.config = experiment(self.photos, self.folder / "output")
        self.files: dict[str, int] = {}
        self.embedded = Embedded()
        self.known: set[int] = set()
        """Contents the store has a vector of."""
        # A window that is short, but longer than the clock's grain: the cache of file times is used here.
        self.patches = [
            mock.patch.object(baselines, "_TABLE", self.embedded.table),
            mock.patch.object(reading, "RACY_NS", 10_000_000),
        ]
        for patch in self.patches:
            patch.start()

    @initialize()
    def some_images_that_stay(self) -> None:
        for number, label in enumerate(CLASSES * 2):
            self._write(f"{label}/kept{number}.bmp", 27 + number)
        self._run()

    def _write(self, path: str, number: int) -> None:
        target = self.photos / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(CONTENTS[number])
        self.files[path] = number

    def _pick(self, which: int) -> str | None:
        free = sorted(path for path in self.files if "kept" not in path)
        return free[which % len(free)] if free else None

    def _move(self, source: str, target: str) -> None:
        if source != target:
            (self.photos / source).rename(self.photos / target)
            self.files[target] = self.files.pop(source)

    @rule(label=classes, name=names, number=numbers)
    def add_or_change(self, label: str, name: str, number: int) -> None:
        self._write(f"{label}/{name}", number)
        self._run()

    @rule(which=which, number=numbers)
    def change_and_restore_the_time(self, which: int, number: int) -> None:
        if path := self._pick(which):
            before = (self.photos / path).stat()
            self._write(path, number)
            os.utime(self.photos / path, ns=(before.st_atime_ns, before.st_mtime_ns))
        self._run()

    @rule(which=which)
    def touch(self, which: int) -> None:
        if path := self._pick(which):
            (self.photos / path).touch()
        self._run()

    @rule(which=which, name=names)
    def rename(self, which: int, name: str) -> None:
        if path := self._pick(which):
            self._move(path, f"{path.partition('/')[0]}/{name}")
        self._run()

    @rule(which=which, label=classes)
    def move_to_a_class(self, which: int, label: str) -> None:
        if path := self._pick(which):
            self._move(path, f"{label}/{path.partition('/')[2]}")
        self._run()

    @rule(one=which, other=which)
    def swap_two(self, one: int, other: int) -> None:
        first, second = self._pick(one), self._pick(other)
        if first and second and first != second:
            self._move(first, "ant/between.bmp")
            self._move(second, first)
            self._move("ant/between.bmp", second)
        self._run()

    @rule(which=which, label=classes, name=names)
    def duplicate(self, which: int, label: str, name: str) -> None:
        if path := self._pick(which):
            self._write(f"{label}/{name}", self.files[path])
        self._run()

    @rule(which=which)
    def remove(self, which: int) -> None:
        if path := self._pick(which):
            (self.photos / path).unlink()
            del self.files[path]
        self._run()

    @rule(label=classes, name=names, number=numbers)
    def make_unreadable(self, label: str, name: str, number: int) -> None:
        self._write(f"{label}/{name}", BROKEN + number)
        self._run()

    @rule()
    def collect(self) -> None:
        maintenance.gc(self.config)
        self.known = {number for number in self.files.values() if number < BROKEN}
        self.embedded.counts = Counter()  # what was forgotten may be embedded again
        self._run()

    @rule()
    def read_every_file_again(self) -> None:
        self._run(rehash=True)

    def _run(self, rehash: bool = False) -> None:
        expected = {number for number in self.files.values() if number < BROKEN} - self.known
        result = extract_features.run(self.config, rehash=rehash)
        assert (result.work.images if result.work else 0) == len(expected)
        self.known |= expected
        assert set(self.embedded.counts.values()) <= {1}, "an image was embedded twice"
        self._equals_a_fresh_build()
        again = extract_features.run(self.config)
        assert again.work is None, "a second run found something to do"

    def _equals_a_fresh_build(self) -> None:
        ours = dict(self.embedded.counts)
        fresh = experiment(self.photos, self.folder / "apart" / "fresh")
        extract_features.run(fresh)
        self.embedded.counts = Counter(ours)
        here, there = (DatasetIndex.read(Artifacts(config.output).dataset) for config in (self.config, fresh))
        assert here.paths.tolist() == there.paths.tolist() == sorted(self.files)
        assert here.labels.tolist() == there.labels.tolist()
        assert np.array_equal(here.digests, there.digests)
        store, new = opened(self.config), opened(fresh)
        assert np.array_equal(store.missing(here.digests), new.missing(here.digests))
        assert store.missing(here.digests).tolist() == [self.files[path] >= BROKEN for path in here.paths]
        live = here.digests[~store.missing(here.digests)]
        assert store.read(live).tobytes() == new.read(live).tobytes()
        assert store.rows == len(self.known)
        assert new.rows == len({number for number in self.files.values() if number < BROKEN})
        named = [{entry.path for entry in read_failures(Artifacts(config.output).dataset) if entry.status == "unreadable"}
                 for config in (self.config, fresh)]  # fmt: skip
        broken = {number for number in self.files.values() if number >= BROKEN}
        assert all({self.files[path] for path in paths if path in self.files} == broken for paths in named)
        shutil.rmtree(self.folder / "apart")

    def teardown(self) -> None:
        for patch in self.patches:
            patch.stop()
        shutil.rmtree(self.folder)


TestImages = Images.TestCase
TestImages.settings = settings(
    max_examples=rounds(15, 1_000),
    stateful_step_count=rounds(5, 20),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_the_judge_can_say_no(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the size of a file all that is looked at, the proof would fail."""
    known: Callable[..., object] = reading.StatCache.known

    def by_size_alone(self: reading.StatCache, paths: object, stats: NDArray[np.int64]) -> object:
        blind = reading.StatCache(self.paths, self.stats * [1, 0, 0], self.digests, 2**60, 2**60)
        return known(blind, paths, stats * [1, 0, 0])

    monkeypatch.setattr(reading.StatCache, "known", by_size_alone)
    machine = Images()
    try:
        machine.some_images_that_stay()
        machine.add_or_change("ant", "0.bmp", 1)
        with pytest.raises(AssertionError):
            machine.add_or_change("ant", "0.bmp", 2)
    finally:
        machine.teardown()
