"""Fit: from photos to a leaderboard and its page in one go, and what is asked of the result most.

It looks at the data and embeds, tunes, compares as `features` and `heads` do: what they have finished is not done again, and its
config, which lies in the output folder, is theirs. What only embeds or predicts is imported there, as `heads` needs none of it.
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
"""What to write on the command line, by what problems name."""

NOTHING_NEW = "nothing changed since the last scan"
"""What the stage after the look says of the data, a moment later."""


@dataclass(frozen=True)
class Run:
    """A finished experiment, by its output folder; all it says is read from the files in there."""

    output: Path

    @property
    def boards(self) -> dict[str, Leaderboard]:
        """The leaderboard of each of several targets by its name; '' for the one of a single target."""
        return {name: read_leaderboard(folder) for name, folder in Artifacts(self.output).each_target().items()}

    @property
    def leaderboard(self) -> pd.DataFrame:
        """One row for each embedding and head, the best first; of several targets those of each, with its name in a column."""
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
        """Label image files, and all images in folders, by the best head: a row for each image, as `manyheads predict` writes them.

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
        """Return the path of the report page, made again where it is not current; `open` shows it in the browser."""
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
    """Tune and compare heads on the stored features of each target; yield what there is to say, return the results by their names.

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
    """Return the config of photos, or a config file's, with what was said besides: columns to learn, time, where results go."""
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
    """Look, embed, tune, compare, write the page; yield what is found as it is, and at the end what to do next."""
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
        f"  mend labels   manyheads clean {place} leaves out labels that look wrong",
        f"  search on     manyheads heads {place} --set tuning.trials=64",
        f"  take along    manyheads export {place} --onnx {quote(root.name)}.onnx{trust} is one file from pixels to answer",
        f"  check it      manyheads replay {place}",
    ]
