"""manyheads: embed every image once, then train, tune and honestly compare many heads on the cached features.

    run = manyheads.fit("photos/")       # a folder that holds a folder of photos for each class
    run.leaderboard                      # a pandas DataFrame
    run.predict(["new.jpg", "more/"])    # another

Every function here is also a command: `pipeline/cli.py` builds the command line from the functions' parameters and docstrings, whose
last lines describe the options. Config overrides (`--set`) are keyword arguments here (`tuning__trials=8`, or `tuning={"trials": 8}`).
A function returns the result of its stage. CONFIG is a `Config`, or the path of a config file, of an experiment's output folder or of
images.

Importing this module is cheap: each function imports what it needs when it is called.
"""

from collections.abc import Callable, Generator, Sequence
from functools import partial, wraps
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeAlias, TypeVar

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
    from pipeline.stages.extract.spread import ShardRun
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
    """Import a public name of another module on first use."""
    from importlib import import_module

    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE[name]), name)


def __dir__() -> list[str]:
    own = (name for name, value in globals().items() if getattr(value, "__module__", None) == __name__)
    return sorted({*_ELSEWHERE, *(name for name in own if not name.startswith("_"))})


_Given: TypeAlias = "str | Path | Config"
_Place: TypeAlias = str | Path
_Images: TypeAlias = str | Path | Sequence[str | Path]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Parts: TypeAlias = Generator[Any, None, _R]


def _in_parts(command: Callable[_P, _Parts[_R]]) -> Callable[_P, _R]:
    """Turn a command that yields its output in parts into a function that runs it to the end and returns its result.

    The command line calls the generator, `__wrapped__`, and prints each part as it is yielded.
    """

    @wraps(command)
    def whole(*args: _P.args, **options: _P.kwargs) -> _R:
        parts = command(*args, **options)
        while True:
            try:
                next(parts)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]

    return whole


# ---- the commands, in the order in which the help lists them


@_in_parts
def fit(
    config: Annotated[_Given, "WHAT"],
    target: str | Sequence[str] = (),
    budget: str | None = None,
    output: _Place | None = None,
    open: bool = False,
    **overrides: Any,
) -> "_Parts[Run]":
    """Go from photos to a leaderboard and a report page in one run: check, embed, tune, compare.

    WHAT is a folder with one subfolder of photos per class, an archive of such a folder, a manifest (.csv, .parquet) or a config file.
    `manyheads photos` is short for `manyheads fit photos`. Finished work is not repeated.

    Example: manyheads fit photos --budget 10m --open

    target COLUMN : Column of the manifest to learn (default: label); repeat it for several targets.
    budget TIME : Time for the search, such as 90s, 10m or 1h.
    output : Folder for the results (default: artifacts/NAME).
    open : Show the report page in the browser.
    """
    from pipeline.stages import fit as stage

    made = stage.settings_of(config, overrides, [target] if isinstance(target, str) else target, budget, output)
    yield from stage.run(made)
    run = stage.Run(Path(made.output))
    run.report(open=open)
    return run


def check(config: _Given, **overrides: Any) -> list[str]:
    """Validate a config and its data without embedding or training anything.

    Example: manyheads check configs/folder.yaml --set dataset.path=photos
    """
    from pipeline.stages import check as stage

    return stage.run(_config(config, overrides))


