"""Any order of doings: after each, the store has exactly the rows of a plain dictionary."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.store import FeatureStore, StoredRows
from pipeline.store.maintain import collect, merge, repair, verify
from pipeline.store.share import pack
from pipeline.store.writer import StoreWriter
from store.harness import DIGESTS, DIM, FEATURES, IDENTITY, PROBE, ROWS, Faults, rounds, small_segments, system

rows = st.lists(st.integers(0, ROWS - 1), max_size=8)


class Model(RuleBasedStateMachine):
    """`promised` are the committed rows, `compacted` those a reader must see."""

    def __init__(self):
        super().__init__()
        self.context = [small_segments(), system(Faults())]
        for context in self.context:
            context.__enter__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.path = self.folder / "s"
        self.promised, self.compacted, self.waiting = set(), set(), set()
        self.writer = self._open()

    def _open(self):
        return StoreWriter.open(self.path, IDENTITY, DIM, probe=PROBE)

    @rule(rows=rows)
    def append(self, rows):
        known = self.promised | self.waiting
        assert self.writer.append(DIGESTS[rows], FEATURES[rows]) == len(set(rows) - known)
        self.waiting |= set(rows) - known

    @rule()
    def commit(self):
        self.writer.commit()
        self.promised |= self.waiting
        self.waiting = set()

    @rule()
    def compact(self):
        self.commit()
        self.writer.compact()
        self.compacted = set(self.promised)

    @rule()
    def die(self):
        self.writer.close()
        self.waiting = set()
        self.writer = self._open()

    @rule(rows=rows)
    def collect(self, rows):
        self.compact()
        self.writer.close()
        gone, kept = collect(self.path, DIGESTS[rows])
        assert gone + kept == len(self.compacted)
        self.promised &= set(rows)
        self.compacted = set(self.promised)
        self.writer = self._open()

    @rule(bit=st.integers(0, 2**30), which=st.integers(0, 2**10))
    def damage_a_segment_and_repair(self, bit, which):
        self.compact()
        self.writer.close()
        segments = sorted((self.path / "segments").iterdir())
        if segments:
            file = segments[which % len(segments)]
            data = bytearray(file.read_bytes())
            data[bit // 8 % len(data)] ^= 1 << bit % 8
            file.write_bytes(data)
            report = repair(self.path)
            lost = {row for row in self.compacted if (report.damaged == DIGESTS[row]).all(axis=1).any()}
            assert len(lost) == len(report.damaged)
            self.promised -= lost
            self.compacted -= lost
            assert verify(self.path, full=True).ok
        self.writer = self._open()

    @rule(rows=rows)
    def merge_another(self, rows):
        self.compact()
        self.writer.close()
        other = self.folder / "other"
        with StoreWriter.open(other, IDENTITY, DIM, probe=PROBE) as writer:
            writer.append(DIGESTS[rows], FEATURES[rows])
        assert merge(self.path, [other]) == {other: len(set(rows) - self.compacted)}
        shutil.rmtree(other)
        self.promised |= set(rows)
        self.compacted = set(self.promised)
        self.writer = self._open()

    @rule()
    def pack_and_read(self):
        packed = pack(FeatureStore.open(self.path), self.folder / "p.h5", DIGESTS[sorted(self.compacted)])
        assert packed.rows == len(self.compacted)
        self._equals(FeatureStore.open(self.folder / "p.h5"))

    def _equals(self, store):
        assert np.flatnonzero(~store.missing(DIGESTS)).tolist() == sorted(self.compacted)
        have = sorted(self.compacted)
        assert store.rows == len(have)
        assert store.read(DIGESTS[have]).tobytes() == FEATURES[have].tobytes()
        assert StoredRows.of(store, DIGESTS[have])[:].tobytes() == FEATURES[have].tobytes()

    @invariant()
    def the_reader_sees_what_was_compacted(self):
        self._equals(FeatureStore.open(self.path))

    @invariant()
    def the_writer_knows_what_is_missing(self):
        known = np.flatnonzero(~self.writer.missing(DIGESTS)).tolist()
        assert known == sorted(self.promised | self.waiting)

    def teardown(self):
        self.writer.close()
        shutil.rmtree(self.folder)
        for context in reversed(self.context):
            context.__exit__(None, None, None)


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=rounds(12, 5_000), stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
