"""The ONNX file of a model: written, proven, and described in its own metadata."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

import numpy as np
import onnx
import onnxruntime

from pipeline.data.targets import record_of
from pipeline.embed.spec import Embedder
from pipeline.errors import BundleError, number_of
from pipeline.experiment import made_by, plain
from pipeline.export.bundle import versions
from pipeline.export.onnx.graph import FLOAT, OPSET, UINT8, Graph
from pipeline.export.onnx.heads import Outputs, add_answer
from pipeline.export.onnx.pixels import add_prepared
from pipeline.export.onnx.proof import FROM_PREPARED, FROM_RAW, Proof, prove
from pipeline.export.table import Model, Photo
from pipeline.io.digests import canonical_json

FORMAT = "manyheads onnx 1"
IMAGES = "images"
MOST_BYTES = 2**31 - 1
"""What a file of this kind can hold, for the format that it is in."""


def write(model: Model, photos: Iterable[Photo]) -> tuple[bytes, list[str]]:
    """Return the content of the file, the same for the same model and photos, and lines on what it is and was proven to be.

    Raises
    ------
    PipelineError
        When a part of it cannot be written as ONNX, or does not say what `predict` says of the photos.
    """
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
        raise BundleError(
            f"it is {whole.ByteSize() / 1e9:.1f} GB, and an ONNX file holds 2; export a head of a smaller network"
        )
    proof = prove(model, photos, whole.SerializeToString(), inner.SerializeToString(), entries)
    onnx.helper.set_model_props(whole, metadata(model, proof))
    return whole.SerializeToString(deterministic=True), _lines(outputs, proof)


def _vectors(g: Graph, embedder: Embedder, pixels: str) -> list[str]:
    """The names of an embedder's outputs, float32 of shape (n, dim) each."""
    spec = embedder.specs[0]
    if spec.kind == "backbone":
        return g.add(onnx.load_from_string(embedder.to_onnx(OPSET)), pixels)  # type: ignore[attr-defined]
    if spec.architecture == "pixels":
        colours = g("Div", g("Transpose", pixels, perm=[0, 2, 3, 1]), np.float32(255))
        return [g("Reshape", colours, np.array([0, -1]))]
    raise BundleError(f"{spec.name} has no form in ONNX here; export a head of a network")


def metadata(model: Model, proof: Proof) -> dict[str, str]:
    """Return the file's metadata: texts, each JSON but for those of one word, that say what it is, of what, and what was proven."""
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


def _lines(outputs: Iterable[str], proof: Proof) -> list[str]:
    shapes = f"{number_of(proof.images, 'image')} and {number_of(proof.odd_sizes, 'odd size')}"
    undecided = f"; {number_of(proof.undecided, 'image')} between two labels got the other one" * bool(proof.undecided)
    return [
        f"input   {IMAGES}, uint8 of shape (n, height, width, 3)",
        f"output  {', '.join(outputs)}",
        f"proven  by onnxruntime {onnxruntime.__version__} on {shapes}: at most {proof.from_prepared:.1g} from `predict` on prepared "
        f"pixels, {proof.from_raw:.1g} on images themselves{undecided}",
    ]
