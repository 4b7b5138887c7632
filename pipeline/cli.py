"""The `manyheads` command: parse, call a stage, print what it returned. It adds no behaviour.

A command is a row of `COMMANDS` or `STORE`: a function from a config and options to lines, whose docstring is the help, and the
parameters it takes. Stages are imported inside it, so that `--help` answers at once and `heads` runs where torch cannot be imported.
Exit codes: 0 done, 1 a check found something, 2 a mistake the user can solve, 130 and 143 interrupted.
"""

from __future__ import annotations

import io
import logging
import signal
import sys
from collections.abc import Callable, Iterable
from inspect import cleandoc
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from pipeline.errors import PipelineError
from pipeline.io import files

if TYPE_CHECKING:
    from pipeline.config import Config

DEFAULT_CONFIG = "configs/digits.yaml"
PACKED = (".h5", ".hdf5")
"""Endings of packed files, which `store status`, `verify` and `export` take in place of a config."""


def main() -> None:
    """Run the command line; a user's mistake is printed without a traceback and ends with exit code 2."""
    _write_what_a_stream_can_show()
    _log_to_stderr()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = cli.main(full(sys.argv[1:]), prog_name="manyheads", standalone_mode=False)
    except PipelineError as error:
        _complain(str(error))
        sys.exit(2)
    except (click.exceptions.Abort, KeyboardInterrupt) as stop:  # click makes the first of the second
        _complain("stopped; what was finished is kept, and features, heads and finetune go on from there")
        reason = stop.__cause__.args if stop.__cause__ else stop.args
        sys.exit(143 if reason[:1] == (signal.SIGTERM,) else 130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)  # the reader of our output, such as `head`, has what it wanted
    except OSError as error:
        text = files.refusal(error)
        if text is None:
            raise
        _complain(text)
        sys.exit(2)
    sys.exit(status if isinstance(status, int) else 0)


def full(given: list[str]) -> list[str]:
    """Return the words of the command line, with `fit` before what is no command but images, a config or options.

    Raises
    ------
    ConfigError
        When the first word is nothing that there is.
    """
    first = given[0] if given else "--help"
    if first in cli.commands or first in ("-h", "--help", "--version"):
        return given
    if not first.startswith("-"):
        from pipeline.stages import settings

        words = [command.name or "" for command in (*COMMANDS, store) if not command.hidden]
        settings.require_there(Path(first).expanduser(), words)
    return ["fit", *given]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True})
@click.version_option(package_name="manyheads")
def cli() -> None:
    """Embed every image once, then train, tune and honestly compare many heads on the cached features.

    `manyheads PHOTOS`, of a folder that holds a folder of photos for each class, does it all: it is `manyheads fit PHOTOS`.
    """


@cli.group()
def store() -> None:
    """Care for the feature stores: check, repair, share."""


def fit(config: Config, target: tuple[str, ...], budget: str | None, output: Path | None, open: bool) -> Iterable[str]:
    """From photos to a leaderboard and a page, in one go: look, embed, tune, compare.

    WHAT is a folder that holds a folder of photos for each class, an archive of one, a manifest (.csv, .parquet) or a config file.
    `manyheads photos` is short for it. What is finished is not done again.

    Example: manyheads fit photos --budget 10m --open
    """
    from pipeline.stages import fit as stage

    config = stage.settings_of(config, (), target, budget, output)
    yield from stage.run(config)
    if open:
        stage.Run(Path(config.output)).report(open=True)


def check(config: Config) -> Iterable[str]:
    """Validate a config and its data without embedding or training anything.

    Example: manyheads check configs/folder.yaml --set dataset.path=photos
    """
    from pipeline.stages import check as stage

    return stage.run(config)


