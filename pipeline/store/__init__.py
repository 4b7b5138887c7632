"""The feature store: image content -> feature vector for one identity, in immutable HDF5 files.

    features.store/
      LOCK                    held by the one writer
      snapshot-00000007.h5    the table of contents; the highest valid number counts, the previous one is kept
      segments/<digest>.h5    features, immutable, named by their content
      journal/00000001.h5     committed groups of rows of an unfinished run
      tmp/                    the only place for partial files
      quarantine/             damaged files

Reading: `format` defines the bytes of every file, `opener` checks them, `reader` returns vectors, `rows` many of them as an array.
Writing: `writer`, one at a time by `lock`; `maintain` works on whole stores, `share` makes files to share.
"""

from pipeline.store.format import differences
from pipeline.store.reader import FeatureStore
from pipeline.store.rows import JoinedStores, StoredRows

__all__ = ["FeatureStore", "JoinedStores", "StoredRows", "differences"]
