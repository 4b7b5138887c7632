"""The `manyheads` command: parse, call a stage, print what it returned. It adds no behaviour.

Stages are imported inside their command, so that `--help` answers at once and `heads` runs where torch cannot be imported.
Exit codes: 0 done, 1 a check found something, 2 a mistake the user can solve, 130 and 143 interrupted.
"""

from __future__ import annotations

import io
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import click
from tqdm import tqdm

from pipeline import config as configuration
from pipeline.errors import PipelineError
from pipeline.io import files

DEFAULT_CONFIG = "configs/digits.yaml"
PACKED = (".h5", ".hdf5")
"""Endings of packed files, which `store status`, `verify` and `export` take in place of a config."""


def main() -> None:
    """Run the command line; a user's mistake is printed without a traceback and ends with exit code 2."""
    _write_what_a_stream_can_show()
    _log_to_stderr()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = cli.main(prog_name="manyheads", standalone_mode=False)
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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="manyheads")
def cli() -> None:
    """Embed every image once, then train, tune and honestly compare many heads on the cached features."""


def _experiment(command: Callable[..., Any]) -> Callable[..., Any]:
    """The argument and option that every command on an experiment has."""
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a key, such as tuning.trials=8; repeatable.",
    )(command)
    return click.argument("config", default=DEFAULT_CONFIG, type=click.Path(path_type=Path))(command)


@cli.command()
@_experiment
def check(config: Path, overrides: tuple[str, ...]) -> None:
    """Validate a config and its data without embedding or training anything.

    Example: manyheads check configs/folder.yaml --set dataset.path=photos
    """
    from pipeline.stages import check as stage

    for line in stage.run(configuration.load(config, overrides)):
        click.echo(line)


@cli.command()
@_experiment
@click.option("--plan", is_flag=True, help="Only say what a run would do and roughly how long it takes.")
@click.option("--why", is_flag=True, help="With --plan: say for every missing image why it is missing.")
@click.option("--rehash", is_flag=True, help="Read every image again instead of trusting its size and times.")
def features(config: Path, overrides: tuple[str, ...], plan: bool, why: bool, rehash: bool) -> None:
    """Stage one: embed the images that the feature stores do not have yet.

    Example: manyheads features configs/folder.yaml --plan
    """
    from pipeline.stages import extract as stage

    settings = configuration.load(config, overrides)
    result = stage.run(settings, plan=plan, rehash=rehash)
    for line in result.summary_lines(why=why):
        click.echo(line)


@cli.command()
@_experiment
def heads(config: Path, overrides: tuple[str, ...]) -> None:
    """Stage two: tune the heads on the stored features and print the leaderboard.

    Example: manyheads heads configs/digits.yaml --set tuning.strategy=random
    """
    from pipeline import report as pages
    from pipeline.stages import train_heads as stage

    result = stage.run(configuration.load(config, overrides))
    page = pages.refresh(result.files.root)
    for line in [*result.summary_lines(), f"report       {page}"]:
        click.echo(line)


@cli.command()
@_experiment
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Also copy the weights file to this name.")
def finetune(config: Path, overrides: tuple[str, ...], output: Path | None) -> None:
    """Stage three: train the best backbone end to end, from the best head, and say whether it was worth it.

    Example: manyheads finetune configs/digits.yaml --output finetuned.safetensors
    """
    from pipeline.stages import finetune as stage

    settings = configuration.load(config, overrides)
    if output is not None:
        files.require_place(output)
    result = stage.run(settings)
    for line in result.summary_lines():
        click.echo(line)
    if output is not None:
        files.write_atomic(output, result.weights.read_bytes())


@cli.command(hidden=True, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1)
def pretrain(arguments: tuple[str, ...]) -> None:
    """Gone from the package."""
    raise click.UsageError(
        "pretrain is a script of the source repository now: python configs/pretraining/pretrain.py configs/pretraining/bundled.yaml"
    )


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output", "-o", default="predictions.csv", type=click.Path(path_type=Path), help="The CSV file to write."
)
@click.option("--top", default=3, type=click.IntRange(min=1), help="How many labels with probabilities per image.")
@click.option("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N.")
@click.option("--trust", is_flag=True, help="Load a joblib bundle, which can run any code.")
@click.option(
    "--max-pixels", type=click.IntRange(min=1), help="Larger images are not read; the experiment's limit otherwise."
)
def predict(
    bundle: Path, images: tuple[Path, ...], output: Path, top: int, device: str, trust: bool, max_pixels: int | None
) -> None:
    """Label new images with a saved head.

    BUNDLE is a bundle's folder, or an experiment's output folder, whose best head is then used. IMAGES are image files
    and folders. Rows are written as they come: a run that is stopped leaves them beside the output, as NAME.*.partial.

    Example: manyheads predict artifacts/digits photos/ --output labels.csv
    """
    from pipeline.stages import predict as stage

    result = stage.run(bundle, images, output=output, top=top, device=device, trust_code=trust, max_pixels=max_pixels)
    for line in result.summary_lines():
        click.echo(line)


@cli.command()
@_experiment
def report(config: Path, overrides: tuple[str, ...]) -> None:
    """Build the report page again from the saved results.

    Example: manyheads report configs/digits.yaml
    """
    from pipeline import report as pages
    from pipeline.experiment import Artifacts

    settings = configuration.load(config, overrides)
    click.echo(f"report  {pages.build(Artifacts(settings.output).root)}")