@_in_parts
def features(
    config: _Given,
    plan: bool = False,
    rehash: bool = False,
    shard: str | None = None,
    parts: str | None = None,
    engine: Literal["ray"] | None = None,
    address: str | None = None,
    workers: int | None = None,
    **overrides: Any,
) -> "_Parts[FeaturesRun | ShardRun]":
    """Stage one: embed the images that are not in the feature stores yet.

    --shard 3/16 embeds only the third of sixteen shards and writes part files, which `store merge` combines; --engine ray uses a
    whole Ray cluster. See docs/scale.md.

    Example: manyheads features configs/folder.yaml --plan

    plan : Only say what a run would do and roughly how long it would take.
    rehash : Read every image again instead of trusting its size and times.
    shard K/N : Embed only the K-th of N shards and write part files; an image's content decides its shard.
    parts PLACE : Where to write the part files: a folder, or an address such as s3://bucket/run.
    engine : Run on a cluster; needs manyheads[NAME].
    address ADDRESS : Address of a running cluster; by default one is started on this machine.
    workers : Number of workers; by default as many as there is room for.
    """
    from pipeline.stages import extract as stage

    asked = _config(config, overrides)
    options = {"shard": shard, "parts": parts, "engine": engine, "address": address}
    made = stage.asked(asked, plan=plan, rehash=rehash, workers=workers, **options)
    yield made
    if shard is None and not plan:
        yield f"next step  manyheads heads {quote(asked.output)}"
    return made


@_in_parts
def embed(config: _Given, **overrides: Any) -> "_Parts[FeaturesRun]":
    """Embed images that have no labels yet, for `similar` and `pick`. CONFIG may be a folder of photos, nested in any way.

    Once the images have labels, `features` reuses these embeddings.

    Example: manyheads embed photos
    """
    from pipeline.stages import extract

    asked = _config(config, overrides)
    made = extract.without_labels(asked)
    yield made
    place = quote(asked.output)
    yield f"next step  manyheads similar IMAGE --in {place}, or manyheads pick {place} to choose what to label first"
    return made


@_in_parts
def heads(
    config: _Given = "",
    engine: Literal["dask", "ray"] | None = None,
    address: str | None = None,
    workers: int | None = None,
    list: bool = False,
    **overrides: Any,
) -> "_Parts[HeadsRun | dict[str, HeadsRun] | Sequence[str]]":
    """Stage two: tune the heads on the stored features and print the leaderboard.

    With --engine, the workers of a Dask or Ray cluster tune the heads; they must see the output folder. See docs/scale.md.

    Example: manyheads heads configs/digits.yaml --set tuning.strategy=random

    engine : Run on a cluster; needs manyheads[NAME].
    address ADDRESS : Address of a running cluster; by default one is started on this machine.
    workers : Number of workers; by default as many as there is room for.
    list : List the available heads; needs no config.

    In Python, several targets give a dict of results by target name, and `list` gives the lines of the list.
    """
    from pipeline.errors import ConfigError
    from pipeline.heads.table import listed
    from pipeline.io.remote import Engine
    from pipeline.stages import fit

    if list:
        lines = listed()
        yield lines
        return lines
    if not config:
        raise ConfigError("heads: give the path of a config, of an output folder or of images")
    found = yield from fit.heads(_config(config, overrides), Engine.of(engine, address, workers))
    return found.get("") or found


def replay(config: _Given, **overrides: Any) -> "list[Replay]":
    """Recompute every number of a leaderboard from the stored features and report differences; exit code 1 if there are any.

    CONFIG may also be the output folder. Nothing in it is changed.

    Example: manyheads replay artifacts/digits
    """
    from pipeline.stages import replay as stage

    return stage.run(_config(config, overrides))


@_in_parts
def advise(config: _Given, **overrides: Any) -> "_Parts[Advice]":
    """Advise what to do next: stop, label more, use another layer or backbone, or fine-tune, each with its gain and cost.

    Takes at most a twentieth of the cost of fine-tuning, and uses no test image.

    Example: manyheads advise configs/folder.yaml
    """
    from pipeline import report
    from pipeline.stages import advise as stage

    asked = _config(config, overrides)
    made = stage.run(asked)
    yield [made, f"report     {report.refresh(Path(asked.output))}"]
    return made


