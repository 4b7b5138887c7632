"""Many machines: shards and workers give the vectors of one process, every image once, whoever dies."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pytest
from click.testing import CliRunner
from photos import make_photos
from sklearn.pipeline import Pipeline

from pipeline import config as configuration
from pipeline.cli import cli
from pipeline.config import Config, TuningConfig
from pipeline.data import DatasetIndex, read_failures
from pipeline.errors import PipelineError, StoreError
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.experiment import Artifacts
from pipeline.heads import HEADS
from pipeline.heads.tuning import TuningRun, make_folds, tune
from pipeline.heads.tuning.room import on
from pipeline.io.remote import Engine
from pipeline.stages import extract, maintenance, train_heads
from pipeline.stages.extract.spread import Shard, pays, run_shard
from pipeline.stages.train_heads.task import SharedFeatures
from pipeline.store import FeatureStore
from pipeline.store.maintain import verify


def small(photos: Path, output: Path) -> Config:
    raw = {
        "output": str(output),
        "dataset": {"source": "folder", "path": str(photos), "max_failures": 0.5},
        "backbones": [{"name": "squeezenet1_1", "weights": "random"}],
        "baselines": ["pixels", "hog"],
        "extraction": {"batch_size": 4},
    }
    return configuration.parse(raw, "test").model_copy(update={"backbones": ()})  # quick, without torch


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small(make_photos(tmp_path / "photos"), tmp_path / "a" / "out")


def stores(config: Config) -> dict[str, dict[bytes, bytes]]:
    """Of every store, the bytes of each content's vector; each is checked in full, and has no content twice."""
    found = {}
    for path in sorted(Artifacts(config.output).stores.glob("*.store")):
        assert verify(path, full=True).ok
        store = FeatureStore.open(path)
        content = store.table.in_file_order()
        found[path.name] = {key.tobytes(): row.tobytes() for key, row in zip(content, store.read(content), strict=True)}
        assert len(found[path.name]) == store.rows
    return found


@pytest.fixture
def alone(config: Config, tmp_path: Path) -> dict[str, dict[bytes, bytes]]:
    """What one process makes of the same photos."""
    other = small(Path(config.dataset.path), tmp_path / "b" / "out")
    extract.run(other)
    return stores(other)


def test_shards_that_are_merged_are_what_one_process_makes(
    config: Config, alone: dict[str, dict[bytes, bytes]]
) -> None:
    runs = [run_shard(config, Shard(number, 3)) for number in (1, 2, 3)]
    assert [run.images for run in runs] == [run.work.images for run in runs]
    assert sum(run.images for run in runs) == 36
    assert run_shard(config, Shard(2, 3)).work.images == 0, "what is done is not done again"
    done = extract.run(config)
    assert done.work is None
    assert stores(config) == alone
    assert not Artifacts(config.output).parts.exists()
    assert run_shard(config, Shard(1, 3)).work.images == 0, "nor what the stores have"


KILLED_AND_AGAIN = """
import os, pickle, signal, sys, time
from pathlib import Path
from pipeline.experiment import Artifacts
from pipeline.stages.extract.spread import Shard, run_shard

config = pickle.loads(Path(sys.argv[1]).read_bytes())
child = os.fork()
if child == 0:
    run_shard(config, Shard(1, 2))
    signal.pause()
while not (Artifacts(config.output).dataset / "index.csv").exists() and os.waitpid(child, os.WNOHANG)[0] == 0:
    time.sleep(0.01)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
print("killed", flush=True)
run_shard(config, Shard(1, 2))
"""


