"""Kills, deaths and errors at long counts; apart, because these tests all work on small segments."""

from store.test_store_crash import *  # noqa: F403
from store.test_store_crash import _small  # noqa: F401
