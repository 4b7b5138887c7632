"""A fuzz over every file of a finished experiment: one bit, one character or one line is changed, and every reader asked.

What a reader answers must be what it answered before, or the change must be told: by an error of ours, a warning, or
`verify --full`. Anything else is a wrong result in silence.
"""

from __future__ import annotations

import logging
import shutil
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import pipeline
from pipeline.config import Config
from pipeline.data import DatasetIndex
from pipeline.embed import records as embedders
from pipeline.errors import PipelineError
from pipeline.evaluation.leaderboard import read_leaderboard, read_predictions, read_trials, recommend
from pipeline.experiment import FINETUNING, Artifacts, plain, read_document
from pipeline.export import bundle as bundles
from pipeline.io.digests import bytes_digest, digests_to_hex
from pipeline.io.files import refusal
from pipeline.stages import extract as extract_features
from pipeline.stages import maintenance
from pipeline.stages.train_heads import make_task
from pipeline.store import FeatureStore

FOR_PEOPLE = ("config.yaml", "leaderboard.md", "report.html", "MODEL_CARD.md", "LOCK")
"""Names of files that no command reads for a result, or that the user hands over as his own."""


def changes(data: bytes, count: int, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yield so many changed contents of a file, each with what was done."""
    text = all(byte in TEXT for byte in data[:4096])
    kinds = ("bit", "character", "line") if text else ("bit",)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        if kind == "line":
            lines = data.splitlines(keepends=True)
            cut = int(rng.integers(len(lines)))
            yield f"line {cut + 1} cut", b"".join(lines[:cut] + lines[cut + 1 :])
            continue
        place = int(rng.integers(len(data)))
        other = data[place] ^ (1 << int(rng.integers(8)))
        if kind == "character":
            other = ord(rng.choice([char for char in string.printable[:90] if ord(char) != data[place]]))
        yield f"{kind} at {place}", data[:place] + bytes([other]) + data[place + 1 :]


TEXT = {*range(32, 256), 9, 10, 13}


def answers(config: Config) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every reader of an experiment: its name, and a call whose answer can be compared."""
    files = Artifacts(config.output)
    yield "heads", lambda: _heads(config, files)
    yield "load", lambda: [bytes_digest(np.asarray(part).tobytes()) for part in _loaded(files)]
    yield "gc", lambda: _kept(config)
    yield "leaderboard", lambda: read_leaderboard(files.root).to_json()
    yield "recommend", lambda: recommend(read_leaderboard(files.root), files.root).to_json()
    yield "trials", lambda: read_trials(read_leaderboard(files.root), files.root)
    yield "predictions", lambda: _predictions(files)
    yield "bundles", lambda: _labels(files)
    yield "features", lambda: _plan(config)
    yield "status", lambda: maintenance.status(config)
    for path in sorted(files.finetuned.glob("*/*")):
        if path.name == "result.json":
            yield "finetune", lambda path=path: read_document(path, FINETUNING)
        if path.suffix == ".safetensors":
            yield "weights", lambda path=path: _weights(path)


def _kept(config: Config) -> list[str]:
    """What `gc` would keep."""
    here = maintenance.Experiment.open(config)
    embedders.require_index(here.files.features, here.index.fingerprint())
    return sorted(digests_to_hex(here.index.digests))


def _heads(config: Config, files: Artifacts) -> Any:
    records = embedders.read_asked_records(files.features, config)
    index = DatasetIndex.read(files.dataset)
    embedders.require_index(files.features, index.fingerprint())
    stores = [FeatureStore.open(files.find_store(record.store), record.fingerprint) for record in records]
    task = make_task(config, files, index, stores)
    vectors = [bytes_digest(store.read(task.train.digests).tobytes()) for store in stores]
    return task.key, [plain(record) for record in records], vectors, str(task.train.root)


def _loaded(files: Artifacts) -> Iterator[Any]:
    X, y, paths, _ = pipeline.load(files.root, embedding="pixels")
    yield from (X, y.astype(str), paths.astype(str))


def _predictions(files: Artifacts) -> dict[str, str]:
    found = read_predictions(read_leaderboard(files.root), files.root)
    return {key: bytes_digest(value.to_bytes()) for key, value in found.items()}


def _labels(files: Artifacts) -> dict[str, Any]:
    found = {}
    for path in sorted(files.root.glob("heads/*/*")):
        bundle = bundles.load(path)
        X = np.random.default_rng(0).normal(size=(5, bundle.estimator.n_features_in_)).astype(np.float32)
        labels, probabilities = bundle.predict(X)
        found[str(path)] = labels.tolist(), None if probabilities is None else probabilities.tolist(), bundle.embedding
    return found


def _plan(config: Config) -> Any:
    run = extract_features.run(config, plan=True)
    for warning in run.scan.warnings:  # shown in the summary
        logging.getLogger("pipeline").warning(warning)
    return run.pending, run.scan.index.fingerprint(), run.scan.difference


def _weights(path: Path) -> Any:
    from pipeline.embed.published import tensors_digest
    from pipeline.embed.weights import read_weights

    state, description = read_weights(path)
    return tensors_digest(state), description


class _Told(logging.Handler):
    """Counts warnings of the package."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


@dataclass
class Found:
    """Per file how many changes were refused, warned of, found by `verify --full` alone, or changed nothing; and what is wrong."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def changes(self) -> int:
        """How many changes were tried."""
        return sum(counter.total() for counter in self.counts.values())

    def lines(self) -> list[str]:
        """A table for people."""
        names = ("refused", "warned", "verified", "same")
        rows = [
            f"{path:<72} " + " ".join(f"{counter[name]:>8}" for name in names) for path, counter in self.counts.items()
        ]
        return [
            f"{'file':<72} " + " ".join(f"{name:>8}" for name in names),
            *rows,
            f"{self.changes} changes",
            *self.wrong,
        ]


def fuzz(
    config: Config, scratch: Path, per_file: int, seed: int, only: Callable[[str], bool] = lambda name: True
) -> Found:
    """Change every file of an experiment so many times, each time alone, and ask every reader."""
    rng = np.random.default_rng(seed)
    copy = scratch / "copy"
    shutil.copytree(config.output, copy / "output")
    shutil.copytree(Artifacts(config.output).stores, copy / "features")
    here = config.model_copy(update={"output": str(copy / "output")})
    before = {name: ask() for name, ask in answers(here)}
    found = Found()
    for path in sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size):
        name = path.relative_to(copy).as_posix()
        if path.name in FOR_PEOPLE or path.suffix == ".png" or not only(name):
            continue
        data, mode = path.read_bytes(), path.stat().st_mode
        path.chmod(0o644)
        counter = found.counts.setdefault(name, Counter())
        for what, changed in changes(data, per_file, rng):
            path.write_bytes(changed)
            counter[_outcome(here, before, found, f"{name}: {what}")] += 1
        path.write_bytes(data)
        path.chmod(mode)
    return found