@cli.command()
@click.argument("outputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output", "-o", default="comparison", type=click.Path(path_type=Path), help="The folder for the tables and plots."
)
@click.option("--row", metavar="EMBEDDING/HEAD", help="Which row's searches to draw; the best one otherwise.")
def compare(outputs: tuple[Path, ...], output: Path, row: str | None) -> None:
    """Compare finished experiments.

    OUTPUTS are output folders. On several data sets: average ranks of the rows that all share, with a critical-difference
    diagram. On one data set, searched differently: the searches side by side.

    Example: manyheads compare artifacts/digits-bayes artifacts/digits-random artifacts/digits-grid --output comparison
    """
    from pipeline.report import several

    for line in several.compare(outputs, output, row):
        click.echo(line)


@cli.group()
def store() -> None:
    """Care for the feature stores: what is in them, whether it is whole, and files to share."""


@store.command()
@_experiment
def status(config: Path, overrides: tuple[str, ...]) -> None:
    """Say what is cached, missing, changed, stale and failed. CONFIG may also be a packed file.

    The images are looked at, and those that are new or changed are read; nothing is embedded or written.

    Example: manyheads store status configs/folder.yaml
    """
    from pipeline.stages import maintenance

    packed = config.suffix in PACKED
    for line in (
        maintenance.status_of_pack(config) if packed else maintenance.status(configuration.load(config, overrides))
    ):
        click.echo(line)


@store.command()
@_experiment
@click.option("--full", is_flag=True, help="Read every byte, of all files of the experiment.")
@click.option(
    "--sample", default=0, type=click.IntRange(min=0), metavar="K", help="Embed K random images anew and compare."
)
def verify(config: Path, overrides: tuple[str, ...], full: bool, sample: int) -> int:
    """Check the feature stores, and with --full every file; exit code 1 when something is wrong. CONFIG may also be a packed file.

    Example: manyheads store verify configs/folder.yaml --full --sample 20
    """
    from pipeline.stages import maintenance

    ok, lines = True, list[str]()
    if config.suffix in PACKED:
        if sample:
            raise click.UsageError("--sample needs an experiment: a packed file does not say where its images are")
        checks = [maintenance.verify_pack(config, full=full)]
    else:
        settings = configuration.load(config, overrides)
        checks = maintenance.verify(settings, full=full, sample=sample)
        ok, lines = maintenance.verify_files(settings) if full else (ok, lines)
    for line in [*(line for found in checks for line in found.lines()), *lines]:
        click.echo(line)
    return 0 if ok and all(found.ok for found in checks) else 1


@store.command()
@_experiment
def repair(config: Path, overrides: tuple[str, ...]) -> None:
    """Drop damaged vectors and embed exactly those images again.

    Example: manyheads store repair configs/folder.yaml
    """
    from pipeline.stages import extract as extract_features
    from pipeline.stages import maintenance

    settings = configuration.load(config, overrides)
    for line in [*maintenance.repair(settings), *extract_features.run(settings).summary_lines()]:
        click.echo(line)


@store.command()
@_experiment
def gc(config: Path, overrides: tuple[str, ...]) -> None:
    """Remove the vectors that belong to no image of any experiment that uses the stores.

    Example: manyheads store gc configs/folder.yaml
    """
    from pipeline.stages import maintenance

    for line in maintenance.gc(configuration.load(config, overrides)):
        click.echo(line)


_embedding = click.option(
    "--embedding", metavar="NAME", help="Which one, where there are several; `store status` lists them."
)


@store.command()
@click.argument("output", type=click.Path(path_type=Path))
@_experiment
@_embedding
@click.option("--anonymous", is_flag=True, help="Leave out the paths.")
def pack(output: Path, config: Path, overrides: tuple[str, ...], embedding: str | None, anonymous: bool) -> None:
    """Write one embedding, with paths, labels and splits, into a single HDF5 file.

    Example: manyheads store pack features.h5 configs/folder.yaml
    """
    from pipeline.stages import maintenance

    settings = configuration.load(config, overrides)
    click.echo(maintenance.pack(settings, output, embedding=embedding, anonymous=anonymous))


@store.command()
@click.argument("output", type=click.Path(path_type=Path))
@_experiment
@_embedding
def export(output: Path, config: Path, overrides: tuple[str, ...], embedding: str | None) -> None:
    """Write one embedding as .npy or .parquet, rows in the order of the index. CONFIG may also be a packed file.

    Example: manyheads store export features.parquet configs/folder.yaml
    """
    from pipeline.stages import maintenance

    source = config if config.suffix in PACKED else configuration.load(config, overrides)
    click.echo(maintenance.export(source, output, embedding=embedding))


@store.command()
@click.argument("target", metavar="STORE", type=click.Path(path_type=Path))
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
def merge(target: Path, sources: tuple[Path, ...]) -> None:
    """Add the vectors of other stores or packed files of the same identity, such as those of several machines, to STORE.

    Example: manyheads store merge artifacts/features/resnet50.store other-machine/resnet50.store
    """
    from pipeline.stages import maintenance

    for line in maintenance.merge(target, sources):
        click.echo(line)


def _alias(command: click.Command) -> click.Command:
    """The command under the name that it had up to 0.1."""

    def told(*arguments: Any, **options: Any) -> Any:
        click.echo(f"note: `manyheads {command.name}` is `manyheads store {command.name}` from now on", err=True)
        return command.callback(*arguments, **options) if command.callback else None

    return click.Command(command.name, params=command.params, callback=told, help=command.help, hidden=True)


for _command in store.commands.values():
    cli.add_command(_alias(_command))


@cli.command()
@click.argument("model")
def layers(model: str) -> None:
    """List the layers of a backbone that can be embedded, with their shapes.

    MODEL is a torchvision model, regnet_small, or a weights file that `finetune` wrote.

    Example: manyheads layers resnet18
    """
    from pipeline.embed import networks as backbone

    for name, shape in backbone.layers(model):
        click.echo(f"{name:<40} {' x '.join(map(str, shape))}")


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
