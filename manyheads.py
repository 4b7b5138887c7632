"""manyheads: embed every image once, then train, tune and honestly compare many heads on the cached features.

    run = manyheads.fit("photos/")       # a folder that holds a folder of photos for each class
    run.leaderboard                      # a pandas DataFrame
    run.predict(["new.jpg", "more/"])    # another

Every command of the command line is a function here by the same words. It takes what the command takes, with what `--set` changes as
keywords (`tuning__trials=8`, or `tuning={"trials": 8}`), and returns what the stage made. Where a command takes CONFIG, a function
takes the path of a config file, of an experiment's output folder or of images, or a `Config`.

Importing this costs nothing: what is used is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import Config as Config
    from pipeline.data.manifest import manifest as manifest
    from pipeline.embed.transformer import Embedder as Embedder
    from pipeline.errors import PipelineError as PipelineError
    from pipeline.evaluation.advice import Advice
    from pipeline.stages.clean import CleanRun
    from pipeline.stages.estimators import Classifier as Classifier
    from pipeline.stages.estimators import Regressor as Regressor
    from pipeline.stages.estimators import best_estimator as best_estimator
    from pipeline.stages.extract import FeaturesRun
    from pipeline.stages.extract.shard import ShardRun
    from pipeline.stages.fewshot import FewShotRun
    from pipeline.stages.finetune import FinetuneRun
    from pipeline.stages.fit import Run as Run
    from pipeline.stages.load import load as load
    from pipeline.stages.maintenance import Check
    from pipeline.stages.pick import PickRun
    from pipeline.stages.predict import PredictRun
    from pipeline.stages.refit import RefitRun
    from pipeline.stages.replay import Replay
    from pipeline.stages.shortlist import Shortlist
    from pipeline.stages.similar import SimilarRun
    from pipeline.stages.train_heads import HeadsRun

    Given = str | Path | Config
    Place = str | Path

_ELSEWHERE = {
    "Classifier": "pipeline.stages.estimators",
    "Config": "pipeline.config",
    "Embedder": "pipeline.embed.transformer",
    "PipelineError": "pipeline.errors",
    "Regressor": "pipeline.stages.estimators",
    "Run": "pipeline.stages.fit",
    "best_estimator": "pipeline.stages.estimators",
    "load": "pipeline.stages.load",
    "manifest": "pipeline.data.manifest",
}


def __getattr__(name: str) -> Any:
    """Import what lies elsewhere when it is asked for."""
    from importlib import import_module

    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE[name]), name)


def __dir__() -> list[str]:
    own = (name for name, value in globals().items() if getattr(value, "__module__", None) == __name__)
    return sorted({*_ELSEWHERE, *(name for name in own if not name.startswith("_"))})


def fit(
    config: Given,
    target: str | Sequence[str] = (),
    budget: str | None = None,
    output: Place | None = None,
    open: bool = False,
    **overrides: Any,
) -> Run:
    """Look at photos, embed them, tune and compare heads, write the page; return the experiment.

    `target` names columns of a manifest, `budget` the time for the search ("10m"), `open` shows the page in the browser.
    """
    from pipeline.stages import fit as stage

    columns = [target] if isinstance(target, str) else list(target)
    made = stage.settings_of(config, overrides, columns, budget, output)
    for _ in stage.run(made):
        pass
    run = stage.Run(Path(made.output))
    run.report(open=open)
    return run


def check(config: Given, **overrides: Any) -> list[str]:
    """Validate a config and its data without embedding or training anything; return what was found, a line each."""
    from pipeline.stages import check as stage

    return stage.run(_config(config, overrides))


def features(
    config: Given,
    plan: bool = False,
    rehash: bool = False,
    shard: str | None = None,
    parts: str | None = None,
    engine: str | None = None,
    address: str | None = None,
    workers: int | None = None,
    **overrides: Any,
) -> FeaturesRun | ShardRun:
    """Embed the images that the feature stores do not have yet: here, on the workers of an engine, or those of one shard."""
    from pipeline.stages import extract as stage

    options = {"shard": shard, "parts": parts, "engine": engine, "address": address}
    return stage.asked(_config(config, overrides), plan=plan, rehash=rehash, workers=workers, **options)


def embed(config: Given, **overrides: Any) -> FeaturesRun:
    """Embed images that have no labels yet, for `similar` and `pick`."""
    from pipeline.stages import extract

    return extract.without_labels(_config(config, overrides))


def heads(
    config: Given = "",
    list: bool = False,
    engine: str | None = None,
    address: str | None = None,
    workers: int | None = None,
    **overrides: Any,
) -> HeadsRun | dict[str, HeadsRun] | Sequence[str]:
    """Tune the heads on the stored features; of several targets return what was made of each by its name.

    With `list` return the lines on the heads that there are, which needs no config.
    """
    from pipeline.errors import ConfigError
    from pipeline.heads.table import listed
    from pipeline.io.engine import Engine
    from pipeline.stages import fit

    if list:
        return listed()
    if not config:
        raise ConfigError("heads: give the path of a config, of an output folder or of images")
    on = Engine.of(engine, address, workers)
    found = {name: result for name, result, _ in fit.heads(_config(config, overrides), on)}
    return found.get("") or found


def replay(config: Given, **overrides: Any) -> list[Replay]:
    """Make every number of a leaderboard, of several targets of each, again from the stored features, and say what differs."""
    from pipeline.stages import replay as stage

    return stage.run(_config(config, overrides))


def advise(config: Given, **overrides: Any) -> Advice:
    """Say what to do next: stop, label more, take another layer or backbone, or fine-tune, each with its gain and price."""
    from pipeline.stages import advise as stage

    return stage.run(_config(config, overrides))


def finetune(config: Given, output: Place | None = None, **overrides: Any) -> FinetuneRun:
    """Train the best backbone end to end, from the best head, and say whether it was worth it; `output` gets its weights too."""
    from pipeline.io import files
    from pipeline.stages import finetune as stage

    if output is not None:
        files.require_place(Path(output))
    run = stage.run(_config(config, overrides))
    if output is not None:
        files.write_atomic(Path(output), run.weights.read_bytes())
    return run


def fewshot(
    config: Given,
    ways: int | None = None,
    shots: Sequence[int] = (),
    queries: int = 15,
    episodes: int = 600,
    embedding: str | None = None,
    **overrides: Any,
) -> dict[str, FewShotRun]:
    """Say how well classes are learned from a few images each; return what was found by target, '' being a single one."""
    from pipeline.stages import fewshot as stage
    from pipeline.stages import targets

    options: dict[str, Any] = {"ways": ways, "queries": queries, "episodes": episodes, "embedding": embedding}
    each = targets.of_classes(_config(config, overrides), "episodes are")
    return {name: stage.run(alone, shots=tuple(shots) or stage.SHOTS, **options) for name, alone in each.items()}


def refit(config: Given, row: str | None = None, **overrides: Any) -> RefitRun:
    """Embed new images and fit saved heads again with them, at their stored parameters; say whether a new search is worth it."""
    from pipeline.stages import extract
    from pipeline.stages import refit as stage

    asked = _config(config, overrides)
    extract.run(asked)
    return stage.run(asked, row)


def predict(
    bundle: Place,
    images: Place | Sequence[Place],
    output: Place = "predictions.csv",
    top: int = 3,
    unknown: float | None = None,
    sets: float | None = None,
    explain: Place | None = None,
    align: bool = False,
    device: str = "auto",
    trust: bool = False,
    max_pixels: int | None = None,
) -> PredictRun:
    """Label image files, and all images in folders, with a saved head, or the best one of an output folder."""
    from pipeline.stages import predict as stage

    given = [Path(each) for each in ([images] if isinstance(images, (str, Path)) else images)]
    options: dict[str, Any] = {"top": top, "device": device, "trust_code": trust, "max_pixels": max_pixels}
    options |= {"explain": Path(explain) if explain else None, "align": align}
    return stage.run(Path(bundle), given, output=Path(output), unknown=unknown, sets=sets, **options)


def export(experiment: Place, onnx: Place | None = None, row: str | None = None, trust: bool = False) -> list[str]:
    """Write a saved head with its network as one ONNX file that is proven to say what `predict` says; return lines on it."""
    from pipeline.stages import export as stage

    return stage.run(Path(experiment), {"onnx": Path(onnx)} if onnx else {}, row, trust)


def similar(
    images: Place | Sequence[Place],
    place: Place | None = None,
    count: int = 10,
    embedding: str | None = None,
    output: Place | None = None,
    trust: bool = False,
) -> SimilarRun:
    """Find the stored images that are nearest to some images; `place` is an output folder, a config or a folder of photos."""
    from pipeline.stages import similar as stage

    given = [Path(each) for each in ([images] if isinstance(images, (str, Path)) else images)]
    options: dict[str, Any] = {"count": count, "embedding": embedding, "trust": trust}
    return stage.run(given, _path(place), output=_path(output), **options)


def pick(
    config: Given,
    place: Place | None = None,
    count: int = 50,
    output: Place = "next.csv",
    trust: bool = False,
    **overrides: Any,
) -> PickRun:
    """Pick which unlabelled images to label next, and write them as a CSV file; `place` is the experiment of those with labels."""
    from pipeline.stages import pick as stage

    return stage.run(_config(config, overrides), _path(place), count=count, output=Path(output), trust=trust)


def clean(config: Given, output: Place = "cleaned.csv", **overrides: Any) -> CleanRun:
    """Write a manifest that proposes what to leave out and what to keep together, and why."""
    from pipeline.stages import clean as stage

    return stage.run(_config(config, overrides), Path(output))


def report(config: Given, **overrides: Any) -> Path:
    """Build the report page again from the saved results; return its path."""
    from pipeline import report as pages

    return pages.build(Path(_config(config, overrides).output))


def compare(outputs: Sequence[Place], output: Place = "comparison", row: str | None = None) -> list[str]:
    """Compare finished experiments by their output folders; return the tables' lines."""
    from pipeline.report import several

    return several.compare([Path(each) for each in outputs], Path(output), row)


