"""Few-shot evaluation: episodes on the stored features, the same for every method; independent of the leaderboard."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from pipeline.config import Config
from pipeline.data import DatasetIndex, lineage
from pipeline.data.targets import Classification
from pipeline.embed.records import choose, read_asked_records, require_index
from pipeline.errors import ConfigError, DatasetError, PipelineError
from pipeline.evaluation import fewshot
from pipeline.evaluation.fewshot import EpisodePlan, FewShot, LabelledFeatures
from pipeline.experiment import FEWSHOT, Artifacts, read_record, write_record
from pipeline.io.digests import fingerprint
from pipeline.io.process import bar
from pipeline.store import FeatureStore

SHOTS = (1, 2, 5, 10, 20)
WAYS = 5
LEAST_EPISODES = 20
VERSION = 1
"""Version of the protocol; results of other versions are measured again."""


@dataclass(frozen=True)
class FewShotRun:
    """The result of the stage, and its files."""

    result: FewShot
    files: Artifacts

    def summary_lines(self) -> list[str]:
        """Return the table, its conclusions, and the path of the results."""
        return [self.result.to_text(), "", f"results  {self.files.few_shot}"]


def run(
    config: Config,
    *,
    ways: int | None = None,
    shots: Sequence[int] = SHOTS,
    queries: int = 15,
    episodes: int = 600,
    embedding: str | None = None,
) -> FewShotRun:
    """Evaluate every method on episodes of the stored features, or return stored results of the same evaluation."""
    if episodes < LEAST_EPISODES:
        raise ConfigError(f"{episodes} episodes give no interval; expected {LEAST_EPISODES} at least, set --episodes")
    files = Artifacts(config.output)
    record = choose(read_asked_records(files.features, config), embedding, "--embedding")
    index = DatasetIndex.read(files.dataset)
    made_of = index.fingerprint()
    require_index(files.features, made_of)
    store = FeatureStore.open(files.find_store(record.store), record.fingerprint)
    used, known = index.select("train", "validation", "test"), lineage.of(record.section, record.spec.trained_on)
    # Images that the network was trained on or chosen by say nothing about new classes.
    used = used.rows(~store.missing(used.digests) & ~known.learned(used.digests) & ~known.chose(used.digests))
    target = Classification.of(used)
    plan = EpisodePlan(ways or min(WAYS, target.width), queries, episodes, config.seed)
    if plan.ways > target.width or min(plan.ways, target.width) < 2:
        raise DatasetError(
            f"episodes of {max(plan.ways, 2)} classes are asked for, and there are {target.width}; set --ways"
        )
    shots = sorted({*shots})
    key = fingerprint({"version": VERSION, "index": made_of, "store": store.digest, "shots": shots, **asdict(plan)})
    with suppress(PipelineError, OSError):
        before = read_record(files.few_shot, FEWSHOT, FewShot)
        if before.key == key:
            return FewShotRun(before, files)
    images = LabelledFeatures(store.read(used.digests), target.encode(used), used.fold_groups())
    points, notes = list[fewshot.Point](), list[str]()
    if record.spec.trained_on is not None:
        notes.append(
            "The network was fine-tuned on other images of these classes: they are new images to it, but no new classes."
        )
    with bar(len(shots), "numbers of shots", "few-shot") as progress:
        for count in shots:
            found, said = fewshot.measure(images, plan, count)
            points += fewshot.points_of(count, found) if found else []
            notes += said
            progress.update()
    if not points:
        raise DatasetError("no number of shots can be measured", notes)
    shown = tuple(dict.fromkeys(notes))
    result = FewShot(
        record.name, plan.ways, queries, episodes, config.seed, len(used), target.width, key, tuple(points), shown
    )
    write_record(files.few_shot, FEWSHOT, result)
    return FewShotRun(result, files)
