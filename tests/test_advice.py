"""The advice: the rule is learned from cells alone, says nothing beyond them, and recommends what is worth its price."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from documents import rewrite
from judged_advice import judged
from photos import make_photos, small_config
from report_experiment import material, row, section, words

from pipeline.cli import cli
from pipeline.config import Config, dump_yaml
from pipeline.evaluation import advice
from pipeline.evaluation.advice import ARMS, LABEL, OTHER, STOP, Advice, Way, fit, recommend
from pipeline.experiment import ADVICE, Artifacts, read_document
from pipeline.finetuning.pilot import statistics_shift
from pipeline.stages import advise as stage
from pipeline.stages import extract, finetune, train_heads
from pipeline.stages.advise import probes

LAST, ALL = advice.TRAIN


def made(drop: float, share: float, cv: float = 0.8, shift: float = 0.5) -> dict:
    """Return a cell in which both arms take a share of the error away."""
    signs = {"images": 300, "copies": 0, "classes": 3, "train": 0.95, "linear": cv, "half": cv - 0.05}
    truth = {arm: {"test": 0.8 + share * (1 - cv), "minutes": 1.0} for arm in ARMS}
    return {
        "signs": {**signs, "rbf": cv, "neighbours": cv, "cv": cv},
        "pilot": {"shift": shift, "start": 1.0, "losses": [1.1 - drop, 1 - drop]},
        "truth": {"frozen": 0.8, **truth},
    }


DROPS = np.linspace(-0.5, 0.5, 21)


def test_the_rule_learns_what_a_sign_tells_and_how_sure_that_is() -> None:
    rule = fit([made(drop, drop) for drop in DROPS])
    for drop in (-0.3, 0.0, 0.4):
        for arm, expected in rule.expect(made(drop, 0.0)).items():
            assert expected.gain == pytest.approx(0.2 * drop, abs=0.02), arm
            assert expected.interval[0] < expected.gain < expected.interval[1]
    rng = np.random.default_rng(0)
    noisy = fit([made(drop, drop + rng.normal(0, 0.2)) for drop in DROPS])
    widths = [np.diff(each.expect(made(0.1, 0.0))["all"].interval)[0] for each in (rule, noisy)]
    assert widths[1] > 3 * widths[0]


def test_intervals_hold_four_of_five_gains_of_cells_that_the_rule_has_not_seen() -> None:
    rng, inside = np.random.default_rng(1), 0
    for _ in range(60):
        drops = rng.uniform(-0.5, 0.5, 21)
        cells = [made(drop, drop + rng.normal(0, 0.2)) for drop in drops]
        new, true = fit(cells[:-1]).expect(cells[-1])["all"], cells[-1]["truth"]["all"]["test"] - 0.8
        inside += new.interval[0] <= true <= new.interval[1]
    assert 0.68 <= inside / 60 <= 0.95


def test_nothing_is_said_of_what_is_unlike_every_cell() -> None:
    rule = fit([made(drop, drop) for drop in DROPS])
    assert rule.outside(made(0.7, 0.0)) == ()  # a quarter of the range beyond is let pass
    assert rule.outside(made(2.0, 0.0)) == (
        "share of the loss that the pilot took away: 2.00, measured from -0.50 to 0.50",
    )


@pytest.mark.parametrize(
    ("gains", "taken"),
    [
        ({}, STOP),
        ({LABEL: 0.03}, LABEL),
        ({LABEL: 0.004}, STOP),
        ({LABEL: 0.03, ALL: 0.01}, ALL),
        ({LAST: 0.02, ALL: 0.024}, LAST),
        ({LAST: 0.02, ALL: 0.03}, ALL),
        ({OTHER: 0.028, ALL: 0.03}, OTHER),
        ({LAST: -0.02, ALL: 0.004}, STOP),
    ],
)
def test_the_largest_gain_is_taken_unless_a_cheaper_way_brings_nearly_as_much(gains: dict, taken: str) -> None:
    minutes = {LAST: 2.0, ALL: 5.0}
    ways = [Way(STOP, 0.0)] + [Way(name, gain, minutes=minutes.get(name, 0.0)) for name, gain in gains.items()]
    assert recommend(ways).name == taken


def test_the_cells_that_are_shipped_bear_the_advice_out_each_by_the_others() -> None:
    found = judged(advice.cells())
    assert len(found.names) >= 12
    assert np.mean(found.regrets) <= 0.01
    assert found.covered >= 0.75
    assert found.spared >= 0.8
    assert found.worth["advice"] >= max(found.worth["always"], found.worth["never"])


def test_simple_heads_judge_images_that_they_have_not_seen() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 40)
    noise = rng.normal(size=(80, 60)).astype(np.float32)
    found = probes(noise, y, None, 0)
    assert found["train"] > 0.9
    assert all(found[name] < 0.7 for name in ("linear", "neighbours", "rbf", "half"))
    ring = rng.normal(size=(200, 2)).astype(np.float32)
    curved = probes(ring, (np.linalg.norm(ring, axis=1) > 1.2).astype(np.int64), None, 0)
    assert curved["rbf"] > curved["linear"] + 0.2


def test_the_shift_is_what_batch_norm_sees_of_other_images() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU())
    images = torch.randn(64, 3, 16, 16)
    assert statistics_shift(network, images) == pytest.approx(0, abs=0.05)
    assert statistics_shift(network, images + 2) == pytest.approx(2, abs=0.05)
    assert statistics_shift(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Conv2d(3, 1, 1)), images) is None


# ---- the stage


@pytest.fixture(scope="module")
def advised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Advice]:
    """An experiment on a network that ends in a linear layer, with its advice."""
    root = tmp_path_factory.mktemp("advised")
    config = small_config(make_photos(root / "photos"), root / "output")
    section = config.backbones[0].model_copy(update={"name": "shufflenet_v2_x0_5"})
    short = config.finetune.model_copy(update={"steps": 12, "batch_size": 4})
    config = config.model_copy(update={"backbones": (section,), "heads": config.heads[:1], "finetune": short})
    extract.run(config)
    train_heads.run(config)
    return config, stage.run(config)


def test_every_way_has_its_price_and_the_pilot_is_cheap(advised: tuple[Config, Advice]) -> None:
    _, found = advised
    assert [way.name for way in found.ways] == [STOP, LABEL, OTHER, LAST, ALL]
    assert found.recommended in [way.name for way in found.ways]
    last, everything = found.ways[3:]
    assert 0 < last.minutes <= everything.minutes
    text = "\n".join(found.summary_lines())
    assert f"advice     {found.recommended}" in text
    if found.outside:
        assert last.gain is everything.gain is None
        assert "Nothing is said of fine-tuning" in text


def test_the_same_question_is_answered_once_and_another_anew(advised: tuple[Config, Advice]) -> None:
    config, found = advised
    path = Artifacts(config.output).advice
    before = path.stat().st_mtime_ns
    assert stage.run(config) == found
    assert path.stat().st_mtime_ns == before
    assert read_document(path, ADVICE)["signs"]["signs"]["classes"] == 3
    rewrite(path, json.loads(path.read_text()) | {"key": "another"})
    assert stage.run(config).ways[0] == found.ways[0]
    assert path.stat().st_mtime_ns > before


def test_auto_trains_what_is_advised_and_nothing_else(
    advised: tuple[Config, Advice], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, _ = advised
    auto = config.model_copy(update={"finetune": config.finetune.model_copy(update={"unfreeze": "auto"})})
    path = Artifacts(config.output).advice
    kept = json.loads(path.read_text())
    rewrite(path, kept | {"advice": kept["advice"] | {"recommended": STOP}})
    assert finetune.run(auto) is None
    written = tmp_path / "config.yaml"
    written.write_text(dump_yaml(auto, tmp_path), encoding="utf-8")
    done = CliRunner().invoke(cli, ["finetune", str(written)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "Nothing is trained, as finetune: auto follows the advice" in done.output
    rewrite(path, kept | {"advice": kept["advice"] | {"recommended": LAST}})
    plans = []
    monkeypatch.setattr(finetune, "choose", lambda asked, files: plans.append(asked.finetune.unfreeze) or 1 / 0)
    for asked in (auto, config):
        with pytest.raises(ZeroDivisionError):
            finetune.run(asked)
    assert plans == [((0.0, "last_stage"),), ((0.0, "all"),)]


def test_the_page_says_what_to_do_and_why() -> None:
    ways = (Way(STOP, 0.0, (0.0, 0.0)), Way(ALL, 0.021, (0.004, 0.04), minutes=3.0))
    given = Advice("lite0", ALL, ways, (), 17, 0.041, {"drop": 0.1})
    shown = dataclasses.replace(material([row("ridge", 0.9)]), advice=given)
    text = words(section("advice", shown))
    assert "Advice: fine-tune everything." in text
    assert "fine-tune everything +2.1 [+0.4, +4.0] 3.0 minutes measured cases" in text
    assert section("advice", material([row("ridge", 0.9)])) == ""
