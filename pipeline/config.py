"""One experiment: a YAML file turned into a frozen, typed `Config`, with every problem reported at once.

The YAML is read by the rules of YAML 1.2, so `1e-3` is a number, `NO` is a text, `010` is ten, and a key given twice is
refused. Paths are relative to the folder the command is run in.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import ConfigError

HEAD_NAMES = (
    "logistic_regression",
    "linear_svm",
    "rbf_svm",
    "random_forest",
    "ridge",
    "knn",
    "nearest_centroid",
    "decision_tree",
    "mlp",
)
"""The built-in heads; `pipeline.heads.HEADS` has a row for each."""

Baseline = Literal["majority", "pixels", "hog"]
BASELINE_NAMES: tuple[Baseline, ...] = ("majority", "pixels", "hog")

Scalar = bool | int | float | str | None


class Section(BaseModel):
    """What every section shares: frozen, strict about types, and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Item = TypeVar("Item")


def _not_empty(value: tuple[Item, ...]) -> tuple[Item, ...]:
    # Not `min_length`, which also complains when an item was dropped for a mistake of its own.
    if not value:
        raise ValueError("expected at least one, got an empty list")
    return value


class DatasetConfig(Section):
    """Where the images are and how they are split."""

    source: Literal["digits", "folder", "manifest", "torchvision"] = "digits"
    path: str | None = None
    """A folder of class folders, a manifest file, or the folder a torchvision data set is downloaded to."""
    name: str | None = None
    """The torchvision data set's class name, such as `CIFAR10`."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the images set aside for the test when the data come without a test split."""
    leaks: Literal["drop_train", "drop_test", "keep", "error"] = "drop_train"
    """What to do with the same content in train and test."""
    max_failures: float = Field(0.1, ge=0)
    """Images that may fail before the run stops: a share when below 1, a number from 1 up."""
    max_pixels: int = Field(64_000_000, ge=1)
    """Larger images are refused before they are decoded."""
    follow_symlinks: bool = False

    @model_validator(mode="after")
    def _source_has_what_it_needs(self) -> DatasetConfig:
        needs = {"digits": (), "folder": ("path",), "manifest": ("path",), "torchvision": ("path", "name")}[self.source]
        missing = [key for key in needs if getattr(self, key) is None]
        if missing:
            raise ValueError(f"source '{self.source}' also needs {' and '.join(repr(key) for key in missing)}")
        return self


class PreprocessingConfig(Section):
    """An explicit override of the preprocessing that belongs to the weights; recorded in the store's identity."""

    resize: int = Field(256, ge=1)
    crop: int = Field(224, ge=1)
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _yaml_has_lists(cls, value: Any) -> Any:
        return tuple(float(v) if type(v) is int else v for v in value) if isinstance(value, list) else value