@_in_parts
def finetune(config: _Given, output: _Place | None = None, **overrides: Any) -> "_Parts[FinetuneRun | None]":
    """Stage three: train the best backbone end to end, starting from the best head, and say whether it was worth it.

    Prints the advice of `manyheads advise` first; `finetune: auto` in the config follows it.

    Example: manyheads finetune configs/digits.yaml --output finetuned.safetensors

    output : Also copy the weights to this file.

    In Python it returns None where `finetune: auto` follows advice to train nothing.
    """
    from pipeline.io import files
    from pipeline.stages import advise
    from pipeline.stages import finetune as stage

    asked = _config(config, overrides)
    if output is not None:
        files.require_place(Path(output))
    given = advise.run(asked)
    yield [given, ""]
    run = stage.run(asked)
    if run is None:
        yield "Nothing is trained, as finetune: auto follows the advice; set finetune.unfreeze to [[0, all]] to train anyway."
        return None
    yield run
    if output is not None:
        files.write_atomic(Path(output), run.weights.read_bytes())
    return run


@_in_parts
def fewshot(
    config: _Given,
    ways: int | None = None,
    shots: Sequence[int] = (),
    queries: int = 15,
    episodes: int = 600,
    embedding: str | None = None,
    **overrides: Any,
) -> "_Parts[dict[str, FewShotRun]]":
    """Measure few-shot accuracy on the stored features: prototypes, kNN, logistic regression, MAML.

    Draws many episodes of N classes with K labelled images each, and scores every method on other images of the same classes.

    Example: manyheads fewshot configs/folder.yaml --ways 5 --shots 1 --shots 5

    ways : Classes per episode, at least 2 (default: 5, or all if there are fewer).
    shots : Labelled images per class; repeat it for more points of the curve (default: 1, 2, 5, 10 and 20).
    queries : Query images per class, on which the methods are scored.
    episodes : Episodes per number of shots, at least 20.
    embedding NAME : Embedding to use where there are several backbones.

    In Python it returns results by target name; a single target's name is ''.
    """
    from pipeline.stages import fewshot as stage
    from pipeline.stages import targets

    found = targets.of_classes(_config(config, overrides), "episodes are")
    options: dict[str, Any] = {"ways": ways, "queries": queries, "episodes": episodes, "embedding": embedding}
    made = yield from targets.each(found, partial(stage.run, shots=shots or stage.SHOTS, **options))
    return made


@_in_parts
def refit(config: _Given, row: str | None = None, **overrides: Any) -> "_Parts[RefitRun]":
    """Refit a saved head with new images or a new class, keeping its hyperparameters, and say whether a new search is worth it.

    Only new images are embedded. The leaderboard does not change; the refitted heads go to the folder `refit` of the experiment, which
    `predict` accepts.

    Example: manyheads refit configs/folder.yaml

    row EMBEDDING/HEAD : Head to refit, or all (default: the recommended head).
    """
    from pipeline.stages import extract
    from pipeline.stages import refit as stage

    asked = _config(config, overrides)
    yield [extract.run(asked), ""]
    run = stage.run(asked, row)
    yield run
    return run


def predict(
    bundle: _Place,
    images: _Images,
    output: _Place = "predictions.csv",
    top: int = 3,
    unknown: float | None = None,
    sets: float | None = None,
    align: bool = False,
    explain: _Place | None = None,
    device: str = "auto",
    trust: bool = False,
    max_pixels: int | None = None,
) -> "PredictRun":
    """Label new images with a saved head.

    BUNDLE is a bundle folder, or an experiment's output folder, whose best head (for several targets, the best head of each) is used.
    IMAGES are image files and folders. Rows are written as they are made: an interrupted run leaves them next to the output, as NAME.*.partial.

    Example: manyheads predict artifacts/digits photos/ --output labels.csv

    output : The CSV file to write.
    top : Labels to list with probabilities per image.
    unknown SHARE : Mark images of no known class, with this share of false alarms.
    sets SHARE : Also list a set of labels per image that holds the right one for this share of images.
    align : First align the images' features to the mean and covariance of the training images: for photos from another source.
    explain FOLDER : Also write pages on why the first 200 images got their labels: maps, and training images for and against.
    device : auto, cpu, mps, cuda or cuda:N.
    trust : Load a joblib bundle or a backbone's own code, either of which can run any code.
    max_pixels : Skip images with more pixels than this (default: the experiment's limit).
    """
    from pipeline.stages import predict as stage

    options: dict[str, Any] = {"top": top, "unknown": unknown, "sets": sets, "align": align, "explain": _path(explain)}
    options |= {"device": device, "trust": trust, "max_pixels": max_pixels}
    return stage.run(Path(bundle), _paths(images), output=Path(output), **options)


