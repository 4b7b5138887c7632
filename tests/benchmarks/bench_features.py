"""How fast stage one embeds photos, beside the script people write and the limits of this machine.

    python tests/benchmarks/bench_features.py [FOLDER] [--images 256] [--model resnet18] [--repeats 3] [--output results.json]

FOLDER has photos anywhere below it; without it they are drawn. Every repeat runs all ways one behind the other, so that a ratio is taken inside one
repeat; the table shows medians over repeats and their spread. `naive` is an image folder, a DataLoader with two workers,
eval, no_grad and fp32. `limit` is perfect sharing of the processors between decoding and the network: the two rates added
as times. Weights are random: speed does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline import backbone, extract_features
from pipeline import config as configuration
from pipeline.config import BackboneConfig, ExtractionConfig
from pipeline.feed import Feeder, Item
from pipeline.memory import keep_freed_memory
from pipeline.vision import torchvision

BATCH = 32


class Photos(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Files through torchvision's own transform, as the usual script has them."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        with Image.open(self.paths[row]) as image:
            return self.transform(image.convert("RGB"))


def naive(paths: list[Path], model: str) -> float:
    """Images/s of the script people write, without its imports and start."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(model).eval()
    transform = next(iter(torchvision.models.get_model_weights(model))).transforms()
    loader = torch.utils.data.DataLoader(Photos(paths, transform), batch_size=BATCH, num_workers=2)
    began = time.perf_counter()
    with torch.no_grad():
        for batch in loader:
            network(batch)
    return len(paths) / (time.perf_counter() - began)


def ours(folder: Path, paths: list[Path], model: str, precision: str) -> float:
    """Images/s of stage one from files to a sealed store, without its start."""
    with tempfile.TemporaryDirectory() as output:
        raw: dict[str, Any] = {
            "output": output,
            "dataset": {"source": "folder", "path": str(folder)},
            "backbones": [{"name": model}],
            "baselines": [],
            "extraction": {"precision": precision},
            "heads": ["nearest_centroid"],
        }
        work = extract_features.run(configuration.parse(raw, "benchmark")).work
    assert work is not None
    assert work.images == len(paths)
    return work.images / work.loop_seconds


def decode_only(paths: list[Path], embedder: backbone.Backbone) -> float:
    """Images/s of reading, decoding and preparing on all processors."""
    items = [Item(row, str(path), None, (0,)) for row, path in enumerate(paths)]
    feeder = Feeder(Path("/"), 10**9, (embedder.preprocessing,), BATCH, os.cpu_count() or 1)
    began = time.perf_counter()
    for _ in feeder.batches(items):
        pass
    return len(paths) / (time.perf_counter() - began)


def network_only(images: int, embedder: backbone.Backbone) -> float:
    """Images/s of the network on pixels that are ready."""
    pixels = np.zeros((BATCH, *embedder.preprocessing.size, 3), np.uint8)
    embedder.embed(pixels)
    batches = max(1, images // BATCH)
    began = time.perf_counter()
    for _ in range(batches):
        embedder.embed(pixels)
    return batches * BATCH / (time.perf_counter() - began)


def measure(folder: Path, paths: list[Path], model: str) -> dict[str, float]:
    """One repeat of every way, in images/s."""
    section = BackboneConfig(name=model)
    embedders = {
        name: backbone.load(section, ExtractionConfig.model_validate({"precision": name}), 0)
        for name in ("auto", "fp32")
    }
    rates = {
        "naive": naive(paths, model),
        "ours": ours(folder, paths, model, "auto"),
        "ours fp32": ours(folder, paths, model, "fp32"),
        "decode only": decode_only(paths, embedders["auto"]),
        "network only": network_only(len(paths), embedders["auto"]),
        "network only fp32": network_only(len(paths), embedders["fp32"]),
    }
    rates["limit"] = 1 / (1 / rates["decode only"] + 1 / rates["network only"])
    return rates


def draw_photos(folder: Path, count: int) -> Path:
    """Write JPEGs of 400 x 533 pixels and about the size of a photo's: smooth shapes with some noise."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 9, 3), dtype=np.uint8)).resize(
            (400, 533), Image.Resampling.BICUBIC
        )
        pixels = np.clip(np.asarray(coarse) + rng.normal(0, 6, (533, 400, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.jpg", quality=80)
    return folder


def main() -> None:
    """Measure, print a Markdown table, and write JSON where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?", help="photos; without it, photo-sized images are drawn")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    photos = arguments.folder or draw_photos(Path(tempfile.mkdtemp()), arguments.images)
    found = sorted(path for path in photos.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    step = max(1, len(found) // arguments.images)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        paths = []
        for row, path in enumerate(found[::step][: arguments.images]):
            target = folder / "ab"[row % 2] / f"{row:06d}{path.suffix}"
            target.parent.mkdir(exist_ok=True)
            paths.append(Path(shutil.copy(path, target)))
        keep_freed_memory()  # for all ways alike: ours would switch it on for those after it anyway
        repeats = [measure(folder, paths, arguments.model) for _ in range(arguments.repeats)]
    print(f"{arguments.model}, {len(paths)} photos, {os.cpu_count()} processors, {arguments.repeats} repeats\n")
    print("| way | images/s | lowest - highest | times naive | of the limit |\n|---|---|---|---|---|")
    for way in repeats[0]:
        rates = [repeat[way] for repeat in repeats]
        over, share = (
            statistics.median(repeat[way] / repeat[base] for repeat in repeats) for base in ("naive", "limit")
        )
        print(
            f"| {way} | {statistics.median(rates):.1f} | {min(rates):.1f} - {max(rates):.1f} | {over:.2f} | {share:.2f} |"
        )
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"model": arguments.model, "images": len(paths), "repeats": repeats}, indent=2)
        )


if __name__ == "__main__":
    main()
