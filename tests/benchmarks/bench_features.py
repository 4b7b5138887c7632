"""How fast stage one embeds photos, beside the script people write and the limits of this machine.

    python tests/benchmarks/bench_features.py [FOLDER] [--images 1000] [--models efficientnet_lite0 resnet18 resnet50 ...] [--repeats 3] [--whole] [--scaling]

FOLDER has photos anywhere below it; without it they are drawn. Every way runs in a process of its own, as a user would run
it, the ways in turn in every repeat, so that a ratio is taken inside one repeat; the table shows medians over repeats and
their spread. Rates are without imports and start-up; `--whole` also times the whole process from its start on all the
photos, and `--scaling` shows seconds and memory against the number of images.

`naive` is an image folder, a DataLoader with two workers, eval, no_grad and fp32, on a quarter of the photos. `limit` is
perfect sharing of all processors between decoding and the network: their two rates, each measured alone on all processors
with images that are ready, added as times; on a GPU, which shares nothing with decoding, the lower rate. Memory is that of the whole process tree, shared pages counted once.
Weights are random: speed does not depend on their values.

Where torch sees a GPU, the networks run there, and a second table has the network alone at several batch sizes. Where the package thingsvision can be imported, it is another way, on the same photos with the same random weights' architecture.
Neither has ever been run: this file was written without a GPU, and thingsvision cannot be installed beside the versions of
torch and numpy that this project needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from drawn_photos import copy_photos, draw_photos

BATCH = 32
OUTPUT = Path("build/benchmarks")
NAIVE_SHARE = 4
"""The naive ways get one photo in so many: one takes as long as all others together."""

VIT = "timm:vit_small_patch16_224.augreg_in21k"
TIMMS = {"efficientnet_lite0": "tf_efficientnet_lite0"}
"""What timm calls a network of this package."""

MODELS = ["efficientnet_lite0", "resnet18", "resnet50", *([VIT] if importlib.util.find_spec("timm") else [])]

NAIVE = ("naive", "thingsvision")
GPU_BATCHES = (32, 64, 128, 256, 512, 1024)


# ---- the ways, each in a process of its own


def naive(folder: Path, model: str) -> float:
    """Images/s of the script people write: for torchvision's models with torchvision, for all others with timm."""
    import torch

    from pipeline.io.vision import torchvision

    if model in torchvision.models.list_models():
        transform = next(iter(torchvision.models.get_model_weights(model))).transforms()
        network = torchvision.models.get_model(model)
        network.fc = torch.nn.Identity()
    else:
        import timm

        network = timm.create_model(TIMMS.get(model, model.removeprefix("timm:")), num_classes=0)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    photos = torchvision.datasets.ImageFolder(str(folder), transform)
    network.eval()
    loader = torch.utils.data.DataLoader(photos, batch_size=BATCH, num_workers=2)
    found = []
    began = time.perf_counter()
    with torch.no_grad():
        for images, _ in loader:
            found.append(network(images))
    features = torch.cat(found).numpy()
    np.save(folder.parent / "naive.npy", features)
    return len(photos) / (time.perf_counter() - began)


def thingsvision(folder: Path, model: str) -> float:
    """Images/s of the package thingsvision, as its README uses it; never run."""
    import torch
    from thingsvision import get_extractor
    from thingsvision.utils.data import DataLoader, ImageDataset

    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = get_extractor(model_name=model, source="torchvision", device=device, pretrained=False)
    backend = extractor.get_backend()
    with tempfile.TemporaryDirectory() as output:
        photos = ImageDataset(
            root=str(folder), out_path=output, backend=backend, transforms=extractor.get_transformations()
        )
        batches = DataLoader(dataset=photos, batch_size=BATCH, backend=backend)
        began = time.perf_counter()
        features = extractor.extract_features(batches=batches, module_name="avgpool", flatten_acts=True)
        np.save(folder.parent / "thingsvision.npy", features)
        return len(features) / (time.perf_counter() - began)


