"""The trainer: its schedule and batches, what it freezes, what it chooses, and that it goes on where it was stopped."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from pipeline.config import FinetuneConfig
from pipeline.errors import HeadError, TrainingError
from pipeline.finetuning import trainer
from pipeline.finetuning.batches import Data, LabelledImages, augmented, loss_of, rows_at, to_float
from pipeline.finetuning.handover import put_head
from pipeline.finetuning.plan import (
    check_plan,
    describe_plan,
    fold_norms,
    last_linear,
    modules_below,
    set_trainable,
    stages_of,
)
from pipeline.finetuning.result import interpolate, return_path
from pipeline.finetuning.trainer import (
    TrainingTask,
    copy_weights,
    evaluate,
    make_optimizer,
    make_schedule,
    predict_logits,
    steps_of,
    train,
)
from pipeline.heads import as_layer

CPU = torch.device("cpu")
BASE = FinetuneConfig(steps=6, batch_size=8, augment="flip", rate=0.03)


def but(settings: FinetuneConfig, **changes: object) -> FinetuneConfig:
    return FinetuneConfig(**{**settings.model_dump(), **changes})


class Toy(nn.Module):
    """Three stages and a head, as torchvision's networks have them."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(*(self._stage(8 * 2**i) for i in range(3)))
        self.fc = nn.Linear(64, classes)

    @staticmethod
    def _stage(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(self.stem(images)).mean((2, 3)))


