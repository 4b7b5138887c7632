"""Fit: from photos to a leaderboard and its page in one command, and the most common uses of the result.

It checks the data, embeds, tunes and compares as `features` and `heads` do: their finished work is not repeated, and its
config, in the output folder, is theirs. Modules for embedding or predicting are imported where used, as `heads` does not need them.
"""

from __future__ import annotations

import tempfile
import webbrowser
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from pipeline import report
from pipeline.config import Config, Overrides
from pipeline.errors import ConfigError, PipelineError
from pipeline.evaluation.leaderboard.table import Leaderboard, overview_text, read_leaderboard
from pipeline.experiment import Artifacts, from_cell
from pipeline.io.remote import Engine
from pipeline.stages import settings, targets, train_heads
from pipeline.stages.train_heads import HeadsRun

if TYPE_CHECKING:
    import pandas as pd
    from sklearn.pipeline import Pipeline

HINTS = {
    "dataset.label_columns": "--target COLUMN says which column to learn",
    "dataset.target": "--set dataset.target=regression, or another kind, says what it is",
}
"""Command line options to suggest, by the config key in a problem."""

NOTHING_NEW = "nothing changed since the last scan"
"""A line of stage one that repeats the check just before."""


@dataclass(frozen=True)
class Run:
    """A finished experiment, given by its output folder; all values are read from its files."""

    output: Path

    @property
    def boards(self) -> dict[str, Leaderboard]:
        """The leaderboard of each target by its name; '' for a single target."""
        return {name: read_leaderboard(folder) for name, folder in Artifacts(self.output).each_target().items()}

    @property
    def leaderboard(self) -> pd.DataFrame:
        """The leaderboard with one row per embedding and head, best first; with several targets, a `target` column is added."""
        import pandas as pd

        tables = {name: board.to_frame() for name, board in self.boards.items()}
        if list(tables) == [""]:
            return tables[""]
        for name, table in tables.items():
            table.insert(0, "target", name)
        return pd.concat(tables.values(), ignore_index=True)

    @property
    def best_estimator_(self) -> Pipeline:
        """The best head with its network, as a fitted scikit-learn pipeline from images to labels."""
        from pipeline.stages.estimators import best_estimator

        return best_estimator(self.output)

    def predict(self, images: str | Path | Sequence[str | Path], **options: Any) -> pd.DataFrame:
        """Label image files, and all images in folders, with the best head: one row per image, as written by `manyheads predict`.

        `options` are those of `manyheads.predict`, such as `top=5`, or `output` to keep the CSV file too.
        """
        import pandas as pd

        from pipeline.stages import predict as stage

        given = [images] if isinstance(images, (str, Path)) else images
        with tempfile.TemporaryDirectory() as folder:
            output = Path(options.pop("output", f"{folder}/predictions.csv"))
            run = stage.run(self.output, [Path(image) for image in given], output=output, **options)
            found = pd.read_csv(run.output, dtype=str, keep_default_na=False)
        texts = {"path", "status", *(name for name, board in self.boards.items() if board.target.kind != "regression")}
        for name in found.columns:
            numbers = pd.to_numeric(found[name].replace("", None), errors="coerce")
            is_text = (
                name in texts or "label" in name or numbers.isna().all() or (numbers.isna() & (found[name] != "")).any()
            )
            found[name] = found[name].map(from_cell) if is_text else numbers
        return found

    def report(self, open: bool = False) -> Path:
        """Return the path of the report page, rebuilt if outdated; `open` shows it in the browser."""
        page = report.refresh(self.output)
        if open:
            webbrowser.open(page.resolve().as_uri())
        return page

    def __repr__(self) -> str:
        told = [
            f"{name}: " * bool(name) + f"{len(board.rows)} rows, best {board.best.key}"
            for name, board in self.boards.items()
        ]
        return f"Run({str(self.output)!r}: {'; '.join(told)})"


def heads(config: Config, engine: Engine | None = None) -> Generator[str, None, dict[str, HeadsRun]]:
    """Tune and compare heads on the stored features of each target; yield lines of output, return the results by target name.

    The name of a single target is ''.
    """
    found = yield from targets.each(targets.experiments(config), partial(train_heads.run, engine=engine))
    if "" not in found:
        files = Artifacts(config.output, config.store)
        boards = {name: result.leaderboard for name, result in found.items()}
        yield from ["== all targets ==", overview_text(boards), ""]
        yield f"to predict   manyheads predict {quote(str(files.root))} IMAGES --output labels.csv"
        yield f"report       {report.refresh(files.root)}"
    return found


def settings_of(
    given: str | Path | Config,
    overrides: Overrides = (),
    target: Sequence[str] = (),
    budget: str | None = None,
    output: str | Path | None = None,
) -> Config:
    """Return the config of photos or of a config file, with options applied: target columns, time budget, output folder."""
    config = settings.load(given, overrides)
    if target and config.dataset.source != "manifest":
        raise ConfigError(
            f"--target {target[0]}: names a column of a manifest (.csv, .parquet); here the labels are the "
            f"folders' names, as dataset.source is {config.dataset.source}"
        )
    more: dict[str, Any] = {"dataset.label_columns": list(target)} if target else {}
    more |= {"tuning.budget": budget} if budget else {}
    more |= {"output": str(output)} if output else {}
    return settings.load(config, more)


def run(config: Config) -> Iterator[str]:
    """Check, embed, tune, compare, write the page; yield results as they arrive, and finally the next steps."""
    from pipeline.stages import check, extract

    files = Artifacts(config.output, config.store)
    try:
        found = check.run(config, files.dataset)
    except PipelineError as error:
        hints = [hint for word, hint in HINTS.items() if any(word in problem for problem in error.problems)]
        lines = [*error.problems[:-1], "; ".join([*error.problems[-1:], *hints])]
        raise PipelineError("\n  ".join(lines)) from None
    yield from found[:-1]
    told = {*found, NOTHING_NEW}
    yield from [*(line for line in extract.run(config).summary_lines() if line not in told), ""]
    trust = ""
    for line in heads(config):
        if not line.startswith(("to predict ", "report ")):  # which is said below
            yield line
        elif line.endswith(" --trust"):
            trust = " --trust"
    root, place = files.root, quote(str(files.root))
    yield from [
        "",
        "What next",
        f"  look          {report.refresh(root)} says how sure this is, which images are doubtful and whether more would help",
        f"  label photos  manyheads predict {place} PHOTOS --output labels.csv{trust}",
        f"  label more    manyheads pick PHOTOS --in {place} says which photos without labels would help most",
        f"  fix labels    manyheads clean {place} leaves out labels that look wrong",
        f"  tune more     manyheads heads {place} --set tuning.trials=64",
        f"  deploy        manyheads export {place} --onnx {quote(root.name)}.onnx{trust} writes one file from pixels to labels",
        f"  check it      manyheads replay {place}",
    ]
