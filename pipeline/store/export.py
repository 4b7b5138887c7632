"""Features for other tools: a `.npy` array, or a `.parquet` table with one row per image."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import StoreError
from pipeline.io import files
from pipeline.io.digests import Digests, digests_to_hex
from pipeline.store.reader import FeatureStore
from pipeline.store.recovery import explained


def export(
    store: str | Path | FeatureStore,
    path: str | Path,
    digests: Digests | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write the float32 features of n images, shape (n, 2), or of all contents, as `.npy` or `.parquet`.

    A `.npy` has the features alone; a `.parquet` also has `content` (hex digest) and the given columns.
    """
    store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    path = Path(path)
    digests = store.table.in_file_order() if digests is None else np.asarray(digests, np.uint64).reshape(-1, 2)
    writers = {".npy": _write_npy, ".parquet": _write_parquet}
    if path.suffix not in writers:
        raise StoreError(f"{path}: cannot export to {path.suffix or 'a file without ending'!r}; use .npy or .parquet")
    with explained(path):
        files.make_folder(path.parent)
        writers[path.suffix](store, path, digests, columns or {})


def _write_npy(store: FeatureStore, path: Path, digests: Digests, columns: Mapping[str, Sequence[str]]) -> None:
    if columns:
        raise StoreError(f"{path}: a .npy file has no place for {', '.join(columns)}; export to .parquet")
    header = io.BytesIO()
    description = {"descr": "<f4", "fortran_order": False, "shape": (len(digests), store.dim)}
    np.lib.format.write_array_header_1_0(header, description)

    def parts() -> Iterator[bytes | memoryview]:
        yield header.getvalue()
        for _, features in store.pieces(digests):
            yield features.data.cast("B")

    files.rename(files.write_temporary(path.parent, parts(), f".{path.name}"), path)


def _write_parquet(store: FeatureStore, path: Path, digests: Digests, columns: Mapping[str, Sequence[str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vector = pa.list_(pa.float32(), store.dim)
    schema = pa.schema([("content", pa.string()), *((name, pa.string()) for name in columns), ("features", vector)])
    scratch = files.write_temporary(path.parent, [], f".{path.name}")
    try:
        with scratch.open("wb") as out:
            with pq.ParquetWriter(out, schema) as writer:
                for part, features in store.pieces(digests):
                    texts = [list(map(str, values[part])) for values in columns.values()]
                    rows = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), store.dim)
                    writer.write_table(pa.table([digests_to_hex(digests[part]), *texts, rows], schema=schema))
            out.flush()
            files.sync(out.fileno())
    except BaseException:
        files.remove(scratch)
        raise
    files.rename(scratch, path)
