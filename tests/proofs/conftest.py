"""The tests of this folder are those of the store and of the images, told to repeat more often."""

import os

os.environ["MANYHEADS_PROOFS"] = "long"

from store.conftest import place  # noqa: F401
