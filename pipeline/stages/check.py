"""Check the config and the data before a run. Nothing is embedded, trained, downloaded or written."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from pipeline import heads as head_table
from pipeline.config import BackboneConfig, Config, names_vectors
from pipeline.data import check_failures
from pipeline.data.scan import fold_warnings, missing_side, require_its_own, scan
from pipeline.data.sources import needs_download
from pipeline.data.targets import kind_of
from pipeline.embed import baselines
from pipeline.embed.engines import require_arithmetic
from pipeline.embed.published import NO_DOWNLOAD, STAND_IN, about_stand_in, require_permitted, stand_in
from pipeline.embed.records import find_parts
from pipeline.errors import DatasetError, PipelineError, number_of
from pipeline.experiment import Artifacts
from pipeline.heads import tuning
from pipeline.stages import targets


def run(config: Config, place: Path | None = None) -> list[str]:
    """Check the heads, the backbones and the data, and return the findings.

    `place` is the folder for the index if a run follows; without it nothing is written. The error lists every
    problem of every part, one line each.
    """
    lines, problems = list[str](), list[str]()
    for part in (_heads, _backbones, _machine, partial(_data, place=place)):
        try:
            lines += part(config)
        except PipelineError as error:
            problems += error.problems or [error.message]
    if problems:
        raise PipelineError(f"{number_of(len(problems), 'problem')}; nothing was embedded or trained", problems)
    return [*lines, "the config is valid and the data can be used"]


def _heads(config: Config) -> list[str]:
    tuning.require(config.tuning.strategy)
    lines = list[str]()
    for name, alone in targets.experiments(config).items():
        kind = kind_of(alone.dataset.kinds[0])
        problems = {
            head.name: tuning.check(head, alone.tuning, kind) for head in head_table.resolve_all(alone.heads, kind)
        }
        able = [head for head, found in problems.items() if not found]
        reasons = [reason for found in problems.values() for reason in found]
        if not able:
            raise PipelineError("heads", reasons)
        told = [f"{number_of(len(able), 'head')}: {', '.join(able)}", *(f"left out: {reason}" for reason in reasons)]
        lines += [f"{name}: {line}" if name else line for line in told]
    return lines


def _backbones(config: Config) -> list[str]:
    from pipeline.embed import weights  # loads torch

    problems: list[str] = []
    names = [name for name in baselines.NAMES if config.baselines is None or name in config.baselines]
    for section in config.backbones:
        try:
            if names_vectors(section.name):
                names += [spec.name for spec in baselines.load_vectors(section).specs]
                continue
            names += weights.check(section if stand_in(section) is None else STAND_IN)
            require_permitted(config.licenses, ((each.title, weights.license_of(each)) for each in [section]))
        except PipelineError as error:
            problems += error.problems or [error.message]
    if not problems:  # otherwise a name may be missing because its backbone is wrong
        # The run appends the start of the fingerprint to names shared by several embeddings; it is removed here.
        several = {name for name in names if names.count(name) > 1}
        plain = [[name[:-7] if name[:-7] in several else name for name in group] for group in config.concat]
        find_parts(plain, dict.fromkeys(names))
    if problems:
        raise PipelineError("backbones", problems)
    return [
        f"{number_of(len(config.backbones), 'backbone')}: {', '.join(section.title for section in config.backbones)}",
        *dict.fromkeys(line for section in config.backbones for line in _not_here(section)),
    ]


def _not_here(section: BackboneConfig) -> list[str]:
    """Return a note on weights that the next command will download or replace, while the user can still provide them."""
    from pipeline.embed import weights

    if stand_in(section) is not None:
        return [f"warning: {about_stand_in(section)}"]
    if names_vectors(section.name):
        return []
    found = weights.to_fetch(section)
    if found is None:
        return []
    size = f" ({found.megabytes:.0f} MB)" if found.megabytes else ""
    return [
        f"note: {section.title} is not here yet: `features` fetches {found.url}{size} to {found.folder}; {NO_DOWNLOAD}"
    ]


def _machine(config: Config) -> list[str]:
    """Raise PipelineError if this machine lacks a device or engine that the config requires."""
    try:
        require_arithmetic(config.extraction)
    except PipelineError as error:
        problems = [f"{error.message}: {problem}" for problem in error.problems] or [error.message]
        raise PipelineError("machine", problems) from None
    return []


def _data(config: Config, place: Path | None) -> list[str]:
    if needs_download(config.dataset):
        return [f"data set {config.dataset.name}: not looked at, because that means a download"]
    with tempfile.TemporaryDirectory() as folder:
        # Into a temporary folder: a check must not fix the splits.
        found = scan(config.dataset, config.seed, place or Path(folder, "dataset"))
        if config.dataset.source in {"folder", "manifest"}:
            require_its_own(found.index.root, Artifacts(config.output).dataset, config.dataset)
        failures = len(found.failures)
        check_failures(failures, found.total, config.dataset.max_failures, Path("failures.csv"))
        if lack := missing_side(found.index, config.dataset.kinds):
            raise DatasetError(lack)
        warnings = [
            f"warning: {line}" for line in fold_warnings(found.index, config.tuning.folds, config.dataset.kinds)
        ]
    return [line for line in found.summary_lines() if not line.startswith("since the last scan")] + warnings
