"""Writes the golden store of the current format version: `python tests/golden/make_store.py tests/golden/store-v1`.

A golden store is never written again: every later version must open it as it is.
"""

import hashlib
import sys

import numpy as np

from pipeline.io.digests import digests_from_hex
from pipeline.store.writer import StoreWriter

ROWS, DIM = 7, 6
IDENTITY = {
    "architecture": "golden",
    "layer": "penultimate",
    "preprocessing": {"resize": 8, "mean": [0.5, 0.25, 0.125]},
}
DIGESTS = digests_from_hex(hashlib.blake2b(bytes([row]), digest_size=16).hexdigest() for row in range(ROWS))
FEATURES = (np.arange(ROWS * DIM, dtype=np.float32).reshape(ROWS, DIM) - 20) / 8
PROBE = np.full((1, DIM), 0.5, np.float32)

if __name__ == "__main__":
    with StoreWriter.open(sys.argv[1], IDENTITY, DIM, probe=PROBE) as writer:
        writer.append(DIGESTS[:4], FEATURES[:4])
    with StoreWriter.open(sys.argv[1], IDENTITY, DIM, probe=PROBE) as writer:
        writer.append(DIGESTS[4:], FEATURES[4:])
