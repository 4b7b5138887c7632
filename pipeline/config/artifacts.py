"""Where the files of one experiment are."""

from __future__ import annotations

from pathlib import Path


class Artifacts:
    """Names of the files of one experiment; the one place that knows them."""

    def __init__(self, output: str | Path) -> None:
        self.root = Path(output)
        self.config = self.root / "config.yaml"
        self.dataset = self.root / "dataset"
        """index.csv, ledger.csv and the stat cache."""
        self.stores = self.root / "features"
        self.specs = self.root / "specs.json"
        """What the embeddings of a config are, so that a run with nothing to do loads no network."""
        self.features = self.root / "features.json"
        """What stage one made: one record per embedding, with its store and identity."""
        self.leaderboard = self.root / "leaderboard.json"
        self.leaderboard_md = self.root / "leaderboard.md"

    def store(self, embedding: str, fingerprint: str) -> Path:
        """The feature store of one embedding."""
        return self.stores / f"{embedding}-{fingerprint[:12]}.store"

    def trials(self, embedding: str, head: str) -> Path:
        """The journal of one search."""
        return self.root / "trials" / embedding / f"{head}.jsonl"

    def bundle(self, embedding: str, head: str) -> Path:
        """The folder of one saved head."""
        return self.root / "heads" / embedding / head
