"""The store's proofs at long counts: `make proofs`. The tests are those of tests/store, told to repeat more often."""

import os

os.environ["MANYHEADS_PROOFS"] = "long"

from store.conftest import place  # noqa: F401
from store.test_store_crash import *  # noqa: F403
from store.test_store_crash import _small  # noqa: F401
from store.test_store_damage import *  # noqa: F403
from store.test_store_full_disk import *  # noqa: F403
from store.test_store_hostile import *  # noqa: F403
from store.test_store_model import *  # noqa: F403
from store.test_store_power_loss import *  # noqa: F403
from store.test_store_writers import *  # noqa: F403
from test_images_model import *  # noqa: F403