def export(experiment: _Place, onnx: _Place | None = None, row: str | None = None, trust: bool = False) -> list[str]:
    """Write a saved head and its network into one file for other programs, checked to give the same results as `predict`.

    EXPERIMENT is a bundle folder, or an output folder or its config, whose best head (for several targets, the best head of each) is
    exported. The file takes decoded images of any size. It is not written if it disagrees with `predict` on the test images.

    Example: manyheads export artifacts/digits --onnx digits.onnx

    onnx FILE : Write an ONNX file, which onnxruntime runs.
    row EMBEDDING/HEAD : Head to export (default: the best).
    trust : Load a joblib bundle or a backbone's own code, either of which can run any code.
    """
    from pipeline.stages import export as stage

    return stage.run(Path(experiment), {} if onnx is None else {"onnx": Path(onnx)}, row, trust)


def similar(
    images: _Images,
    place: _Place | None = None,
    count: int = 10,
    embedding: str | None = None,
    output: _Place | None = None,
    trust: bool = False,
) -> "SimilarRun":
    """Show the nearest stored images of given images, with their labels and distances.

    IMAGES are image files and folders, stored already or new.

    Example: manyheads similar photos/cat/1.jpg --in artifacts/photos --count 5

    place EXPERIMENT : An output folder, a config or a folder of photos (default: the only one in artifacts/).
    count : Neighbours per image.
    embedding NAME : Embedding to search in (default: that of the leaderboard's best row).
    output : Also write the neighbours to this CSV file.
    trust : Load a backbone's own code, which can do anything.
    """
    from pipeline.stages import similar as stage

    output = _path(output)
    return stage.run(_paths(images), _path(place), count=count, embedding=embedding, output=output, trust=trust)


def pick(
    config: _Given,
    place: _Place | None = None,
    count: int = 50,
    output: _Place = "next.csv",
    trust: bool = False,
    **overrides: Any,
) -> "PickRun":
    """Choose which unlabelled images to label next: typical images first, later those the best head is unsure of.

    CONFIG names the unlabelled images, or is the folder they are in; they are embedded in the same way as the labelled ones.

    Example: manyheads pick new --in artifacts/photos --count 50 --output next.csv

    place EXPERIMENT : Experiment of the labelled images, if there are any.
    count : Images to pick.
    output : The CSV file to write.
    trust : Load a joblib head, which can run any code.
    """
    from pipeline.stages import pick as stage

    return stage.run(_config(config, overrides), _path(place), count=count, output=Path(output), trust=trust)


def clean(config: _Given, output: _Place = "cleaned.csv", **overrides: Any) -> "CleanRun":
    """Propose a cleaned manifest: leave out doubtful labels and near-duplicates of test images, group other near-duplicates.

    No label is changed, and each changed row gives the reason. Use the manifest as `dataset.path`; the command for that is printed.

    Example: manyheads clean configs/folder.yaml --output cleaned.csv

    output : The manifest to write, a CSV file.
    """
    from pipeline.stages import clean as stage

    return stage.run(_config(config, overrides), Path(output))


@_in_parts
def report(config: _Given, explain: bool = False, **overrides: Any) -> _Parts[Path]:
    """Rebuild the report page from the saved results.

    Example: manyheads report configs/digits.yaml

    explain : Explain the worst mistakes with maps and training images; needs the images and the network.
    """
    from pipeline import report as pages

    output = Path(_config(config, overrides).output)
    if explain:
        from pipeline.stages.explain import mistakes

        yield from mistakes(output)
    page = pages.build(output)
    yield f"report  {page}"
    return page


