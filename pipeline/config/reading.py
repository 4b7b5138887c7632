"""From a YAML file to a config, with every problem told at once and a guess at what was meant."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from pipeline.config.sections import (
    LOCAL_DIR,
    VECTORS,
    WEIGHTS_FILES,
    Config,
    FinetuneConfig,
    Names,
    Section,
    guess,
    source_of,
)
from pipeline.errors import ConfigError, first_line, number_of
from pipeline.io.files import read_file
from pipeline.io.process import look_in
from pipeline.io.remote import address_of

MOST_BYTES = 1 << 20
"""Of a config file."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping; ConfigError when it cannot be read, has a key twice, or holds what no config needs, such as aliases."""
    try:
        text = read_file(path, MOST_BYTES).decode("utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give an existing config file, such as configs/digits.yaml"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"{path}: is not UTF-8 text; a config is a YAML file, and images are given as a folder that holds one for each class"
        ) from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: is no config, which is YAML with keys such as 'backbones:' and 'heads:'; images are given as a folder that "
            "holds one for each class, an archive of one, or a manifest (.csv, .parquet)"
        )
    return raw


def parse_yaml(text: str, origin: str) -> Any:
    """Return the value that a YAML text stands for, or raise a ConfigError; `origin` names it in messages."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{origin}{where}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: lists and sections within each other are too deep") from None
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:  # of a tag, or of too many digits
        raise ConfigError(f"{origin}: holds a value that cannot be read ({first_line(error)})") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core rules for plain scalars, and no key twice."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - as the library declares it

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few lines of them stand for more values than any memory holds
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"aliases such as *{event.anchor} are not read; write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(problem="a key is a list or section", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


class Retired(NamedTuple):
    """A key, or a spelling of its value, that is gone."""

    default: object
    """The value that meant what happens now."""
    told: str
    """What became of it and what to do instead."""
    is_old: Callable[[Any], bool] = lambda value: True
    """Whether a value is the old spelling, where the key is still there."""


_GONE = {
    "accumulate": Retired(1, "is gone: set finetune.batch_size, and finetune.rate with it"),
    "weight_decay": Retired(0.01, "is gone: it is 0.01; remove it"),
    "label_smoothing": Retired(0.0, "is gone: remove it"),
    "mixup": Retired(0.0, "is gone: remove it, and set finetune.augment: trivial"),
    "patience": Retired(None, "is gone: the best weights are kept anyway; set finetune.steps lower"),
    "rate_decay": Retired(0.5, "is gone: each stage has half the rate of the one above it; remove it"),
    "warmup": Retired(0.1, "is gone: the rate rises in the first tenth of the steps; remove it"),
    "class_weight": Retired(None, "is gone: classes weigh as in the head that a run starts from; set it for that head"),
    "batch_norm": Retired("frozen", "is gone: norms stay as they are; remove it"),
    "ema": Retired(0.0, "is gone: no average of the weights is made; remove it"),
    "profile_steps": Retired(0, "is gone: write finetune.watch: [profiler]"),
    "tensorboard": Retired(False, "is gone: write finetune.watch: [tensorboard]"),
}
"""Of `finetune`, and of `finetune.training` before."""

_OF_TRAINING = {
    "precision": Retired("auto", "is gone: extraction.precision holds for training too"),
    "range_test": Retired(False, "is gone: no rate is looked for; set finetune.rate"),
    "momentum": Retired(0.9, "is gone with the optimizer sgd; remove it"),
    "schedule": Retired("cosine", "is gone: the rate falls along a cosine; remove it"),
    "optimizer": Retired("adamw", "is gone: it is AdamW; remove it"),
    "cutmix": Retired(0.0, "is gone: remove it, and set finetune.augment: trivial"),
    "dropout": Retired(0.0, "is gone: remove it, and set finetune.augment: trivial"),
    "smallest_crop": Retired(0.5, "is gone: crops keep half of the area or more; remove it"),
    "clip_norm": Retired(None, "is gone: lower finetune.rate where the loss is no number"),
    "evaluate_every": Retired("auto", "is gone: a run is evaluated ten times; remove it"),
    "replicas": Retired(1, "is gone: torch's own threads share a step's work; remove it"),
    "average_top": Retired(0, "is gone: no soup of weights is made; remove it"),
    "sizes": Retired([], "is gone: images have the size of the weights' preprocessing; remove it"),
    "cooldown": Retired(0.4, "is gone with the schedule trapezoid; remove it"),
    **{
        key: Retired(about.default, f"is finetune.{key} now")
        for key, about in FinetuneConfig.model_fields.items()
        if key not in ("start", "validation_fraction", "unfreeze", "watch")
    },
}

KEYS: Final[Mapping[str, Retired]] = {
    "dataset.follow_symlinks": Retired(False, "is gone: links are followed to what lies inside the folder; remove it"),
    "extraction.processes": Retired(
        "auto", "is gone: one process uses all processors and one GPU; remove it, and name a GPU with extraction.device"
    ),
    "extraction.decode": Retired(
        None,
        "gpu is gone: the processor decodes; set it to standard, or fast for large photos",
        lambda value: value == "gpu",
    ),
    "tuning.device": Retired("auto", "is gone: heads are searched on the processor; remove it"),
    "finetune.embedding": Retired("best", "is gone: write finetune.start: EMBEDDING"),
    "finetune.head": Retired("best", "is gone: write finetune.start: EMBEDDING/HEAD, or finetune.start: random"),
    "finetune.interpolate": Retired(True, "is gone: the weights between are always tried; remove it"),
    "finetune.unfreeze": Retired(
        [{"start": 0.0, "scope": "all"}],
        "{start: ..., scope: ...} is written as a pair now: [[0, head], [0.2, all]]",
        lambda value: isinstance(value, list) and any(isinstance(step, dict) for step in value),
    ),
    **{f"finetune.{key}": row for key, row in _GONE.items()},
    **{f"finetune.training.{key}": row for key, row in (_GONE | _OF_TRAINING).items()},
    "finetune.training": Retired({}, "is gone: its keys stand in finetune itself", lambda value: value == {}),
}
"""Section and key -> what became of it."""


def without_retired(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a config without retired keys, and a line for each that meant something else than what happens now."""
    kept, problems = copy.deepcopy(dict(raw)), []
    for path, row in KEYS.items():
        *sections, key = path.split(".")
        section: Any = kept
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        old = isinstance(section, dict) and key in section and row.is_old(section[key])
        if old and section.pop(key) != row.default:
            problems.append(f"{path}: {row.told}")
    return kept, problems