def pictures(count: int, seed: int = 0) -> LabelledImages:
    """Stripes along, stripes across, and blobs, in noise: what differs is the shape, not the colour."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    y, x = np.mgrid[0:16, 0:16]
    shapes = np.stack([(y // 2) % 2, (x // 2) % 2, (x // 2 + y // 2) % 2]) * 120
    noise = rng.integers(0, 100, (count, 16, 16, 3))
    return LabelledImages((shapes[labels][..., None] + noise).astype(np.uint8), labels.astype(np.int64))


@pytest.fixture(scope="module")
def data() -> Data:
    return Data(pictures(48), pictures(24, seed=1), 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def make_task(
    settings: FinetuneConfig = BASE, scope: str = "all", seed: int = 0, precision: str = "fp32", evaluations: int = 2
) -> TrainingTask:
    torch.manual_seed(seed)
    network = Toy()
    with torch.no_grad():  # statistics that are not those of a fresh network
        network.train()(torch.randn(32, 3, 16, 16))
    stages = stages_of(network, (16, 16))
    plan = check_plan([(0, scope)], stages)
    return TrainingTask(network, stages, plan, settings, settings.steps, precision, seed, CPU, evaluations)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first) and set(first) == set(second)


# ---- settings


def factors(settings: FinetuneConfig) -> list[float]:
    """The share of its full rate that the head has at each step."""
    task = make_task(but(settings, rate=1.0))
    optimizer = make_optimizer(task)
    schedule = make_schedule(task, optimizer)
    found = []
    for _ in range(task.steps):
        found.append(schedule.get_last_lr()[-1])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_rises_in_the_warm_up_and_falls_to_nothing() -> None:
    found = factors(but(BASE, steps=100))
    assert found[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert found[10:] == pytest.approx([0.5 * (1 + np.cos(np.pi * step / 90)) for step in range(90)])
    assert factors(but(BASE, steps=4)) == pytest.approx([0.5 * (1 + np.cos(np.pi * step / 4)) for step in range(4)])


def test_steps_and_evaluations_go_by_the_size_of_the_data() -> None:
    assert [steps_of(FinetuneConfig(), n) for n in (100, 20_000, 10**6)] == [500, 10_000, 20_000]
    assert steps_of(BASE, 10**6) == 6
    task = replace(make_task(), steps=500, evaluations=TrainingTask.evaluations)
    assert (task.evaluate_every, replace(task, steps=7).evaluate_every) == (50, 1)


# ---- batches


def test_every_epoch_holds_every_image_once_however_it_is_cut() -> None:
    whole = rows_at(0, 30, 10, seed=3)
    assert [sorted(whole[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert list(whole[:10]) != list(whole[10:20])
    pieces = np.concatenate([rows_at(start, 7, 10, seed=3) for start in (0, 7, 14)])
    assert list(pieces) == list(whole[:21])
    assert list(rows_at(0, 10, 10, seed=4)) != list(whole[:10])


def test_pixels_become_normalised_channels_last() -> None:
    pixels = torch.full((2, 4, 4, 3), 255, dtype=torch.uint8)
    images = to_float(pixels, (0.5, 0.0, 1.0), (0.25, 1.0, 0.5))
    assert images[0, :, 0, 0].tolist() == pytest.approx([2.0, 1.0, 0.0])
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_crops_keep_their_share_of_a_ramp_and_mirror_half_of_them() -> None:
    torch.manual_seed(0)
    ramp = np.broadcast_to(np.linspace(0, 255, 32).astype(np.uint8)[:, None], (64, 32, 32, 3)).copy()
    unscaled = Data(pictures(1), pictures(1), 3, (0.0,) * 3, (1.0,) * 3)
    out = augmented(ramp, but(BASE, augment="crop"), CPU, unscaled)
    steps = out[:, 0, 16, 1:] - out[:, 0, 16, :-1]
    rising, falling = (steps >= 0).all(1), (steps <= 0).all(1)
    assert (rising | falling).all()
    assert 16 < rising.sum() < 48
    kept = out.amax((1, 2, 3)) - out.amin((1, 2, 3))
    assert kept.min() > (0.25 * 3 / 4) ** 0.5 - 0.1
    assert kept.max() > 0.9


def test_flips_mirror_about_half_of_the_images_and_nothing_else() -> None:
    torch.manual_seed(0)
    pixels = pictures(40).pixels
    out = augmented(pixels, BASE, CPU, Data(pictures(1), pictures(1), 3, (0.0,) * 3, (1.0,) * 3))
    plain = to_float(torch.from_numpy(pixels), (0.0,) * 3, (1.0,) * 3)
    kept = [torch.equal(a, b) for a, b in zip(out, plain, strict=True)]
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(out, plain, strict=True)]
    assert all(a or b for a, b in zip(kept, mirrored, strict=True))
    assert 8 < sum(mirrored) < 32


# ---- stages


def test_stages_of_the_toy_and_of_torchvisions_networks() -> None:
    from pipeline.io.vision import torchvision

    def names(network: nn.Module, size: int) -> list[tuple[str, tuple[str, ...]]]:
        return [(stage.name, stage.modules) for stage in stages_of(network, (size, size))]

    assert [name for name, _ in names(Toy(), 16)] == ["stem", "stage1", "stage2", "stage3", "head"]
    assert names(torchvision.models.resnet18(), 64) == [
        ("stem", ("conv1", "bn1")),
        ("stage1", ("layer1",)),
        ("stage2", ("layer2",)),
        ("stage3", ("layer3",)),
        ("stage4", ("layer4",)),
        ("head", ("fc",)),
    ]
    mobile = dict(names(torchvision.models.mobilenet_v2(width_mult=0.35), 64))
    assert mobile["stem"] == ("features.0",)
    assert mobile["head"] == ("classifier.1",)
    assert len(mobile) == 7  # five resolutions between stem and head, the stem's own included
    with torch.device("meta"):  # to fill its hundred million weights takes a second
        large = torchvision.models.vgg11()
    vgg = names(large.to_empty(device="cpu"), 64)
    assert [name for name, _ in vgg] == ["stem", *(f"stage{number}" for number in range(1, 7)), "head"]
    assert vgg[2] == ("stage2", ("features.6", "features.8"))
    vit = torchvision.models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5)
    # The norm behind a transformer's blocks is trained with the last of them.
    assert names(vit, 32)[-2:] == [
        ("stage3", ("encoder.layers.encoder_layer_2", "encoder.ln")), ("head", ("heads.head",)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "head"),
    [
        ("mobilenetv3_small_050", {}, "classifier"),  # a linear layer of timm's own
        ("regnety_002", {}, "head.fc"),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2, "num_classes": 5}, "head"),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2, "num_classes": 0}, None),
        ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 2}, None),  # the mean of two layers
    ],
)
def test_a_network_that_names_its_last_layer_is_believed(name: str, arguments: dict, head: str | None) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model(name, **arguments).eval()
    if head is None:  # the last linear layer is one within its blocks
        with pytest.raises(TrainingError, match="no linear layer to give one score per class"):
            last_linear(network)
        return
    assert last_linear(network) == head
    assert stages_of(network, (56, 56))[-1].modules == (head,)
    rng = np.random.default_rng(0)
    layer = rng.normal(size=(3, network.get_submodule(head).in_features)), rng.normal(size=3)
    pixels = rng.integers(0, 256, (2, 56, 56, 3)).astype(np.uint8)
    entering: list[torch.Tensor] = []
    put_head(network, layer)
    network.get_submodule(head).register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0]))
    logits = predict_logits(network, pixels, (0.5,) * 3, (0.25,) * 3, CPU)
    np.testing.assert_allclose(logits, entering[0].numpy() @ layer[0].T + layer[1], rtol=1e-4, atol=1e-4)


def test_every_parameter_is_in_one_group_and_norms_and_biases_do_not_decay() -> None:
    task = make_task(but(BASE, rate=1.0))
    groups = make_optimizer(task).param_groups
    names = {id(parameter): name for name, parameter in task.network.named_parameters()}
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(names)
    assert {group["weight_decay"] for group in groups} == {0.01, 0.0}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {name for name, p in task.network.named_parameters() if p.ndim > 1}
    rates = {group["stage"]: group["lr"] for group in groups}
    assert rates == {"stem": 0.0625, "stage1": 0.125, "stage2": 0.25, "stage3": 0.5, "head": 1.0}


def test_a_network_without_a_last_layer_is_refused() -> None:
    with pytest.raises(TrainingError, match="no linear layer to give one score per class"):
        stages_of(nn.Sequential(nn.Conv2d(3, 4, 3)), (8, 8))


def test_a_plan_is_read_and_told_with_its_parameters() -> None:
    network = Toy()
    stages = stages_of(network, (16, 16))
    plan = check_plan(
        [
            (0, "head"),
            (0.2, "last_stage"),
            (0.5, "all"),
        ],
        stages,
    )
    assert plan == ((0, 4), (0.2, 3), (0.5, 0))
    lines = describe_plan(plan, stages, network, 100)
    assert lines[0] == "from step 0: head (195 of 73,451 parameters)"
    assert lines[2].startswith("from step 50: stem, stage1, stage2, stage3, head (73,451 of")


def test_a_plan_that_closes_a_stage_or_names_none_is_refused_with_all_its_problems() -> None:
    plan = [(0.0, "all"), (0.1, "head"), (0.5, "layer4")]
    with pytest.raises(TrainingError, match="the plan cannot be followed") as error:
        check_plan(plan, stages_of(Toy(), (16, 16)))
    assert error.value.problems == (
        "step 3: the network has no stage 'layer4'; allowed: head, last_stage, all, stem, stage1, stage2, stage3",
        "freezes stem again at 0.1; expected each step to train the same stages or more",
    )


@pytest.mark.parametrize("scope", ["head", "last_stage", "stage2", "all"])
def test_what_is_frozen_stays_bit_for_bit(data: Data, tmp_path: Path, scope: str) -> None:
    task = make_task(but(BASE, steps=3), scope)
    before = copy_weights(task.network)
    after = train(task, data, tmp_path, "x").weights
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    lowest = {"head": 4, "last_stage": 3, "stage2": 2, "all": 0}[scope]
    open_modules = [module for stage in task.stages[lowest:] for module in stage.modules]
    inside = {name for name in before if any(name.startswith(f"{module}.") for module in open_modules)}
    norms = tuple(name.removesuffix("num_batches_tracked") for name in before if name.endswith("num_batches_tracked"))
    assert moved == {name for name in inside if not name.startswith(norms)}


def test_plan_opens_stages_on_the_way(data: Data) -> None:
    task = make_task(but(BASE, steps=4))
    task = replace(task, plan=check_plan([(0, "head"), (0.5, "all")], task.stages))
    stem, optimizer, seen = task.network.stem[0].weight, make_optimizer(task), []
    for step in range(4):
        before = stem.detach().clone()
        trainer.train_step(task, data, optimizer, torch.amp.GradScaler("cpu", enabled=False), step)
        seen.append(torch.equal(stem, before))
    assert seen == [True, True, False, False]


# ---- hand-over


@pytest.fixture(scope="module")
def vectors() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(90, 64)) * rng.uniform(0.1, 5, 64) + rng.normal(size=64)
    X[:, 5] = 3.0  # a dead feature
    return X.astype(np.float32), rng.integers(0, 3, 90)


@pytest.mark.parametrize(
    "steps",
    [
        (StandardScaler(),),
        (StandardScaler(with_mean=False),),
        (PCA(10, random_state=0),),
        (StandardScaler(), PCA(10, whiten=True, random_state=0)),
        (PCA(20, random_state=0), StandardScaler()),
        (),
    ],
    ids=["scaler", "scale", "pca", "scaler+whitening", "pca+scaler", "bare"],
)
@pytest.mark.parametrize(
    "head", [LogisticRegression(C=0.1, max_iter=2000), RidgeClassifier()], ids=["logistic", "ridge"]
)
def test_folded_scores_are_the_pipelines(vectors: tuple[np.ndarray, np.ndarray], steps: tuple, head: object) -> None:
    X, y = vectors
    pipeline = make_pipeline(*steps, head).fit(X, y)
    weights, bias = as_layer(pipeline)
    assert weights.shape == (3, 64)
    np.testing.assert_allclose(X @ weights.T + bias, pipeline.decision_function(X), atol=1e-4)


def test_two_classes_get_two_rows_with_the_same_probability(vectors: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = vectors[0], vectors[1] > 0
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y)
    weights, bias = as_layer(pipeline)
    probabilities = torch.softmax(torch.from_numpy(X @ weights.T + bias), 1)
    np.testing.assert_allclose(probabilities, pipeline.predict_proba(X), atol=1e-6)


@pytest.mark.parametrize("dim", [1, 64])
def test_two_classes_of_a_ridge_get_two_rows_with_its_scores(vectors: tuple[np.ndarray, np.ndarray], dim: int) -> None:
    """Its coefficients have one dimension less than those of other heads."""
    X, y = vectors[0][:, :dim], vectors[1] > 0
    pipeline = make_pipeline(StandardScaler(), RidgeClassifier()).fit(X, y)
    weights, bias = as_layer(pipeline)
    assert (weights.shape, bias.shape) == ((2, dim), (2,))
    scores = X @ weights.T + bias
    np.testing.assert_allclose(scores[:, 1] - scores[:, 0], pipeline.decision_function(X), atol=1e-5)


def test_the_network_starts_with_the_heads_scores(data: Data, vectors: tuple[np.ndarray, np.ndarray]) -> None:
    network = Toy(classes=10).eval()
    features: list[torch.Tensor] = []
    hook = network.fc.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    predict_logits(network, data.train.pixels, data.mean, data.std, CPU)
    hook.remove()
    X = torch.cat(features).numpy()
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1)).fit(X, data.train.y)
    put_head(network, as_layer(pipeline))
    logits = predict_logits(network, data.train.pixels, data.mean, data.std, CPU)
    np.testing.assert_allclose(logits, pipeline.decision_function(X), atol=1e-4)


def test_heads_that_are_no_layer_are_refused(vectors: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = vectors
    with pytest.raises(HeadError, match="a KNeighborsClassifier cannot become a linear layer; heads that can: ridge"):
        as_layer(make_pipeline(KNeighborsClassifier()).fit(X, y))


# ---- the loop


def test_it_learns_and_keeps_the_best_weights(data: Data, tmp_path: Path) -> None:
    task = make_task(but(BASE, steps=40), evaluations=5)
    trained = train(task, data, tmp_path, "x")
    assert trained.score[0] > 0.9
    assert trained.score == evaluate(task.network, data.validation, data, CPU)
    assert trained.score[0] == max(record["validation_accuracy"] for record in trained.history)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [8, 16, 24, 32, 40]
    assert set(lines[0]) - {"line_digest"} == {
        "step",
        "loss",
        "rate",
        "seconds",
        "validation_accuracy",
        "validation_loss",
    }


RICH = but(BASE, steps=7, augment="crop", batch_size=4)


class Stop(BaseException):
    pass


@pytest.mark.parametrize(("precision", "last"), [("fp32", 1), ("bf16", 4), ("fp32", 6)])
def test_a_run_stopped_between_evaluations_goes_on_to_the_same_weights(
    data: Data, tmp_path: Path, precision: str, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations are after steps 3, 6 and 7: the first stop is before any of them."""
    data = replace(data, balanced=precision == "fp32")
    whole = train(make_task(RICH, precision=precision), data, tmp_path / "whole", "x")
    real, done = trainer.train_step, []

    def stop(task: TrainingTask, data: Data, optimizer: object, scaler: object, step: int) -> float:
        if step == last and last not in done:
            raise Stop
        done.append(step)
        return real(task, data, optimizer, scaler, step)

    monkeypatch.setattr(trainer, "train_step", stop)
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    with pytest.raises(Stop):
        train(make_task(RICH, precision=precision), data, tmp_path / "cut", "x")
    monkeypatch.setattr(trainer, "train_step", real)
    resumed = train(make_task(RICH, precision=precision), data, tmp_path / "cut", "x")
    assert done == list(range(last))
    assert resumed.history[0]["step"] == 3
    assert same(resumed.weights, whole.weights)
    assert resumed.score == whole.score
    timeless = [{k: v for k, v in r.items() if "second" not in k} for r in resumed.history]
    assert timeless == [{k: v for k, v in r.items() if "second" not in k} for r in whole.history]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed that was forked")
