"""Export: a saved head with its network as one file for other programs, verified on images to give the results of `predict`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np

from pipeline.config import DatasetConfig, unknown
from pipeline.data import DatasetIndex
from pipeline.embed.records import EmbeddingRecord, open_networks
from pipeline.embed.spec import VIEW
from pipeline.errors import BundleError, DatasetError, HeadError, PipelineError, first
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.experiment import Artifacts
from pipeline.export import bundle as bundles
from pipeline.export.exports import EXPORTS, Model, Photo
from pipeline.images import ImageProblem, Preprocessing, decode, open_file, prepare
from pipeline.io.files import require_place, write_atomic
from pipeline.io.process import bar
from pipeline.stages import settings
from pipeline.stages.predict import experiment_around, find_bundles, records_of

MOST_IMAGES = 256
"""Largest number of test images to verify an export on; they are evenly spread."""
EXAMPLES = 5
ODD_SIZES = ((0, 0), (0.01, 0.02), (0.03, 2), (2, 0.03), (1, 1), (0.99, 1.01), (1.01, 0.99), (0.3, 0.17), (2.71, 3.14))
"""Height and width of crops with unusual sizes, relative to the network's input; at least one pixel."""


def run(experiment: Path, files: Mapping[str, Path], row: str | None = None, trust_code: bool = False) -> list[str]:
    """Write a head with its network into files of some formats, named as in `EXPORTS`; return lines on each.

    `experiment` is an output folder, its config, or a bundle's folder; the best head of each target is exported, or `row`, given as
    `embedding/head`. Each file is verified on the experiment's test images, and written only if it passes.
    """
    if not files:
        raise PipelineError(f"say what to export: {', '.join(f'--{name} FILE' for name in EXPORTS)}")
    for name, file in files.items():
        EXPORTS[name].require_installed()
        require_place(file)
    if experiment.suffix in (".yaml", ".yml"):
        experiment = Path(settings.load(experiment).output)
    folders = _rows(experiment, row) if row else find_bundles(experiment)
    heads = {target: bundles.load(folder, trust_code=trust_code) for target, folder in folders.items()}
    model = opened(heads, trust_code)
    index = test_images(next(iter(folders.values())))
    ways = {embedder.preprocessing for embedder in model.networks.embedders}
    lines = [f"head    {folder}" for folder in folders.values()]
    for name, file in files.items():
        total = min(len(index), MOST_IMAGES) + len(ODD_SIZES)
        with bar(total, "images", f"verifying {file.name}") as progress:
            content, about = EXPORTS[name].write(model, map(progress.passed, photos(index, ways)))
        write_atomic(file, content)
        lines += [*about, f"written to {file}, {len(content) / 1e6:.1f} MB"]
    return lines


def _rows(experiment: Path, row: str) -> dict[str, Path]:
    """Return the bundle of a leaderboard row for each target, by the target's name."""
    found = {}
    for target, folder in Artifacts(experiment).each_target().items():
        rows = read_leaderboard(folder).rows
        able = {each.key: folder / each.bundle for each in rows if each.bundle and not each.constant}
        if row not in able:
            raise HeadError(f"--row: {unknown('row', row, list(able))}")
        found[target] = able[row]
    return found


def opened(heads: Mapping[str, bundles.ModelBundle], trust_code: bool) -> Model:
    """Open each network of some heads once; those that `predict` runs in bf16 or with OpenVINO also in torch's float32."""
    records = records_of(heads, dict.fromkeys(heads, Path("this head")))
    if any(record.kind == VIEW for own in records.values() for record in own):
        raise BundleError("this head is averaged over views of an image, which exports do not support; name another")
    networks = open_networks(records, "cpu", trust_code=trust_code)
    exact = {target: list(map(_in_torch, own)) for target, own in records.items()}
    if exact == records:
        return Model(heads, networks, networks)
    return Model(heads, networks, open_networks(exact, "cpu", trust_code=trust_code))


def _in_torch(record: EmbeddingRecord) -> EmbeddingRecord:
    """Return an embedding, including its parts, as computed by torch in float32; a baseline is unchanged."""
    spec = replace(record.spec, precision="fp32", engine="torch") if record.kind == "backbone" else record.spec
    return replace(record, spec=spec, parts=tuple(map(_in_torch, record.parts)))


def test_images(bundle: Path) -> DatasetIndex:
    """Return the test images of the experiment that a bundle belongs to."""
    if files := experiment_around(bundle):
        return DatasetIndex.read(files.dataset).select("test")
    raise BundleError(
        f"{bundle}: is in no experiment, whose test images an export is verified on; export it where it was made"
    )


def photos(index: DatasetIndex, ways: Collection[Preprocessing]) -> Iterator[Photo]:
    """Yield the readable test images, and then crops of them with unusual sizes."""
    read, problems, limit = list[Photo](), list[str](), DatasetConfig().max_pixels
    for row in np.unique(np.linspace(0, len(index) - 1, min(len(index), MOST_IMAGES)).astype(int)):
        try:
            data = open_file(index.root, str(index.paths[row]))
            pixels = decode(data, max_pixels=limit)
            # As `predict` does, which may decode large images at reduced size.
            small = {way: decode(data, max_pixels=limit, at_least=way.at_least) for way in ways if way.at_least}
        except ImageProblem as problem:
            problems.append(f"{index.paths[row]}: {problem.status}: {problem.reason}")
            continue
        photo = Photo(str(index.paths[row]), pixels, {way: prepare(small.get(way, pixels), way) for way in ways})
        read = [*read, photo][: len(ODD_SIZES)]
        yield photo
    if not read:
        raise DatasetError(
            f"{index.root}: has no readable test image to verify the export on", first(problems, EXAMPLES)
        )
    side = max(max(way.size) for way in ways)
    for (down, across), photo in zip(ODD_SIZES, cycle(read), strict=False):
        size = max(1, round(down * side)), max(1, round(across * side))
        rows, columns = (np.arange(length) % had for length, had in zip(size, photo.pixels.shape, strict=False))
        pixels = np.ascontiguousarray(photo.pixels[rows][:, columns])
        name = f"{photo.name}, tiled to {size[0]} x {size[1]} pixels"
        yield Photo(name, pixels, {way: prepare(pixels, way) for way in ways}, odd=True)
