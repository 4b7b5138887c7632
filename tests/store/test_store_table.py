"""Look-ups in the table agree with a dictionary, for digests as they are and for tables a stranger made up."""

import numpy as np
import pytest

from pipeline.store.reader import Table


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000, 30_000])
@pytest.mark.parametrize("highest", [2**64, 1000, 5], ids=["spread evenly", "all low", "few first halves"])
def test_look_ups_agree_with_a_dictionary(size, highest):
    random = np.random.default_rng(size)
    content = np.unique(random.integers(0, highest, (size, 2), dtype=np.uint64), axis=0)
    count = len(content)
    table = Table.of([content])
    known = {tuple(row): place for place, row in enumerate(content.tolist())}
    asked = np.concatenate([
        content[random.integers(0, count, 1 + count // 100)],
        random.integers(0, 2**64, (20, 2), dtype=np.uint64),
        random.integers(0, 6, (20, 2), dtype=np.uint64),
        np.array([[2**64 - 1] * 2, [0, 0]], np.uint64),
    ])  # fmt: skip
    expected = [known.get(tuple(row), -1) for row in asked.tolist()]
    assert table.find(asked).tolist() == expected
    assert [int(table.find(row[None])[0]) for row in asked] == expected
    assert table.find(content).tolist() == list(range(count))


def test_a_table_of_several_segments_says_where_each_content_lies():
    random = np.random.default_rng(3)
    content = np.unique(random.integers(0, 50, (2000, 2), dtype=np.uint64), axis=0)
    content = content[random.permutation(len(content))]
    table = Table.of([content[:900], content[:0], content[900:]])
    segment, row = (line[table.find(content)] for line in table.lines[2:])
    assert segment.tolist() == [0] * 900 + [2] * (len(content) - 900)
    assert row.tolist() == [*range(900), *range(len(content) - 900)]
    assert np.array_equal(table.in_file_order(), content)
