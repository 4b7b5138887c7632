"""The sections of stage three, which trains a network."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from pipeline.config.section import Section


class UnfreezeConfig(Section):
    """From a share of the steps on, everything from the last layer down to one stage is trained."""

    start: float = Field(0.0, ge=0, lt=1)
    scope: str = "all"
    """`head`, `last_stage`, `all`, or the lowest stage that is trained, such as `stage3`."""


class TrainingConfig(Section):
    """How a network is trained. The rate is the head's; the stage `d` below it has `rate * rate_decay ** d`."""

    steps: Literal["auto"] | int = "auto"
    """Optimizer steps; `auto` goes by the number of images."""
    batch_size: int = Field(32, ge=1)
    accumulate: int = Field(1, ge=1)
    """Batches per step; their gradients are averaged."""
    rate: float = Field(1e-3, gt=0)
    rate_decay: float = Field(0.5, gt=0, le=1)
    """Stages further from the head learn more slowly, down to a hundredth of the rate."""
    weight_decay: float = Field(1e-2, ge=0)
    """AdamW's; not applied to norms and biases."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the rate rises; then it falls to zero by a cosine."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    """Alpha of the Beta distribution; 0 is off."""
    augment: Literal["none", "flip", "crop", "trivial"] = "crop"
    """`crop` is a random resized crop and a flip; `trivial` is torchvision's TrivialAugmentWide before it."""
    smallest_crop: float = Field(0.5, gt=0, le=1)
    """The smallest share of an image's area that a crop keeps."""
    class_weight: Literal["balanced"] | None = None
    clip_norm: float | None = Field(None, gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    batch_norm: Literal["frozen", "affine", "train"] = "frozen"
    """`frozen`: statistics, scale and shift stay; `affine`: the statistics stay; `train`: nothing stays."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of a moving average of the weights; 0 is off."""
    evaluate_every: Literal["auto"] | int = "auto"
    """Steps between two evaluations on the validation images; `auto` makes about ten."""
    patience: int | None = Field(None, ge=1)
    """Evaluations without improvement after which training stops."""
    profile_steps: int = Field(0, ge=0)
    """Steps torch's profiler watches after the first; its table is written beside the log."""
    tensorboard: bool = False

    @field_validator("steps", "evaluate_every")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError("should be 'auto' or a whole number from 1 up")
        return value


class FinetuneConfig(Section):
    """Stage three: train the best backbone end to end, from the best linear head."""

    embedding: str = "best"
    """An embedding of the leaderboard, or the one of the best row of a backbone whose last layer can be replaced."""
    head: str = "best"
    """A linear head to start from; `best` is the best one of that embedding, `random` a control that starts from none."""
    validation_fraction: float = Field(0.2, gt=0, lt=0.5)
    """Share of the training images that chooses weights, where the data have no validation split."""
    unfreeze: tuple[UnfreezeConfig, ...] = (UnfreezeConfig(),)
    """Which stages are trained from which share of the steps on, such as `[{start: 0, scope: head}, {start: 0.2}]`."""
    training: TrainingConfig = TrainingConfig()

    @field_validator("unfreeze", mode="before")
    @classmethod
    def _yaml_has_lists(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("unfreeze")
    @classmethod
    def _rises_from_the_start(cls, plan: tuple[UnfreezeConfig, ...]) -> tuple[UnfreezeConfig, ...]:
        starts = [step.start for step in plan]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise ValueError("should be steps of which the first starts at 0 and each later than the one before")
        return plan