def test_the_same_shard_at_once_and_killed_ones_do_no_harm(
    config: Config, alone: dict[str, dict[bytes, bytes]], tmp_path: Path
) -> None:
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    command = [sys.executable, "-c", KILLED_AND_AGAIN, str(tmp_path / "config")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "killed\n"
    run_shard(config, Shard(1, 2))
    run_shard(config, Shard(2, 2))
    assert other.wait() == 0
    assert extract.run(config).work is None
    assert stores(config) == alone


def test_shards_on_machines_of_their_own_meet_in_an_object_store(
    config: Config, alone: dict[str, dict[bytes, bytes]], tmp_path: Path
) -> None:
    pytest.importorskip("fsspec")
    place = f"memory://{tmp_path.name}/run"
    for number in (1, 2):
        machine = small(Path(config.dataset.path), tmp_path / f"machine{number}" / "out")
        said = list(run_shard(machine, Shard(number, 2), place).summary_lines())
        assert not Artifacts(machine.output).parts.exists()
    files = Artifacts(config.output)
    assert f"manyheads store merge {tmp_path / 'machine2' / 'features'} {place}, then manyheads features" in said[-1]
    merged = CliRunner().invoke(cli, ["store", "merge", str(files.stores), place], catch_exceptions=False)
    assert f"{place}: 36 new vectors of pixels-" in merged.output
    assert extract.run(config).work is None
    assert stores(config) == alone


def test_a_shard_is_a_matter_of_content(config: Config) -> None:
    run_shard(config, Shard(1, 2))
    before = DatasetIndex.read(Artifacts(config.output).dataset).digests
    make_photos(Path(config.dataset.path) / "more", per_class=20, seed=1)
    run_shard(config, Shard(1, 2))
    after = DatasetIndex.read(Artifacts(config.output).dataset).digests
    shards = np.array([Shard(number, 4).has(after) for number in (1, 2, 3, 4)])
    assert (shards.sum(axis=0) == 1).all()
    there = np.isin(after[:, 0], before[:, 0])
    assert there.sum() == len(before)
    assert {*before[Shard(3, 4).has(before), 0]} == {*after[shards[2] & there, 0]}


def test_what_a_shard_cannot_decode_is_told_and_not_tried_again(config: Config) -> None:
    photo = next(Path(config.dataset.path).glob("leaf/*.png"))
    photo.write_bytes(photo.read_bytes()[:300])
    runs = [run_shard(config, Shard(number, 2)) for number in (1, 2)]
    assert sum(len(run.work.failures) for run in runs) == 1
    assert any("1 image could not be used" in line for run in runs for line in run.summary_lines())
    assert [one.path for one in read_failures(Artifacts(config.output).dataset)] == [f"leaf/{photo.name}"]
    assert extract.run(config).work is None


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "1/0", "-1/4"])
def test_a_shard_is_one_of_so_many(text: str) -> None:
    with pytest.raises(
        PipelineError, match=r"expected the shard's number, from 1, and how many there are, such as 3/16"
    ):
        Shard.parse(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shard", "1/2", "--plan"], "--shard excludes --plan and --engine"),
        (["--shard", "1/2", "--engine", "ray"], "--shard excludes --plan and --engine"),
        (["--parts", "x"], "--parts needs --shard or --engine"),
        (["--workers", "2"], "they need --engine"),
        (["--engine", "spark"], "'spark' is not 'ray'"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(options: list[str], said: str) -> None:
    found = CliRunner().invoke(cli, ["features", "configs/digits.yaml", *options])
    assert found.exit_code != 0
    assert said in found.output + str(found.exception)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "127.0.0.1 does not answer at port 1 (Connection refused); start a cluster there with `{start}`, or "),
        ("tcp://127.0.0.1:1", "127.0.0.1 does not answer at port 1 (Connection refused); start a cluster there with `{start}`, or "),
        ("127.0.0.1", "expected HOST:PORT, where a cluster runs"),
        ("127.0.0.1:x", "expected HOST:PORT, where a cluster runs"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("name", "start"), [("ray", "ray start --head"), ("dask", "dask scheduler")])
def test_an_address_where_nothing_answers_is_told_in_one_line(address: str, said: str, name: str, start: str) -> None:
    pytest.importorskip("ray" if name == "ray" else "distributed")
    with pytest.raises(PipelineError) as caught, on(Engine(name, address)):
        pass
    assert str(caught.value).startswith(f"--address {address}: {said.format(start=start)}")
    assert "\n" not in str(caught.value)


def test_merge_says_what_goes_where(config: Config, tmp_path: Path) -> None:
    extract.run(config)
    stores, place = Artifacts(config.output).stores, tmp_path / "parts"
    run_shard(small(Path(config.dataset.path), tmp_path / "other" / "out"), Shard(1, 2), str(place))
    one = next(stores.glob("pixels-*.store"))
    for target, sources in (
        (one, [str(place)]),
        (stores, [str(one), str(place)]),
        (tmp_path / "new.store", [str(place)]),
        (stores, [str(one)]),
    ):
        with pytest.raises(
            StoreError, match=f"{target}: parts, .*, are merged alone and into the folder of the stores"
        ):
            maintenance.merge(target, sources)
    assert not (tmp_path / "new.store").exists()
    assert not list(stores.glob("snapshot-*"))


def test_when_an_engine_pays_is_where_both_take_as_long() -> None:
    assert "from about 2,000 images" in pays(10.0, 0.010, 2)  # 2,000 x 10 ms = 10 s + 2,000 x 10 ms / 2
    assert pays(10.0, 0.010, 1) == "one worker is no quicker than a run without an engine"


def _kill_one_at_work(killed: list[int], stop: threading.Event) -> None:
    """End the first of Ray's workers that is seen at work, as the system does when memory runs out."""
    while not killed and not stop.is_set():
        for process in Path("/proc").iterdir():
            if process.name.isdecimal() and _title(process).startswith(b"ray::Worker.embed"):
                os.kill(int(process.name), signal.SIGKILL)
                killed.append(int(process.name))
                break


def _title(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes() if process.stat().st_uid == os.getuid() else b""
    except OSError:
        return b""


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc to find a worker")
def test_workers_on_ray_give_what_one_process_does_though_one_is_killed(
    config: Config, alone: dict[str, dict[bytes, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    photo = next(Path(config.dataset.path).glob("leaf/*.png"))
    (photo.parent / "broken.png").write_bytes(photo.read_bytes()[:300])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=100 << 20,
    )
    killed: list[int] = []
    stop = threading.Event()
    hunter = threading.Thread(target=_kill_one_at_work, args=(killed, stop))
    hunter.start()
    try:
        done = extract.run(config, engine=Engine("ray", workers=2))
    finally:
        stop.set()
        hunter.join()
        ray.shutdown()
    assert len(killed) == 1
    assert stores(config) == alone
    assert done.work is not None
    assert done.work.images == 36
    assert [one.path for one in done.work.failures] == ["leaf/broken.png"]
    assert [one.path for one in read_failures(Artifacts(config.output).dataset)] == ["leaf/broken.png"]
    assert any(line.startswith("engine: 2 workers of 1 core, ready after ") for line in done.summary_lines())
    assert not Artifacts(config.output).parts.exists()


def test_heads_tuned_by_workers_are_those_of_one_process(
    experiment: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distributed = pytest.importorskip("distributed")
    output = tmp_path / "output"
    shutil.copytree(Path(experiment.output).parent / "features", tmp_path / "features")
    shutil.copytree(
        experiment.output, output, ignore=shutil.ignore_patterns("heads", "trials", "leaderboard*", "report*")
    )
    config = experiment.model_copy(update={"output": str(output)})
    with (
        distributed.Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None),
        joblib.parallel_config(backend="dask"),
    ):
        found = train_heads.run(config)
        again = train_heads.run(config)
    expected = read_leaderboard(Path(experiment.output))
    assert [(row.key, row.cv_scores, row.params, row.test) for row in found.leaderboard.rows] == [
        (row.key, row.cv_scores, row.params, row.test) for row in expected.rows
    ]
    assert "tuning on the workers: 100%" in capsys.readouterr().err
    assert (found.reused, again.reused) == (0, len(expected.rows))
    assert not (output / "mapped").exists()


WORKERS: set[str] = set()


def fit_noting_the_worker(pipeline: Pipeline, X: np.ndarray, y: np.ndarray) -> Pipeline:
    """Fit as a user's own head may, and note which worker does; without one this is the process itself."""
    import distributed

    try:
        WORKERS.add(distributed.get_worker().address)
    except ValueError:
        WORKERS.add("here")
    return pipeline.fit(X, y)


def test_folds_of_one_head_are_fitted_by_several_workers_as_by_one_process(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    random = np.random.default_rng(0)
    y = np.arange(120) % 3
    np.save(tmp_path / "X.npy", (random.normal(size=(120, 8)) + np.eye(3, 8)[y]).astype(np.float32))
    X = np.load(tmp_path / "X.npy", mmap_mode="r")
    head, folds = replace(HEADS["knn"], fit=fit_noting_the_worker), make_folds(y, 4, 0)

    def tuned(name: str) -> TuningRun:
        WORKERS.clear()
        return tune(head, X, y, folds, TuningConfig(trials=6), 0, tmp_path / name)

    alone = tuned("alone.jsonl")
    assert {"here"} == WORKERS
    with (
        distributed.Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None),
        joblib.parallel_config(backend="dask"),
    ):
        spread = tuned("spread.jsonl")
    assert len(WORKERS - {"here"}) == 2
    assert [(trial.params, trial.fold_scores, trial.status) for trial in spread.trials] == [
        (trial.params, trial.fold_scores, trial.status) for trial in alone.trials
    ]
    assert np.array_equal(spread.out_of_fold.scores, alone.out_of_fold.scores)
    assert pickle.dumps(spread.pipeline) == pickle.dumps(alone.pipeline)


def test_workers_of_one_machine_map_one_file(experiment: Config, tmp_path: Path) -> None:
    asked = train_heads.ask(experiment)
    embedding = asked.embeddings[0]
    first, second = (SharedFeatures(embedding, tmp_path) for _ in range(2))
    assert isinstance(first.train, np.memmap)
    assert np.array_equal(first.train, SharedFeatures(embedding).train)
    assert np.array_equal(first.test, SharedFeatures(embedding).test)
    assert second.train.filename == first.train.filename
    assert len(list(tmp_path.iterdir())) == 2
