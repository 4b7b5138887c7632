"""What fine-tuning brings on photos of clothes, and how fast its steps are beside a plain PyTorch script.

    python tests/benchmarks/bench_finetune.py CLOTHING [--work FOLDER] [--seeds 0 1 2] [--steps 125] [--only METHOD ...]
    python tests/benchmarks/bench_finetune.py CLOTHING --pilot
    python tests/benchmarks/bench_finetune.py CLOTHING --speed

CLOTHING is a folder with train/, validation/ and test/ of class folders; the network is EfficientNet-Lite0 with its ImageNet weights.
A method is one run of `finetune` for each seed, all of the same number of steps, compared with the frozen features on the same test
images. `--pilot` runs seed 0 with so many steps at several rates, of which validation images choose `CHOSEN`. What is finished
is kept and a stopped run goes on; the tables are printed anew from what there is.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.config import BackboneConfig, Config, FinetuneConfig
from pipeline.data import DatasetIndex
from pipeline.embed.weights import load_network
from pipeline.evaluation import ACCURACY, HeadPredictions, Predictions, paired_answers
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.experiment import Artifacts
from pipeline.finetuning.batches import Data, LabelledImages
from pipeline.finetuning.material import read_pixels
from pipeline.finetuning.plan import check_plan, stages_of
from pipeline.finetuning.trainer import TrainingTask, make_optimizer, predict_logits, prepare, train_step
from pipeline.stages import extract, finetune, settings, train_heads

NETWORK = BackboneConfig(name="efficientnet_lite0", weights="imagenet")
CPU = torch.device("cpu")
LONGER = "everything, 300 steps at 160 pixels"
METHODS: Mapping[str, tuple[str, ...]] = {
    "everything": ("finetune.unfreeze=[[0, all]]",),
    "last stage": ("finetune.unfreeze=[[0, last_stage]]",),
    "everything, from an untrained head": ("finetune.unfreeze=[[0, all]]", "finetune.start=random"),
    LONGER: ("finetune.unfreeze=[[0, all]]",),
}
TRIED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "everything": (("finetune.rate=2e-4",), ("finetune.rate=5e-4",)),
    "last stage": (("finetune.rate=1e-4",), ("finetune.rate=3e-4",)),
    "everything, from an untrained head": (("finetune.rate=5e-4",),),
}
CHOSEN: Mapping[str, tuple[str, ...]] = {
    **{name: tried[-1] for name, tried in TRIED.items()},
    LONGER: ("finetune.rate=5e-4", "finetune.size=160", "finetune.steps=300"),
}
"""By the validation images of a pilot with seed 0; with an untrained head the rate is that of a trained one."""


def config_of(photos: Path, work: Path, seed: int, steps: int, given: tuple[str, ...]) -> Config:
    """Return the config of one run."""
    common = (
        f"output={work}/{seed}",
        f"store={work}/features",
        f"seed={seed}",
        "backbones=[{name: efficientnet_lite0, weights: imagenet}]",
        "heads=[logistic_regression]",
        f"finetune.steps={steps}",
    )
    return settings.load(photos, [*common, *given])


def run(photos: Path, work: Path, seed: int, steps: int, given: tuple[str, ...]) -> dict[str, Any]:
    """Fine-tune once, or read what was found before: the result, what it said of the test images, and the seconds that it took."""
    config = config_of(photos, work, seed, steps, given)
    files = Artifacts(config.output, config.store)
    if not files.leaderboard.exists():
        extract.run(config)
        train_heads.run(config)
    clock, used = time.perf_counter(), processor_seconds()
    made = finetune.run(config)
    kept = made.weights.with_name("bench.json")
    if not made.reused:
        spent = {"wall": time.perf_counter() - clock, "processors": processor_seconds() - used}
        kept.write_text(json.dumps({**spent, "right": right(made.weights, files)}), encoding="utf-8")
    return {**made.result, **json.loads(kept.read_text(encoding="utf-8"))}


def right(weights: Path, files: Artifacts) -> list[int]:
    """Return for each test image, sorted by path, whether a fine-tuned network labels it right."""
    network = load_network(NETWORK.model_copy(update={"weights": str(weights)}), 0)
    prepared, test = network.preprocessing, DatasetIndex.read(files.dataset).select("test")
    images = read_pixels(settings.load(files.root), test, prepared)
    said = predict_logits(network.module, images, prepared.mean, prepared.std, CPU).argmax(1).numpy()
    classes = np.array(sorted(set(test.labels)), object)
    return (classes[said] == test.labels).astype(int)[np.argsort(test.paths)].tolist()


def frozen(files: Artifacts) -> list[int]:
    """Return the same of the head on the frozen features."""
    row = next(row for row in read_leaderboard(files.root).rows if not row.baseline)
    test = HeadPredictions.read(files.root / str(row.bundle) / FILE_NAME).test
    return test.correct.astype(int)[np.argsort(test.paths)].tolist()


def processor_seconds() -> float:
    """Return what this process has taken of all processors."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def table(found: Mapping[str, list[dict[str, Any]]], start: list[list[int]]) -> Iterator[str]:
    """Return the methods in Markdown: what each seed reached, and the gain over all seeds, an image's answers as one unit."""
    yield "| method | test, of each seed | mean | gain on the frozen features [95 % interval] | validation | minutes of the wall, and of processors |"
    yield "|---|---|--:|---|--:|--:|"
    each = ", ".join(f"{100 * np.mean(one):.1f}" for one in start)
    yield f"| frozen features | {each} | {100 * np.mean(start):.1f} | | | |"
    for name, results in found.items():
        each = ", ".join(f"{100 * one['test']:.1f}" for one in results)
        said = [one["right"] for one in results]
        chosen = 100 * np.mean([one["validation"]["chosen"] for one in results])
        spent = [np.mean([one[kind] for one in results]) / 60 for kind in ("wall", "processors")]
        yield f"| {name} | {each} | {100 * np.mean(said):.1f} | {gain(said, start)} | {chosen:.1f} | {spent[0]:.1f}, {spent[1]:.1f} |"
    yield ""
    for name, results in found.items():
        yield from (f"- {name}: {one['comparisons']['frozen']['verdict']}" for one in results)
    both = [found[name] for name in ("everything", "everything, from an untrained head") if found.get(name)]
    if len(both) == 2:
        yield f"- the handed-over head against an untrained one: {gain(*([one['right'] for one in each] for each in both))}"