LONGEST_SHOWN = 200
"""Characters of a wrong value that an error shows."""


Overrides = Sequence[str] | Mapping[str, Any]
"""`a.b=c` as `--set` takes them, or the values by their keys: `{"a.b": c}`, `{"a__b": c}` or `{"a": {"b": c}}`."""


def load(
    given: Path | Config,
    overrides: Overrides = (),
    names: Names | None = None,
    of_photos: Mapping[str, Any] | None = None,
) -> Config:
    """Read and validate a config file with overrides applied; or the config of photos in a folder, an archive or a table, `of_photos`.

    Paths in the file are relative to its folder, those of overrides to the working folder; the config has them all relative to
    the working folder. `names` are the words of the tables; without them any word passes here.

    ConfigError with one line for every problem: where it is, what was found, what is allowed, and a guess.
    """
    if isinstance(given, Config) and not overrides:
        return given
    path = Path("the config") if isinstance(given, Config) else given
    source = "folder" if path.is_dir() else source_of(str(path))
    if isinstance(given, Config):
        raw = given.model_dump(mode="json")
    elif of_photos is not None and source is not None:
        raw = {**of_photos, "dataset": {"source": source, "path": address_of(path) or str(path)}}
    else:
        raw = read_yaml(path)
        _seen_from_here(raw, path)
    if isinstance(overrides, Mapping):
        _put_all(raw, (), overrides)
    for override in () if isinstance(overrides, Mapping) else overrides:
        _apply(raw, override)
    config = parse(raw, str(path), names)
    stores = config.store or str(Path(config.output).parent / "features")
    for key, folder in (("output", config.output), ("store", stores)):
        place = next(place for place in (Path(folder), *Path(folder).parents, Path()) if place.exists())
        if not place.is_dir():  # whatever is read there would look damaged
            raise ConfigError(
                f"{path}: {key}: {place} is a file, expected a folder or a name that is free; choose another {key}"
            )
        images = Path(config.dataset.path or "") if config.dataset.source == "folder" else None
        if images and images.is_dir() and Path(folder).resolve().is_relative_to(images.resolve()):
            raise ConfigError(
                f"{path}: {key}: {folder} lies in the folder of images, {images}, where what is written would be taken for classes "
                f"and images; choose a place outside of it (--set {key}=FOLDER)"
            )
    if any(
        ":" in name for name in [*(head.name for head in config.heads or ()), *(each.name for each in config.backbones)]
    ):
        look_in(path.parent)
    return config


