"""Several targets: with several label columns, each becomes its own experiment on the same vectors and split.

`features` writes the experiments' folders, `targets/NAME`, each with the index of its column; later stages treat such a folder, or the
config in it, like any other experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

from pipeline import report
from pipeline.config import Config, dump_yaml
from pipeline.data.failures import read_failures, write_failures
from pipeline.data.index import DatasetIndex, WrittenIndex
from pipeline.data.targets import Classification, kind_of
from pipeline.embed.records import EmbeddingRecord, write_records
from pipeline.errors import ConfigError
from pipeline.evaluation import METRICS
from pipeline.experiment import TARGETS, Artifacts, write_document
from pipeline.heads.choosing import serving
from pipeline.io.files import remove, write_text_atomic

R = TypeVar("R", bound=Any)


def experiments(config: Config) -> dict[str, Config]:
    """Return the config of each target's experiment by name; for a single target, the config itself under ''.

    Each has the heads and the metric that support its kind; if none does, all heads, and the default metric.
    """
    data, found = config.dataset, {}
    if len(data.kinds) < 2:
        return {"": config}
    files, seconds = Artifacts(config.output, config.store), config.tuning.budget_seconds
    budget = None if seconds is None else f"{max(1, round(seconds / len(data.kinds)))}s"
    for name, kind in zip(data.label_columns, data.kinds, strict=True):
        section: dict[str, Any] = {"label_columns": (name,), "target": kind}
        if kind != "multilabel":
            section["label_separator"] = None
        scoring, kind = config.tuning.scoring, kind_of(kind)
        if scoring != "auto" and kind not in METRICS[scoring].targets:
            scoring = "auto"
        changed = {
            "output": str(files.target(name)),
            "store": str(files.stores),
            "dataset": data.model_copy(update=section),
            "heads": serving(config.heads, kind),
            "tuning": config.tuning.model_copy(update={"scoring": scoring, "budget": budget}),
        }
        found[name] = config.model_copy(update=changed)
    return found


def of_classes(config: Config, what: str) -> dict[str, Config]:
    """Return the classification experiments; ConfigError if there are none: `what` names the feature that needs classes in the message."""
    each = experiments(config).items()
    found = {name: alone for name, alone in each if kind_of(alone.dataset.kinds[0]) == Classification.kind}
    if not found:
        raise ConfigError(f"{what} of classes, and dataset.target is {config.dataset.target}")
    return found


def each(found: Mapping[str, Config], run: Callable[[Config], R]) -> Generator[str, None, dict[str, R]]:
    """Run a stage for each target; yield its lines below the target's name, and its report's path; return the results by name."""
    made = {}
    for name, alone in found.items():
        made[name] = result = run(alone)
        yield from [*heading(name), *(result if isinstance(result, list) else result.summary_lines())]
        if Artifacts(alone.output).leaderboard.exists():
            yield f"report       {report.refresh(Artifacts(alone.output).root)}"
    return made


def heading(name: str) -> list[str]:
    """Return the heading line for one of several targets; empty for a single one, whose name is ''."""
    return [f"== {name} =="] if name else []


def write_experiments(config: Config, index: DatasetIndex, records: Sequence[EmbeddingRecord]) -> None:
    """Write stage one's results again for each of several targets, with the images that have a label for it."""
    files, found = Artifacts(config.output, config.store), experiments(config)
    if "" in found:
        remove(files.targets)
        return
    plan = WrittenIndex.read(files.dataset).plan
    for name, alone in found.items():
        own, part = Artifacts(alone.output, alone.store), index.only(name)
        part = part.rows(part.has_labels(*alone.dataset.kinds))
        if WrittenIndex.read(own.dataset).digest != part.fingerprint():
            part.write(own.dataset, plan, config.dataset.source)
        write_failures(own.dataset, read_failures(files.dataset))
        write_records(own.features, records, alone, part.fingerprint())
        write_text_atomic(own.config, dump_yaml(alone, own.root))
    write_document(files.targets, TARGETS, {"targets": list(found)})
