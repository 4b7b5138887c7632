"""Stage one: embeds what is missing and nothing else, and a stop of any kind loses no finished row."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from pipeline import cli
from pipeline import config as configuration
from pipeline import data as dataset
from pipeline.config import Config
from pipeline.embed import backbone, baselines
from pipeline.embed import loader as loading
from pipeline.embed.records import read_records
from pipeline.errors import BackboneError, DatasetError
from pipeline.evaluation import audit
from pipeline.experiment import Artifacts
from pipeline.images import HASH_STORE, decode, perceptual_hash, policy_key, prepare
from pipeline.stages import extract as extract_features
from pipeline.stages.extract import work
from pipeline.store import FeatureStore

N = 24


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((40, 48)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number in range(N):
        picture(folder / "ab"[number % 2] / f"{number:02d}.png", number)
    return folder


def make(photos: Path, **changes: Any) -> Config:
    raw: dict[str, Any] = {
        "output": str(photos.parent / "out"),
        "dataset": {"source": "folder", "path": str(photos), "max_failures": 0.5},
        "backbones": [
            {"name": "squeezenet1_1", "weights": "random", "preprocessing": {"resize": 40, "crop": 32}},
        ],
        "baselines": ["pixels"],
        "extraction": {"device": "cpu", "precision": "fp32", "batch_size": 4, "workers": 2},
        "heads": ["nearest_centroid"],
    }
    return configuration.parse({**raw, **changes}, "test")


def stores(config: Config) -> dict[str, FeatureStore]:
    files = Artifacts(config.output)
    return {
        record.name: FeatureStore.open(files.find_store(record.store), record.fingerprint)
        for record in read_records(files.features)
    }


def segments(config: Config) -> list[tuple[str, str, bytes]]:
    """Every segment of every store; its name is the digest of its bytes."""
    return [
        (path.parent.parent.name, path.name, path.read_bytes())
        for path in sorted(Artifacts(config.output).stores.glob("*/segments/*.h5"))
    ]


def test_each_image_gets_the_vector_of_its_own_pixels(photos: Path) -> None:
    config = make(photos)
    result = extract_features.run(config)
    assert result.work is not None
    assert result.work.images == N
    assert result.work.vectors == {"squeezenet1_1-random-penultimate": N, "pixels": N}
    index = dataset.DatasetIndex.read(Artifacts(config.output).dataset)
    for embedder in (backbone.load(config.backbones[0], config.extraction, config.seed), baselines.load("pixels")):
        (spec,) = embedder.specs
        stored = stores(config)[spec.name].read(index.digests)
        for row in (0, 5, N - 1):
            image = decode((photos / index.paths[row]).read_bytes(), max_pixels=10**6)
            (expected,) = embedder.embed(prepare(image, embedder.preprocessing)[None])
            np.testing.assert_allclose(stored[row], expected[0], rtol=0, atol=1e-5 * np.abs(expected).max())


def test_images_are_hashed_where_they_are_decoded_and_only_there(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(photos)
    extract_features.run(config)
    files = Artifacts(config.output)
    index = dataset.DatasetIndex.read(files.dataset)
    expected = [
        perceptual_hash(decode((photos / path).read_bytes(), max_pixels=10**6)) for path in index.paths.tolist()
    ]
    assert np.array_equal(audit.read_hashes(files, index.digests), expected)
    picture(photos / "a" / "new.png", N)
    decoded: list[int] = []
    monkeypatch.setattr(loading, "perceptual_hash", lambda pixels: decoded.append(1) or perceptual_hash(pixels))
    extract_features.run(config)
    assert len(decoded) == 1
    index = dataset.DatasetIndex.read(files.dataset)
    assert audit.read_hashes(files, index.digests).any(axis=1).all()


def test_without_readable_hashes_there_are_none_and_it_is_said(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make(photos)
    files = Artifacts(config.output)
    digests = np.ones((3, 2), np.uint64)
    assert not audit.read_hashes(files, digests).any()
    assert not caplog.messages
    extract_features.run(config)
    for snapshot in (files.stores / HASH_STORE).glob("snapshot-*.h5"):
        snapshot.write_bytes(snapshot.read_bytes()[:-100])
    assert not audit.read_hashes(files, digests).any()
    assert caplog.messages[-1].startswith("near-duplicates are searched without perceptual hashes: ")


def test_added_and_changed_images_are_embedded_and_renamed_and_removed_ones_are_not(photos: Path) -> None:
    config = make(photos)
    extract_features.run(config)
    for number in range(3):
        picture(photos / "a" / f"new{number}.png", 100 + number)  # added
        picture(photos / "ab"[number % 2] / f"{number:02d}.png", 200 + number)  # changed
        (photos / "ab"[number % 2] / f"{number + 4:02d}.png").rename(photos / "b" / f"moved{number}.png")
        (photos / "ab"[number % 2] / f"{number + 8:02d}.png").unlink()
    plan = extract_features.run(config, plan=True)
    assert plan.pending == 6
    assert any("6 images are new or changed since the store was filled" in line for line in plan.summary_lines())
    result = extract_features.run(config)
    assert result.work is not None
    assert result.work.images == 6
    assert extract_features.run(config).work is None


def test_an_image_is_decoded_once_for_all_that_want_it(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(data: bytes, *, max_pixels: int, at_least: int | None) -> NDArray[np.uint8]:
        calls.append(len(data))
        return decode(data, max_pixels=max_pixels, at_least=at_least)

    monkeypatch.setattr(loading, "decode", counting)
    extract_features.run(make(photos, baselines=["pixels", "hog"]))
    assert len(calls) == N


def test_copies_of_an_image_are_embedded_once(photos: Path) -> None:
    (photos / "a" / "copy.png").write_bytes((photos / "a" / "00.png").read_bytes())
    result = extract_features.run(make(photos))
    assert result.work is not None
    assert result.work.images == N


def test_what_is_added_to_a_config_costs_its_own_work_only(photos: Path) -> None:
    extract_features.run(make(photos))
    result = extract_features.run(make(photos, baselines=["pixels", "hog"]))
    assert result.work is not None
    assert result.work.vectors == {"hog": N}


def test_weights_in_a_file_that_was_renamed_are_the_same_weights(photos: Path) -> None:
    from pipeline.embed import weights
    from pipeline.embed.published import BUNDLED

    state, _ = weights.read_weights(BUNDLED)
    description = json.loads(BUNDLED.with_suffix(".json").read_text(encoding="utf-8"))
    kept = {key: description[key] for key in ("architecture", "arguments", "preprocessing")}
    first, second = photos.parent / "first.safetensors", photos.parent / "second.safetensors"
    save_file(state, first, metadata={weights.METADATA_KEY: json.dumps(kept)})
    assert extract_features.run(make(photos, backbones=[{"name": "mine", "weights": str(first)}])).work is not None
    first.rename(second)
    renamed = make(photos, backbones=[{"name": "mine", "weights": str(second)}])
    assert extract_features.run(renamed).work is None
    assert [record.name for record in read_records(Artifacts(renamed.output).features)] == [
        "mine-second-penultimate",
        "pixels",
    ]


def test_a_plan_names_what_is_new_in_an_identity(photos: Path) -> None:
    config = make(photos)
    first = extract_features.run(config, plan=True)
    assert any(
        "24 to embed, time unknown until it has run once; no features of it yet" in line
        for line in first.summary_lines()
    )
    extract_features.run(config)
    other = make(photos, backbones=[{"name": "squeezenet1_1", "preprocessing": {"resize": 44, "crop": 32}}])
    (target,) = (target for target in extract_features.run(other, plan=True).targets if target.why)
    assert "preprocessing.resize: the store has 40, this run has 44" in target.why
    assert "weights" not in target.why


def test_two_embeddings_of_one_name_are_told_apart(photos: Path) -> None:
    two = [{"name": "squeezenet1_1", "preprocessing": {"resize": size, "crop": 32}} for size in (40, 44)]
    result = extract_features.run(make(photos, backbones=two, baselines=[]))
    names = [record.name for record in result.records]
    assert len(set(names)) == 2
    assert all(name.startswith("squeezenet1_1-random-penultimate-") for name in names)


# ---- images that fail


def test_a_broken_image_is_recorded_and_not_tried_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (photos / "a" / "00.png").read_bytes()
    (photos / "a" / "broken.png").write_bytes(whole[: len(whole) // 2])
    config = make(photos)
    result = extract_features.run(config)
    assert result.work is not None
    assert result.work.images == N
    assert [entry.path for entry in result.work.failures] == ["a/broken.png"]
    assert len(dataset.failed_digests(Artifacts(config.output).dataset, policy_key(config.dataset.max_pixels))) == 1
    again = extract_features.run(config)
    assert again.work is None
    whole = (photos / "b" / "01.png").read_bytes()
    (photos / "a" / "broken.png").write_bytes(whole + b"mended")  # other bytes: tried again
    mended = extract_features.run(config)
    assert mended.work is not None
    assert mended.work.images == 1


def test_too_many_failures_end_the_run_and_keep_what_is_finished(photos: Path) -> None:
    for number in range(3):
        (photos / "a" / f"broken{number}.png").write_bytes((photos / "a" / "00.png").read_bytes()[: 60 + number])
    section = {"source": "folder", "path": str(photos), "max_failures": 2}
    config = make(photos, dataset=section)
    with pytest.raises(DatasetError, match=r"3 of 27 images failed, dataset.max_failures allows 2"):
        extract_features.run(config)
    assert stores(config)["pixels"].rows == N


# ---- stops


def stop_after(batches: int, number: int) -> str:
    """Code that sends this process a signal in the midst of a run."""
    return f"""
