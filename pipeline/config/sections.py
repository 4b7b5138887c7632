"""The sections of a config, frozen and typed: which keys there are, what each may be, and its default.

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
"""The largest whole number of a config: beyond it floats are no longer exact."""

WEIGHTS_FILES = (".safetensors", ".pth", ".pt")
"""Endings of weights files."""

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""Endings of archives that are read as folders are."""

NETWORK_DEVICES = ("auto", "cpu", "mps", "cuda")
"""Where a network may compute."""

OWN = "own"
"""What the weights of a network of the user's own are called."""

NO_LABELS = "none"
"""What `dataset.target` is called where images have no labels, or none that matter."""

What = Literal["head", "baseline", "score", "target"]
Names = Mapping[What, Sequence[str]]
"""What the tables offer: the words that `heads`, `baselines`, `tuning.scoring` and `dataset.target` may hold."""


def _scalar(value: Any) -> Any:
    if not isinstance(value, Scalar):
        raise ValueError(f"expected a number, a text, true, false or null, got {value!r}")
    return value


def _count(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"expected 'auto' or a whole number above 0, got {value!r}")


# What is wrong with a value of several types is told by these in one line, where pydantic has one for each type.
Scalar = bool | int | float | str | None
AnyScalar = Annotated[Scalar, BeforeValidator(_scalar)]
Count = Annotated[Literal["auto"] | int, BeforeValidator(_count)]
ItemT = TypeVar("ItemT")


class Section(BaseModel):
    """What every section shares: frozen, strict about types, and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _within_reason(cls, value: Any) -> Any:
        # No file and no column can have such a name, and a terminal obeys some of them.
        if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f]", value):
            raise ValueError(f"holds a control character: {value[:40]!r}; leave it out")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"expected at most {LARGEST:,}, got a larger number")
        return _frozen(value)


def keys_of(section: type[Section]) -> list[str]:
    """Return the keys that a section of a config may have."""
    return [key for key in section.model_fields if (section, key) != (BackboneConfig, "view")]


def _frozen(value: Any) -> Any:
    """Return a value whose lists, as YAML has them, are tuples."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    return {key: _frozen(item) for key, item in value.items()} if isinstance(value, dict) else value


def names_code(name: str) -> bool:
    """Return whether a network is `module:function`: code of the user's own, which runs when it is loaded."""
    module, colon, function = name.partition(":")
    return bool(module and colon and function) and module != "timm"


VECTORS = (".npy", ".parquet")
"""Endings of files with vectors of the user's own, which may stand in place of a network's name."""


def names_vectors(name: str) -> bool:
    """Return whether a backbone is a file of vectors that were made elsewhere."""
    return name.endswith(VECTORS)


TIMM_PREFIX = "timm:"
LOCAL_DIR = f"{TIMM_PREFIX}local-dir:"
"""Before the path of a folder with weights of timm and their `config.json`."""

TIMM_NAMES: Mapping[str, str] = {
    "dinov2_base": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov3_base": "vit_base_patch16_dinov3.lvd1689m",
    "siglip2_base": "vit_base_patch16_siglip_224.v2_webli",
    "clip_base": "vit_base_patch16_clip_quickgelu_224.openai",
    "convnextv2_tiny": "convnextv2_tiny.fcmae_ft_in22k_in1k",
}
"""Short names for networks of timm, and what timm calls them: network and weights."""


def names_timm(name: str) -> bool:
    """Return whether a network is one of timm's, whose name says which weights."""
    return name in TIMM_NAMES or name.startswith(TIMM_PREFIX)