def compare(outputs: Sequence[_Place], output: _Place = "comparison", row: str | None = None) -> list[str]:
    """Compare finished experiments.

    OUTPUTS are output folders. Experiments on several data sets are compared by average ranks of the rows they share, with a
    critical-difference diagram; different searches on one data set are shown side by side.

    Example: manyheads compare artifacts/digits-bayes artifacts/digits-random artifacts/digits-grid --output comparison

    output : The folder for the tables and plots.
    row EMBEDDING/HEAD : Row whose searches are drawn (default: the best).
    """
    from pipeline.report import several

    return several.compare(_paths(outputs), Path(output), row)


@_in_parts
def layers(
    config: Annotated[_Given, "MODEL|CONFIG"], **overrides: Any
) -> _Parts[list[str] | list[tuple[str, tuple[int, ...], str]]]:
    """List the layers of a backbone that can be embedded, with their shapes and their names common to all backbones.

    For a CONFIG whose features exist: compare its layers by ridge regression in cross-validation, and say whether several
    concatenated layers are better.

    MODEL is a name that `manyheads backbones` lists, your own module:function, or a weights file written by `finetune`.

    Example: manyheads layers efficientnet_lite0
    """
    from pipeline.experiment import Artifacts

    if isinstance(config, str) and not config.endswith((".yaml", ".yml")) and not Artifacts(config).features.exists():
        from pipeline.embed import backbone

        found = backbone.layers(config)
        yield [f"{name:<40} {' x '.join(map(str, shape)):<16} {called}".rstrip() for name, shape, called in found]
        return found
    from pipeline.stages import targets
    from pipeline.stages.train_heads import layers as stage

    experiments = targets.of_classes(_config(config, overrides), "profiles of layers are")
    made = yield from targets.each(experiments, stage.run)
    return [line for lines in made.values() for line in lines]


def backbones(word: str = "") -> list[str]:
    """List the networks and weights that a config can name, with size and licence, and whether they are on this machine.

    WORD, a part of a name, family or licence, lists all matches; without it, those on this machine are listed.

    Example: manyheads backbones resnet50
    """
    from pipeline.stages import backbones as stage

    return stage.run(word)


def shortlist(
    config: _Given, images: int = 1000, candidates: str | Sequence[str] = (), **overrides: Any
) -> "Shortlist":
    """Find the networks that are worth a full run: accuracy on a sample against time and memory.

    CONFIG may also be a folder of photos. Networks that fall behind are dropped early, and a config is written with those that are
    not significantly worse than the best.

    Example: manyheads shortlist photos --images 400 --candidates efficientnet_lite0,regnet_small,hog

    images : Training images in the sample.
    candidates NAME,... : NAME or NAME/WEIGHTS (default: all on this machine).
    """
    from pipeline.stages import shortlist as stage

    words = ",".join([candidates] if isinstance(candidates, str) else candidates).split(",")
    return stage.run(_config(config, overrides), images, [word.strip() for word in words if word.strip()])


