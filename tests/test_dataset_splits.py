from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import DatasetIndex
from pipeline.data.index import SplitPlan, difference, leakage_units, match_digests, match_texts, texts
from pipeline.data.splits import make_test_split, prior_sides
from pipeline.io.digests import content_digest, digests_from_hex

Image = tuple[str, str, str]
"""Content, label, group."""


def make_index(images: list[Image], splits: list[str] | None = None) -> DatasetIndex:
    groups = [group for *_, group in images]
    return DatasetIndex(
        Path("photos"),
        texts([f"{number:05d}.png" for number in range(len(images))]),
        texts([label for _, label, _ in images]),
        texts(splits or ["train"] * len(images)),
        texts(groups) if any(groups) else None,
        digests_from_hex(content_digest(content.encode()).hex() for content, *_ in images),
        np.ones(len(images), dtype=np.int64),
    )


def split(
    index: DatasetIndex, seed: int = 0, fraction: float = 0.2, before: DatasetIndex | None = None
) -> DatasetIndex:
    prior = np.full(len(index), -1, dtype=np.int8) if before is None else prior_sides(before, index)
    return replace(index, splits=make_test_split(index, SplitPlan(seed, fraction), prior))


def by_content(index: DatasetIndex) -> dict[bytes, str]:
    return {digest.tobytes(): side for digest, side in zip(index.digests, index.splits, strict=True)}


def plain(counts: dict[str, int]) -> list[Image]:
    return [(f"{label} {number}", label, "") for label, count in counts.items() for number in range(count)]


IMAGES = st.lists(
    st.tuples(st.integers(0, 25).map(str), st.sampled_from("abc"), st.sampled_from(["", "", "p", "q", "r", "s"])),
    min_size=1,
    max_size=40,
)


@settings(max_examples=75, deadline=None)
@given(images=IMAGES, seed=st.integers(0, 2**32 - 1), fraction=st.floats(0.01, 0.99))
def test_units_stay_whole_and_every_class_keeps_training_images(
    images: list[Image], seed: int, fraction: float
) -> None:
    index = split(make_index(images), seed, fraction)
    units = leakage_units(index.digests, index.groups)
    assert all(len(set(index.splits[units == unit])) == 1 for unit in set(units))
    assert set(index.select("train").labels) == set(index.labels)


@settings(max_examples=80, deadline=None)
@given(first=IMAGES, second=IMAGES, seed=st.integers(0, 9))
def test_images_added_or_renamed_move_no_other(first: list[Image], second: list[Image], seed: int) -> None:
    # No content joins two groups here: a copy that ties two units together must move one of them.
    def own(images: list[Image]) -> list[Image]:
        return [(f"{label}{content}", label, "") for content, label, _ in images]

    before = split(make_index(own(first)), seed)
    after = split(make_index(own(second) + own(first)), seed, before=before)
    was, now = by_content(before), by_content(after)
    assert all(now[content] == side for content, side in was.items())


def test_each_class_gives_its_share() -> None:
    index = split(make_index(plain({"a": 100, "b": 50, "c": 7, "d": 2, "e": 1})), fraction=0.3)
    held = Counter(index.select("test").labels)
    assert held == {"a": 30, "b": 15, "c": 2, "d": 1}


def test_the_share_holds_as_images_come() -> None:
    index = split(make_index(plain({"a": 20, "b": 20})))
    for count in (21, 24, 40, 200):
        index = split(make_index(plain({"a": count, "b": 20})), before=index)
        held = Counter(index.select("test").labels)
        assert held == {"a": round(0.2 * count), "b": 4}


