"""Train a small network from nothing on labelled images and write it as a weights file; it makes the bundled weights.

    python configs/pretraining/pretrain.py configs/pretraining/bundled.yaml data=tiny_imagenet_32.tar.xz

The images are of one size and lie in train/CLASS/ and val/CLASS/, in a folder or a tar archive; a classes.tsv beside them may
give the classes readable names. All of them are decoded once and kept in memory. A run that was stopped goes on from its last
evaluation; `weights.safetensors` in the output folder can be used after each.
"""

from __future__ import annotations

import json
import math
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import ConstantLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline import config, images
from pipeline.embed.weights import build
from pipeline.finetuning.batches import Data, LabelledImages, rows_at, to_float
from pipeline.finetuning.result import write_weights
from pipeline.finetuning.trainer import copy_weights, evaluate
from pipeline.io.digests import bytes_digest, fingerprint

CPU = torch.device("cpu")
MAX_PIXELS = 1_000_000


@dataclass(frozen=True)
class Recipe:
    """The recipe's file: what is made of which images, and how; bundled.yaml explains the keys."""

    output: str
    data: str
    name: str
    architecture: str
    arguments: dict[str, Any]
    preprocessing: dict[str, Any]
    steps: int
    batch_size: int
    accumulate: int
    rate: float
    momentum: float
    weight_decay: float
    warmup: int
    cooldown: int
    label_smoothing: float
    smallest_crop: float
    ema: float
    evaluate_every: int
    sizes: list[list[int]]
    precision: str
    seed: int = 0


@dataclass(frozen=True)
class Source:
    """Labelled images with the names of their classes and the digest of them all."""

    data: Data
    classes: tuple[str, ...]
    digest: str


def read_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a recipe with `key=value` from the command line put over it."""
    raw = config.read_yaml(path)
    raw.update({key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in overrides)})
    return Recipe(**raw)


def read_images(recipe: Recipe) -> Source:
    """Decode train/CLASS/ and val/CLASS/ into memory; the classes are in the order of their folders."""
    rows: dict[str, list[tuple[str, np.ndarray]]] = {"train": [], "val": []}
    names: dict[str, str] = {}
    digests = []
    for name, content in sorted_files(Path(recipe.data)):
        parts = PurePosixPath(name).parts
        if parts[-1] == "classes.tsv":
            names = dict(line.split("\t", 1) for line in content.decode("utf-8").splitlines() if "\t" in line)
        elif len(parts) > 2 and parts[-3] in rows:
            rows[parts[-3]].append((parts[-2], np.asarray(images.decode(content, max_pixels=MAX_PIXELS))))
            digests.append(bytes_digest(content))
    codes = sorted({label for label, _ in rows["train"]})
    if not codes or not rows["val"]:
        sys.exit(f"{recipe.data}: expected images in train/CLASS/ and val/CLASS/")
    train, validation = (
        LabelledImages(np.stack([pixels for _, pixels in part]), np.array([codes.index(label) for label, _ in part]))
        for part in rows.values()
    )
    prepared = recipe.preprocessing
    data = Data(train, validation, len(codes), tuple(prepared["mean"]), tuple(prepared["std"]))
    return Source(data, tuple(names.get(code, code) for code in codes), fingerprint(digests))


def sorted_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file of a folder or a tar archive, in the order of the names."""
    if path.is_dir():
        for file in sorted(found for found in path.rglob("*") if found.is_file()):
            yield file.relative_to(path).as_posix(), file.read_bytes()
        return
    with tarfile.open(path) as archive:
        contents = {
            member.name: opened.read() for member in archive if (opened := archive.extractfile(member)) is not None
        }
    for name in sorted(contents):
        yield name, contents[name]


