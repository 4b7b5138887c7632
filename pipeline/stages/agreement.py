"""Agreement: how often a head says what the folder of an image is called, where folders are called like its classes."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data import DatasetIndex
from pipeline.data.failures import shown
from pipeline.data.index import INDEX_FILE
from pipeline.data.targets import Target
from pipeline.data.walk import is_folder
from pipeline.errors import first, number_of
from pipeline.evaluation.intervals import wilson
from pipeline.io.remote import absolute

MOST_CLASSES = 20
"""Classes that are told each, the worst first."""


@dataclass
class Agreement:
    """Images counted by the folder they lie in, right below one of `roots`, and by the label that each target's head gives them.

    Images that the head has learned from are counted apart: of those it says more than it can know.
    """

    roots: Sequence[str]
    targets: Mapping[str, Target]
    learned: frozenset[str] = frozenset()
    """Where the training images of the experiment lie."""
    said: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    """Target -> (folder, label) -> images."""
    of_training: Counter[str] = field(default_factory=Counter)
    """Folder -> images that were learned from."""

    @staticmethod
    def of(images: Sequence[Path], bundle: Path, targets: Mapping[str, Target]) -> Agreement:
        """Prepare for the images of some folders, and the bundle of an experiment or that experiment."""
        roots = [absolute(path) for path in images if is_folder(path)]
        place, learned = Path(os.path.abspath(bundle)), list[str]()
        found = next(
            (each / "dataset" for each in (place, *place.parents) if (each / "dataset" / INDEX_FILE).exists()), None
        )
        if roots and found is not None:
            index = DatasetIndex.read(found)
            root, taught = absolute(index.root), index.select("train", "validation")
            if any(f"{a}/".startswith(f"{b}/") for each in roots for a, b in ((root, each), (each, root))):
                learned = [f"{root}/{path}" for path in taught.paths]
        exclusive = {name: target for name, target in targets.items() if target.exclusive}
        return Agreement(roots, exclusive, frozenset(learned), {name: Counter() for name in exclusive})

    def add(self, path: str, target: str, label: str) -> None:
        """Count what the head of a target says of an image file."""
        if target not in self.said:
            return
        whole = absolute(path)
        root = next((each for each in self.roots if whole.startswith(f"{each}/")), None)
        folder, inside, _ = whole[len(root or "") + 1 :].partition("/")
        if root is None or not inside:
            return
        folder = unicodedata.normalize("NFC", shown(folder))
        if whole in self.learned:
            self.of_training[folder] += target == next(iter(self.said))
        else:
            self.said[target][folder, label] += 1

    def lines(self, target: str) -> Iterator[str]:
        """Say how many are right, overall and by class; nothing where no folder is called like a class."""
        if target not in self.said:
            return
        counts, classes = self.said[target], {*self.targets[target].classes}
        images, right, wrong = Counter[str](), Counter[str](), dict[str, Counter[str]]()
        for (folder, label), number in counts.items():
            images[folder] += number
            right[folder] += number * (folder == label)
            wrong.setdefault(folder, Counter())[label] += number * (folder != label)
        known = [folder for folder in images if folder in classes]
        if not known and not classes & {*self.of_training}:
            return
        total, correct = sum(images[each] for each in known), sum(right[each] for each in known)
        if total:
            low, high = wilson(correct, total)
            yield (
                f"accuracy {100 * correct / total:.1f} % [{100 * low:.1f}, {100 * high:.1f}]: {correct:,} of {number_of(total, 'image')} are labelled as "
                "their folders are called"
            )
        told = []
        for name in sorted(known, key=lambda name: (right[name] / images[name], -images[name], name)):
            often = [f"{count:,} as {label}" for label, count in wrong[name].most_common(2) if count]
            told.append(f"  {name}: {right[name]:,} of {images[name]:,}" + f", {' and '.join(often)}" * bool(often))
        yield from first(told, MOST_CLASSES)
        if learned := sum(self.of_training[name] for name in classes):
            yield f"not counted: {number_of(learned, 'training image')}, which the head has learned from"
        if others := sorted({*images} - classes):
            left = number_of(sum(images[each] for each in others), "image")
            yield f"not counted: {left} in folders that are no known class: {', '.join(first(others, 5))}"