def parse(raw: Mapping[str, Any], origin: str, names: Names | None = None) -> Config:
    """Validate nested mappings, ConfigError with every problem; `origin` names them, `names` are the words of the tables."""
    kept, problems = without_retired(raw)
    try:
        config = Config.model_validate(kept, context=names)
    except ValidationError as error:
        problems = _problems(error) + problems
    if problems:
        raise ConfigError(f"{origin}: {number_of(len(problems), 'problem')}", problems)
    return config


def dump_yaml(config: Config, folder: Path) -> str:
    """Return a config as the YAML text of a file in a folder, which reads back as the same config."""
    raw = config.model_dump(mode="json")
    for section, key, prefix, _ in _paths(raw):
        section[key] = prefix + os.path.relpath(section[key].removeprefix(prefix), folder)
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def _seen_from_here(raw: dict[str, Any], file: Path) -> None:
    """Rewrite the paths of a config file so that they hold in the working folder.

    A path that leads nowhere from the file's folder, but somewhere from the working folder, is refused: so it was up to 0.1.
    """
    problems = []
    for section, key, prefix, where in _paths(raw):
        given = section[key].removeprefix(prefix)
        place = Path(os.path.abspath(file.parent / given))
        seen = str(place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place)
        section[key] = prefix + seen
        if not os.path.exists(seen) and os.path.exists(given):
            right = os.path.relpath(given, file.parent)
            problems.append(f"{where}: {given!r} is relative to the working folder, expected {right!r}")
    if problems:
        raise ConfigError(f"{file}: paths in a config are relative to the folder the config is in", problems)


def _paths(raw: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str, str]]:
    """Yield every relative path in a config that may hold anything: its section, its key, what stands before it, and the first
    two for a message.
    """
    dataset, backbones = raw.get("dataset"), raw.get("backbones")
    places: list[tuple[Any, str, str]] = [
        (raw, "output", "output"),
        (raw, "store", "store"),
        (dataset, "path", "dataset.path"),
        (dataset, "root", "dataset.root"),
    ]
    for number, section in enumerate(backbones if isinstance(backbones, list) else []):
        if isinstance(section, dict) and str(section.get("weights")).endswith(WEIGHTS_FILES):
            places.append((section, "weights", f"backbones.{number}.weights"))
        name = str(section.get("name")) if isinstance(section, dict) else ""
        if name.startswith(LOCAL_DIR) or name.endswith(VECTORS):
            places.append((section, "name", f"backbones.{number}.name"))
    for section, key, where in places:
        path = section.get(key) if isinstance(section, dict) else None
        prefix = LOCAL_DIR if key == "name" and str(path).startswith(LOCAL_DIR) else ""
        if not isinstance(path, str) or not path or address_of(path) or path.startswith("file://"):
            continue
        if not os.path.isabs(os.path.expanduser(path.removeprefix(prefix))):
            yield section, key, prefix, where


def _apply(raw: dict[str, Any], override: str) -> None:
    """Put one `a.b.0.c=value` into the raw config; the value is taken as it is where the field is text, and read as YAML elsewhere."""
    path, separator, text = override.partition("=")
    keys, origin = path.split("."), f"--set {override!r}"
    if not separator or not all(keys):
        raise ConfigError(f"{origin}: expected key.key=value, such as tuning.trials=8")
    kinds = _kinds_at(keys)
    literal = kinds and all(kind is str or isinstance(kind, str) for kind in kinds) and text not in ("null", "~", "")
    _put(raw, keys, text if literal else parse_yaml(text, origin), origin)


