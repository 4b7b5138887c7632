"""What is known of embeddings without their networks: which they are, and where their stores lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import LOCAL_DIR, BackboneConfig, Config, names_timm, names_vectors
from pipeline.embed.installed import BUNDLED
from pipeline.embed.precision import choice_inputs, version
from pipeline.embed.spec import EMBED_VERSION, EmbeddingSpec
from pipeline.errors import PipelineError
from pipeline.experiment import SPECS, Artifacts, read_document, write_document
from pipeline.images import DECODE_POLICY
from pipeline.io.digests import fingerprint
from pipeline.io.files import make_folder
from pipeline.store import FeatureStore


def place(spec: EmbeddingSpec, files: Artifacts, folders: Sequence[Path] = ()) -> Path:
    """The embedding's store, in the shared folder or else in `folders`; also where it was made under another name.

    Such as of weights in a file that was renamed since.
    """
    path = files.store(spec.name, spec.fingerprint())
    found = (each for folder in (files.stores, *folders) for each in sorted(folder.glob(named(spec))))
    return next(found, path)


def named(spec: EmbeddingSpec) -> str:
    """Return the pattern of the name of an embedding's store."""
    return f"*-{spec.fingerprint()[:12]}.store"


def open_store(path: Path, fingerprint: str | None = None) -> FeatureStore | None:
    """Open an embedding's store; None when it was never published.

    Raises
    ------
    StoreError
        When it is damaged.
    """
    return FeatureStore.open(path, fingerprint) if any(path.glob("snapshot-*.h5")) else None


def spec_key(section: BackboneConfig, config: Config) -> str:
    """The digest of all that the specs of a section depend on, none of which needs torch to be known."""
    return fingerprint(
        {
            "embed_version": EMBED_VERSION,
            "section": section.model_dump(mode="json"),
            "asked": config.extraction.model_dump(mode="json", include={"device", "precision", "engine", "decode"}),
            "seed": config.seed if section.weights == "random" else None,
            "machine": choice_inputs(),
            "decode": dict(DECODE_POLICY),
            "file": _state_of(BUNDLED if section.weights == "bundled" else Path(section.weights)),
            **({"vectors": _state_of(Path(section.name))} if names_vectors(section.name) else {}),
            **({"timm": _state_of_timm(section.name)} if names_timm(section.name) else {}),
        }
    )


def _state_of_timm(name: str) -> list[Any]:
    """The version of timm and, where the network is a folder's, the state of its files."""
    folder = Path(name.removeprefix(LOCAL_DIR)) if name.startswith(LOCAL_DIR) else None
    files = sorted(folder.iterdir()) if folder and folder.is_dir() else []
    return [version("timm"), *map(_state_of, files)]


def _state_of(path: Path) -> list[Any] | None:
    """What changes when a file is written, or None where there is none."""
    try:
        state = path.stat()
    except OSError:
        return None
    return [str(path), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def read_specs(path: Path) -> dict[str, tuple[EmbeddingSpec, ...]]:
    """The kept specs; nothing where the file is missing, damaged or of another version: they are found out again."""
    try:
        entries = read_document(path, SPECS)["entries"]
        return {key: tuple(map(EmbeddingSpec.from_dict, specs)) for key, specs in entries.items()}
    except (PipelineError, KeyError, TypeError, ValueError, AttributeError):
        return {}


def write_specs(path: Path, specs: Mapping[str, Sequence[EmbeddingSpec]]) -> None:
    """Keep specs by their keys."""
    make_folder(path.parent)
    entries = {key: [spec.to_dict() for spec in found] for key, found in specs.items()}
    write_document(path, SPECS, {"entries": entries})