def test_a_killed_process_leaves_a_checkpoint_that_goes_on(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill_after(folder: Path, identity: str, state: Any, parts: Any) -> None:
        save(folder, identity, state, parts)
        if state.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    save = trainer._save
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no other threads
    try:
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "_save", kill_after)
            arguments = make_task(RICH), data, tmp_path / "cut", "x"
            process = multiprocessing.get_context("fork").Process(target=train, args=arguments)
            process.start()
            process.join()
        resumed = train(make_task(RICH), data, tmp_path / "cut", "x")
        whole = train(make_task(RICH), data, tmp_path / "whole", "x")
    finally:
        torch.set_num_threads(threads)
    assert process.exitcode == -signal.SIGKILL
    assert same(resumed.weights, whole.weights)


def test_a_finished_run_is_not_trained_again(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(make_task(), data, tmp_path, "x")
    monkeypatch.setattr(trainer, "train_step", None)
    assert same(first.weights, train(make_task(), data, tmp_path, "x").weights)


def test_a_checkpoint_of_another_run_or_of_rubbish_is_refused(data: Data, tmp_path: Path) -> None:
    train(make_task(), data, tmp_path, "x")
    with pytest.raises(TrainingError, match="belongs to another run or version; delete it to train from the start"):
        train(make_task(), data, tmp_path, "y")
    (tmp_path / "checkpoint.pt").write_bytes(b"rubbish")
    with pytest.raises(TrainingError, match=r"checkpoint\.pt: cannot be read .* delete it to train from the start"):
        train(make_task(), data, tmp_path, "x")


def test_balanced_weights_make_a_rare_class_count(data: Data) -> None:
    y = np.array([0] * 6 + [1] * 2, dtype=np.int64)
    rare = replace(data, train=LabelledImages(data.train.pixels[:8], y), width=2)
    logits, seen = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    losses = torch.logsumexp(logits, 1) - logits[[0, 1], seen]
    weights = torch.tensor([8 / 12, 8 / 4])
    balanced = loss_of(logits, seen, replace(rare, balanced=True))
    assert balanced.item() == pytest.approx(((weights * losses).sum() / weights.sum()).item())
    assert loss_of(logits, seen, rare).item() == pytest.approx(losses.mean().item())


def test_what_cannot_be_trained_is_said_before_it_starts(data: Data, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as error:
        train(make_task(but(BASE, size=17), precision="fp16"), data, tmp_path, "x")
    assert error.value.problems == (
        "precision: 'fp16' needs a GPU; use 'bf16' or 'fp32' on the CPU",
        "finetune.size: 17 is larger than the 16 pixels of the prepared images",
    )


def test_a_loss_that_is_no_number_is_said_with_its_step(data: Data, tmp_path: Path) -> None:
    task = make_task(but(BASE, steps=2))
    with torch.no_grad():
        task.network.fc.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"the loss at step 0 is nan; lower finetune\.rate"):
        train(task, data, tmp_path, "x")


def test_the_profiler_and_tensorboard_are_optional(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(make_task(but(BASE, steps=2, watch=["profiler"])), data, tmp_path / "a", "x")
    assert "convolution" in (tmp_path / "a" / "profile.txt").read_text()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match="run `pip install tensorboard` or remove it"):
        train(make_task(but(BASE, watch=["tensorboard"])), data, tmp_path / "b", "x")


def test_tensorboard_gets_every_number_of_every_evaluation(data: Data, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained = train(make_task(but(BASE, watch=["tensorboard"])), data, tmp_path, "x")
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(shown.Tags()["scalars"]) == set(trained.history[0]) - {"step"}
    for name in shown.Tags()["scalars"]:
        expected = [(record["step"], pytest.approx(record[name])) for record in trained.history]
        assert [(event.step, event.value) for event in shown.Scalars(name)] == expected
    assert len(trained.history) == 2


# ---- the way back


def test_interpolation_has_its_ends_and_its_middle() -> None:
    a = {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(5)}
    b = {"w": torch.tensor([1.0, 4.0]), "n": torch.tensor(5)}
    assert same(interpolate(a, b, 0.0), a)
    assert same(interpolate(a, b, 1.0), b)
    assert interpolate(a, b, 0.5)["w"].tolist() == [0.5, 3.0]


def test_the_path_back_is_never_below_the_start(data: Data, tmp_path: Path) -> None:
    task = make_task(but(BASE, steps=20))
    start = copy_weights(task.network)
    good = train(task, data, tmp_path, "x").weights
    path = return_path(task, data, start, good)
    assert path.scores[path.alphas.index(path.alpha)] == max(path.scores)
    assert path.alpha > 0
    assert max(path.scores) == evaluate(task.network, data.validation, data, CPU)
    ruined = {
        name: 9 * torch.randn_like(tensor) if name.endswith("weight") else tensor for name, tensor in good.items()
    }
    back = return_path(task, data, good, ruined)
    assert back.alpha == 0.0
    assert same(back.weights, good)


def test_the_path_back_is_searched_closer_around_the_best_and_judges_nothing_twice(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task()
    start = copy_weights(task.network)
    end = {name: torch.full_like(tensor, 1.0) for name, tensor in start.items()}
    seen = []

    def score(network: Toy, *_: object) -> tuple[float, float]:
        alpha = float((network.fc.bias[0].detach() - start["fc.bias"][0]) / (1 - start["fc.bias"][0]))
        seen.append(round(alpha, 4))
        return (1.0 - abs(alpha - 0.6), 0.0)

    monkeypatch.setattr("pipeline.finetuning.result.evaluate", score)
    path = return_path(task, data, start, end, end_score=(0.6, 0.0))
    assert seen == [0, 0.25, 0.5, 0.75, 0.375, 0.625]
    assert (path.alpha, path.alphas) == (0.625, (0, 0.25, 0.375, 0.5, 0.625, 0.75, 1))
    seen.clear()
    monkeypatch.setattr("pipeline.finetuning.result.evaluate", lambda *given: (score(*given)[0] * 0, 0.0))
    assert return_path(task, data, start, end).alpha == 0  # the smallest of equals
    assert seen == [0, 0.25, 0.5, 0.75, 1, 0.125]


# ---- what makes steps cheaper


class Reused(Toy):
    """A network that uses what a convolution gives before its norm, too."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        conv, norm, act = self.stem
        plain = conv(images)
        return self.fc(self.body(act(norm(plain)) + plain).mean((2, 3)))


def test_folded_norms_change_neither_outputs_nor_gradients_nor_names() -> None:
    task, images = make_task(), torch.randn(4, 3, 16, 16)
    plain, names = copy.deepcopy(task.network), list(task.network.state_dict())
    assert fold_norms(task.network, images) == 7
    set_trainable(plain, task.stages, 0)
    set_trainable(task.network, task.stages, 0)
    for network in (plain, task.network):
        network(images).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), task.network.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)
    assert list(task.network.state_dict()) == names
    with torch.no_grad():
        torch.testing.assert_close(task.network(images), plain(images), rtol=1e-4, atol=1e-5)


def test_norms_are_left_where_folding_would_change_the_network() -> None:
    torch.manual_seed(0)
    network, images = Reused(), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        network.train()(images)  # statistics that are not those of a fresh network
        network.eval()
        before = network(images)
        assert fold_norms(network, images) == 0
        assert torch.equal(network(images), before)


@pytest.mark.parametrize(
    "settings",
    [but(BASE, augment="none"), BASE],
    ids=["as they are", "flipped"],
)
def test_what_stays_is_run_once_and_the_weights_are_the_same(
    data: Data, tmp_path: Path, settings: FinetuneConfig
) -> None:
    plain, short = (make_task(settings, "last_stage") for _ in range(2))
    start, kept = copy_weights(plain.network), trainer.keep_below(short, data)
    assert (kept.validation.entering is None, kept.train.entering is None) == (False, settings.augment != "none")
    conv, calls = short.network.stem[0], []
    real = conv._conv_forward
    conv._conv_forward = lambda *given: (calls.append(1), real(*given))[1]
    expected, found = (
        train(plain, data, tmp_path / "a", "x"),
        train(short, kept, tmp_path / "b", "x"),
    )
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(tensor, found.weights[name], rtol=1e-4, atol=1e-5)
    path = return_path(short, kept, start, found.weights)
    ends = path.scores[-1], return_path(plain, data, start, expected.weights).scores[-1]
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)
    if settings.augment == "none":
        assert len(calls) == 2  # before the first step, to see which norms can be folded
    assert trainer.keep_below(make_task(), data).below == ()  # everything is trained


def test_a_module_that_runs_twice_is_left_out_and_comes_back() -> None:
    from pipeline.io.vision import torchvision

    torch.manual_seed(0)
    network, images = torchvision.models.resnet18(num_classes=3).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(images)
    stages = stages_of(network, (32, 32))
    assert fold_norms(network, images) == 20
    assert modules_below(network, stages[-2], images)
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


class Between(Toy):
    """A network that changes what it has between its modules."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(self.stem(images) * 2).mean((2, 3)))


def test_nothing_is_kept_where_a_network_does_more_than_its_modules(data: Data) -> None:
    task = make_task(scope="last_stage")
    assert trainer.keep_below(task, data).below
    assert trainer.keep_below(replace(task, network=Between()), data).below == ()
    assert trainer.keep_below(make_task(scope="head"), data).below == ()  # a mean lies before it


@pytest.mark.parametrize("augment", ["none", "flip", "crop", "trivial"])
def test_images_are_learned_from_at_their_own_size(data: Data, augment: str) -> None:
    wide = np.repeat(pictures(4).pixels, 2, axis=2)
    out = augmented(wide, but(BASE, augment=augment, size=12), CPU, data)
    assert out.shape == (4, 3, 12, 24)
    assert torch.isfinite(out).all()
