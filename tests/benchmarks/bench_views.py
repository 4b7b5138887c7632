"""Views: what averaging over a flip, a crop and other colours brings on photos of clothes, what learning from them does, and what they cost.

    python tests/benchmarks/bench_views.py CLOTHING [--output build/benchmarks/views]

CLOTHING has folders of photos by kind in train/, validation/ and test/. Heads learn from 100 and from 400 photos by efficientnet_lite0
at 128 pixels, and are judged by 400 others. Prints a table of accuracies, and the sentences of the leaderboard with the cost.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from advisor_cells import lite0
from bench_domains import clothing

from pipeline.stages import extract, settings, train_heads

TEST = 400
SIZES = (100, 400)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clothing", type=Path)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/views"))
    given = parser.parse_args()
    output = given.output.resolve()
    photos = list(clothing(given.clothing, TEST + max(SIZES)))
    for size in SIZES:
        for number, (label, image) in enumerate(photos[: TEST + size]):
            folder = output / str(size) / ("test" if number < TEST else "train") / label
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number:04d}.png")
        section = lite0(128).replace("{name", "{views: [flip, crop, colour], name", 1)
        asked = [
            f"output={output}/experiment-{size}",
            f"store={output}/features",
            f"backbones=[{section}]",
            "baselines=[majority]",
            "heads=[logistic_regression, ridge]",
            "tuning.trials=8",
        ]
        config = settings.load(output / str(size), asked)
        extract.run(config)
        board = train_heads.run(config).leaderboard
        print(f"\n{size} training images\n\n| head | out of fold | test |\n|---|--:|--:|")
        for row in (board.best, *(row for rows in board.apart for row in rows)):
            if row.test:
                print(f"| {row.head} | {100 * row.cv_mean:.1f} | {100 * row.test.accuracy:.1f} |")
        print("", *board.provenance["views"]["notes"], sep="\n- ", flush=True)


if __name__ == "__main__":
    main()
