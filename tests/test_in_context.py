"""TabICL with weights of no use, written as its checkpoints are: how it is named, refused, judged, saved and loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import Config, HeadConfig, TuningConfig
from pipeline.errors import HeadError
from pipeline.export import bundle as bundles
from pipeline.heads import in_context, resolve, resolve_all, table
from pipeline.heads.tuning import make_folds, tune
from pipeline.stages import train_heads

CONFIG = [HeadConfig(name="tabicl")]
SMALL = {
    "max_classes": 4, "embed_dim": 8, "col_num_blocks": 1, "col_nhead": 2, "col_num_inds": 4, "row_num_blocks": 1,
    "row_nhead": 2, "row_num_cls": 2, "icl_num_blocks": 1, "icl_nhead": 2, "ff_factor": 1, "zero_init": False,
}  # fmt: skip


def write(path: Path, seed: int = 0, **changed: int) -> Path:
    torch = pytest.importorskip("torch")
    network = pytest.importorskip("tabicl._model.tabicl").TabICL
    torch.manual_seed(seed)
    config = {**SMALL, **changed}
    torch.save({"config": config, "state_dict": network(**config).state_dict()}, path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("tabicl")
    path = write(tmp_path / "small.ckpt")
    monkeypatch.setenv(in_context.VARIABLE, str(path))
    return path


def test_it_is_tuned_only_where_it_is_named_and_the_list_says_what_it_needs() -> None:
    assert "tabicl" not in [head.name for head in resolve_all(None)]
    assert any(line.startswith("tabicl ") and "needs manyheads[tabicl]" in line for line in table.listed())
    with pytest.raises(HeadError, match="unknown head for regression 'tabicl'"):
        resolve(CONFIG[0], "regression")


def test_without_the_package_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_context.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(HeadError, match=r"is not installed here; run `pip install 'manyheads\[tabicl\]'`"):
        resolve(CONFIG[0])


def test_without_a_fitting_file_a_line_says_which_is_expected(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content, message in (
        ("missing.ckpt", None, r"there is no file .*missing\.ckpt; get a checkpoint of TabICL's classifier"),
        ("text.ckpt", b"no weights", r"text\.ckpt is not a TabICL checkpoint \("),
        ("numbers.ckpt", write(tmp_path / "n", max_classes=0).read_bytes(), "is a checkpoint for regression"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        monkeypatch.setenv(in_context.VARIABLE, str(tmp_path / name))
        with pytest.raises(HeadError, match=message):
            resolve(CONFIG[0])
    monkeypatch.delenv(in_context.VARIABLE)
    with pytest.raises(HeadError, match="TABICL_CHECKPOINT is not set"):
        resolve(CONFIG[0])


def test_a_file_that_would_run_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("tabicl")

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"config": Trap(), "state_dict": {}}, tmp_path / "trap.ckpt")
    monkeypatch.setenv(in_context.VARIABLE, str(tmp_path / "trap.ckpt"))
    with pytest.raises(HeadError, match="is not a TabICL checkpoint"):
        resolve(CONFIG[0])
    assert not (tmp_path / "ran").exists()


def test_one_trial_gives_every_image_a_probability_of_each_class(checkpoint: Path, tmp_path: Path) -> None:
    X, y = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32), np.arange(24) % 3
    tuning = TuningConfig(trials=5, folds=2, jobs=1)
    run = tune(resolve(CONFIG[0]), X, y, make_folds(y, 2, 0), tuning, 0, tmp_path / "journal")
    assert len(run.trials) == 1
    assert run.best.params == {}
    fitted = resolve(CONFIG[0]).build(0).fit(X, y)
    shares = fitted.predict_proba(X)
    assert shares.shape == (24, 3)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    np.testing.assert_array_equal(fitted.predict(X), shares.argmax(axis=1))
    np.testing.assert_allclose(fitted.predict_proba(X[:5]), shares[:5], atol=1e-6)


def test_a_leaderboard_has_it_and_its_bundle_runs_no_code_and_asks_for_the_same_weights(
    checkpoint: Path, experiment: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    shutil.copytree(experiment.output, output)
    heads = (*CONFIG, HeadConfig(name="nearest_centroid"))
    tuning = experiment.tuning.model_copy(update={"pca": 2, "jobs": 1, "folds": 2})
    changes = {"output": str(output), "heads": heads, "baselines": ("majority",), "tuning": tuning}
    config = experiment.model_copy(update=changes)
    board = train_heads.run(config).leaderboard
    row = next(row for row in board.rows if row.head == "tabicl")
    assert row.trials == 1
    folder = next(
        path.parent for path in output.rglob("bundle.json") if json.loads(path.read_text())["head"] == "tabicl"
    )
    assert json.loads((folder / "bundle.json").read_text())["runs_code_when_loaded"] is False
    bundle = bundles.load(folder)
    X = np.random.default_rng(1).normal(size=(3, bundle.estimator.n_features_in_)).astype(np.float32)
    assert bundle.predict(X)[1].shape == (3, 3)
    monkeypatch.setenv(in_context.VARIABLE, str(write(tmp_path / "other.ckpt", seed=1)))
    with pytest.raises(HeadError, match=r"it was made with another file of weights than .*other\.ckpt"):
        bundle.predict(X)