def features(config: Config, **options: Any) -> Iterable[str]:
    """Stage one: embed the images that the feature stores do not have yet.

    With --shard 3/16 only the third of sixteen shards, into parts that `store merge` puts together; with --engine ray on all of a
    Ray cluster. docs/scale.md has the rest.

    Example: manyheads features configs/folder.yaml --plan
    """
    from pipeline.stages import extract as stage

    return stage.asked(config, **options).summary_lines()


def embed(config: Config) -> Iterable[str]:
    """Embed images that have no labels yet, for `similar` and `pick`. CONFIG may be a folder of photos, whatever lies in it where.

    Once they have labels, `features` embeds none of them again.

    Example: manyheads embed photos
    """
    from pipeline.stages import extract

    return extract.without_labels(config).summary_lines()


def heads(config: Config, engine: str | None, address: str | None, workers: int | None) -> Iterable[str]:
    """Stage two: tune the heads on the stored features and print the leaderboard.

    With --engine the heads are tuned by the workers of a Dask or Ray cluster, which must see the output folder; docs/scale.md says more.

    Example: manyheads heads configs/digits.yaml --set tuning.strategy=random
    """
    from pipeline.io.engine import Engine
    from pipeline.stages import fit as stage

    return stage.heads_lines(config, Engine.of(engine, address, workers))


def replay(config: Config) -> tuple[bool, Iterable[str]]:
    """Make every number of a leaderboard again from the stored features, and say what differs; exit code 1 when something does.

    CONFIG may also be the output folder. Nothing in it is changed.

    Example: manyheads replay artifacts/digits
    """
    from pipeline.stages import replay as stage

    found = stage.run(config)
    return all(each.ok for each in found), [line for each in found for line in each.summary_lines()]


def finetune(config: Config, output: Path | None) -> Iterable[str]:
    """Stage three: train the best backbone end to end, from the best head, and say whether it was worth it.

    Prints the advice of `manyheads advise` first; `finetune: auto` in the config follows it.

    Example: manyheads finetune configs/digits.yaml --output finetuned.safetensors
    """
    from pipeline.stages import advise
    from pipeline.stages import finetune as stage

    if output is not None:
        files.require_place(output)
    given = advise.run(config)
    yield from [*given.summary_lines(), ""]
    if config.finetune.unfreeze == "auto" and given.scope is None:
        yield "Nothing is trained, as finetune: auto follows the advice; set finetune.unfreeze to [[0, all]] to train nevertheless."
        return
    result = stage.run(config)
    yield from result.summary_lines()
    if output is not None:
        files.write_atomic(output, result.weights.read_bytes())


def advise(config: Config) -> Iterable[str]:
    """Say what to do next: stop, label more, take another layer or backbone, or fine-tune, each with its gain and price.

    Costs at most a twentieth of a whole fine-tuning, and looks at no test image.

    Example: manyheads advise configs/folder.yaml
    """
    from pipeline import report
    from pipeline.stages import advise as stage

    return [*stage.run(config).summary_lines(), f"report     {report.refresh(Path(config.output))}"]


def fewshot(config: Config, shots: tuple[int, ...], **options: Any) -> Iterable[str]:
    """Say how well classes are learned from a few images each, on the stored features: prototypes, kNN, logistic regression, MAML.

    Draws many episodes of N classes with K labelled images each, and judges every method on other images of the same classes.

    Example: manyheads fewshot configs/folder.yaml --ways 5 --shots 1 --shots 5
    """
    from pipeline import report
    from pipeline.stages import fewshot as stage
    from pipeline.stages import targets

    for name, alone in targets.of_classes(config, "episodes are").items():
        result = stage.run(alone, shots=shots or stage.SHOTS, **options)
        yield from [*([f"== {name} =="] if name else []), *result.summary_lines()]
        if result.files.leaderboard.exists():
            yield f"report   {report.refresh(result.files.root)}"


