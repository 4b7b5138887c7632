"""Engines: which one computes, and that OpenVINO gives torch's vectors, each image's its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from photos import make_photos, small_config

from pipeline.config import BackboneConfig, ExtractionConfig, PreprocessingConfig
from pipeline.embed import backbone, engines
from pipeline.embed.engines import BATCH, PAYS_FROM, choice_inputs, choose_engine
from pipeline.embed.records import open_record, read_records
from pipeline.errors import BackboneError
from pipeline.experiment import Artifacts
from pipeline.stages import extract as extract_features
from pipeline.store import FeatureStore, differences

SMALL = PreprocessingConfig(resize=40, crop=32)


def choose(asked: str = "auto", device: str = "cpu", precision: str = "bf16", **rest: object) -> tuple[str, str]:
    return choose_engine(asked, device, precision, **{"images": 10**6, "layer_norms": False, "installed": True, **rest})  # type: ignore[arg-type]


def load(engine: str, name: str = "resnet18", precision: str = "fp32", **section: object) -> backbone.Backbone:
    pytest.importorskip("openvino")
    section.setdefault("preprocessing", SMALL)
    extraction = ExtractionConfig.model_validate({"device": "cpu", "precision": precision, "engine": engine})
    return backbone.load(BackboneConfig(name=name, **section), extraction, seed=0)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (BATCH + 3, 32, 32, 3), dtype=np.uint8)


def test_auto_goes_by_what_the_machine_the_network_and_the_data_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.platform, "machine", lambda: "x86_64")
    assert choose() == ("openvino", "faster than torch for convolutional networks")
    assert choose(images=PAYS_FROM) == choose()
    assert choose(images=PAYS_FROM - 1) == ("torch", "fewer than 1,000 images do not pay for the start of OpenVINO")
    assert choose(layer_norms=True) == ("torch", "faster than OpenVINO for networks with layer norms")
    assert choose(installed=False) == ("torch", "OpenVINO: it is not installed; pip install 'manyheads[openvino]'")
    assert choose(device="cuda") == ("torch", "OpenVINO: it computes on the processor and the device is cuda")
    assert choose(precision="fp16")[0] == "torch"
    monkeypatch.setattr(engines.platform, "machine", lambda: "arm64")
    assert choose() == ("torch", "OpenVINO was not measured on this kind of processor")


def test_what_is_asked_for_is_given_or_refused_with_every_reason() -> None:
    assert choose("torch") == ("torch", "asked for")
    assert choose("openvino", layer_norms=True, images=1) == ("openvino", "asked for")
    with pytest.raises(BackboneError) as caught:
        choose("openvino", device="cuda", precision="fp16", installed=False)
    assert str(caught.value).splitlines() == [
        "extraction.engine is openvino, but it cannot be used",
        "  it is not installed; pip install 'manyheads[openvino]'",
        "  it computes on the processor and the device is cuda",
        "  it has no fp16; set extraction.precision to fp32 or bf16",
    ]


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("resnet18", {"layers": ("layer1", "penultimate"), "pooling": ("max", "grid")}),
        ("mobilenet_v3_small", {}),
        ("efficientnet_lite0", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)) or "default",
)
def test_openvino_gives_torchs_vectors(name: str, section: dict[str, object], pixels: np.ndarray) -> None:
    mine, theirs = load("openvino", name, **section), load("torch", name, **section)
    for found, expected in zip(mine.embed(pixels), theirs.embed(pixels), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert differences(theirs.specs[0].identity(), mine.specs[0].identity()) == [
        "engine: the store has 'torch', this run has 'openvino'"
    ]
    if name == "mobilenet_v3_small":  # and a vector does not depend on the batch it was in
        (together,) = mine.embed(pixels)
        alone = np.concatenate([mine.embed(image[None])[0] for image in pixels])
        np.testing.assert_array_equal(alone, together)
        np.testing.assert_array_equal(mine.embed(pixels[::-1])[0], together[::-1])
        assert np.abs(together[0] - together[1]).max() > 1e-2 * np.abs(together).max()


def test_bf16_is_rounding_away_from_fp32(pixels: np.ndarray) -> None:
    if not choice_inputs()["bf16"]:
        pytest.skip("the processor has no bf16 of its own")
    (coarse,), (exact,) = (load("openvino", precision=precision).embed(pixels) for precision in ("bf16", "fp32"))
    cosine = (coarse * exact).sum(1) / np.linalg.norm(coarse, axis=1) / np.linalg.norm(exact, axis=1)
    assert 0.999 < cosine.min() < 1 - 1e-8


def test_a_network_that_openvino_cannot_take_runs_by_torch_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no such operation\n  details")

    pytest.importorskip("openvino")

    monkeypatch.setattr(backbone, "compile_openvino", refuse)
    monkeypatch.setattr(engines.platform, "machine", lambda: "x86_64")
    section = BackboneConfig(name="squeezenet1_1", preprocessing=SMALL)
    extraction = ExtractionConfig(device="cpu", precision="fp32")
    assert backbone.load(section, extraction, 0, images=10**6).specs[0].engine == "torch"
    with pytest.raises(BackboneError, match=r"OpenVINO cannot run squeezenet1_1 \(no such operation\); set extraction"):
        load("openvino", "squeezenet1_1")


def test_a_choice_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="pipeline")
    section = BackboneConfig(name="squeezenet1_1", preprocessing=SMALL)
    backbone.load(section, ExtractionConfig(device="cpu", precision="fp32", engine="torch"), 0)
    backbone.load(section, ExtractionConfig(device="cpu", precision="fp32"), 0, images=1)
    name = "squeezenet1_1-random-penultimate on cpu in fp32: asked for; by torch"
    assert caplog.messages[0] == f"{name}: asked for"
    assert caplog.messages[1].startswith(f"{name}: ")


def test_half_an_openvino_is_told_and_torch_computes_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One whose package fails when it is imported."""
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "__init__.py").write_text("raise ImportError('libopenvino.so.2026: cannot open\\nmore')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(engines.platform, "machine", lambda: "x86_64")
    caplog.set_level("INFO", logger="pipeline")
    section = BackboneConfig(name="squeezenet1_1", preprocessing=SMALL)
    made = backbone.load(section, ExtractionConfig(device="cpu", precision="fp32"), 0, images=10**6)
    reason = "it is installed and cannot be imported: libopenvino.so.2026: cannot open"
    assert made.specs[0].engine == "torch"
    assert f"by torch: OpenVINO cannot run squeezenet1_1 ({reason})" in caplog.text
    with pytest.raises(BackboneError) as caught:
        backbone.load(section, ExtractionConfig(device="cpu", precision="fp32", engine="openvino"), 0)
    assert str(caught.value) == f"OpenVINO cannot run squeezenet1_1 ({reason}); set extraction.engine: torch"


def test_an_engine_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    real = engines.compile_openvino

    def wrong(vectors: engines.TorchForward, *rest: object) -> engines.Forward:
        return real(lambda pixels: tuple(vector.roll(1, dims=1) for vector in vectors(pixels)), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(backbone, "compile_openvino", wrong)
    with pytest.raises(BackboneError, match="the vectors of the probe images differ from torch's"):
        load("openvino", "squeezenet1_1")


def test_an_engine_is_chosen_once_and_its_store_is_read_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(engines.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(engines, "PAYS_FROM", 20)
    all_photos = make_photos(tmp_path / "all", per_class=15)
    config = small_config(tmp_path / "photos", tmp_path / "out")
    small = (BackboneConfig(name="squeezenet1_1", preprocessing=SMALL),)
    extraction = ExtractionConfig(device="cpu", precision="fp32")
    config = config.model_copy(update={"extraction": extraction, "backbones": small})
    files = Artifacts(config.output)

    def photos_of(per_class: int) -> None:
        shutil.rmtree(tmp_path / "photos", ignore_errors=True)
        shutil.copytree(
            all_photos,
            tmp_path / "photos",
            ignore=lambda _, names: [
                name for name in names if name >= f"{per_class:02d}.png" and name.endswith(".png")
            ],
        )

    def embedded(per_class: int) -> tuple[str, int]:
        """The engine and the number of new vectors with so many photos."""
        photos_of(per_class)
        work = extract_features.run(config).work
        record = read_records(files.features)[0]
        return record.spec.engine, 0 if work is None else work.vectors[record.name]

    assert embedded(4) == ("torch", 12)
    assert embedded(15) == ("torch", 33), "more images than the choice was made for do not make all features anew"
    shutil.rmtree(config.output)
    assert embedded(15) == ("openvino", 45)
    assert embedded(5) == ("openvino", 0), "nor do images that are gone"
    assert embedded(12) == ("openvino", 0)
    record = read_records(files.features)[0]

    # Where OpenVINO is missing, the same network computes with torch, to the same vectors but for rounding.
    embedder, output = open_record(record, "cpu")
    (expected,) = embedder.embed(np.full((1, 32, 32, 3), 99, np.uint8))
    monkeypatch.setattr(engines, "openvino_is_installed", lambda: False)
    other, output = open_record(record, "cpu")
    assert other.specs[output] == replace(record.spec, engine="torch")
    (found,) = other.embed(np.full((1, 32, 32, 3), 99, np.uint8))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert FeatureStore.open(files.find_store(record.store), record.fingerprint).rows == 45


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="there is one processor to be on"
)
def test_a_network_with_a_part_of_the_processors_may_be_on_any(pixels: np.ndarray) -> None:
    """Two processes with a thread each would otherwise both compute on the first processor."""
    pytest.importorskip("openvino")
    own = os.sched_getaffinity(0)
    run = engines.compile_openvino(lambda images: (images.float().mean((1, 2)),), (32, 32), "fp32", 1)
    caller, seen, ended = threading.get_native_id(), set(), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            seen.add(frozenset(os.sched_getaffinity(caller)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(200):
        run(pixels)
    ended.set()
    watcher.join()
    assert seen == {frozenset(own)}


def test_a_signal_is_heard_after_networks_have_come_and_gone() -> None:
    """OpenVINO gives the main thread a stack for signals; it must not outlive the memory."""
    pytest.importorskip("openvino")
    code = """
import gc, os, signal
from pipeline.embed.engines import compile_openvino
live = [compile_openvino(lambda pixels: (pixels.float().mean((1, 2)),), (8, 8), "fp32", 1) for _ in range(2)]
while live:
    del live[0]
    gc.collect()
signal.signal(signal.SIGINT, lambda *_: print("heard"))
os.kill(os.getpid(), signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "heard\n")
