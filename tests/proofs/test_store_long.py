"""The store's promises at long counts: `make proofs`."""

from store.test_store_damage import *  # noqa: F403
from store.test_store_full_disk import *  # noqa: F403
from store.test_store_hostile import *  # noqa: F403
from store.test_store_model import *  # noqa: F403
from store.test_store_power_loss import *  # noqa: F403
from store.test_store_writers import *  # noqa: F403
from test_images_model import *  # noqa: F403