def optimizer_of(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum; norms and biases do not decay."""
    parts = [[p for p in network.parameters() if (p.ndim > 1) == decays] for decays in (True, False)]
    groups = [{"params": parts[0], "weight_decay": recipe.weight_decay}, {"params": parts[1], "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=recipe.rate, momentum=recipe.momentum, nesterov=True)


def schedule_of(optimizer: torch.optim.Optimizer, recipe: Recipe) -> LRScheduler:
    """A trapezoid: the rate rises linearly, stays, and falls linearly to zero."""
    flat = recipe.steps - recipe.warmup - recipe.cooldown
    parts = [
        LinearLR(optimizer, 1 / (recipe.warmup + 1), total_iters=recipe.warmup),
        ConstantLR(optimizer, 1.0, total_iters=flat),
        LinearLR(optimizer, 1.0, 0.0, total_iters=recipe.cooldown),
    ]
    return SequentialLR(optimizer, parts, milestones=[recipe.warmup, recipe.warmup + flat])


def crop_and_flip(images: Tensor, size: int, smallest: float) -> Tensor:
    """Cut a random rectangle out of each image, flip half of them, and bring all to `size` pixels.

    The random resized crop of Szegedy et al. 2014 with area in [smallest, 1] and ratio in [3/4, 4/3], each image its own,
    in one call for the whole batch instead of one per image.
    """
    count = len(images)
    area = torch.empty(count).uniform_(smallest, 1.0)
    ratio = torch.exp(torch.empty(count).uniform_(-1.0, 1.0) * math.log(4 / 3))
    width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0] = width * (torch.randint(0, 2, (count,)).float() * 2 - 1)
    transform[:, 0, 2] = torch.empty(count).uniform_(-1.0, 1.0) * (1.0 - width)
    transform[:, 1, 1] = height
    transform[:, 1, 2] = torch.empty(count).uniform_(-1.0, 1.0) * (1.0 - height)
    grid = functional.affine_grid(transform, [count, 3, size, size], align_corners=False).to(images.device)
    return functional.grid_sample(images, grid, align_corners=False, padding_mode="reflection")


def gradients(network: nn.Module, data: Data, recipe: Recipe, step: int) -> float:
    """Put the gradient of one step into the network and return its loss; everything random comes from (seed, step)."""
    torch.manual_seed(int(np.random.SeedSequence([recipe.seed, step]).generate_state(1)[0]))
    size = next(pixels for start, pixels in reversed(recipe.sizes) if step >= start)
    count = recipe.batch_size * recipe.accumulate
    network.train().zero_grad(set_to_none=True)
    total = 0.0
    for part in np.split(rows_at(step * count, count, len(data.train), recipe.seed), recipe.accumulate):
        pixels = to_float(torch.from_numpy(data.train.pixels[part]), data.mean, data.std)
        batch = crop_and_flip(pixels, size, recipe.smallest_crop).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            logits = network(batch).float()
        target = torch.from_numpy(data.train.y[part])
        loss = functional.cross_entropy(logits, target, label_smoothing=recipe.label_smoothing) / recipe.accumulate
        loss.backward()
        total += loss.item()
    return total


def train(recipe: Recipe, source: Source) -> dict[str, Any]:
    """Train, write the better of the weights and their average after each evaluation, and return the last record."""
    data, folder = source.data, Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    network = build(recipe.architecture, {**recipe.arguments, "num_classes": data.width})
    network.to(memory_format=torch.channels_last)
    optimizer = optimizer_of(network, recipe)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule_of(optimizer, recipe), "average": average}
    key = fingerprint([{**asdict(recipe), "output": "", "data": ""}, source.digest])
    checkpoint = folder / "checkpoint.pt"
    history: list[dict[str, Any]] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["key"] != key:
            sys.exit(f"{checkpoint}: belongs to another recipe or other images; delete it or give another output")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        history = saved["history"]
    start = time.perf_counter()
    for step in trange(history[-1]["steps"] if history else 0, recipe.steps):
        loss = gradients(network, data, recipe, step)
        optimizer.step()
        parts["schedule"].step()
        average.update_parameters(network)
        if (step + 1) % recipe.evaluate_every and step + 1 < recipe.steps:
            continue
        scores = {
            name: evaluate(made, data.validation, data, CPU, recipe.precision)
            for name, made in (("weights", network), ("ema", average.module))
        }
        best = max(scores, key=lambda name: scores[name])
        record = {"steps": step + 1, "loss": loss, "averaging": best, "seconds": round(time.perf_counter() - start)}
        history.append({**record, "validation_accuracy": scores[best][0], "validation_loss": -scores[best][1]})
        write(folder, network if best == "weights" else average.module, recipe, source, history)
        torch.save(
            {"key": key, "history": history, **{name: part.state_dict() for name, part in parts.items()}}, checkpoint
        )
    return history[-1]


def write(folder: Path, network: nn.Module, recipe: Recipe, source: Source, history: list[dict[str, Any]]) -> None:
    """Write the weights in half precision, and beside them their description and the log as files to read."""
    apart = {"output", "data", "name", "architecture", "arguments", "preprocessing", "seed"}
    counts = {"train": len(source.data.train), "validation": len(source.data.validation)}
    weights = {
        name: weight.half() if weight.is_floating_point() else weight for name, weight in copy_weights(network).items()
    }
    description = write_weights(
        folder / "weights.safetensors",
        weights,
        name=recipe.name,
        architecture=recipe.architecture,
        arguments=recipe.arguments,
        preprocessing=recipe.preprocessing,
        classes=source.classes,
        source={"images": counts, "pixels": source.data.train.pixels.shape[1], "digest": source.digest},
        training={key: value for key, value in asdict(recipe).items() if key not in apart},
        seed=recipe.seed,
        outcome=history[-1],
    )
    (folder / "weights.json").write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in history), "utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    asked = read_recipe(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.write(json.dumps(train(asked, read_images(asked))) + "\n")