import os
from pipeline.store import writer
from pipeline.stages.extract import work
writer.GROUP_BYTES = 1
original, seen = work._store, []
def stopping(*arguments):
    original(*arguments)
    seen.append(1)
    if len(seen) == {batches}:
        os.kill(os.getpid(), {number})
work._store = stopping
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(photos: Path) -> None:
    batches = 3
    config = make(photos).model_copy(update={"backbones": ()})  # quick, without torch
    path = photos.parent / "config"
    path.write_bytes(pickle.dumps(config))
    code = stop_after(batches, signal.SIGKILL) + (
        "import pickle\nfrom pathlib import Path\nfrom pipeline.stages import extract as extract_features\n"
        f"extract_features.run(pickle.loads(Path({str(path)!r}).read_bytes()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    resumed = extract_features.run(config)
    assert resumed.work is not None
    assert resumed.work.images == N - 4 * batches
    whole = config.model_copy(update={"output": str(photos.parent / "apart" / "whole")})
    extract_features.run(whole)
    assert segments(config) == segments(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_batch_in_hand(
    photos: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = work._store, []

    def interrupted(*arguments: Any) -> None:
        os.kill(os.getpid(), number)
        original(*arguments)
        seen.append(1)

    monkeypatch.setattr(work, "_store", interrupted)
    config = make(photos)
    before = signal.signal(number, cli._terminate)
    try:
        with pytest.raises(KeyboardInterrupt) as stop:
            extract_features.run(config)
    finally:
        assert signal.signal(number, before) is cli._terminate
    assert stop.value.args == (number,)
    assert len(seen) == 1
    monkeypatch.setattr(work, "_store", original)
    rest = extract_features.run(config)
    assert rest.work is not None
    assert rest.work.images == N - 4


# ---- memory


class Tight:
    """A recipe that has memory for so many images at a time."""

    def __init__(self, room: int) -> None:
        self.room = room

    def embed(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        if len(pixels) > self.room:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return (pixels.reshape(len(pixels), -1).astype(np.float32),)


def test_the_batch_halves_when_memory_runs_out_and_no_row_is_lost() -> None:
    pixels = np.arange(13 * 4 * 3, dtype=np.uint8).reshape(13, 2, 2, 3)
    lane = loading.Lane(Tight(3), limit=32)  # type: ignore[arg-type]
    (vectors,) = loading.in_passes(lane, pixels)
    np.testing.assert_array_equal(vectors, pixels.reshape(13, -1))
    assert lane.limit == 3
    with pytest.raises(BackboneError, match="not even one image fits into memory"):
        loading.in_passes(loading.Lane(Tight(0), limit=8), pixels)  # type: ignore[arg-type]


class Sums:
    """A recipe that adds up an image's bytes, and may fail at one of its batches."""

    preprocessing = baselines.load("pixels").preprocessing

    def __init__(self, fails_at: int | None = None) -> None:
        self.batches = 0
        self.fails_at = fails_at

    def embed(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        if self.batches == self.fails_at:
            raise BackboneError("the device is gone")
        self.batches += 1
        return (pixels.reshape(len(pixels), -1).sum(1, dtype=np.float32, keepdims=True),)


def through(embedder: Sums, photos: Path, size: int) -> Iterator[tuple[loading.Batch, list[loading.Part | None]]]:
    items = [loading.Item(number, f"{'ab'[number % 2]}/{number:02d}.png", None, (0,)) for number in range(N)]
    return loading.embed([loading.Lane(embedder, limit=size)], items, photos, 10**6, workers=1)  # type: ignore[arg-type]


def test_a_batch_is_embedded_only_when_it_is_asked_for_and_in_order(photos: Path) -> None:
    embedder = Sums()
    contents, sums = [], []
    for number, (batch, (part,)) in enumerate(through(embedder, photos, 10)):
        assert embedder.batches == number + 1, "what is finished can be stored before the next batch may fail"
        contents += [item.content for item in batch.items]
        assert part is not None
        sums += part.vectors[0][:, 0].tolist()
    assert contents == list(range(N))
    for content in (0, 9, 10, N - 1):
        image = decode((photos / "ab"[content % 2] / f"{content:02d}.png").read_bytes(), max_pixels=10**6)
        assert sums[content] == prepare(image, embedder.preprocessing).sum(dtype=np.float32)


def test_an_error_of_a_network_reaches_the_caller_after_what_was_finished(photos: Path) -> None:
    finished = through(Sums(fails_at=1), photos, 10)
    assert [item.content for item in next(finished)[0].items] == list(range(10))
    with pytest.raises(BackboneError, match="the device is gone"):
        next(finished)


def test_reading_ahead_holds_a_fixed_number_of_batches(photos: Path) -> None:
    preprocessing = baselines.load("pixels").preprocessing
    items = [loading.Item(number, f"{'ab'[number % 2]}/{number:02d}.png", None, (0,)) for number in range(N)]
    loader = loading.Loader(photos, 10**6, (preprocessing,), batch_size=2, workers=2)
    memory, seen = set(), []
    for batch in loader.batches(items):
        memory.add(batch.pixels[0].ctypes.data)
        seen += [item.content for item in batch.items]
    assert seen == list(range(N))
    assert len(memory) == loading.AHEAD


def test_a_run_ends_with_its_rate_and_where_the_time_went(photos: Path) -> None:
    lines = extract_features.run(make(photos)).summary_lines()
    place = next(row for row, line in enumerate(lines) if line.startswith("24 images embedded in"))
    assert "images/s" in lines[place]
    seconds = next(line for line in lines if line.startswith("seconds: "))
    assert [part.split()[0] for part in seconds.partition(";")[0].removeprefix("seconds: ").split(", ")] == [
        "start-up", "network", "write",
    ]  # fmt: skip
