"""ONNX export: one file from decoded images to the results of `predict`, verified, and described in its metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from pipeline.data.targets import Classification, MultiLabel, Target, record_of
from pipeline.embed.spec import EmbeddingModel
from pipeline.errors import BundleError, number_of
from pipeline.experiment import made_by, plain
from pipeline.export.bundle import versions
from pipeline.export.exports import Model, Photo, PreparedImages
from pipeline.export.onnx.graph import FLOAT, OPSET, UINT8, Graph, add_prepared
from pipeline.export.onnx.heads import Outputs, add_answer
from pipeline.io.digests import canonical_json

FORMAT = "manyheads onnx 1"
IMAGES = "images"
MOST_BYTES = 2**31 - 1
"""Size limit of an ONNX file, which is a protobuf message."""

FROM_PREPARED, FROM_RAW = 1e-5, 5e-3
"""Largest allowed deviation of a probability from that of `predict`; for numbers in their standard deviations in training. The first
covers only arithmetic, the second also single grey levels and bf16."""
BATCH = 16

NamedOutputs = Mapping[str, NDArray[Any]]
"""Outputs by name, n rows each."""


def write(model: Model, photos: Iterable[Photo]) -> tuple[bytes, list[str]]:
    """Return the file, deterministic for a model and photos, and lines on it; PipelineError if it cannot be written or verified."""
    g = Graph()
    ways = dict.fromkeys(embedder.preprocessing for embedder in model.exact.embedders)
    entries = {way: f"prepared.{number}" for number, way in enumerate(ways)}
    for way, name in entries.items():
        g("Identity", add_prepared(g, IMAGES, way), named=name)
    made = [_vectors(g, embedder, entries[embedder.preprocessing]) for embedder in model.exact.embedders]
    outputs: Outputs = {}
    for target, head in model.heads.items():
        parts = model.exact.places[target]
        vectors = [g("Concat", *(made[number][output] for number, output in part), axis=1) for part in parts]
        outputs |= add_answer(g, head, vectors, f"{target}_" if target else "")
    whole = g.model({IMAGES: (UINT8, ["n", "height", "width", 3])}, outputs)
    inner = g.model({name: (FLOAT, ["n", 3, *way.size]) for way, name in entries.items()}, outputs)
    if whole.ByteSize() > MOST_BYTES:
        raise BundleError("the network has more than the 2 GB that an ONNX file holds; export a head of a smaller one")
    proof = prove(model, photos, whole.SerializeToString(), inner.SerializeToString(), entries)
    onnx.helper.set_model_props(whole, _metadata(model, proof))
    shapes = f"{number_of(proof.images, 'image')} and {number_of(proof.odd_sizes, 'odd size')}"
    return whole.SerializeToString(deterministic=True), [
        f"input   {IMAGES}, uint8 of shape (n, height, width, 3)",
        f"output  {', '.join(outputs)}",
        f"proven  by onnxruntime {onnxruntime.__version__} on {shapes}: at most {proof.from_prepared:.1g} from `predict` on prepared "
        f"pixels, {proof.from_raw:.1g} on images themselves",
    ]


def _vectors(g: Graph, embedder: EmbeddingModel, pixels: str) -> list[str]:
    """Add an embedder to the graph; return the names of its outputs, float32 of shape (n, dim) each."""
    spec = embedder.specs[0]
    if spec.kind == "backbone":
        return g.add(onnx.load_from_string(embedder.to_onnx(OPSET)), pixels)  # type: ignore[union-attr]
    if spec.architecture == "pixels":
        colours = g("Div", g("Transpose", pixels, perm=[0, 2, 3, 1]), np.float32(255))
        return [g("Reshape", colours, np.array([0, -1]))]
    raise BundleError(f"{spec.name} cannot be exported to ONNX; export a head of a network")


def _metadata(model: Model, proof: Proof) -> dict[str, str]:
    """Return the file's metadata, plain texts or JSON: its format, the heads and embeddings, and the verification."""
    targets = {
        name: {
            "head": head.head,
            "params": dict(head.params),
            "target": record_of(head.target),
            "key": head.provenance.get("key", ""),
            "embeddings": [part.embedding["spec"] for part in head.parts],
        }
        for name, head in model.heads.items()
    }
    specs = [spec for embedder in model.exact.embedders for spec in embedder.specs]
    proven = {
        **asdict(proof),
        "allowed": {"from_prepared": FROM_PREPARED, "from_raw": FROM_RAW},
        "onnxruntime": onnxruntime.__version__,
    }
    return {
        "format": FORMAT,
        "made_by": made_by(),
        "licenses": canonical_json({spec.name: spec.license for spec in specs}),
        "targets": canonical_json(plain(targets)),
        "proof": canonical_json(proven),
        "versions": canonical_json({**versions(), "onnx": onnx.__version__}),
    }


