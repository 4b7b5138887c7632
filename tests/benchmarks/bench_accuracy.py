"""What stage one's faster ways cost in accuracy: the same head on the same folds, with features made each way.

    python tests/benchmarks/bench_accuracy.py FOLDER [--networks bundled resnet18 resnet50] [--ways ...]

FOLDER is a folder of class folders, or of train/, validation/ and test/ with them. The features of fp32, torch and
`decode: exact` are what torchvision's own transform and network give; every other way is compared with them: the change of
out-of-fold accuracy over all images in points with its paired bootstrap 95 % interval, how many pixels of the prepared
images differ and by how much, and how many images keep their nearest neighbour. The head is a ridge classifier on
standardised features, its penalty chosen on the exact features. Without FOLDER there is nothing to measure.
`bundled` looks at 3 x 3 places of 64 pixels; torchvision's networks have random weights here, which amplify differences.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import pipeline
from pipeline import config
from pipeline.evaluation import ACCURACY, Predictions, paired_answers
from pipeline.images import Preprocessing, decode, prepare
from pipeline.stages import extract as extract_features

OUTPUT = Path("build/benchmarks/accuracy.json")
EXACT = {"device": "cpu", "precision": "fp32", "engine": "torch", "decode": "exact"}
WAYS: Mapping[str, Mapping[str, str]] = {
    "fp32, torch, exact": EXACT,
    "fp32, torch, standard": {**EXACT, "decode": "standard"},
    "fp32, torch, fast": {**EXACT, "decode": "fast"},
    "fp32, OpenVINO, exact": {**EXACT, "engine": "openvino"},
    "bf16, torch, exact": {**EXACT, "precision": "bf16"},
    "bf16, OpenVINO, standard": {**EXACT, "precision": "bf16", "engine": "openvino", "decode": "standard"},
    "bf16, OpenVINO, fast": {**EXACT, "precision": "bf16", "engine": "openvino", "decode": "fast"},
}
GPU_WAYS: Mapping[str, Mapping[str, str]] = {
    f"{precision} on a GPU, {mode}": {"device": "cuda", "precision": precision, "decode": mode}
    for precision, mode in (("fp32", "exact"), ("bf16", "standard"))
}
"""Only where torch sees one; these have never been run."""
NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "bundled": {
        "weights": "bundled",
        "layers": ["trunk_output"],
        "pooling": "grid",
        "preprocessing": {"resize": 64, "crop": 64, "mean": [0.4806, 0.4486, 0.3983], "std": [0.2521, 0.2448, 0.2590]},
    }
}
PENALTIES = (1e2, 1e3, 1e4)


def features(folder: Path, network: str, way: Mapping[str, str]) -> tuple[NDArray[np.float32], NDArray[np.object_]]:
    """Embed the folder one way."""
    with tempfile.TemporaryDirectory() as output:
        raw: dict[str, Any] = {
            "output": str(Path(output) / "out"),  # whose stores are beside it
            "dataset": {"source": "folder", "path": str(folder)},
            "backbones": [{"name": network, **NETWORKS.get(network, {})}],
            "baselines": [],
            "extraction": dict(way),
            "heads": ["nearest_centroid"],
        }
        extract_features.run(config.parse(raw, "benchmark"))
        found = pipeline.load(raw["output"])
        return np.asarray(found.X), found.y


def out_of_fold(X: NDArray[np.float32], y: NDArray[np.object_], penalty: float) -> NDArray[np.bool_]:
    """Whether each image is right when it is not learned from."""
    head = make_pipeline(StandardScaler(), RidgeClassifier(alpha=penalty))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    right: NDArray[np.bool_] = cross_val_predict(head, X, y, cv=folds) == y
    return right


def neighbours(X: NDArray[np.float32]) -> NDArray[np.intp]:
    """The nearest other image of each, by cosine."""
    unit = X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12)
    similar = unit @ unit.T
    np.fill_diagonal(similar, -np.inf)
    nearest: NDArray[np.intp] = similar.argmax(axis=1)
    return nearest


def pixels(folder: Path, network: str) -> dict[str, tuple[float, int]]:
    """Of prepared images, the share of values that differ from the exact ones and the largest difference, per mode."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})[::10]
    asked = NETWORKS.get(network, {}).get("preprocessing", {"resize": 256, "crop": 224})
    modes = {mode: Preprocessing(asked["resize"], asked["crop"], decode=mode) for mode in ("exact", "standard", "fast")}
    differ = dict.fromkeys(("standard", "fast"), 0.0)
    largest = dict.fromkeys(differ, 0)
    for path in found:
        data = path.read_bytes()
        made = {
            mode: prepare(decode(data, max_pixels=10**9, at_least=way.at_least), way).astype(int)
            for mode, way in modes.items()
        }
        for mode in differ:
            distance = np.abs(made[mode] - made["exact"])
            differ[mode] += float((distance > 0).mean()) / len(found)
            largest[mode] = max(largest[mode], int(distance.max()))
    return {mode: (differ[mode], largest[mode]) for mode in differ}


def main() -> None:
    """Measure, print Markdown, and keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--networks", nargs="+", default=["bundled", "resnet18", "resnet50"])
    there = {**WAYS, **(GPU_WAYS if torch.cuda.is_available() else {})}
    parser.add_argument("--ways", nargs="+", default=list(there), choices=list(there), help="the first is always run")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if arguments.folder is None:
        print("bench_accuracy.py needs a folder of labelled photos; left out")
        return
    results: dict[str, Any] = {}
    lines = []
    for network in arguments.networks:
        made = {
            name: features(arguments.folder, network, way)
            for name, way in there.items()
            if way is EXACT or name in arguments.ways
        }
        X, y = made["fp32, torch, exact"]
        penalty = max(PENALTIES, key=lambda alpha: out_of_fold(X, y, alpha).mean())
        exact, nearest = out_of_fold(X, y, penalty), neighbours(X)
        lines += [
            f"## {network}, {len(y):,} images, ridge with alpha = {penalty:g}: {exact.mean():.1%}",
            "",
            "| way | accuracy | change in points [95 % interval] | nearest neighbour kept |",
            "|---|---:|---:|---:|",
        ]
        for name, (other, _) in made.items():
            right = out_of_fold(other, y, penalty)
            answers = (Predictions(np.ones(len(y), int), correct.astype(int)) for correct in (right, exact))
            test = paired_answers(ACCURACY, *answers, seed=0)
            kept = float((neighbours(other) == nearest).mean())
            low, high = (100 * end for end in test.interval)
            results[f"{network}: {name}"] = {"accuracy": float(right.mean()), "change": test.difference, "kept": kept}
            lines.append(
                f"| {name} | {right.mean():.2%} | {100 * test.difference:+.2f} [{low:+.2f}, {high:+.2f}] | {kept:.1%} |"
            )
        for mode, (share, most) in pixels(arguments.folder, network).items():
            results[f"{network}: pixels, {mode}"] = {"differ": share, "most": most}
            lines.append(
                f"\nPixels of `decode: {mode}`: {share:.2%} of the values differ from the exact ones, by at most {most}."
            )
        lines.append("")
    print("\n".join(lines))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2), encoding="utf-8")
    arguments.output.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
