"""The sections of a config, frozen and typed: their keys, allowed values and defaults.

`configs/folder.yaml` explains every key.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from pipeline.io.remote import address_of

LARGEST = 2**53
"""The largest integer allowed in a config: beyond it floats are no longer exact."""

WEIGHTS_FILES = (".safetensors", ".pth", ".pt")
"""Suffixes of weights files."""

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""Suffixes of archives, which are read like folders."""

NETWORK_DEVICES = ("auto", "cpu", "mps", "cuda")
"""Devices that a network can run on."""

OWN = "own"
"""The value of `weights` for a user's own network."""

NO_LABELS = "none"
"""The value of `dataset.target` for images whose labels are missing or ignored."""

What = Literal["head", "baseline", "score", "target"]
Names = Mapping[What, Sequence[str]]
"""The names in the tables, which are the values allowed in `heads`, `baselines`, `tuning.scoring` and `dataset.target`."""


def _scalar(value: Any) -> Any:
    if not isinstance(value, Scalar):
        raise ValueError(f"expected a number, a text, true, false or null, got {value!r}")
    return value


def _count(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"expected 'auto' or a whole number above 0, got {value!r}")


# These report a value of the wrong type in one line; pydantic reports one line for each member of a union.
Scalar = bool | int | float | str | None
AnyScalar = Annotated[Scalar, BeforeValidator(_scalar)]
Count = Annotated[Literal["auto"] | int, BeforeValidator(_count)]
ItemT = TypeVar("ItemT")


class Section(BaseModel):
    """The base of all sections: frozen, strict about types, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _within_reason(cls, value: Any) -> Any:
        # No file or column has such a name, and a terminal interprets some control characters.
        if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f]", value):
            raise ValueError(f"holds a control character: {value[:40]!r}; remove it")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"expected at most {LARGEST:,}, got a larger number")
        return _frozen(value)


def keys_of(section: type[Section]) -> list[str]:
    """Return the keys allowed in a section of a config."""
    return [key for key in section.model_fields if (section, key) != (BackboneConfig, "view")]


def _frozen(value: Any) -> Any:
    """Return a value with its lists turned into tuples, at any depth."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    return {key: _frozen(item) for key, item in value.items()} if isinstance(value, dict) else value


def names_code(name: str) -> bool:
    """Return whether a network is `module:function`: the user's own code, which runs when it is loaded."""
    module, colon, function = name.partition(":")
    return bool(module and colon and function) and module != "timm"


VECTORS = (".npy", ".parquet")
"""Suffixes of files with the user's own vectors, allowed in place of a network's name."""


def names_vectors(name: str) -> bool:
    """Return whether a backbone is a file of vectors computed elsewhere."""
    return name.endswith(VECTORS)


TIMM_PREFIX = "timm:"
LOCAL_DIR = f"{TIMM_PREFIX}local-dir:"
"""Prefix of the path of a folder with timm weights and their `config.json`."""

TIMM_NAMES: Mapping[str, str] = {
    "dinov2_base": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov3_base": "vit_base_patch16_dinov3.lvd1689m",
    "siglip2_base": "vit_base_patch16_siglip_224.v2_webli",
    "clip_base": "vit_base_patch16_clip_quickgelu_224.openai",
    "convnextv2_tiny": "convnextv2_tiny.fcmae_ft_in22k_in1k",
}
"""Short name of a timm network -> timm's name for its architecture and weights."""


def names_timm(name: str) -> bool:
    """Return whether a network is one of timm's, whose name includes the weights."""
    return name in TIMM_NAMES or name.startswith(TIMM_PREFIX)