def test_seeds_differ_and_one_seed_repeats() -> None:
    index = make_index(plain({"a": 200, "b": 200}))
    first, same, other = (split(index, seed).splits.tolist() for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_the_split_does_not_depend_on_the_order_or_the_names() -> None:
    images = plain({"a": 60, "b": 40})
    shuffled = [images[row] for row in np.random.default_rng(0).permutation(len(images))]
    assert by_content(split(make_index(images))) == by_content(split(make_index(shuffled)))


def test_a_class_of_which_only_test_images_are_left_is_drawn_anew() -> None:
    before = split(make_index(plain({"a": 20, "b": 20})))
    rows = [row for row in range(40) if before.labels[row] == "b" or before.splits[row] == "test"]
    after = split(replace(before.rows(np.array(rows)), splits=texts(["train"] * len(rows))), before=before)
    assert Counter(after.select("test").labels) == {"a": 1, "b": 4}
    assert Counter(after.select("train").labels) == {"a": 3, "b": 16}


def test_groups_are_drawn_whole() -> None:
    images = [(f"{group} {number}", "ab"[group % 2], f"g{group}") for group in range(40) for number in range(5)]
    index = split(make_index(images))
    assert Counter(index.select("test").labels) == {"a": 20, "b": 20}
    assert index.groups is not None
    assert len(set(index.groups[index.splits == "test"])) == 8


def test_a_group_too_large_for_the_test_stays_in_training() -> None:
    images = [(f"{number}", "a", "big" if number < 90 else f"g{number}") for number in range(100)]
    index = split(make_index(images), fraction=0.1)
    assert index.groups is not None
    assert "big" not in index.groups[index.splits == "test"]
    assert (index.splits == "test").sum() == 10


def test_a_changed_image_keeps_its_side_by_its_path() -> None:
    before = split(make_index(plain({"a": 40})))
    changed = [(f"a {number}" if number % 2 else f"new {number}", "a", "") for number in range(40)]
    after = split(make_index(changed), before=before)
    assert after.splits.tolist() == before.splits.tolist()


def test_validation_images_and_their_copies_stay() -> None:
    images = [*plain({"a": 30, "b": 30}), *[(f"a {number}", "a", "") for number in range(30)]]
    index = split(make_index(images, ["train"] * 60 + ["validation"] * 30))
    assert (index.splits[60:] == "validation").all()
    assert (index.splits[:30] == "train").all()
    assert (index.splits[30:60] == "test").sum() == 6


def test_the_shares_of_a_seed_look_random() -> None:
    """Over many seeds each image is in the test about as often as any other."""
    index = make_index(plain({"a": 50}))
    often = sum((split(index, seed).splits == "test").astype(int) for seed in range(300))
    assert often.sum() == 300 * 10
    assert 30 < often.min() < often.max() < 95  # 60 expected, standard deviation 7


class TestMatch:
    @settings(max_examples=100, deadline=None)
    @given(
        old=st.sets(st.text("abc\u00e9\U0001f600", max_size=3), max_size=30),
        new=st.sets(st.text("abc\u00e9\U0001f600", max_size=3), max_size=30),
    )
    def test_texts_are_found(self, old: set[str], new: set[str]) -> None:
        ours, theirs = sorted(old), sorted(new)
        expected = [ours.index(text) if text in old else -1 for text in theirs]
        assert match_texts(texts(ours), texts(theirs)).tolist() == expected
        assert match_texts(texts(ours), texts(ours)).tolist() == list(range(len(ours)))

    def test_digests_are_found_at_their_first_row(self) -> None:
        def digests(words: str) -> np.ndarray:
            return digests_from_hex(content_digest(word.encode()).hex() for word in words)

        assert match_digests(digests("abca"), digests("cxab")).tolist() == [2, -1, 0, 1]
        assert match_digests(digests("ab"), digests_from_hex([])).tolist() == []
        assert match_digests(digests_from_hex([]), digests("ab")).tolist() == [-1, -1]

    @pytest.mark.parametrize(
        ("old", "new", "expected"),
        [
            ({"a": "1"}, {"a": "1"}, (0, 0, 0, 0)),
            ({}, {"a": "1", "b": "2"}, (2, 0, 0, 0)),
            ({"a": "1", "b": "2"}, {}, (0, 0, 2, 0)),
            ({"a": "1"}, {"a": "2"}, (0, 1, 0, 0)),
            ({"a": "1"}, {"b": "1"}, (0, 0, 0, 1)),
            ({"a": "1"}, {"a": "1", "b": "1"}, (1, 0, 0, 0)),
            ({"a": "1", "b": "1"}, {"c": "1"}, (0, 0, 1, 1)),
            ({"a": "1", "b": "2"}, {"a": "2", "b": "1"}, (0, 2, 0, 0)),
        ],
    )
    def test_differences_are_counted(self, old: dict[str, str], new: dict[str, str], expected: tuple[int, ...]) -> None:
        def state(files: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
            return texts(list(files)), digests_from_hex(
                content_digest(content.encode()).hex() for content in files.values()
            )

        found = difference(*state(old), *state(new))
        assert (found.added, found.changed, found.removed, found.renamed) == expected
        assert bool(str(found)) == any(expected)
