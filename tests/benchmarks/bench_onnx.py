"""Heads as ONNX files: how far they are from `predict`, how large they are, and how quick beside torch.

    python tests/benchmarks/bench_onnx.py FOLDER [--images 64] [--output build/benchmarks/onnx] [--set tuning.trials=8 ...]

FOLDER has a folder of photos for each kind of thing, maybe in train/ and test/ above. Its kinds are learned as classes; with what the
pixels say (bright, colourful) as several labels; how bright and colourful a photo is as two numbers; and kind and brightness as
two targets of one experiment, which are one file. Every head of every target is exported and proven on so many test images, the best on as many as usual.
Then the best head of each is timed from decoded images to answers, one image at a time: by the file, and as `predict` does.
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.experiment import Artifacts
from pipeline.export import bundle as bundles
from pipeline.images import decode, prepare
from pipeline.stages import export, extract, predict, settings, targets, train_heads

COMMON = """
backbones: [{name: efficientnet_lite0, weights: imagenet}]
baselines: [majority, pixels]
tuning: {trials: 1, folds: 2}
"""
TASKS = {
    "classes": "label_columns: kind",
    "labels": "label_columns: tags, target: multilabel",
    "numbers": "label_columns: [brightness, colour], target: regression",
    "columns": "label_columns: [kind, brightness], target: {brightness: regression}",
}
TIMED = 40


def make(source: Path, folder: Path) -> None:
    """Write the manifest of all photos."""
    lines = ["path,kind,tags,brightness,colour,split"]
    for path in sorted(path for path in source.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"}):
        image = Image.open(path)
        image.draft("RGB", (64, 64))
        pixels = np.asarray(image.convert("RGB").resize((16, 16)), dtype=float)
        bright, colour = pixels.mean(), pixels.std(axis=2).mean()
        tags = [path.parent.name, *["bright"] * int(bright > 160), *["colourful"] * int(colour > 15)]
        split = {"test": "test"}.get(path.parent.parent.name, "train")
        lines.append(
            f"{path.relative_to(source)},{path.parent.name},{'|'.join(tags)},{bright:.3f},{colour:.3f},{split}"
        )
    (folder / "photos.csv").write_text("\n".join([*lines, ""]), encoding="utf-8")


def experiment(task: str, arguments: argparse.Namespace) -> dict[str, Path]:
    """Run an experiment as users would; return the output folder of each target."""
    folder = arguments.output
    more = f"dataset: {{source: manifest, path: photos.csv, root: {arguments.folder.resolve()}, {TASKS[task]}}}\n"
    vote = "vote: true\n" if task == "classes" else ""
    (folder / f"{task}.yaml").write_text(f"output: {task}\n{more}{vote}{COMMON}", encoding="utf-8")
    config = settings.load(folder / f"{task}.yaml", arguments.set)
    extract.run(config)
    each = targets.experiments(config)
    for alone in each.values():
        train_heads.run(alone)
    return {name: Path(alone.output) for name, alone in each.items()}


def proven(folder: Path, row: str | None, file: Path) -> str:
    """Export a row and say how it went."""
    try:
        lines = export.run(folder, {"onnx": file}, row)
    except PipelineError as error:
        return f"refused: {error}"
    far = re.findall(r"at most (\S+) from .* pixels, (\S+) on .*?(; .*)?$", "\n".join(lines), re.MULTILINE)[0]
    return f"{far[0]:>8} {far[1]:>8} {file.stat().st_size / 1e6:8.1f} MB{far[2]}"


def speed(folder: Path, file: Path) -> str:
    """Time decoded images to answers, one at a time."""
    place = next(iter(predict.find_bundles(folder).values()))
    head = bundles.load(place)
    spec = {**head.embedding["spec"], "engine": "torch"}  # OpenVINO's batches are of 32, whatever is in them
    model = export.opened({"": replace(head, embedding={**head.embedding, "spec": spec})}, False)
    index = export.test_images(place)
    photos = [decode((index.root / path).read_bytes(), max_pixels=1 << 26) for path in index.paths[:TIMED]]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    torch.set_num_threads(1)
    session = onnxruntime.InferenceSession(str(file), options)
    ways = {embedder.preprocessing for embedder in model.networks.embedders}

    def by_torch(pixels: np.ndarray) -> None:
        model.said(model.networks, {way: prepare(pixels, way)[None] for way in ways})

    def by_onnx(pixels: np.ndarray) -> None:
        session.run(None, {"images": pixels[None]})

    seconds: dict[str, list[float]] = {"torch": [], "onnxruntime": []}
    for pixels in photos:
        for name, run in (("torch", by_torch), ("onnxruntime", by_onnx)):
            began = time.process_time()
            run(pixels)
            seconds[name].append(time.process_time() - began)
    return ", ".join(f"{name} {1 / median(times):.0f} images/s" for name, times in seconds.items())


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/onnx"))
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--tasks", default=",".join(TASKS))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    usual = export.MOST_IMAGES
    if not (arguments.output / "photos.csv").exists():
        make(arguments.folder, arguments.output)
    for task in arguments.tasks.split(","):
        each = experiment(task, arguments)
        export.MOST_IMAGES = arguments.images
        print(f"== {task}: largest difference from prepared pixels and from images, size", flush=True)
        for name, folder in each.items():
            for row in read_leaderboard(folder).rows:
                if not row.constant:
                    print(f"{name} {row.key:<75}", proven(folder, row.key, arguments.output / "row.onnx"), flush=True)
        export.MOST_IMAGES = usual
        whole, file = arguments.output / task, arguments.output / f"{task}.onnx"
        print(f"best{' of each' * (len(each) > 1)}: {proven(whole, None, file)}")
        if file.exists() and "" in Artifacts(whole).each_target():
            print(f"  {speed(whole, file)}, one image at a time, by processor time of one thread", flush=True)


if __name__ == "__main__":
    main()
