"""The feature store: image content -> feature vector for one identity, in immutable HDF5 files.

    features.store/
      LOCK                    held by the one writer
      snapshot-00000007.h5    the table of contents; the highest valid number counts, the one before is kept
      segments/<digest>.h5    features, immutable, named by their content
      journal/00000001.h5     groups of rows of a run that has not ended yet
      tmp/                    the only place where a partial file can be
      quarantine/             damaged files, set aside

To read: `format` has the bytes of every file, `opener` checks them, `reader` gives vectors, `rows` many of them as an array. To write,
which nobody needs who reads: `writer`, alone by `lock`; `maintain` cares for a whole store, `share` makes files of it.
"""

from pipeline.store.format import differences
from pipeline.store.reader import FeatureStore
from pipeline.store.rows import JoinedStores, StoredRows

__all__ = ["FeatureStore", "JoinedStores", "StoredRows", "differences"]
