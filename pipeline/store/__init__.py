"""The feature store: image content -> feature vector for one identity, in immutable HDF5 files.

    features.store/
      LOCK                    held by the one writer
      snapshot-00000007.h5    the table of contents; the highest valid number counts, the one before is kept
      segments/<digest>.h5    features, immutable, named by their content
      journal/00000001.h5     groups of rows of a run that has not ended yet
      tmp/                    the only place where a partial file can be
      quarantine/             damaged files, set aside

`format` has the bytes of every file, `opener` checks them, `reader` reads (and `table` looks up, `joined` has several side by side), `writer` writes, `verify` and `maintain` care
for a whole store, `pack` and `export` make files to share.
"""

from pipeline.store.export import export
from pipeline.store.identity import check_canary, differences
from pipeline.store.joined import JoinedStores
from pipeline.store.maintain import (
    CollectReport,
    RepairReport,
    StoreStatus,
    collect,
    copy_rows,
    disk_bytes,
    merge,
    repair,
    status,
)
from pipeline.store.pack import PackedIndex, pack, read_packed_index
from pipeline.store.reader import FeatureStore, load
from pipeline.store.rows import StoredRows
from pipeline.store.verify import Problem, VerifyReport, verify
from pipeline.store.writer import StoreWriter

__all__ = [
    "CollectReport",
    "FeatureStore",
    "JoinedStores",
    "PackedIndex",
    "Problem",
    "RepairReport",
    "StoreStatus",
    "StoreWriter",
    "StoredRows",
    "VerifyReport",
    "check_canary",
    "collect",
    "copy_rows",
    "differences",
    "disk_bytes",
    "export",
    "load",
    "merge",
    "pack",
    "read_packed_index",
    "repair",
    "status",
    "verify",
]