def gain(a: list[list[int]], b: list[list[int]]) -> str:
    """Return what the first gain on the second over all seeds, the answers to one image as one unit."""
    units = np.tile(np.arange(len(a[0])), len(a))
    both = (Predictions(np.ones(units.size, int), np.ravel(one), units=units) for one in (a, b[: len(a)]))
    paired = paired_answers(ACCURACY, *both, seed=0)
    low, high = (100 * end for end in paired.interval)
    return f"{100 * paired.difference:+.1f} [{low:+.1f}, {high:+.1f}], p = {paired.p_value:.2g}"


# ---- speed, beside a script as it is usually written

SIZE, BATCH = 224, 32
WAYS = ("plain", "plain, channels last", "ours", "ours, 160 pixels", "ours, last stage")


def speed(clothing: Path, rounds: int) -> Iterator[str]:
    """Yield images per second of our steps and of a plain loop's, each in processes of its own, which take turns; and what takes our time."""
    taken: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    profile = ""
    for _ in range(rounds):
        for way in WAYS:
            command = [sys.executable, __file__, str(clothing), "--way", way]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            taken[way] += told["times"]
            profile = told["profile"] or profile
    yield "| a step of 32 images | images per second of a processor | seconds of processors | seconds |"
    yield "|---|--:|--:|--:|"
    for way, times in taken.items():
        wall, used = (min(one) for one in zip(*times, strict=True))
        yield f"| {way} | {BATCH / used:.1f} | {used:.2f} | {wall:.2f} |"
    yield f"\n```text\n{profile}\n```"


def timed(way: str, steps: int = 4) -> dict[str, Any]:
    """Return the seconds of the wall and of all processors that steps after the first took, and a profile of one of ours."""
    rng = np.random.default_rng(0)
    part = LabelledImages(rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8), rng.integers(0, 10, BATCH))
    step = ours(part, way) if way.startswith("ours") else plain(part.pixels, part.y, way.endswith("channels last"))
    times = []
    for number in range(steps):
        clock, used = time.perf_counter(), processor_seconds()
        step(number)
        times.append([time.perf_counter() - clock, processor_seconds() - used])
    if way != "ours":
        return {"times": times[1:], "profile": ""}
    with torch.profiler.profile() as profile:
        step(steps)
    table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=8, max_name_column_width=40)
    return {"times": times[1:], "profile": table}


def ours(part: LabelledImages, way: str) -> Callable[[int], object]:
    """Return a step of the trainer."""
    network = load_network(NETWORK, 0).module
    stages = stages_of(network, (SIZE, SIZE))
    scope = "last_stage" if way.endswith("last stage") else "all"
    given = FinetuneConfig(batch_size=BATCH, augment="none", size=160 if "160" in way else None)
    task = TrainingTask(network, stages, check_plan([(0.0, scope)], stages), given, 100, "fp32", 0, CPU)
    data = Data(part, part, 10, (0.5,) * 3, (0.25,) * 3)
    prepare(task, data)
    optimizer, scaler = make_optimizer(task), torch.amp.GradScaler("cpu", enabled=False)
    return lambda number: train_step(task, data, optimizer, scaler, number)


def plain(pixels: Any, y: Any, channels_last: bool) -> Callable[[int], object]:
    """Return a step as tutorials have it: the network, frozen norms in evaluation mode, AdamW."""
    network = load_network(NETWORK, 0).module
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network.to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4)

    def step(number: int) -> object:
        network.train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
        images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
        loss = nn.functional.cross_entropy(network(images.contiguous(memory_format=layout)), torch.from_numpy(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clothing", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/finetune"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=125)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--pilot", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        print(json.dumps(timed(asked.way)))
    elif asked.speed:
        print("\n".join(speed(asked.clothing, asked.rounds)))
    elif asked.pilot:
        for name in asked.only:
            for given in TRIED.get(name, ()):
                made = run(asked.clothing, asked.work, 0, asked.steps, (*METHODS[name], *given))
                chosen = max((score, -loss) for _, score, loss in made["curve"])
                spent = f"{made['minutes']:.1f} min of training, {made['wall'] / 60:.1f} in all, {made['processors'] / 60:.1f} of processors"
                print(
                    f"| {name} | {', '.join(given)} | {100 * chosen[0]:.1f}, loss {chosen[1]:.3f} | {spent} |",
                    flush=True,
                )
    else:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in asked.only}
        start = []
        for seed in asked.seeds:
            for name in asked.only:
                made = run(asked.clothing, asked.work, seed, asked.steps, (*METHODS[name], *CHOSEN[name]))
                found[name].append(made)
                print(seed, name, made["test"], made["validation"], made["alpha"], made["wall"], flush=True)
            start.append(frozen(Artifacts(asked.work / str(seed), asked.work / "features")))
        print("\n".join(table(found, start)))


if __name__ == "__main__":
    main()