def refit(config: Config, row: str | None) -> Iterable[str]:
    """Fit a saved head again with new images or a new class, at its stored parameters, and say whether a new search is worth it.

    Only new images are embedded. The leaderboard stays what it was; what is made lies in the folder `refit` of the experiment, which
    `predict` takes.

    Example: manyheads refit configs/folder.yaml
    """
    from pipeline.stages import extract
    from pipeline.stages import refit as stage

    yield from extract.run(config).summary_lines()
    yield from ["", *stage.run(config, row).summary_lines()]


def predict(bundle: Path, images: tuple[Path, ...], trust: bool, **options: Any) -> Iterable[str]:
    """Label new images with a saved head.

    BUNDLE is a bundle's folder, or an experiment's output folder, whose best head is then used, of several targets the best of
    each. IMAGES are image files and folders. Rows are written as they come: a run that is stopped leaves them beside the output, as NAME.*.partial.

    Example: manyheads predict artifacts/digits photos/ --output labels.csv
    """
    from pipeline.stages import predict as stage

    return stage.run(bundle, images, trust_code=trust, **options).summary_lines()


def export(experiment: Path, row: str | None, trust: bool, **files: Path | None) -> Iterable[str]:
    """Write a saved head with its network as one file for other programs, proven to say what `predict` says.

    EXPERIMENT is an output folder or its config, whose best head is taken, of several targets the best of each, or a bundle's folder.
    The file takes decoded images of any size. Where it does not say what `predict` says of the test images, it is not written.

    Example: manyheads export artifacts/digits --onnx digits.onnx
    """
    from pipeline.stages import export as stage

    return stage.run(experiment, {name: file for name, file in files.items() if file}, row, trust)


def similar(images: tuple[Path, ...], place: Path | None, **options: Any) -> Iterable[str]:
    """Show the stored images that are nearest to some images, with their labels and distances.

    IMAGES are image files and folders, which may be stored or new.

    Example: manyheads similar photos/cat/1.jpg --in artifacts/photos --count 5
    """
    from pipeline.stages import similar as stage

    return stage.run(images, place, **options).summary_lines()


def pick(config: Config, place: Path | None, **options: Any) -> Iterable[str]:
    """Say which unlabelled images to label next, in a CSV file: typical ones first, later those the best head is unsure of.

    CONFIG is of the unlabelled images, or the folder they lie in; they are embedded as those with labels are.

    Example: manyheads pick new --in artifacts/photos --count 50 --output next.csv
    """
    from pipeline.stages import pick as stage

    return stage.run(config, place, **options).summary_lines()


def clean(config: Config, output: Path) -> Iterable[str]:
    """Propose a cleaned manifest: labels that look wrong and near-duplicates of test images left out, others alike kept together.

    No label is changed, and each row says why it was touched. It goes back in as `dataset.path`; the commands for that are printed.

    Example: manyheads clean configs/folder.yaml --output cleaned.csv
    """
    from pipeline.stages import clean as stage

    return stage.run(config, output).summary_lines()


def report(config: Config) -> Iterable[str]:
    """Build the report page again from the saved results.

    Example: manyheads report configs/digits.yaml
    """
    from pipeline import report as pages
    from pipeline.experiment import Artifacts

    return [f"report  {pages.build(Artifacts(config.output).root)}"]


def compare(outputs: tuple[Path, ...], output: Path, row: str | None) -> Iterable[str]:
    """Compare finished experiments.

    OUTPUTS are output folders. On several data sets: average ranks of the rows that all share, with a critical-difference
    diagram. On one data set, searched differently: the searches side by side.

    Example: manyheads compare artifacts/digits-bayes artifacts/digits-random artifacts/digits-grid --output comparison
    """
    from pipeline.report import several

    return several.compare(outputs, output, row)


def status(config: Config | Path) -> Iterable[str]:
    """Say what is cached, missing, changed, stale and failed. CONFIG may also be a packed file.

    The images are looked at, and those that are new or changed are read; nothing is embedded or written.

    Example: manyheads store status configs/folder.yaml
    """
    from pipeline.stages import maintenance

    return maintenance.status_of_pack(config) if isinstance(config, Path) else maintenance.status(config)