def guess(word: str, allowed: Sequence[str]) -> str:
    """Return `, did you mean 'x'?` for the closest allowed word, or '' if none is close."""
    close = difflib.get_close_matches(word, allowed, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def source_of(path: str) -> str | None:
    """Return the `dataset.source` implied by a path to an archive, table or remote folder; None for a config or local folder."""
    if path.lower().endswith((".parquet", ".csv")):
        return "manifest"
    is_config = path.lower().endswith((".yaml", ".yml"))
    return "folder" if path.lower().endswith(ARCHIVES) or (address_of(path) and not is_config) else None


def unknown(what: str, word: str, allowed: Sequence[str], besides: str = "") -> str:
    """Return the message for a word that is not in a table, with the closest word and all allowed ones."""
    return f"unknown {what} {word!r}{guess(word, allowed)}; allowed: {', '.join(allowed)}{besides}"


def checked_device(value: str) -> str:
    """Return a device of `NETWORK_DEVICES`, or `cuda` with an index; ValueError for any other."""
    kind, colon, index = value.partition(":")
    if kind not in NETWORK_DEVICES or (colon and not (kind == "cuda" and index.isdecimal())):
        words = ", ".join(map(repr, NETWORK_DEVICES))
        raise ValueError(f"should be {words} or a GPU by number, such as 'cuda:1', got {value!r}")
    return value


def _in_table(what: What, word: str, info: ValidationInfo, besides: str = "") -> str:
    """Return a word if the table has it, or if the caller passed no tables; ValueError otherwise."""
    allowed = (info.context or {}).get(what)
    if allowed is not None and word not in allowed:
        raise ValueError(unknown(what, word, allowed, besides))
    return word


def _not_empty(value: tuple[ItemT, ...]) -> tuple[ItemT, ...]:
    # Not `min_length`, which also complains when an invalid item was dropped.
    if not value:
        raise ValueError("expected at least one, got an empty list")
    return value


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


NOT_EMPTY = AfterValidator(_not_empty)
Pooling = Literal["own", "avg", "max", "grid", "flatten", "cls", "cls+avg", "map"]
View = Literal["flip", "crop", "colour"]
Share = Annotated[float, Field(ge=0, lt=1)]


_OF_A_MANIFEST = ("root", "path_column", "label_columns", "label_separator", "split_column", "group_column")
SPLIT = "split"
"""The value of `dataset.domain` if the training and test images are the two domains."""


class DatasetConfig(Section):
    """Where the images are and how they are split."""

    source: Literal["digits", "folder", "manifest", "torchvision"] = "digits"
    path: str | None = None
    name: str | None = None
    test_fraction: float = Field(0.2, gt=0, lt=1)
    leaks: Literal["drop_train", "drop_test", "keep", "error"] = "drop_train"
    max_failures: float = Field(0.1, ge=0)
    max_pixels: int = Field(64_000_000, ge=1)
    root: str | None = None
    path_column: str | None = None
    label_columns: Annotated[tuple[str, ...], NOT_EMPTY, BeforeValidator(_one_or_several)] = ("label",)
    label_separator: str | None = None
    split_column: str | None = None
    group_column: str | None = None
    domain: str | None = None
    """The manifest's column with the origin of each image, such as its camera or clinic; `split` if training and test images come from
    different sources."""
    target: str | dict[str, str] = "auto"
    """The task, for all label columns or by column name: `classification`, `regression` or `multilabel`. `auto` is classification, but
    stops if the labels look like another task; `none` needs no labels, and no head is trained."""

    @field_validator("target", mode="before")
    @classmethod
    def _known(cls, value: Any, info: ValidationInfo) -> Any:
        for word in value.values() if isinstance(value, dict) else [value]:
            if not isinstance(word, str):
                raise ValueError(f"expected a word, or a word for each column, got {value!r}")
            if value != NO_LABELS:
                _in_table("target", word, info, f", or {NO_LABELS} for images without labels")
        return value

    @model_validator(mode="after")
    def _source_has_what_it_needs(self) -> DatasetConfig:
        needs = {"digits": (), "folder": ("path",), "manifest": ("path",), "torchvision": ("path", "name")}[self.source]
        missing = [key for key in needs if getattr(self, key) is None]
        if missing:
            raise ValueError(f"source '{self.source}' also needs {' and '.join(repr(key) for key in missing)}")
        fields = type(self).model_fields
        idle = [key for key in _OF_A_MANIFEST if getattr(self, key) != fields[key].default]
        idle += ["domain"] * bool(self.domain_column)
        if idle and self.source != "manifest":
            raise ValueError(f"{' and '.join(idle)}: only for source 'manifest', but the source is '{self.source}'")
        for name in {} if isinstance(self.target, str) else self.target:
            if name not in self.label_columns:
                raise ValueError(f"target: {unknown('column', name, self.label_columns)}")
        if self.label_separator is not None and "multilabel" not in self.kinds:
            raise ValueError(
                "label_separator: only for multilabel columns; mark them with target: {COLUMN: multilabel}"
            )
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kind of each label column; a single kind for a single target, even if that target has several columns."""
        if isinstance(self.target, str) and self.target not in ("auto", "classification") and not self.label_separator:
            return (self.target,)
        if self.target == "auto" and self.label_separator is not None and len(self.label_columns) == 1:
            return ("multilabel",)
        words = self.target if isinstance(self.target, dict) else dict.fromkeys(self.label_columns, self.target)
        return tuple(words.get(name, "auto") for name in self.label_columns)

    @property
    def domain_column(self) -> str:
        """Return the manifest's column of domains; '' if there is none."""
        return "" if self.domain in (None, SPLIT) else str(self.domain)

    @field_validator("label_columns")
    @classmethod
    def _can_stand_side_by_side(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len({*value}) < len(value):
            raise ValueError(f"a column is given twice: {', '.join(value)}")
        return value


class PreprocessingConfig(Section):
    """Overrides of the preprocessing that belongs to the weights; recorded in the store's identity."""

    resize: int = Field(256, ge=1)
    crop: int = Field(224, ge=1)
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    fit: Literal["crop", "squash", "border"] = "crop"


class BackboneConfig(Section):
    """One frozen network and its layers to embed."""

    name: str
    weights: str = "random"
    """Published weights (`imagenet`, torchvision's exact `IMAGENET1K_V2`, timm's `pretrained`), `bundled`, `random`, or a file."""
    layers: Annotated[tuple[str, ...], NOT_EMPTY] = ("penultimate",)
    """`penultimate` is the input of the last linear layer; any node listed by `manyheads layers` is allowed."""
    pooling: Annotated[tuple[Pooling, ...], NOT_EMPTY, BeforeValidator(_one_or_several)] = ("avg",)
    """How a spatial or token axis is pooled into one vector; `own` is the network's own pooling, `map` its attention pooling."""
    arguments: dict[str, AnyScalar] = Field(default_factory=dict)
    preprocessing: PreprocessingConfig | None = None
    views: tuple[View, ...] = ()
    """Transformed images to embed in addition, each as its own embedding."""
    view: View | None = None
    """The view to embed in place of the image; set by `Config.sections`, not allowed in a config."""

    @property
    def title(self) -> str:
        """Return the network's name in messages: `resnet50 (IMAGENET1K_V2)`."""
        return f"{self.name} ({self.weights})"

    @model_validator(mode="before")
    @classmethod
    def _some_names_say_more(cls, raw: Any) -> Any:
        name = str(raw.get("name")) if isinstance(raw, dict) else ""
        usual = {"weights": "pretrained", "pooling": "own"} if names_timm(name) else {}
        if names_code(name) or names_vectors(name):
            usual = {"weights": OWN}
        return {**usual, **raw} if name else raw

    @model_validator(mode="after")
    def _views_are_of_images(self) -> BackboneConfig:
        if self.views and names_vectors(self.name):
            raise ValueError(f"views: {self.name} is a file of vectors, and views need images")
        if len({*self.views}) < len(self.views):
            raise ValueError("views: the same view is given twice")
        return self

    @model_serializer(mode="wrap")
    def _as_before_there_were_views(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Sections are compared and named by their serialized form, so it stays that of versions without views.
        return {key: value for key, value in write(self).items() if value or key not in ("views", "view")}

    @field_serializer("pooling")
    def _as_one_word(self, value: tuple[str, ...]) -> str | list[str]:
        # Sections are compared and named by their serialized form, so a single pooling stays one word.
        return value[0] if len(value) == 1 else list(value)

    @field_validator("weights")
    @classmethod
    def _weights_are_exact(cls, value: str) -> str:
        if value == "DEFAULT":
            raise ValueError(
                "'DEFAULT' may change between torchvision versions; give the exact name, such as 'IMAGENET1K_V2'"
            )
        return value


class ExtractionConfig(Section):
    """How images become vectors; only `precision`, `engine` and `decode` change the vectors."""

    device: Annotated[str, AfterValidator(checked_device)] = "auto"
    batch_size: Count = "auto"
    workers: Count = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    engine: Literal["auto", "torch", "openvino"] = "auto"
    decode: Literal["standard", "exact", "fast"] = "standard"


class HeadConfig(Section):
    """One head to tune; a bare name in the YAML is the same as `name:` alone."""

    name: str
    space: dict[str, tuple[AnyScalar, ...]] = Field(default_factory=dict)
    """Parameter -> `[low, high]` for a range, or the list of choices for a categorical parameter."""
    class_weight: Literal["balanced"] | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        return value if ":" in value else _in_table("head", value, info, ", or package.module:ATTRIBUTE")


_UNITS = {"MB": 10**6, "GB": 10**9}
_SECONDS, _TIME = {"s": 1, "m": 60, "h": 3600}, re.compile(r"\d+(\.\d+)?[smh]")


class TuningConfig(Section):
    """The search: the same strategy, budget and folds for every head."""

    strategy: Literal["bayes", "random", "grid"] = "bayes"
    trials: int = Field(16, ge=1)
    budget: str | None = None
    folds: int = Field(5, ge=2)
    scoring: str = "auto"
    nested: bool = False
    seeds: int = Field(1, ge=1, le=100)
    pca: int | float | None = None
    jobs: Count = "auto"
    memory: str = "auto"

    @property
    def memory_bytes(self) -> int | None:
        """Return the limit in bytes; None for `auto`."""
        return None if self.memory == "auto" else int(float(self.memory[:-2]) * _UNITS[self.memory[-2:]])

    @property
    def budget_seconds(self) -> float | None:
        """Return the budget in seconds; None if there is none."""
        return None if self.budget is None else float(self.budget[:-1]) * _SECONDS[self.budget[-1]]

    @field_validator("budget", mode="before")
    @classmethod
    def _a_time(cls, value: Any) -> Any:
        if value is None or (isinstance(value, str) and _TIME.fullmatch(value) and float(value[:-1]) > 0):
            return value
        raise ValueError(f"expected a time above 0 such as '90s', '10m' or '1.5h', got {value!r}")

    @field_validator("scoring")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        return _in_table("score", value, info)

    @field_validator("pca", mode="before")
    @classmethod
    def _a_number_or_a_share(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is None or whole or (isinstance(value, float) and 0 < value < 1):
            return value
        raise ValueError(
            f"expected a number of components such as 64, a share of the variance below 1 such as 0.95, or null, got {value!r}"
        )

    @field_validator("memory", mode="before")
    @classmethod
    def _a_size(cls, value: Any) -> Any:
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB)", value) if isinstance(value, str) else None
        if value != "auto" and (found is None or not float(found[1])):
            raise ValueError(f"expected 'auto' or a size above 0 such as '2GB' or '500MB', got {value!r}")
        return value


class FinetuneConfig(Section):
    """Stage three: the backbone to train end to end, the linear head to start from, and the hyperparameters."""

    start: str = "best"
    """`best` is the best linear head on the penultimate layer of the best backbone, `EMBEDDING` the best head on that embedding,
    `EMBEDDING/HEAD` one head; `random` in place of a head is a control with a randomly initialised head."""
    validation_fraction: float = Field(0.2, gt=0, lt=0.5)
    unfreeze: tuple[tuple[Share, str], ...] | Literal["auto"] = ((0.0, "all"),)
    """The part that is trained from each fraction of the steps on, such as `[[0, head], [0.2, all]]`: `head`, `last_stage`, `all`, or the
    lowest stage, such as `stage3`. `auto` follows `manyheads advise`, which may advise against training."""
    steps: Count = "auto"
    batch_size: int = Field(32, ge=1)
    size: int | None = Field(None, ge=1)
    rate: float = Field(1e-3, gt=0)
    augment: Literal["none", "flip", "crop", "trivial"] = "crop"
    watch: tuple[Literal["tensorboard", "profiler"], ...] = ()
    """Additional files in the run's folder: metrics for TensorBoard, and a table of torch's profiler."""

    @field_validator("unfreeze", mode="before")
    @classmethod
    def _rises_from_the_start(cls, plan: Any) -> Any:
        if plan == "auto":
            return plan
        try:
            starts = [float(start) for start, scope in plan if isinstance(scope, str)]
            rises = len(starts) == len(plan) and starts[:1] == [0] and starts == sorted({*starts}) and starts[-1] < 1
        except (TypeError, ValueError):
            rises = False
        if not rises:
            raise ValueError(
                "expected steps such as [[0, head], [0.2, all]], the first from 0 and each later than the one before"
            )
        return plan


def _as_advised(given: Any) -> Any:
    return {"unfreeze": "auto"} if given == "auto" else given


class Config(Section):
    """A whole experiment."""

    output: str
    """The folder of all files of this experiment; by default `artifacts/NAME`, with the name of the data set."""
    store: str | None = None
    seed: int = Field(0, ge=0, lt=2**32)
    dataset: DatasetConfig = DatasetConfig()
    backbones: Annotated[tuple[BackboneConfig, ...], NOT_EMPTY]
    baselines: tuple[str, ...] | None = None
    concat: tuple[tuple[str, ...], ...] = ()
    licenses: Literal["any", "permissive"] = "any"
    extraction: ExtractionConfig = ExtractionConfig()
    heads: Annotated[tuple[HeadConfig, ...], NOT_EMPTY] | None = None
    adapt: tuple[Literal["coral", "reweight"], ...] = ("coral", "reweight")
    """With a `dataset.domain`: how the best head is adapted, without labels, to test domains that are missing in training."""
    vote: bool = False
    tuning: TuningConfig = TuningConfig()
    finetune: Annotated[FinetuneConfig, BeforeValidator(_as_advised)] = FinetuneConfig()

    @model_validator(mode="before")
    @classmethod
    def _output_of_the_data(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("output") is not None:
            return raw
        return {**raw, "output": f"artifacts/{_name_of_the_data(raw.get('dataset'))}"}

    @field_validator("baselines")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        for name in value or ():
            _in_table("baseline", name, info)
        return value

    @property
    def sections(self) -> tuple[BackboneConfig, ...]:
        """Return the sections to embed: each of `backbones`, and each of its views as its own section."""
        found = []
        for section in self.backbones:
            plain = section.model_copy(update={"views": ()})
            found += [plain, *(plain.model_copy(update={"view": view}) for view in section.views)]
        return tuple(found)

    @field_validator("backbones")
    @classmethod
    def _views_by_their_key(cls, value: tuple[BackboneConfig, ...]) -> tuple[BackboneConfig, ...]:
        if any(section.view for section in value):
            raise ValueError("unknown key 'view'; use views, such as views: [flip]")
        return value

    @field_validator("concat")
    @classmethod
    def _several_each(cls, value: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        wrong = [str(list(group)) for group in value if len(set(group)) < max(len(group), 2)]
        if wrong:
            raise ValueError(f"expected lists of two or more different embeddings, got {' and '.join(wrong)}")
        if len(set(value)) < len(value):
            raise ValueError("the same list is given twice")
        return value

    @field_validator("heads", mode="before")
    @classmethod
    def _bare_names(cls, value: Any) -> Any:
        if not isinstance(value, tuple | list):
            return value
        return tuple({"name": item} if isinstance(item, str) else item for item in value)

    @model_validator(mode="after")
    def _nothing_twice(self) -> Config:
        output = Path(self.output)
        if os.path.abspath(output) == os.path.abspath(output.parent / "features" if self.store is None else self.store):
            raise ValueError(f"output: {self.output} is the folder of the feature stores; choose another name")
        names = [head.name for head in self.heads or ()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"heads: named more than once: {', '.join(twice)}")
        if len(set(map(str, self.backbones))) < len(self.backbones):
            raise ValueError("backbones: the same backbone is given twice")
        return self


def _name_of_the_data(section: Any) -> str:
    """Return the name of a data set: its torchvision name, or the name of its folder or manifest without the suffix."""
    found = section if isinstance(section, dict) else {}
    if isinstance(name := found.get("name"), str):
        return Path(name).name
    path = found.get("path")
    if not isinstance(path, str):
        return str(found.get("source", "digits"))
    real = Path(os.path.realpath(os.path.expanduser(path)))
    name = real.parent.name if "{" in real.name else real.name
    ending = next((end for end in (".csv", ".parquet", *ARCHIVES[::-1]) if name.lower().endswith(end)), "")
    return name[: len(name) - len(ending)] or "images"
