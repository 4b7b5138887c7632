"""Look-ups in the table agree with a dictionary, for digests as they are and for tables a stranger made up."""

import numpy as np
import pytest

from pipeline.store.table import Table, sorted_table


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000, 30_000])
@pytest.mark.parametrize("highest", [2**64, 1000, 5], ids=["spread evenly", "all low", "few first halves"])
def test_look_ups_agree_with_a_dictionary(size, highest):
    random = np.random.default_rng(size)
    content = np.unique(random.integers(0, highest, (size, 2), dtype=np.uint64), axis=0)
    count = len(content)
    table = Table(sorted_table(content, np.zeros(count), np.arange(count)))
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


def test_adding_to_a_sorted_table_gives_what_sorting_everything_gives():
    random = np.random.default_rng(3)
    content = random.integers(0, 50, (2000, 2), dtype=np.uint64)
    content = np.unique(content, axis=0)[random.permutation(len(np.unique(content, axis=0)))]
    place = np.arange(len(content))
    whole = sorted_table(content, np.zeros(len(content)), place)
    half = sorted_table(content[:900], np.zeros(900), place[:900])
    old = (half[:2].T, half[2], half[3])
    new = (content[900:], np.zeros(len(content) - 900), place[900:])
    joined = [np.concatenate([before, after]) for before, after in zip(old, new, strict=True)]
    assert np.array_equal(sorted_table(*joined), whole)