def verify(config: Config | Path, full: bool, sample: int | None) -> tuple[bool, Iterable[str]]:
    """Check the feature stores, and with --full every file; exit code 1 when something is wrong. CONFIG may also be a packed file.

    Example: manyheads store verify configs/folder.yaml --full --sample 20
    """
    from pipeline.stages import maintenance

    if isinstance(config, Path):
        if sample:
            raise click.UsageError("--sample needs an experiment: a packed file does not say where its images are")
        pack = maintenance.verify_pack(config, full=full)
        return pack.ok, pack.lines()
    checks = maintenance.verify(config, full=full, sample=sample or 0)
    ok, lines = maintenance.verify_files(config) if full else (True, [])
    return ok and all(found.ok for found in checks), [*(line for found in checks for line in found.lines()), *lines]


def repair(config: Config) -> Iterable[str]:
    """Drop damaged vectors and embed exactly those images again.

    Example: manyheads store repair configs/folder.yaml
    """
    from pipeline.stages import extract, maintenance

    yield from maintenance.repair(config)
    yield from extract.run(config).summary_lines()


def gc(config: Config) -> Iterable[str]:
    """Remove the vectors that belong to no image of any experiment that uses the stores.

    Example: manyheads store gc configs/folder.yaml
    """
    from pipeline.stages import maintenance

    return maintenance.gc(config)


def pack(output: Path, config: Config, embedding: str | None, anonymous: bool) -> Iterable[str]:
    """Write one embedding, with paths, labels and splits, into a single HDF5 file.

    Example: manyheads store pack features.h5 configs/folder.yaml
    """
    from pipeline.stages import maintenance

    return [maintenance.pack(config, output, embedding=embedding, anonymous=anonymous)]


def export_features(output: Path, config: Config | Path, embedding: str | None) -> Iterable[str]:
    """Write one embedding as .npy or .parquet, rows in the order of the index. CONFIG may also be a packed file.

    Example: manyheads store export features.parquet configs/folder.yaml
    """
    from pipeline.stages import maintenance

    return [maintenance.export(config, output, embedding=embedding)]


def merge(target: Path, sources: tuple[str, ...]) -> Iterable[str]:
    """Add the vectors of other stores or packed files of the same identity, such as those of several machines, to STORE.

    SOURCES may be addresses, such as s3://bucket/features.h5. Where they are folders of parts, which `features --shard` writes, STORE
    is the folder of the stores.

    Example: manyheads store merge artifacts/features/efficientnet_lite0.store other-machine/efficientnet_lite0.store
    """
    from pipeline.stages import maintenance

    return maintenance.merge(target, sources)


def layers(config: Config | Path) -> Iterable[str]:
    """List the layers of a backbone that can be embedded, with their shapes, and what they are called in every backbone.

    Of a CONFIG whose features are made: which of its layers hold the signal, by ridge in cross-validation, and whether
    several side by side hold more.

    MODEL is a name that `manyheads backbones` lists, module:function of your own, or a weights file that `finetune` wrote.

    Example: manyheads layers efficientnet_lite0
    """
    if not isinstance(config, Path):
        from pipeline.stages import targets
        from pipeline.stages.train_heads import layers as stage

        each = targets.of_classes(config, "profiles of layers are")
        return [
            line for name, alone in each.items() for line in [*([f"== {name} =="] if name else []), *stage.run(alone)]
        ]
    from pipeline.embed import backbone

    found = [(name, " x ".join(map(str, shape)), called) for name, shape, called in backbone.layers(str(config))]
    return [f"{name:<40} {shape:<16} {called}".rstrip() for name, shape, called in found]


def backbones(word: str) -> Iterable[str]:
    """List the networks and weights that a config can name, with their size, their licence, and whether they are here.

    WORD, a part of a name, family or licence, shows all that has it; without one, what is here is shown.

    Example: manyheads backbones resnet50
    """
    from pipeline.stages import backbones as stage

    return stage.run(word)


