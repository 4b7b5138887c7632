"""Several processes embed what one would, in the same order, and none outlives the other's end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import backbone, baselines, dataset, extract_features
from pipeline import config as configuration
from pipeline.config import Artifacts, Config, ExtractionConfig
from pipeline.errors import BackboneError, PipelineError
from pipeline.extract_features import lanes, processes, work
from pipeline.extract_features.lanes import Loaded
from pipeline.extract_features.processes import DEALT, Failure, Worker
from pipeline.extract_features.sources import Source
from pipeline.extract_features.targets import Contents, find_targets
from pipeline.extract_features.work import Work
from pipeline.feed import Item
from pipeline.images import policy_key
from pipeline.store import FeatureStore

N = 22
BATCH = 3


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number in range(N):
        path = folder / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 48)).save(path)
    return folder


def make(photos: Path, count: int | str = 2, **extraction: Any) -> Config:
    asked = {"device": "cpu", "precision": "fp32", "batch_size": BATCH, "workers": 2, "processes": count}
    raw = {
        "output": str(photos.parent / f"out{count}"),
        "dataset": {"source": "folder", "path": str(photos), "max_failures": 0.5},
        "backbones": [{"name": "squeezenet1_1", "preprocessing": {"resize": 40, "crop": 32}}],
        "baselines": ["pixels"],
        "extraction": {**asked, **extraction},
        "heads": ["nearest_centroid"],
    }
    return configuration.parse(raw, "test")


def alone(config: Config) -> Config:
    """The same experiment by one process."""
    return config.model_copy(update={"extraction": config.extraction.model_copy(update={"processes": 1})})


def embed_pixels(config: Config) -> Work:
    """Stage one for the pixels alone, whose processes start without torch."""
    files = Artifacts(config.output)
    index = dataset.scan(config.dataset, config.seed, files.dataset).index
    contents = Contents.of(index, dataset.failed_digests(files.dataset, policy_key(config.dataset.max_pixels)))
    source = Source(None, baselines.load("pixels").specs, config, len(contents.rows))
    return work.embed(find_targets([source], contents, files), contents, index, config, files.dataset)


def store_of(config: Config, name: str = "pixels") -> FeatureStore:
    (path,) = Artifacts(config.output).stores.glob(f"{name}*.store")
    return FeatureStore.open(path)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """The workers that are begun from now on."""
    team: list[Worker] = []
    begin = processes._begin

    def watching(name: str) -> Worker:
        team.append(begin(name))
        return team[-1]

    monkeypatch.setattr(processes, "_begin", watching)
    return team


def test_two_processes_fill_the_stores_as_one_does(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = make(photos, 1), make(photos, 2)
    extract_features.run(one)
    known = Artifacts(two.output).specs  # so that no network is loaded here to learn what it gives
    known.parent.mkdir()
    known.write_bytes(Artifacts(one.output).specs.read_bytes())
    caplog.clear()
    caplog.set_level(logging.INFO, "pipeline")
    result = extract_features.run(two)
    assert result.work is not None
    assert (result.work.processes, result.work.workers) == (2, 2)
    assert result.work.vectors == {"squeezenet1_1-random-penultimate": N, "pixels": N}
    assert result.work.network_images == result.work.vectors
    told = [
        record.getMessage()
        for record in caplog.records
        if "squeezenet1_1-random-penultimate on cpu in fp32" in record.getMessage()
    ]
    assert len(told) == 2, "what a process logs is heard here"
    digests = dataset.DatasetIndex.read(Artifacts(two.output).dataset).digests
    for name in ("squeezenet", "pixels"):
        mine, theirs = store_of(two, name), store_of(one, name)
        for found, expected in zip(mine.locate(digests), theirs.locate(digests), strict=True):
            np.testing.assert_array_equal(found, expected)
        expected = theirs.read(digests)
        np.testing.assert_allclose(mine.read(digests), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert store_of(two).digest == store_of(one).digest, "the same bytes"
    assert extract_features.run(two).work is None


def test_what_cannot_be_read_is_reported_as_by_one_process(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = photos / "b" / "11.png"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    gone, held, items = photos / "a" / "04.png", photos.parent / "held.png", work._items

    def losing(*arguments: Any) -> Any:
        gone.rename(held)  # after the scan
        return items(*arguments)

    monkeypatch.setattr(work, "_items", losing)
    found = []
    for count in (1, 2):
        done = embed_pixels(make(photos, count))
        found.append((done.images, done.vectors, done.failures, done.unavailable))
        held.rename(gone)
    assert found[0] == found[1]
    images, _, (failure,), (unavailable,) = found[1]
    assert images == N - 2
    assert failure.path == "b/11.png"
    assert unavailable.startswith("a/04.png: ")
    assert store_of(make(photos, 1)).digest == store_of(make(photos, 2)).digest


def test_batches_come_in_order_from_a_fixed_number_under_way(photos: Path) -> None:
    paths = [f"{'ab'[number % 2]}/{number:02d}.png" for number in range(N)]
    drawn: list[int] = []

    def items() -> Iterator[Item]:
        for number in range(20 * N):
            drawn.append(number)
            yield Item(number, paths[number % N], None, (0,))

    source = Source(None, baselines.load("pixels").specs, make(photos), N)
    with processes.spread([source], photos, 2) as networks:
        seen, most = [], 0
        for finished in networks.embed(items()):
            seen += [item.content for item in finished.items]
            most = max(most, len(drawn) - len(seen))
    assert seen == list(range(20 * N))
    assert most <= 2 * DEALT * BATCH


# ---- ends


def test_a_signal_ends_the_run_after_the_batch_in_hand(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, team = work._store, watched(monkeypatch)

    def interrupted(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        store(*arguments)

    config = make(photos)
    with monkeypatch.context() as patch:
        patch.setattr(work, "_store", interrupted)
        with pytest.raises(KeyboardInterrupt) as stop:
            embed_pixels(config)
    assert stop.value.args == (signal.SIGTERM,)
    assert [worker.process.returncode for worker in team] == [-signal.SIGKILL] * 2, "ended, and waited for"
    assert embed_pixels(alone(config)).images == N - BATCH


def test_a_process_that_dies_is_named_and_costs_no_finished_row(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, team = work._store, watched(monkeypatch)
    seen = []

    def killing(*arguments: Any) -> None:
        store(*arguments)
        seen.append(1)
        if len(seen) == 1:
            team[1].process.kill()
            team[1].process.wait()

    config = make(photos, batch_size=1)
    with monkeypatch.context() as patch:
        patch.setattr(work, "_store", killing)
        with pytest.raises(PipelineError) as caught:
            embed_pixels(config)
    assert str(caught.value) == (
        "process 2 of 2 on cpu was killed by SIGKILL, most often because memory ran out; the features that were finished are "
        "kept: run again, with fewer extraction.processes or a smaller extraction.batch_size"
    )
    assert all(worker.process.returncode is not None for worker in team)
    assert 1 <= len(seen) < N
    assert embed_pixels(alone(config)).images == N - len(seen)


def test_no_process_outlives_a_parent_that_was_killed(photos: Path) -> None:
    """The workers have the parent's standard error, so that it ends when the last of them does."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_processes