def _put_all(raw: dict[str, Any], above: tuple[str, ...], values: Mapping[str, Any]) -> None:
    """Put values into the raw config by their keys; a mapping that is given for a section changes only the keys it has."""
    for key, value in values.items():
        keys = (*above, *key.replace("__", ".").split("."))
        if isinstance(value, Mapping) and _section_of(_kinds_at(keys)) is not None:
            _put_all(raw, keys, value)
        else:
            _put(raw, keys, str(value) if isinstance(value, os.PathLike) else value, f"{'.'.join(keys)}={value!r}")


def _put(raw: dict[str, Any], keys: Sequence[str], value: Any, origin: str) -> None:
    target: Any = raw
    for position, key in enumerate(keys):
        here = ".".join(keys[:position])
        index: Any = key
        if isinstance(target, list):
            if not key.isdigit() or int(key) >= len(target):
                raise ConfigError(
                    f"{origin}: '{here}' is a list of {len(target)}; expected an index from 0 to {len(target) - 1}, got {key!r}"
                )
            index = int(key)
        elif not isinstance(target, dict):
            raise ConfigError(f"{origin}: '{here}' is not a section")
        if position == len(keys) - 1:
            target[index] = value
        elif isinstance(target, dict) and not isinstance(target.get(key), dict | list):
            target[key] = {}
        target = target[index]


def _kinds(kind: Any) -> list[Any]:
    """What an annotation allows but None: the members of a union, the words of a literal, or the type itself."""
    if get_origin(kind) is Annotated:
        return _kinds(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [option for each in get_args(kind) for option in _kinds(each)]
    return list(get_args(kind)) if get_origin(kind) is Literal else [kind] if kind is not NoneType else []


def _kinds_at(keys: Sequence[object]) -> list[Any]:
    """What may stand at a place of the config; nothing where there is no such place."""
    kinds: list[Any] = [Config]
    for key in map(str, keys):
        section = _section_of(kinds)
        if section is not None and key in section.model_fields:
            kinds = _kinds(section.model_fields[key].annotation)
        elif key.isdigit() and kinds and get_origin(kinds[0]) is tuple:
            kinds = _kinds(get_args(kinds[0])[0])
        else:
            return []
    return kinds


def _section_of(kinds: Sequence[Any]) -> type[Section] | None:
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _problems(error: ValidationError) -> list[str]:
    """Tell every problem of a config in a line; what pydantic says of each member of a union is one problem."""
    details: dict[str, list[Any]] = {}
    for detail in error.errors():
        location = ".".join(str(part) for part in detail["loc"] if not _is_union_tag(part))
        details.setdefault(location, []).append(detail)
    above = {place[:end] for place in details for end, letter in enumerate(place) if letter == "."}
    word = {place for place, same in details.items() if all(each["type"] == "literal_error" for each in same)}
    # Of a list or a word what is wrong within the list is told: it is no word.
    return [_problem(location, same) for location, same in details.items() if location not in word & above]


def _problem(location: str, details: list[Any]) -> str:
    """Turn pydantic's error records of one place into one line of ours."""
    detail, hint = details[0], ""
    if detail["type"] == "extra_forbidden":
        *above, key = detail["loc"]
        section = _section_of(_kinds_at(above)) or Config
        allowed = list(section.model_fields)
        return f"{location}: unknown key{guess(str(key), allowed)}; allowed: {', '.join(allowed)}"
    if detail["type"] == "missing":
        return f"{location}: missing, expected a value"
    if detail["type"] == "value_error":
        text = str(detail["ctx"]["error"])
        return f"{location}: {text}" if location else text
    given = list(detail["input"]) if isinstance(detail["input"], tuple) else detail["input"]
    if detail["type"] == "literal_error" and isinstance(given, str):
        hint = guess(given, re.findall(r"'([^']+)'", str(detail["ctx"]["expected"])))
    first, *others = (each["msg"].replace("a valid tuple", "a list") for each in details)
    expected = " or ".join(
        [first[0].lower() + first[1:], *(other.removeprefix("Input should be ") for other in others)]
    )
    shown = repr(given)
    return f"{location}: {expected}, got {shown if len(shown) <= LONGEST_SHOWN else shown[:LONGEST_SHOWN] + '…'}{hint}"


def _is_union_tag(part: object) -> bool:
    """Whether pydantic added this part of a path for a member of a union, which the user never wrote."""
    kinds = {"int", "float", "str", "bool", "none", "constrained-int", "constrained-float"}
    return isinstance(part, str) and (part in kinds or "literal[" in part or part.startswith("tuple["))