class store:
    """Maintain the feature stores: check, repair, share."""

    @staticmethod
    def status(config: _Given, **overrides: Any) -> list[str]:
        """Count cached, missing, changed, stale and failed images. CONFIG may also be a packed file.

        New and changed images are read; nothing is embedded or written.

        Example: manyheads store status configs/folder.yaml
        """
        from pipeline.stages import maintenance

        given = _config_or_pack(config, overrides)
        return maintenance.status_of_pack(given) if isinstance(given, Path) else maintenance.status(given)

    @staticmethod
    @_in_parts
    def verify(
        config: _Given, full: bool = False, sample: int | None = None, **overrides: Any
    ) -> "_Parts[list[Check]]":
        """Check the feature stores, and with --full every file; exit code 1 if something is wrong. CONFIG may also be a packed file.

        Example: manyheads store verify configs/folder.yaml --full --sample 20

        full : Read every byte of all files of the experiment.
        sample K : Embed K random images again and compare the vectors.

        In Python it returns a check for each store, which has `ok` and `lines()`.
        """
        from pipeline.errors import ConfigError
        from pipeline.stages import maintenance

        given = _config_or_pack(config, overrides)
        if isinstance(given, Path):
            if sample:
                raise ConfigError("--sample needs an experiment: a packed file does not say where its images are")
            checks = [maintenance.verify_pack(given, full=full)]
        else:
            checks = maintenance.verify(given, full=full, sample=sample or 0)
        yield [(check.ok, *check.lines()) for check in checks]
        if full and not isinstance(given, Path):
            yield maintenance.verify_files(given)
        return checks

    @staticmethod
    @_in_parts
    def repair(config: _Given, **overrides: Any) -> "_Parts[FeaturesRun]":
        """Drop damaged vectors and embed only those images again.

        Example: manyheads store repair configs/folder.yaml
        """
        from pipeline.stages import extract, maintenance

        asked = _config(config, overrides)
        yield maintenance.repair(asked)
        made = extract.run(asked)
        yield made
        return made

    @staticmethod
    def gc(config: _Given, **overrides: Any) -> list[str]:
        """Remove vectors that belong to no image of any experiment using the stores.

        Example: manyheads store gc configs/folder.yaml
        """
        from pipeline.stages import maintenance

        return maintenance.gc(_config(config, overrides))

    @staticmethod
    def pack(
        output: _Place, config: _Given, embedding: str | None = None, anonymous: bool = False, **overrides: Any
    ) -> str:
        """Write one embedding, with paths, labels and splits, into a single HDF5 file.

        Example: manyheads store pack features.h5 configs/folder.yaml

        embedding NAME : Embedding to pack where there are several; `store status` lists them.
        anonymous : Leave out the paths.
        """
        from pipeline.stages import maintenance

        return maintenance.pack(_config(config, overrides), Path(output), embedding=embedding, anonymous=anonymous)

    @staticmethod
    def export(output: _Place, config: _Given, embedding: str | None = None, **overrides: Any) -> str:
        """Write one embedding as .npy or .parquet, rows in the order of the index. CONFIG may also be a packed file.

        Example: manyheads store export features.parquet configs/folder.yaml

        embedding NAME : Embedding to export where there are several; `store status` lists them.
        """
        from pipeline.stages import maintenance

        return maintenance.export(_config_or_pack(config, overrides), Path(output), embedding=embedding)

    @staticmethod
    def merge(target: Annotated[_Place, "STORE"], sources: Sequence[_Place]) -> list[str]:
        """Add the vectors of other stores or packed files with the same identity, such as those of other machines, to STORE.

        SOURCES may be addresses, such as s3://bucket/features.h5. If they are folders of part files, as `features --shard` writes them,
        STORE is the folder of the stores.

        Example: manyheads store merge artifacts/features/efficientnet_lite0.store other-machine/efficientnet_lite0.store
        """
        from pipeline.stages import maintenance

        return maintenance.merge(Path(target), [str(each) for each in sources])


def _path(given: _Place | None) -> Path | None:
    return None if given is None else Path(given)


def _paths(given: _Images) -> list[Path]:
    return [Path(each) for each in ([given] if isinstance(given, (str, Path)) else given)]


def _config(given: _Given, overrides: dict[str, Any]) -> "Config":
    from pipeline.stages import settings

    return settings.load(given, overrides)


def _config_or_pack(given: _Given, overrides: dict[str, Any]) -> "Config | Path":
    packed = isinstance(given, (str, Path)) and str(given).endswith((".h5", ".hdf5"))
    return Path(given) if packed else _config(given, overrides)  # type: ignore[arg-type]