from pipeline.extract_features import work
def dying(*arguments):
    print("embedding", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
work._store = dying
test_processes.embed_pixels(test_processes.make(Path({str(photos)!r})))
"""
    run = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert run.returncode == -signal.SIGKILL
    assert "embedding" in run.stderr


def test_a_bug_in_a_process_keeps_its_traceback(photos: Path) -> None:
    (spec,) = baselines.load("pixels").specs
    source = Source(None, (replace(spec, architecture="nonsense"),), make(photos), N)
    told = r"(?s)process 1 of 2 on cpu failed:\nTraceback.*KeyError: 'nonsense'"
    with pytest.raises(RuntimeError, match=told), processes.spread([source], photos, 2):
        pass


def test_what_the_user_can_solve_crosses_with_every_problem() -> None:
    theirs, mine = Pipe()
    theirs.send(Failure(BackboneError("cannot", ["one", "two"])))
    with pytest.raises(BackboneError) as caught:
        processes._receive(Worker("process 1 of 2", None, mine))  # type: ignore[arg-type]
    assert str(caught.value) == "cannot\n  one\n  two"


# ---- choices


def test_processes_that_would_make_other_vectors_are_refused() -> None:
    made = baselines.load("pixels")
    team = [Worker(f"process {number} of 2 on cuda:{number - 1}", None, None) for number in (1, 2)]  # type: ignore[arg-type]
    loaded = Loaded((made.specs,), (made.canary,), BATCH)
    processes._require_the_same(team, [loaded, loaded])
    message = "process 2 of 2 on cuda:1 makes other vectors than process 1 of 2 on cuda:0; name one device"
    coarse = replace(loaded, specs=((replace(made.specs[0], precision="bf16"),),))
    with pytest.raises(BackboneError, match=message) as caught:
        processes._require_the_same(team, [loaded, coarse])
    assert caught.value.problems == (
        "precision: process 1 of 2 on cuda:0 has 'fp32', process 2 of 2 on cuda:1 has 'bf16'",
    )
    with pytest.raises(BackboneError, match=message) as caught:
        processes._require_the_same(team, [loaded, replace(loaded, canaries=((made.canary[0] * 1.1,),))])
    assert caught.value.problems[0].startswith("probe image 0: cosine 1.0")


@pytest.mark.parametrize(
    ("asked", "devices", "images", "expected"),
    [
        ("auto", ["cpu"], 10**6, 1),
        ("auto", ["cuda:0", "cuda:1", "cuda:2"], 10**6, 3),
        ("auto", ["cuda:1"], 10**6, 1),
        ("auto", ["cuda:0", "cuda:1"], 256, 1),
        ("auto", ["cuda:0", "cuda:1"], 257, 2),
        (4, ["cpu"], 10**6, 4),
        (4, ["cpu"], 70, 3),
        (4, ["cpu"], 0, 1),
    ],
)
def test_auto_is_a_process_per_gpu_and_each_has_a_batch(
    asked: int | str, devices: list[str], images: int, expected: int, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone, "devices", lambda device: devices)
    config = make(photos, asked, device="auto", batch_size="auto")
    source = Source(config.backbones[0], (), config, images)
    assert processes.how_many([source], images) == expected


def test_threads_are_divided_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 40)
    auto, eight = ExtractionConfig(), ExtractionConfig(workers=8)
    assert [lanes.workers(auto, count) for count in (1, 2, 4, 80)] == [16, 16, 10, 1]
    assert [lanes.workers(eight, count) for count in (1, 2, 3, 16)] == [8, 4, 2, 1]


def test_a_device_without_a_number_is_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert backbone.devices("cpu") == ["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert backbone.devices("cuda") == backbone.devices("auto") == ["cuda:0", "cuda:1", "cuda:2"]
    assert backbone.devices("cuda:1") == ["cuda:1"]
