"""A real file system that is really full, where the machine lets us mount one."""

import shutil
import subprocess

import numpy as np
import pytest

from pipeline.errors import StoreError
from pipeline.store import FeatureStore
from pipeline.store.maintain import verify
from pipeline.store.writer import StoreWriter


def test_real_full_file_system(place):
    """A file system of 1 MB that fills up in the middle of a run."""
    small = place / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small file system")
    try:
        ballast = small / "ballast"
        ballast.write_bytes(bytes(900_000))
        random = np.random.default_rng(0)
        digests = random.integers(0, 2**64, (4000, 2), dtype=np.uint64)
        features = random.normal(size=(4000, 64)).astype(np.float32)
        path, safe = small / "s", []
        with pytest.raises(StoreError, match="No space left on device; all rows committed before are safe; free some"):
            fill(path, digests, features, safe)
        safe = len(safe) * 50
        assert 0 < safe < 4000
        assert verify(path, full=True).ok
        ballast.unlink()
        with StoreWriter.open(path, {"a": 1}, 64) as writer:
            assert not writer.missing(digests[:safe]).any()
        assert FeatureStore.open(path).read(digests[:safe]).tobytes() == features[:safe].tobytes()
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def fill(path, digests, features, safe):
    with StoreWriter.open(path, {"a": 1}, 64) as writer:
        for start in range(0, 4000, 50):
            writer.append(digests[start : start + 50], features[start : start + 50])
            writer.commit()
            safe.append(start)