class BackboneConfig(Section):
    """One frozen network and the layers whose output is kept."""

    name: str
    """A torchvision classification model, such as `resnet50`."""
    weights: str = "random"
    """A weights enum member (`IMAGENET1K_V2`), `bundled`, `random`, or a `.safetensors` / `.pth` file."""
    layers: tuple[str, ...] = ("penultimate",)
    """`penultimate` is the input of the last linear layer; any node listed by `manyheads layers` will do."""
    pooling: Literal["avg", "max", "grid", "flatten", "cls"] = "avg"
    """How a layer with a spatial or token axis becomes one vector."""
    arguments: dict[str, Scalar] = Field(default_factory=dict)
    """The architecture's own constructor arguments, such as `width_mult`."""
    preprocessing: PreprocessingConfig | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _yaml_has_lists(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("layers")
    @classmethod
    def _at_least_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _not_empty(value)

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

    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    batch_size: Literal["auto"] | int = "auto"
    workers: Literal["auto"] | int = "auto"
    """Threads that read and decode."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    engine: Literal["auto", "torch", "openvino"] = "auto"
    """What computes; `auto` takes OpenVINO where it is installed and the job is long enough to gain from it."""
    decode: Literal["standard", "exact", "fast"] = "standard"
    """`exact` gives the pixels of torchvision's transforms on a PIL image bit for bit, `standard` is within one grey level of
    them, `fast` also decodes a JPEG more than twice as large as needed at a fraction of its size."""

    @field_validator("batch_size", "workers")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError("should be 'auto' or a whole number from 1 up")
        return value


class HeadConfig(Section):
    """One head to tune; a bare name in the YAML is the same as `name:` alone."""

    name: str
    """A built-in head, or `package.module:ATTRIBUTE` naming a `Head` of your own."""
    space: dict[str, tuple[Scalar, ...]] = Field(default_factory=dict)
    """Parameter -> `[low, high]` for a range, the list of choices for a categorical one."""
    class_weight: Literal["balanced"] | None = None

    @field_validator("space", mode="before")
    @classmethod
    def _yaml_has_lists(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if ":" not in value and value not in HEAD_NAMES:
            raise ValueError(
                f"unknown head {value!r}{guess(value, HEAD_NAMES)}; allowed: {', '.join(HEAD_NAMES)}, or package.module:ATTRIBUTE"
            )
        return value


_UNITS = {"MB": 10**6, "GB": 10**9}


class TuningConfig(Section):
    """The search: the same strategy, budget and folds for every head."""

    strategy: Literal["bayes", "random", "grid"] = "bayes"
    trials: int = Field(16, ge=1)
    """Trials per head."""
    seconds: float | None = Field(None, gt=0)
    """Time per head instead of a number of trials."""
    folds: int = Field(5, ge=2)
    scoring: Literal["accuracy", "balanced_accuracy", "macro_f1", "log_loss"] = "accuracy"
    nested: bool = False
    """Also repeat every search within each fold's training images, for a score that nothing was chosen by: folds times
    the work."""
    seeds: int = Field(1, ge=1, le=100)
    """Searches per head, each with its own folds, by the experiment's seed and those after it: so many times the work."""
    pca: int | float | None = None
    """Principal components that every head works on, found within each fold: a number, or the share of the variance they
    hold, such as 0.95."""
    whiten: bool = False
    """Whether `pca` also gives all components the same variance."""
    jobs: Literal["auto"] | int = "auto"
    """Parallel processes."""
    memory: str = "auto"
    """What the features of one embedding and the work on them may take, such as `2GB` or `500MB`; `auto` is three quarters
    of what is free. Embeddings that need more stay on disk, and only the heads that can work there are tuned."""

    @property
    def memory_bytes(self) -> int | None:
        """The limit in bytes; None for `auto`."""
        return None if self.memory == "auto" else int(float(self.memory[:-2]) * _UNITS[self.memory[-2:]])

    @field_validator("pca", mode="before")
    @classmethod
    def _a_number_or_a_share(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is None or whole or (isinstance(value, float) and 0 < value < 1):
            return value
        raise ValueError(
            f"expected a number of components such as 64, a share of the variance below 1 such as 0.95, or null, got {value!r}"
        )

    @model_validator(mode="after")
    def _whitening_needs_components(self) -> TuningConfig:
        if self.whiten and self.pca is None:
            raise ValueError("whiten: works on principal components; give pca too, such as pca: 64")
        return self

    @field_validator("memory")
    @classmethod
    def _a_size(cls, value: str) -> str:
        if value != "auto" and not re.fullmatch(r"\d+(\.\d+)? ?(MB|GB)", value):
            raise ValueError(f"expected 'auto' or a size such as '2GB' or '500MB', got {value!r}")
        return value

    @field_validator("jobs")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError("should be 'auto' or a whole number from 1 up")
        return value


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
    replicas: int = Field(1, ge=1)
    """Copies of the network that share a step's batches on the CPU, one thread each; at most `accumulate`."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    rate: float = Field(1e-3, gt=0)
    rate_decay: float = Field(0.5, gt=0, le=1)
    """Stages further from the head learn more slowly, down to a hundredth of the rate."""
    range_test: bool = False
    """Choose the rate by a range test first; the network is put back as it was."""
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-2, ge=0)
    """Not applied to norms and biases. AdamW's is decoupled from the gradient; SGD's is the usual L2 term."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the rate rises."""
    schedule: Literal["cosine", "trapezoid", "constant"] = "cosine"
    cooldown: float = Field(0.4, gt=0, le=1)
    """Share of the steps in which a trapezoid falls to zero."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    """Alpha of the Beta distribution; 0 is off. With both mixup and cutmix each batch gets one of them."""
    cutmix: float = Field(0.0, ge=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    """Before the last layer."""
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
    average_top: int = Field(0, ge=0)
    """Best evaluations whose weights are offered to a greedy soup; 0 is off."""
    evaluate_every: Literal["auto"] | int = "auto"
    """Steps between two evaluations on the validation images, each followed by a checkpoint; `auto` makes about ten."""
    patience: int | None = Field(None, ge=1)
    """Evaluations without improvement after which training stops."""
    sizes: tuple[tuple[float, int], ...] = ()
    """Image sizes by share of the steps, such as `[[0, 24], [0.5, 32]]`; empty is the weights' own size."""
    profile_steps: int = Field(0, ge=0)
    """Steps torch's profiler watches; its table is written beside the log."""
    tensorboard: bool = False

    @field_validator("sizes", mode="before")
    @classmethod
    def _yaml_has_lists(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return tuple((float(row[0]), row[1]) if isinstance(row, list) and len(row) == 2 else row for row in value)

    @field_validator("steps", "evaluate_every")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError("should be 'auto' or a whole number from 1 up")
        return value

    @model_validator(mode="after")
    def _replicas_have_work(self) -> TrainingConfig:
        if self.replicas > self.accumulate:
            raise ValueError(
                f"replicas: {self.replicas} copies share {self.accumulate} batches; set accumulate to {self.replicas} or more"
            )
        return self


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
    interpolate: bool = True
    """Also try the weights between hand-over and result, and take what does best on the validation images."""
    training: TrainingConfig = TrainingConfig()

    @field_validator("unfreeze", mode="before")
    @classmethod
    def _yaml_has_lists(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class PretrainConfig(Section):
    """A network trained from scratch on labelled images; `configs/pretraining/` has the bundled one's."""

    output: str
    """The folder for checkpoint, log and weights."""
    data: str
    """A folder or .tar archive with train/CLASS/ and val/CLASS/ images of one size."""
    name: str
    """What the network is called in the config of an experiment."""
    architecture: str
    """A torchvision model, or a class that `pipeline.backbone` can build, such as `torchvision.models.regnet.RegNet`."""
    arguments: dict[str, Any] = {}
    """The architecture's own constructor arguments; anything JSON can hold."""
    seed: int = Field(0, ge=0, lt=2**32)
    preprocessing: PreprocessingConfig
    """What features are made with later; its mean and std are also those of the training."""
    training: TrainingConfig


class Config(Section):
    """A whole experiment."""

    output: str
    """The folder every artifact of this experiment is written to."""
    seed: int = Field(0, ge=0, lt=2**32)
    dataset: DatasetConfig = DatasetConfig()
    backbones: tuple[BackboneConfig, ...]
    baselines: tuple[Baseline, ...] = BASELINE_NAMES
    """Cheap rivals in the leaderboard, so that a backbone that does not help is seen not to help."""
    extraction: ExtractionConfig = ExtractionConfig()
    heads: tuple[HeadConfig, ...]
    tuning: TuningConfig = TuningConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    @field_validator("backbones", "baselines", mode="before")
    @classmethod
    def _yaml_has_lists(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("heads", mode="before")
    @classmethod
    def _bare_names(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return tuple({"name": item} if isinstance(item, str) else item for item in value)

    @field_validator("backbones", "heads")
    @classmethod
    def _at_least_one(cls, value: tuple[Section, ...]) -> tuple[Section, ...]:
        return _not_empty(value)

    @model_validator(mode="after")
    def _nothing_twice(self) -> Config:
        names = [head.name for head in self.heads]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"heads: named more than once: {', '.join(twice)}")
        if len(set(map(str, self.backbones))) < len(self.backbones):
            raise ValueError("backbones: the same backbone is given twice")
        return self


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


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read and validate a config file with `--set a.b=c` overrides applied.

    Raises
    ------
    ConfigError
        With one line for every problem: where it is, what was found, what is allowed, and a guess.
    """
    raw = read_yaml(path)
    for override in overrides:
        _apply(raw, override)
    return parse(raw, str(path))


def load_pretraining(path: Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read and validate a pretraining file, as `load` does an experiment's.

    Raises
    ------
    ConfigError
        With one line for every problem.
    """
    raw = read_yaml(path)
    for override in overrides:
        _apply(raw, override)
    try:
        return PretrainConfig.model_validate(raw)
    except ValidationError as error:
        problems = [_problem(cast("dict[str, Any]", detail), PretrainConfig) for detail in error.errors()]
        plural = "problem" if len(problems) == 1 else "problems"
        raise ConfigError(f"{path}: {len(problems)} {plural}", problems) from None


def parse(raw: Mapping[str, Any], origin: str) -> Config:
    """Validate a config given as nested mappings; `origin` names it in messages."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        problems = [_problem(cast("dict[str, Any]", detail)) for detail in error.errors()]
        plural = "problem" if len(problems) == 1 else "problems"
        raise ConfigError(f"{origin}: {len(problems)} {plural}", problems) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping by the rules of YAML 1.2, refusing duplicate keys."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give an existing config file, such as configs/digits.yaml"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; a config is a YAML file") from None
    raw = _parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds {type(raw).__name__}, expected keys such as 'output:' and 'backbones:'")
    return raw


def dump_yaml(config: Config) -> str:
    """Return a config as YAML text that reads back as the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def guess(word: str, allowed: Sequence[str]) -> str:
    """Return `, did you mean 'x'?` for the closest allowed word, or nothing."""
    close = difflib.get_close_matches(word, allowed, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core rules for plain scalars, and no key twice."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - as the library declares it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{origin}{where}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not YAML: {' '.join(str(error).split())}") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    """Put one `a.b.0.c=value` into the raw config; the value is read as YAML."""
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {override!r}: expected key.key=value, such as tuning.trials=8")
    value = _parse_yaml(text, f"--set {override!r}")
    target: Any = raw
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(target, list):
            if not key.isdigit() or int(key) >= len(target):
                here = ".".join(keys[:position])
                raise ConfigError(
                    f"--set {override!r}: '{here}' is a list of {len(target)}; expected an index from 0 to {len(target) - 1}, got {key!r}"
                )
            index: Any = int(key)
        elif isinstance(target, dict):
            index = key
            if not last and not isinstance(target.get(key), (dict, list)):
                target[key] = {}
        else:
            raise ConfigError(f"--set {override!r}: '{'.'.join(keys[:position])}' is not a section")
        if last:
            target[index] = value
        else:
            target = target[index]


def _problem(detail: dict[str, Any], root: type[Section] | None = None) -> str:
    """Turn one of pydantic's error records into one line of ours."""
    location = ".".join(str(part) for part in detail["loc"] if not _is_union_tag(part))
    given = detail.get("input")
    if detail["type"] == "extra_forbidden":
        key = str(detail["loc"][-1])
        allowed = _keys_at(detail["loc"][:-1], root or Config)
        return f"{location}: unknown key{guess(key, allowed)}; allowed: {', '.join(allowed)}"
    if detail["type"] == "missing":
        return f"{location}: missing, expected a value"
    if detail["type"] == "value_error":
        text = str(detail["ctx"]["error"])
        return f"{location}: {text}" if location else text
    hint = ""
    if detail["type"] == "literal_error" and isinstance(given, str):
        hint = guess(given, re.findall(r"'([^']+)'", str(detail["ctx"]["expected"])))
    return f"{location}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {given!r}{hint}"


def _is_union_tag(part: object) -> bool:
    """Whether pydantic added this part of a path for a member of a union, which the user never wrote."""
    return isinstance(part, str) and (part in {"int", "float", "str", "bool", "none"} or "literal[" in part)


def _keys_at(location: tuple[Any, ...], root: type[Section]) -> list[str]:
    """The keys the section at a place of the config may have."""
    section: Any = root
    for part in location:
        if isinstance(part, int):
            continue
        section = _SECTIONS.get(str(part), section)
    return list(section.model_fields)


_SECTIONS: dict[str, type[Section]] = {
    "dataset": DatasetConfig,
    "backbones": BackboneConfig,
    "preprocessing": PreprocessingConfig,
    "extraction": ExtractionConfig,
    "heads": HeadConfig,
    "tuning": TuningConfig,
    "finetune": FinetuneConfig,
    "training": TrainingConfig,
    "unfreeze": UnfreezeConfig,
}