# ---- verification: the results of onnxruntime with the file, compared with those of `predict`


@dataclass
class Proof:
    """Result of a verification: the numbers of images, and the largest deviations."""

    images: int = 0
    odd_sizes: int = 0
    from_prepared: float = 0.0
    from_raw: float = 0.0
    in_float64: int = 0
    """Images compared with torch in float64, as its float32 deviated too much for an image of their batch."""


def prove(model: Model, photos: Iterable[Photo], raw: bytes, prepared: bytes, entries: Mapping[Any, str]) -> Proof:
    """Compare the file with `predict`, from raw and from prepared pixels, and return the deviations.

    BundleError with the image whose result deviates too much from `predict`, and the deviation.

    raw, prepared : the file, and the same starting at prepared pixels; entries : preprocessing -> the name of an input of the latter
    """
    proof, from_raw, from_prepared = Proof(), _runner(raw), _runner(prepared)
    rest = iter(photos)
    while batch := list(islice(rest, BATCH)):
        ways = batch[0].prepared
        together: PreparedImages = {way: np.stack([photo.prepared[way] for photo in batch]) for way in ways}
        expected = model.said(model.networks, together)
        exact = expected if model.exact is model.networks else model.said(model.exact, together)
        outputs = from_prepared(
            {name: together[way].transpose(0, 3, 1, 2).astype(np.float32) for way, name in entries.items()}
        )
        try:
            far = _compare(model, batch, exact, outputs, FROM_PREPARED, "prepared pixels")
        except BundleError:  # torch's own rounding may be the cause: compare with float64 instead
            exact = model.said(model.exact.in_float64(), together)
            far = _compare(model, batch, exact, outputs, FROM_PREPARED, "prepared pixels")
            proof.in_float64 += len(batch)
        proof.from_prepared = max(proof.from_prepared, far)
        each = [from_raw({IMAGES: photo.pixels[None]}) for photo in batch]
        found = {name: np.concatenate([one[name] for one in each]) for name in each[0]}
        proof.from_raw = max(proof.from_raw, _compare(model, batch, expected, found, FROM_RAW, "the image itself"))
        proof.odd_sizes += sum(photo.odd for photo in batch)
        proof.images += sum(not photo.odd for photo in batch)
    return proof


def _runner(content: bytes) -> Callable[[Mapping[str, NDArray[Any]]], NamedOutputs]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # no warnings about dynamic shapes
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class
        raise BundleError(f"onnxruntime cannot run the file ({error}); nothing was written") from None
    names = [output.name for output in session.get_outputs()]
    return lambda given: dict(zip(names, session.run(names, given), strict=True))


def _compare(
    model: Model, batch: list[Photo], expected: Mapping[str, Any], found: NamedOutputs, most: float, way: str
) -> float:
    """Return the largest deviation; BundleError for an image above `most`, or with another label where that is sure."""
    largest = 0.0
    for name, head in model.heads.items():
        prefix = f"{name}_" if name else ""
        own = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
        y, probabilities = expected[name]
        far, wrong, sure = answers_differ(head.target, y, probabilities, own, most)
        largest = max(largest, float(far.max()))
        for place in np.flatnonzero(~(far <= most) | (wrong & sure)):
            says = "another label" if wrong[place] and far[place] <= most else f"{far[place]:.2g}, more than {most:g}"
            photo = f"{batch[place].name}, target {name}" if name else batch[place].name
            raise BundleError(f"nothing was written: from {way} the file differs from `predict` for {photo}: {says}")
    return largest


def answers_differ(
    target: Target, y: NDArray[Any], probabilities: NDArray[Any] | None, found: NamedOutputs, most: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return for n images the deviation of two predictions, whether their labels differ, and whether the label is sure.

    y, probabilities : as `ModelBundle.said` returns them; found : the file's outputs
    Returns float64, bool and bool of shape (n,).
    """
    n = len(y)
    if isinstance(target, Classification):
        far = np.zeros(n) if probabilities is None else np.abs(found["probabilities"] - probabilities).max(axis=1)
        ordered = np.ones((n, 2)) * [0, 1] if probabilities is None else np.sort(probabilities, axis=1)
        return far, found["label"] != target.decode(y), np.asarray(ordered[:, -1] - ordered[:, -2] > most)
    if isinstance(target, MultiLabel):
        far = np.abs(found["probabilities"] - probabilities)
        sure = np.abs(probabilities - np.array(target.thresholds or 0.5)) > most
        wrong = (found["labels"] != "") != y
        return far.max(axis=1), wrong.any(axis=1), (wrong & sure).any(axis=1) | ~wrong.any(axis=1)
    far = np.abs(found["number"] - y.reshape(n, -1)) / np.array(target.scale)
    return far.max(axis=1), np.zeros(n, bool), np.ones(n, bool)