def shortlist(config: Config, images: int, candidates: str) -> Iterable[str]:
    """Say which networks are worth a full run: accuracy on a sample against time and memory.

    CONFIG may also be a folder of photos. All that is here is compared, losers are dropped early, and a config of the networks that
    cannot be told apart from the best is written.

    Example: manyheads shortlist photos --images 400 --candidates efficientnet_lite0,regnet_small,hog
    """
    from pipeline.stages import shortlist as stage

    return stage.run(config, images, [word.strip() for word in candidates.split(",") if word.strip()]).summary_lines()


def pretrain(arguments: tuple[str, ...]) -> Iterable[str]:
    """Gone from the package."""
    raise click.UsageError(
        "pretrain is a script of the source repository now: python configs/pretraining/pretrain.py configs/pretraining/bundled.yaml"
    )


PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)


def _argument(name: str, **settings: Any) -> click.Argument:
    return click.Argument([name], **settings)


def _option(*names: str, help: str, **settings: Any) -> click.Option:
    return click.Option(names, help=help, **settings)


def _is_packed(path: Path) -> bool:
    return path.suffix in PACKED


def _is_model(path: Path) -> bool:
    return path.suffix not in (".yaml", ".yml")


EXPERIMENT: tuple[click.Parameter, ...] = (
    _argument("config", default=DEFAULT_CONFIG, type=PATH),
    _option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, such as tuning.trials=8."),
)
"""Where a command's function takes a `Config`."""
_IN = _option(
    "--in",
    "place",
    type=PATH,
    metavar="EXPERIMENT",
    help="An output folder, a config or a folder of photos; the only one in artifacts/ otherwise.",
)


def _command(
    run: Callable[..., Iterable[str] | tuple[bool, Iterable[str]]],
    *takes: click.Parameter,
    other: Callable[[Path], bool] | None = None,
    hidden: bool = False,
    name: str = "",
) -> click.Command:
    """Return a row: `run` takes the parameters by name and returns lines, or with them whether a check found nothing.

    In place of a config it is given the path of what is `other`, such as a packed file.
    """

    def call(**given: Any) -> int:
        if "overrides" in given:
            overrides = given.pop("overrides")
            if other is None or not other(given["config"]):
                from pipeline.stages import settings

                given["config"] = settings.load(given["config"], overrides)
        found = run(**given)
        ok, lines = found if isinstance(found, tuple) else (True, found)
        for line in lines:
            click.echo(line)
        return 0 if ok else 1

    context = {"ignore_unknown_options": hidden}
    told = cleandoc(run.__doc__ or "")
    first = " ".join(told.split("\n\n")[0].split())  # click would cut it, and wraps what it is given as short
    return click.Command(name or run.__name__, context, call, list(takes), told, short_help=first, hidden=hidden)