def layers(config: Given, **overrides: Any) -> list[str] | list[tuple[str, tuple[int, ...], str]]:
    """List the layers of a model, by its name: each with its shape, and what it is called in every model.

    Of a config whose features are made, the lines on which of its layers hold the signal.
    """
    if isinstance(config, str) and not config.endswith((".yaml", ".yml")):
        from pipeline.embed import backbone

        return backbone.layers(config)
    from pipeline.stages import targets
    from pipeline.stages.train_heads import layers as stage

    each = targets.of_classes(_config(config, overrides), "profiles of layers are")
    return [line for alone in each.values() for line in stage.run(alone)]


def backbones(word: str = "") -> list[str]:
    """List the networks and weights that a config can name, a line each; those with a word, or those that are here."""
    from pipeline.stages import backbones as stage

    return stage.run(word)


def shortlist(config: Given, images: int = 1000, candidates: str | Sequence[str] = "", **overrides: Any) -> Shortlist:
    """Say which networks are worth a full run, by a sample of the images."""
    from pipeline.stages import shortlist as stage

    words = candidates.split(",") if isinstance(candidates, str) else candidates
    return stage.run(_config(config, overrides), images, [word.strip() for word in words if word.strip()])


class store:
    """Care for the feature stores, as `manyheads store` does; where it says so, `config` may also be a packed file."""

    @staticmethod
    def status(config: Given, **overrides: Any) -> list[str]:
        """Say what is cached, missing, changed, stale and failed; also of a packed file."""
        from pipeline.stages import maintenance

        given = _config_or_pack(config, overrides)
        return maintenance.status_of_pack(given) if isinstance(given, Path) else maintenance.status(given)

    @staticmethod
    def verify(config: Given, full: bool = False, sample: int | None = None, **overrides: Any) -> list[Check]:
        """Check the feature stores, or a packed file; each check has `ok` and `lines()`."""
        from pipeline.stages import maintenance

        given = _config_or_pack(config, overrides)
        if isinstance(given, Path):
            return [maintenance.verify_pack(given, full=full)]
        return maintenance.verify(given, full=full, sample=sample or 0)

    @staticmethod
    def repair(config: Given, **overrides: Any) -> FeaturesRun:
        """Drop damaged vectors and embed exactly those images again."""
        from pipeline.stages import extract, maintenance

        asked = _config(config, overrides)
        maintenance.repair(asked)
        return extract.run(asked)

    @staticmethod
    def gc(config: Given, **overrides: Any) -> list[str]:
        """Remove the vectors that belong to no image of any experiment that uses the stores."""
        from pipeline.stages import maintenance

        return maintenance.gc(_config(config, overrides))

    @staticmethod
    def pack(
        output: Place, config: Given, embedding: str | None = None, anonymous: bool = False, **overrides: Any
    ) -> str:
        """Write one embedding, with paths, labels and splits, into a single HDF5 file."""
        from pipeline.stages import maintenance

        return maintenance.pack(_config(config, overrides), Path(output), embedding=embedding, anonymous=anonymous)

    @staticmethod
    def export(output: Place, config: Given, embedding: str | None = None, **overrides: Any) -> str:
        """Write one embedding as .npy or .parquet, rows in the order of the index; also of a packed file."""
        from pipeline.stages import maintenance

        return maintenance.export(_config_or_pack(config, overrides), Path(output), embedding=embedding)

    @staticmethod
    def merge(target: Place, sources: Sequence[Place]) -> list[str]:
        """Add the vectors of other stores or packed files of the same identity to a store."""
        from pipeline.stages import maintenance

        return maintenance.merge(Path(target), [str(each) for each in sources])


def _path(given: Place | None) -> Path | None:
    return None if given is None else Path(given)


def _config(given: Given, overrides: dict[str, Any]) -> Config:
    from pipeline.stages import settings

    return settings.load(given, overrides)


def _config_or_pack(given: Given, overrides: dict[str, Any]) -> Config | Path:
    packed = isinstance(given, (str, Path)) and str(given).endswith((".h5", ".hdf5"))
    return Path(given) if packed else _config(given, overrides)  # type: ignore[arg-type]