def guess(word: str, allowed: Sequence[str]) -> str:
    """Return `, did you mean 'x'?` for the closest allowed word, or nothing."""
    close = difflib.get_close_matches(word, allowed, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def source_of(path: str) -> str | None:
    """Return `dataset.source` for data that are called so: an archive, a table, a remote folder; None for a config or a folder."""
    if path.lower().endswith((".parquet", ".csv")):
        return "manifest"
    is_config = path.lower().endswith((".yaml", ".yml"))
    return "folder" if path.lower().endswith(ARCHIVES) or (address_of(path) and not is_config) else None


def unknown(what: str, word: str, allowed: Sequence[str], besides: str = "") -> str:
    """Say that a table has no such word, which is the closest, and which there are."""
    return f"unknown {what} {word!r}{guess(word, allowed)}; allowed: {', '.join(allowed)}{besides}"


def checked_device(value: str) -> str:
    """Return a device of `NETWORK_DEVICES`, `cuda` also with an index; ValueError for any other."""
    kind, colon, index = value.partition(":")
    if kind not in NETWORK_DEVICES or (colon and not (kind == "cuda" and index.isdecimal())):
        words = ", ".join(map(repr, NETWORK_DEVICES))
        raise ValueError(f"should be {words} or a GPU by number, such as 'cuda:1', got {value!r}")
    return value


def _in_table(what: What, word: str, info: ValidationInfo, besides: str = "") -> str:
    """Return a word that the table has; any word where the caller handed no tables."""
    allowed = (info.context or {}).get(what)
    if allowed is not None and word not in allowed:
        raise ValueError(unknown(what, word, allowed, besides))
    return word


def _not_empty(value: tuple[ItemT, ...]) -> tuple[ItemT, ...]:
    # Not `min_length`, which also complains when an item was dropped for a mistake of its own.
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
"""What `dataset.domain` is where training and test images are the two domains."""


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
    """The manifest's column that says where an image is from, such as its camera or clinic; `split` where the training images are of
    one source and the test images of another."""
    target: str | dict[str, str] = "auto"
    """What is said of an image, for all columns of labels or by their names: `classification`, `regression`, `multilabel`; `auto` is one
    class too, but stops where labels look like something else; with `none` images need no labels, and nothing is learned."""

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
            raise ValueError(f"{' and '.join(idle)}: for source 'manifest' alone, and the source is '{self.source}'")
        for name in {} if isinstance(self.target, str) else self.target:
            if name not in self.label_columns:
                raise ValueError(f"target: {unknown('column', name, self.label_columns)}")
        if self.label_separator is not None and "multilabel" not in self.kinds:
            raise ValueError(
                "label_separator: for labels of kind multilabel; say which are, with target: {COLUMN: multilabel}"
            )
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each column of labels is said to be; one word where there is one target, also where several columns are its labels."""
        if isinstance(self.target, str) and self.target not in ("auto", "classification") and not self.label_separator:
            return (self.target,)
        if self.target == "auto" and self.label_separator is not None and len(self.label_columns) == 1:
            return ("multilabel",)
        words = self.target if isinstance(self.target, dict) else dict.fromkeys(self.label_columns, self.target)
        return tuple(words.get(name, "auto") for name in self.label_columns)

    @property
    def domain_column(self) -> str:
        """The manifest's column of domains; '' where there is none."""
        return "" if self.domain in (None, SPLIT) else str(self.domain)

    @field_validator("label_columns")
    @classmethod
    def _can_stand_side_by_side(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len({*value}) < len(value):
            raise ValueError(f"a column is given twice: {', '.join(value)}")
        return value


class PreprocessingConfig(Section):
    """An explicit override of the preprocessing that belongs to the weights; recorded in the store's identity."""

    resize: int = Field(256, ge=1)
    crop: int = Field(224, ge=1)
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    fit: Literal["crop", "squash", "border"] = "crop"


class BackboneConfig(Section):
    """One frozen network and the layers whose output is kept."""

    name: str
    weights: str = "random"
    """Published ones (`imagenet`, torchvision's exact `IMAGENET1K_V2`, timm's `pretrained`), `bundled`, `random`, or a file."""
    layers: Annotated[tuple[str, ...], NOT_EMPTY] = ("penultimate",)
    """`penultimate` is the input of the last linear layer; any node listed by `manyheads layers` will do."""
    pooling: Annotated[tuple[Pooling, ...], NOT_EMPTY, BeforeValidator(_one_or_several)] = ("avg",)
    """How a layer with a spatial or token axis becomes one vector; `own` is the network's own way, `map` its own attention."""
    arguments: dict[str, AnyScalar] = Field(default_factory=dict)
    preprocessing: PreprocessingConfig | None = None
    views: tuple[View, ...] = ()
    """Changed images that are embedded as well, each an embedding of its own."""
    view: View | None = None
    """The one that is embedded in place of the image, in what `Config.sections` makes of `views`; no key of a config."""

    @property
    def title(self) -> str:
        """What messages call the network: `resnet50 (IMAGENET1K_V2)`."""
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
            raise ValueError(f"views: {self.name} holds vectors that were made elsewhere, and views are of images")
        if len({*self.views}) < len(self.views):
            raise ValueError("views: each is to be named once")
        return self

    @model_serializer(mode="wrap")
    def _as_before_there_were_views(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A section is compared with, and named by, what was written down then.
        return {key: value for key, value in write(self).items() if value or key not in ("views", "view")}

    @field_serializer("pooling")
    def _as_one_word(self, value: tuple[str, ...]) -> str | list[str]:
        # As it was when there was only one: a section is compared with, and named by, what was written down then.
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
    """How images become vectors: nothing here but `precision`, `engine` and `decode` changes the vectors."""

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
    """Parameter -> `[low, high]` for a range, the list of choices for a categorical one."""
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
        """The limit in bytes; None for `auto`."""
        return None if self.memory == "auto" else int(float(self.memory[:-2]) * _UNITS[self.memory[-2:]])

    @property
    def budget_seconds(self) -> float | None:
        """The budget in seconds; None where there is none."""
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
    """Stage three: which backbone is trained end to end, from which linear head, and how."""

    start: str = "best"
    """`best` is the best linear head on the penultimate layer of the best backbone, `EMBEDDING` the best one on that, or
    `EMBEDDING/HEAD`; `random` in place of a head is a control that starts from none."""
    validation_fraction: float = Field(0.2, gt=0, lt=0.5)
    unfreeze: tuple[tuple[Share, str], ...] | Literal["auto"] = ((0.0, "all"),)
    """From which share of the steps on what is trained, such as `[[0, head], [0.2, all]]`: `head`, `last_stage`, `all`, or the
    lowest stage, such as `stage3`. `auto` follows `manyheads advise`, which may say that nothing should be."""
    steps: Count = "auto"
    batch_size: int = Field(32, ge=1)
    size: int | None = Field(None, ge=1)
    rate: float = Field(1e-3, gt=0)
    augment: Literal["none", "flip", "crop", "trivial"] = "crop"
    watch: tuple[Literal["tensorboard", "profiler"], ...] = ()
    """What a run writes besides, in its folder: its numbers for TensorBoard, and a table of torch's profiler."""

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
    """The folder every artifact of this experiment is written to; `artifacts/NAME` of the data set when not given."""
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
    """With a `dataset.domain`: how the best head is adapted to the test's domains that training lacks, without their labels."""
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
        """What is embedded: each of `backbones`, and each of its views as a section of its own."""
        found = []
        for section in self.backbones:
            plain = section.model_copy(update={"views": ()})
            found += [plain, *(plain.model_copy(update={"view": view}) for view in section.views)]
        return tuple(found)

    @field_validator("backbones")
    @classmethod
    def _views_by_their_key(cls, value: tuple[BackboneConfig, ...]) -> tuple[BackboneConfig, ...]:
        if any(section.view for section in value):
            raise ValueError("unknown key 'view'; a view is asked for beside the images, such as views: [flip]")
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
    """What a data set is called: its torchvision name, else its folder or its manifest without the ending."""
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
