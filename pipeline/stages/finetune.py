"""Stage three: fine-tune the best backbone end to end from the best linear head; the result is a new weights file.

Reads the results of stages one and two, and the images. The training images are divided again: one part is trained on,
the other chooses weights. Test images are used only at the end, for a paired comparison with stage two.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config, PreprocessingConfig
from pipeline.data import lineage
from pipeline.errors import PipelineError
from pipeline.experiment import FINETUNING, Artifacts, read_document, write_document
from pipeline.finetuning.handover import make_task, open_network, starting_layer
from pipeline.finetuning.material import Choice, Parts, choose, divide, read_pixels
from pipeline.finetuning.plan import describe_plan
from pipeline.finetuning.result import judge, lines, return_path, write_weights
from pipeline.finetuning.trainer import copy_weights, keep_below, predict_logits, train
from pipeline.io.digests import digests_to_hex, file_digest, fingerprint
from pipeline.io.files import make_folder, remove
from pipeline.stages import advise
from pipeline.store import FeatureStore

__all__ = ["FinetuneRun", "run"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneRun:
    """The result of stage three: `result` is result.json, `weights` the weights file, `network` its name in a config."""

    result: Mapping[str, Any]
    weights: Path
    network: str
    reused: bool

    def summary_lines(self) -> list[str]:
        """Return the verdict, its evidence, and the next step."""
        said = [*lines(self.result), f"weights    {self.weights} ({self.result['bytes'] / 1e6:.1f} MB)"]
        if self.result["alpha"]:
            backbone = json.dumps({"name": self.network, "weights": str(self.weights)}, ensure_ascii=False)
            said.append(f"next step  put {backbone} under backbones: and run features and heads")
        return ["finished before and kept", *said] if self.reused else said


def run(config: Config) -> FinetuneRun | None:
    """Fine-tune a backbone of the leaderboard and judge whether it was worth it; None if `unfreeze: auto` follows advice against it.

    A finished run is kept; an interrupted one continues from its last checkpoint.
    PipelineError if stages one and two have not been run, the target, embedding or head cannot be fine-tuned, or the plan is invalid.
    """
    if config.finetune.unfreeze == "auto":
        advice = advise.run(config)
        if advice.scope is None:
            return None
        plan = config.finetune.model_copy(update={"unfreeze": ((0.0, advice.scope),)})
        config = config.model_copy(update={"finetune": plan})
    files = Artifacts(config.output)
    choice = choose(config, files)
    store = FeatureStore.open(files.find_store(choice.record.store), choice.record.fingerprint)
    parent = lineage.of(choice.record.section, choice.record.spec.trained_on)
    parts = divide(config, files, store, parent)
    key = _key(config, choice, store, parts)
    folder = files.finetuned / f"{choice.record.name}-{key[:8]}"
    weights = folder / f"finetuned-{key[:8]}.safetensors"
    name = choice.record.section.name if choice.record.section else ""
    finished = _finished(folder, key, weights)
    if finished is not None:
        return FinetuneRun(finished, weights, name, reused=True)
    network = open_network(config, choice, store, parts)
    layer, start = starting_layer(config, choice, store, parts)
    log.info("%s, starting from %s", choice.record.name, start)
    make_folder(folder)
    task, data = make_task(config, choice, network, layer, parts, folder)
    log.info("training on %s in %s", task.device, task.precision)
    for stage in task.stages:
        log.info("  %-7s %s", stage.name, ", ".join(stage.modules))
    for line in describe_plan(task.plan, task.stages, task.network, task.steps):
        log.info("%s", line)
    handed_over, data = copy_weights(task.network), keep_below(task, data)
    trained = train(task, data, folder, key)
    path = return_path(task, data, handed_over, trained.weights, trained.score)
    write_weights(
        weights,
        path.weights,
        name=network.name,
        architecture=network.architecture,
        arguments=network.arguments,
        preprocessing={key: getattr(network.preprocessing, key) for key in PreprocessingConfig.model_fields},
        classes=parts.target.classes,
        lineage=parent.joined(parts.train.digests, parts.validation.digests),
        parent={"embedding": choice.record.name, "weights_digest": network.weights_digest},
        training=config.finetune.model_dump(mode="json"),
        seed=config.seed,
        license=network.license,
    )
    pixels = read_pixels(config, parts.test, network.preprocessing, folder / "test.npy")
    said = predict_logits(task.network, pixels, data.mean, data.std, task.device).argmax(1).numpy()
    minutes = trained.seconds / 60
    result = {
        "key": key,
        "start": start,
        "bytes": weights.stat().st_size,
        "weights_digest": file_digest(weights),
        "steps": trained.step,
        "minutes": minutes,
        "rate": config.finetune.rate,
        "precision": task.precision,
        "alpha": path.alpha,
        "curve": [[alpha, *score] for alpha, score in zip(path.alphas, path.scores, strict=True)],
        "validation": {"start": path.scores[0][0], "end": path.scores[-1][0], "chosen": max(path.scores)[0]},
        **judge(files, choice, parts, said, minutes, config.seed),
    }
    write_document(folder / "result.json", FINETUNING, result)
    for scratch in ("train.npy", "validation.npy", "test.npy"):
        remove(folder / scratch)
    return FinetuneRun(result, weights, name, reused=False)


def _key(config: Config, choice: Choice, store: FeatureStore, parts: Parts) -> str:
    """Return a fingerprint of everything that determines the result."""
    linear = choice.linear
    divided = (parts.train, parts.validation, parts.test)
    parameters = [] if linear is None else sorted((key, str(value)) for key, value in linear.params.items())
    return fingerprint(
        {
            "version": FINETUNING.version,
            "embedding": choice.record.fingerprint,
            "store": store.digest,
            "images": [[digests_to_hex(part.digests), part.labels.tolist()] for part in divided],
            "head": None if linear is None else [linear.head, parameters, choice.balanced],
            "compared": [choice.winner.key, choice.frozen.key if choice.frozen else None],
            "finetune": config.finetune.model_dump(mode="json", exclude={"watch"}),
            "device": config.extraction.device,
            "precision": config.extraction.precision,
            "seed": config.seed,
        }
    )


def _finished(folder: Path, key: str, weights: Path) -> dict[str, Any] | None:
    """Return the result of an earlier run with the same key, if its weights are intact."""
    try:
        found = read_document(folder / "result.json", FINETUNING)
        return found if found["key"] == key and found["weights_digest"] == file_digest(weights) else None
    except (PipelineError, OSError, KeyError):
        return None