def _list_heads(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    """Print the heads there are, which needs no config, and end."""
    if asked:
        from pipeline.heads.table import listed

        click.echo("\n".join(listed()))
        context.exit()


def _engine(*names: str) -> tuple[click.Option, ...]:
    return (
        _option("--engine", type=click.Choice(names), help="Work on a cluster; needs manyheads[NAME]."),
        _option(
            "--address", metavar="ADDRESS", help="Of a cluster that runs; one is started on this machine otherwise."
        ),
        _option("--workers", type=COUNT, help="How many; otherwise as many as there is room for."),
    )


COMMANDS = (
    _command(
        fit,
        _argument("config", metavar="WHAT", type=PATH),
        *EXPERIMENT[1:],
        _option(
            "--target",
            multiple=True,
            metavar="COLUMN",
            help="The column of a manifest to learn, `label` otherwise; again for each more.",
        ),
        _option("--budget", metavar="TIME", help="Time for the search, such as 90s, 10m or 1h."),
        _option("--output", "-o", type=PATH, help="The folder of the results; artifacts/NAME otherwise."),
        _option("--open", is_flag=True, help="Show the page in the browser."),
    ),
    _command(check, *EXPERIMENT),
    _command(
        features,
        *EXPERIMENT,
        _option("--plan", is_flag=True, help="Only say what a run would do and roughly how long it takes."),
        _option("--rehash", is_flag=True, help="Read every image again instead of trusting its size and times."),
        _option("--shard", metavar="K/N", help="Embed only the K-th of N shards, which content decides; into parts."),
        _option(
            "--parts", metavar="PLACE", help="Where to write parts: a folder, or an address such as s3://bucket/run."
        ),
        *_engine("ray"),
    ),
    _command(embed, *EXPERIMENT),
    _command(
        heads,
        *EXPERIMENT,
        *_engine("dask", "ray"),
        _option(
            "--list", is_flag=True, is_eager=True, callback=_list_heads, expose_value=False, help="Say which there are."
        ),
    ),
    _command(replay, *EXPERIMENT),
    _command(advise, *EXPERIMENT),
    _command(finetune, *EXPERIMENT, _option("--output", "-o", type=PATH, help="Also copy the weights to this file.")),
    _command(
        fewshot,
        *EXPERIMENT,
        _option("--ways", type=click.IntRange(min=2), help="Classes of an episode; 5, or all where there are fewer."),
        _option(
            "--shots",
            multiple=True,
            type=COUNT,
            help="Labelled images per class, each a point of the curve; 1, 2, 5, 10 and 20.",
        ),
        _option("--queries", default=15, type=COUNT, help="Images per class to be judged by."),
        _option("--episodes", default=600, type=click.IntRange(min=20), help="Episodes for each number of shots."),
        _option("--embedding", metavar="NAME", help="Which, where there are several backbones."),
    ),
    _command(
        refit,
        *EXPERIMENT,
        _option("--row", metavar="EMBEDDING/HEAD", help="Which head, or all; the recommended one otherwise."),
    ),
    _command(
        predict,
        _argument("bundle", type=PATH),
        _argument("images", nargs=-1, required=True, type=PATH),
        _option("--output", "-o", default="predictions.csv", type=PATH, help="The CSV file to write."),
        _option("--top", default=3, type=COUNT, help="Labels with probabilities per image."),
        _option(
            "--unknown",
            type=float,
            metavar="SHARE",
            help="Mark images of no known class, with this share of false alarms.",
        ),
        _option(
            "--sets",
            type=float,
            metavar="SHARE",
            help="Also the labels of which one is right for this share of images.",
        ),
        _option(
            "--align",
            is_flag=True,
            help="Move the images' features to the mean and covariance of the training images first: for photos from elsewhere.",
        ),
        _option(
            "--explain",
            type=PATH,
            metavar="FOLDER",
            help="Also pages on why the first 200 images got their labels: maps, and training images for and against.",
        ),
        _option("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N."),
        _option("--trust", is_flag=True, help="Load a joblib bundle, or a network of code, which can do anything."),
        _option("--max-pixels", type=COUNT, help="Larger images are not read; the experiment's limit otherwise."),
    ),
    _command(
        export,
        _argument("experiment", type=PATH),
        _option("--onnx", type=PATH, metavar="FILE", help="Write an ONNX file, which onnxruntime runs."),
        _option("--row", metavar="EMBEDDING/HEAD", help="Which head; the best one otherwise."),
        _option("--trust", is_flag=True, help="Load a joblib bundle, or a network of code, which can do anything."),
    ),
    _command(
        similar,
        _argument("images", nargs=-1, required=True, type=PATH),
        _IN,
        _option("--count", default=10, type=COUNT, help="Neighbours of each image."),
        _option("--embedding", metavar="NAME", help="Which; the best row's of the leaderboard otherwise."),
        _option("--output", "-o", type=PATH, help="Also write them to this CSV file."),
        _option("--trust", is_flag=True, help="Load a network of code, which can do anything."),
    ),
    _command(
        pick,
        *EXPERIMENT,
        _option(
            "--in", "place", type=PATH, metavar="EXPERIMENT", help="Of the images with labels, where there are any."
        ),
        _option("--count", default=50, type=COUNT, help="Images to pick."),
        _option("--output", "-o", default="next.csv", type=PATH, help="The CSV file to write."),
        _option("--trust", is_flag=True, help="Load a joblib head, which can do anything."),
    ),
    _command(
        clean,
        *EXPERIMENT,
        _option("--output", "-o", default="cleaned.csv", type=PATH, help="The manifest to write, a CSV file."),
    ),
    _command(report, *EXPERIMENT),
    _command(
        compare,
        _argument("outputs", nargs=-1, required=True, type=PATH),
        _option("--output", "-o", default="comparison", type=PATH, help="The folder for the tables and plots."),
        _option("--row", metavar="EMBEDDING/HEAD", help="Whose searches to draw; the best row's otherwise."),
    ),
    _command(layers, _argument("config", metavar="MODEL|CONFIG", type=PATH), *EXPERIMENT[1:], other=_is_model),
    _command(backbones, _argument("word", default="")),
    _command(
        shortlist,
        *EXPERIMENT,
        _option("--images", default=1000, type=COUNT, help="Training images in the sample."),
        _option(
            "--candidates",
            default="",
            show_default=False,
            metavar="NAME,...",
            help="NAME or NAME/WEIGHTS; all that are here otherwise.",
        ),
    ),
    _command(pretrain, _argument("arguments", nargs=-1, type=click.UNPROCESSED), hidden=True),
)

_OUTPUT = _argument("output", type=PATH)
_EMBEDDING = _option("--embedding", metavar="NAME", help="Which, where there are several; `store status` lists them.")

STORE = (
    _command(status, *EXPERIMENT, other=_is_packed),
    _command(
        verify,
        *EXPERIMENT,
        _option("--full", is_flag=True, help="Read every byte, of all files of the experiment."),
        _option("--sample", type=COUNT, metavar="K", help="Embed K random images anew and compare."),
        other=_is_packed,
    ),
    _command(repair, *EXPERIMENT),
    _command(gc, *EXPERIMENT),
    _command(pack, _OUTPUT, *EXPERIMENT, _EMBEDDING, _option("--anonymous", is_flag=True, help="Leave out the paths.")),
    _command(export_features, _OUTPUT, *EXPERIMENT, _EMBEDDING, other=_is_packed, name="export"),
    _command(
        merge,
        _argument("target", metavar="STORE", type=PATH),
        _argument("sources", nargs=-1, required=True),
    ),
)
"""The commands of `manyheads store`, which up to 0.1 stood beside the others: `manyheads status` still works, with a note."""


def _by_its_old_name(command: click.Command) -> click.Command:
    def told(**given: Any) -> Any:
        click.echo(f"note: `manyheads {command.name}` is `manyheads store {command.name}` from now on", err=True)
        return command.callback(**given) if command.callback else None

    return click.Command(command.name, callback=told, params=command.params, help=command.help, hidden=True)


for _each in STORE:
    store.add_command(_each)
for _each in (*map(_by_its_old_name, STORE), *COMMANDS):  # `export` is another command now
    cli.add_command(_each)


def _write_what_a_stream_can_show() -> None:
    """Escape what a terminal or pipe has no sign for: a class name must not be a traceback after hours of work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _log_to_stderr() -> None:
    """Show the package's messages as plain lines that do not tear a progress bar."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            tqdm.write(prefix + record.getMessage(), file=sys.stderr)

    logger = logging.getLogger("pipeline")
    logger.handlers[:] = [Handler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _complain(text: str) -> None:
    click.echo(f"error: {text}", err=True)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Let SIGTERM unwind like Ctrl-C, so that the group in hand is committed."""
    raise KeyboardInterrupt(number)