def ours(folder: Path, model: str, **extraction: Any) -> float:
    """Images/s of stage one from files to a finished store."""
    from pipeline import config
    from pipeline.stages import extract as extract_features

    with tempfile.TemporaryDirectory() as output:
        raw: dict[str, Any] = {
            "output": str(Path(output) / "out"),  # whose stores are beside it
            "dataset": {"source": "folder", "path": str(folder)},
            "backbones": [{"name": model, "weights": "random"}],
            "baselines": [],
            "extraction": extraction,
            "heads": ["nearest_centroid"],
        }
        run = extract_features.run(config.parse(raw, "benchmark"))
    assert run.work is not None
    print("\n".join(run.summary_lines()), file=sys.stderr)
    return run.work.images / run.work.loop_seconds


def decode_only(folder: Path, model: str) -> float:
    """Images/s of reading, decoding and preparing, on all processors."""
    from pipeline.embed.loader import Item, Loader

    preprocessing = _load(model, "fp32").preprocessing
    items = [Item(row, str(path), None, (0,)) for row, path in enumerate(sorted(folder.rglob("*.*")))]
    loader = Loader(Path("/"), 10**9, (preprocessing,), BATCH, os.cpu_count() or 1)
    for _ in loader.batches(items[:BATCH]):
        pass
    began = time.perf_counter()
    for _ in loader.batches(items):
        pass
    return len(items) / (time.perf_counter() - began)