def _outcome(config: Config, before: dict[str, Any], found: Found, what: str) -> str:
    told, handler = "same", _Told()
    logger = logging.getLogger("pipeline")
    logger.addHandler(handler)
    silent = []
    try:
        for name, ask in answers(config):
            warned = handler.count
            try:
                differs = ask() != before[name]
            except (PipelineError, OSError) as error:
                text = refusal(error) if isinstance(error, OSError) else str(error)
                if text is None or "Traceback" in text:
                    found.wrong.append(f"{what}: {name}: {type(error).__name__}: {error}")
                told = "refused"
            except Exception as error:  # a traceback
                found.wrong.append(f"{what}: {name}: traceback: {type(error).__name__}: {error}")
            else:
                if handler.count > warned:
                    told = "warned" if told == "same" else told
                elif differs:
                    silent.append(name)
        if told == "same" or silent:
            verified = _verify(config, found, what)
            if silent:
                found.wrong.append(f"{what}: {', '.join(silent)} answer otherwise, in silence")
            told = "verified" if verified and told == "same" else told
    finally:
        logger.removeHandler(handler)
    return told


def _verify(config: Config, found: Found, what: str) -> bool:
    """Whether `verify --full` finds something."""
    try:
        ok, _ = maintenance.verify_files(config)
        return not (ok and all(check.ok for check in maintenance.verify(config, full=True)))
    except PipelineError:
        return True
    except Exception as error:  # a traceback
        found.wrong.append(f"{what}: verify: traceback: {type(error).__name__}: {error}")
        return False
