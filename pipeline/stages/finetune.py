"""Stage three: the best backbone trained end to end from the best linear head; its result is one more weights file.

Reads what stages one and two wrote, and the images. The training images are divided once more: one part is learned from,
the other chooses weights. Test images are used at the very end, for one paired comparison with stage two.

    material.py    which embedding, head and images
    start.py       the network with stage two's head as its last layer
    judgement.py   the comparison and the verdict
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Config, PreprocessingConfig
from pipeline.data.lineage import Lineage
from pipeline.embed.weights import Network
from pipeline.errors import PipelineError
from pipeline.experiment import FINETUNING, Artifacts, read_document, write_document
from pipeline.finetuning import Run, copy_weights, describe, predict_logits, return_path, train, write_weights
from pipeline.finetuning.judgement import judge, lines, progress_report
from pipeline.finetuning.material import Choice, Parts, choose, divide, lineage_of, read_pixels
from pipeline.finetuning.start import make_task, open_network, starting_layer
from pipeline.io.digests import digests_to_hex, file_digest, fingerprint
from pipeline.io.files import make_folder, remove
from pipeline.store import FeatureStore

__all__ = ["FinetuneRun", "run"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneRun:
    """What stage three wrote: `result` is result.json, `weights` the weights file, `network` what a config calls it."""

    result: Mapping[str, Any]
    weights: Path
    network: str
    reused: bool

    def summary_lines(self) -> list[str]:
        """The verdict, what it rests on, and how to go on with the weights."""
        backbone = {"name": self.network, "weights": str(self.weights)}
        return [
            *(["finished before and kept"] if self.reused else []),
            *lines(self.result),
            f"weights    {self.weights} ({self.result['bytes'] / 1e6:.1f} MB)",
            *(
                [
                    f"to go on   put {json.dumps(backbone, ensure_ascii=False)} under backbones: and run features and heads"
                ]
                if self.result["alpha"]
                else []
            ),
        ]


def run(config: Config) -> FinetuneRun:
    """Fine-tune a backbone of the leaderboard and say whether it was worth it.

    A finished run is kept; a stopped one goes on from its last checkpoint.

    Raises
    ------
    PipelineError
        When stages one and two have not been run, the embedding or head cannot be fine-tuned, or the plan is wrong.
    """
    files = Artifacts(config.output)
    choice = choose(config, files)
    store = FeatureStore.open(files.find_store(choice.record.store), choice.record.fingerprint)
    parent = lineage_of(choice.record)
    parts = divide(config, files, store, parent)
    lineage = parent.joined(parts.train.digests, parts.validation.digests)
    key = _key(config, choice, store, parts)
    folder = files.finetuned / f"{choice.record.name}-{key[:8]}"
    weights = folder / f"finetuned-{key[:8]}.safetensors"
    name = choice.record.section.name if choice.record.section else ""
    finished = _finished(folder, key, weights)
    if finished is not None:
        return FinetuneRun(finished, weights, name, reused=True)
    network = open_network(config, choice, store, parts)
    layer, start = starting_layer(config, files, choice, store, parts)
    log.info("%s, starting from %s", choice.record.name, start)
    make_folder(folder)
    task, data = make_task(config, network, layer, parts, folder)
    handed_over = copy_weights(task.network)
    trained = train(task, data, Run(folder, key))
    path = return_path(task, data, handed_over, trained.weights)
    write_weights(weights, path.weights, _description(config, network, choice, parts, lineage), lineage)
    pixels = read_pixels(config, parts.test, network.preprocessing, folder / "test.npy")
    predicted = predict_logits(task.network, pixels, data.mean, data.std, task.device).argmax(1).numpy()
    done = progress_report(task, trained, path)
    result = {
        "key": key,
        "start": start,
        "bytes": weights.stat().st_size,
        "weights_digest": file_digest(weights),
        **done,
        **judge(files, choice, parts, predicted.astype(np.int64), done["minutes"], config.seed),
    }
    write_document(folder / "result.json", FINETUNING, result)
    for scratch in ("train.npy", "validation.npy", "test.npy"):
        remove(folder / scratch)
    return FinetuneRun(result, weights, name, reused=False)


def _key(config: Config, choice: Choice, store: FeatureStore, parts: Parts) -> str:
    """Name everything that determines the result."""
    linear = choice.linear
    return fingerprint(
        {
            "version": FINETUNING.version,
            "embedding": choice.record.fingerprint,
            "store": store.digest,
            "images": [
                [digests_to_hex(part.digests), part.labels.tolist()]
                for part in (parts.train, parts.validation, parts.test)
            ],
            "head": None
            if linear is None
            else [linear.head, sorted((key, str(value)) for key, value in linear.params.items())],
            "compared": [choice.winner.key, choice.frozen.key if choice.frozen else None],
            "finetune": config.finetune.model_dump(mode="json"),
            "device": config.extraction.device,
            "precision": config.extraction.precision,
            "seed": config.seed,
        }
    )


def _finished(folder: Path, key: str, weights: Path) -> dict[str, Any] | None:
    """The result of an earlier run that answered the same question and whose weights are there and whole."""
    try:
        found = read_document(folder / "result.json", FINETUNING)
    except PipelineError:
        return None
    if found.get("key") != key or not weights.is_file():
        return None
    return found if found.get("weights_digest", digest := file_digest(weights)) == digest else None


def _description(config: Config, network: Network, choice: Choice, parts: Parts, lineage: Lineage) -> dict[str, Any]:
    """What the weights file says of itself: how to build the network, and where the weights come from."""
    prepared = network.preprocessing
    return describe(
        name=network.name,
        architecture=network.architecture,
        arguments=network.arguments,
        preprocessing={key: getattr(prepared, key) for key in PreprocessingConfig.model_fields},
        classes=parts.classes,
        lineage=lineage,
        parent={"embedding": choice.record.name, "weights_digest": network.weights_digest},
        training=config.finetune.model_dump(mode="json"),
        seed=config.seed,
        license=network.license,
    )