def network_only(
    folder: Path, model: str, precision: str, batch_size: int | str = "auto", engine: str = "auto"
) -> float:
    """Images/s of the network, by the engine of a long run or the one that is named, on pixels that are ready."""
    from pipeline.embed.engines import choose_batch_size
    from pipeline.io.process import keep_freed_memory

    keep_freed_memory()
    embedder = _load(model, precision, batch_size, engine)
    images = choose_batch_size(batch_size, str(embedder.device))
    size = (images, *embedder.preprocessing.size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    for _ in range(3):
        embedder.embed(pixels)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < 4:
        embedder.embed(pixels)
        done += images
    return done / (time.perf_counter() - began)


def _load(model: str, precision: str, batch_size: int | str = "auto", engine: str = "auto") -> Any:
    from pipeline.config import BackboneConfig, ExtractionConfig
    from pipeline.embed import backbone

    extraction = ExtractionConfig.model_validate({"precision": precision, "batch_size": batch_size, "engine": engine})
    return backbone.load(BackboneConfig(name=model, weights="random"), extraction, 0, images=10**6)


WAYS: Mapping[str, Callable[[Path, str], float]] = {
    "naive": naive,
    **({"thingsvision": thingsvision} if importlib.util.find_spec("thingsvision") else {}),
    "ours": ours,
    "ours, fp32": lambda folder, model: ours(folder, model, precision="fp32"),
    "ours, fp32 and exact": lambda folder, model: ours(folder, model, precision="fp32", decode="exact"),
    "ours, by torch": lambda folder, model: ours(folder, model, engine="torch"),
    "decoding only": decode_only,
    "network only": lambda folder, model: network_only(folder, model, "auto"),
    "network only, fp32": lambda folder, model: network_only(folder, model, "fp32"),
    **{
        f"network only, {precision} by {engine}": partial(network_only, precision=precision, engine=engine)
        for precision in ("fp32", "bf16")
        for engine in ("torch", *(["openvino"] if importlib.util.find_spec("openvino") else []))
    },
}

GPU_WAYS: Mapping[str, Callable[[Path, str], float]] = {
    **{
        f"network only, batches of {size}": partial(network_only, precision="auto", batch_size=size)
        for size in GPU_BATCHES
    },
}


# ---- measuring them


def run(way: str, folder: Path, model: str) -> dict[str, float]:
    """Run a way in a new process: its images/s, the seconds of the whole process, and the most memory of its tree in MB."""
    began = time.perf_counter()
    command = [sys.executable, __file__, str(folder), "--models", model, "--way", way]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    most = [0.0]
    watcher = threading.Thread(target=_watch, args=(process, most))
    watcher.start()
    out, log = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{way}: {log}")
    rate = json.loads(out.splitlines()[-1])
    print(f"  {model}, {way}: {rate:.1f} images/s, {most[0]:,.0f} MB", file=sys.stderr)
    return {"rate": rate, "seconds": time.perf_counter() - began, "memory": most[0]}


def _watch(process: subprocess.Popen[str], most: list[float]) -> None:
    while process.poll() is None:
        most[0] = max(most[0], sum(map(_proportional_memory, _tree(process.pid))) / 1024)
        time.sleep(0.3)  # looking holds up the process that is looked at


def _tree(root: int) -> list[int]:
    found = [root]
    for pid in found:
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def _proportional_memory(pid: int) -> int:
    """A process's memory in kB, pages shared by n processes counted as 1/n."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def compare(
    folders: Mapping[int, Path], count: int, model: str, repeats: int, *, gpu: bool
) -> list[dict[str, dict[str, float]]]:
    """Every way in turn, so many times."""
    results = []
    for _ in range(repeats):
        found = {way: run(way, folders[count // NAIVE_SHARE if way in NAIVE else count], model) for way in WAYS}
        for suffix in ("", ", fp32"):
            decode, network = (found[way]["rate"] for way in ("decoding only", "network only" + suffix))
            found["limit" + suffix] = {"rate": min(decode, network) if gpu else 1 / (1 / decode + 1 / network)}
        results.append(found)
    return results


def table(model: str, count: int, repeats: Sequence[Mapping[str, Mapping[str, float]]]) -> list[str]:
    """The rates as Markdown."""
    lines = [
        f"## {model}, {count:,} photos, {os.cpu_count()} processors, {len(repeats)} repeats",
        "",
        "| way | images/s | lowest to highest | times naive | of its limit | memory, MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for way in repeats[0]:
        rates = [repeat[way]["rate"] for repeat in repeats]
        base = "limit, fp32" if "fp32" in way else "limit"
        over, share = (
            statistics.median(repeat[way]["rate"] / repeat[other]["rate"] for repeat in repeats)
            for other in ("naive", base)
        )
        memory = max((repeat[way].get("memory", 0) for repeat in repeats), default=0)
        lines.append(
            f"| {way} | {statistics.median(rates):.1f} | {min(rates):.1f} to {max(rates):.1f} | {over:.2f} | {share:.2f} | "
            f"{f'{memory:,.0f}' if memory else ''} |"
        )
    if "thingsvision" not in repeats[0]:
        lines.append("| thingsvision | not installed | | | | |")
    return [*lines, ""]


def devices() -> tuple[list[str], list[str]]:
    """The names of the GPUs that torch sees, and lines that say so."""
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return names, [f"GPUs: {', '.join(names) or 'none'}; torch {torch.__version__}", ""]


def gpu_table(model: str, repeats: Sequence[Mapping[str, Mapping[str, float]]]) -> list[str]:
    """The network alone at several batch sizes, as Markdown."""
    lines = [f"## {model}, on a GPU", "", "| way | images/s | lowest to highest |", "|---|---:|---:|"]
    for way in GPU_WAYS:
        rates = [repeat[way]["rate"] for repeat in repeats]
        lines.append(f"| {way} | {statistics.median(rates):.1f} | {min(rates):.1f} to {max(rates):.1f} |")
    return [*lines, ""]


def whole_table(model: str, count: int, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Whole processes as Markdown."""
    lines = [
        f"## {model}, the whole process on {count:,} photos",
        "",
        "| way | seconds | naive over it | memory, MB |",
        "|---|---:|---:|---:|",
    ]
    base = found["naive"]["seconds"]
    lines += [
        f"| {way} | {row['seconds']:.1f} | {base / row['seconds']:.2f} | {row['memory']:,.0f} |"
        for way, row in found.items()
    ]
    return [*lines, ""]


def scaling_table(model: str, found: Mapping[int, Mapping[str, float]]) -> list[str]:
    """Images against seconds and memory, as Markdown."""
    lines = [
        f"## {model}, ours, more images",
        "",
        "| images | seconds at work | images/s | memory, MB |",
        "|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {count:,} | {count / row['rate']:.1f} | {row['rate']:.1f} | {row['memory']:,.0f} |"
        for count, row in found.items()
    ]
    return [*lines, ""]


def decode_table(photos: Sequence[Path], large: Path) -> list[str]:
    """One thread's milliseconds per photo for each `extraction.decode`, as Markdown."""
    import torch

    from pipeline.images import DECODE_MODES, Preprocessing, decode, prepare

    torch.set_num_threads(1)
    lines = ["## one thread, ms per photo", "", "| decode | these photos | 4,000 x 3,000 pixels |", "|---|---:|---:|"]
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(5):
        for mode in DECODE_MODES:
            way = Preprocessing(256, 224, decode=mode)
            for column, paths in enumerate((photos, [large])):
                data = [path.read_bytes() for path in paths]
                began = time.perf_counter()
                for each in data:
                    prepare(decode(each, max_pixels=10**9, at_least=way.at_least), way)
                seconds.setdefault((mode, column), []).append((time.perf_counter() - began) / len(data))
    for mode in DECODE_MODES:
        lines.append(
            f"| {mode} | "
            + " | ".join(f"{1000 * statistics.median(seconds[mode, column]):.1f}" for column in (0, 1))
            + " |"
        )
    return [*lines, ""]


def main() -> None:
    """Measure, print Markdown tables, and keep them and the figures behind them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="photos; without it, photo-sized images are drawn")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="time whole processes on all the photos as well")
    parser.add_argument("--scaling", action="store_true", help="500 to 4,000 images with the first model as well")
    parser.add_argument("--output", type=Path, default=OUTPUT / "features.json")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps({**WAYS, **GPU_WAYS}[arguments.way](arguments.folder, arguments.models[0])))
        return
    gpus, lines = devices()
    results: dict[str, Any] = {"images": arguments.images, "gpus": gpus, "models": {}}
    with tempfile.TemporaryDirectory() as place:
        photos = arguments.folder
        if photos is None:
            photos = draw_photos(Path(place, "drawn"), arguments.images)
        found = sorted(path for path in photos.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
        count = min(arguments.images, len(found))
        sizes = sorted(
            {count, count // NAIVE_SHARE, len(found), *(n for n in (500, 1000, 2000, 4000) if arguments.scaling)}
        )
        folders = {size: copy_photos(found, size, Path(place, str(size), "photos")) for size in sizes}
        for model in arguments.models:
            repeats = compare(folders, count, model, arguments.repeats, gpu=bool(gpus))
            results["models"][model] = {"repeats": repeats}
            lines += table(model, count, repeats)
            if gpus:
                alone = [{way: run(way, folders[count], model) for way in GPU_WAYS} for _ in range(arguments.repeats)]
                results["models"][model]["gpu"] = alone
                lines += gpu_table(model, alone)
            if arguments.whole:
                whole = {way: run(way, folders[len(found)], model) for way in ("naive", "ours")}
                results["models"][model]["whole"] = whole
                lines += whole_table(model, len(found), whole)
        if arguments.scaling:
            steps = [size for size in (500, 1000, 2000, 4000) if size <= len(found)] + [len(found)]
            grown = {size: run("ours", folders[size], arguments.models[0]) for size in sorted(set(steps))}
            results["scaling"] = grown
            lines += scaling_table(arguments.models[0], grown)
        lines += decode_table(
            found[:: max(1, len(found) // 150)], draw_photos(Path(place, "large"), 1, 4000, 3000) / "00000.jpg"
        )
    print("\n".join(lines))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2), encoding="utf-8")
    arguments.output.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
