"""Read a YAML file into a config, report all problems at once, and suggest corrections."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from pipeline.config.sections import (
    LOCAL_DIR,
    VECTORS,
    WEIGHTS_FILES,
    Config,
    Names,
    Section,
    guess,
    keys_of,
    source_of,
)
from pipeline.errors import ConfigError, first_line, number_of
from pipeline.io.files import read_file
from pipeline.io.process import look_in
from pipeline.io.remote import address_of

MOST_BYTES = 1 << 20
"""Size limit of a config file, in bytes."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping; ConfigError if it is unreadable, repeats a key, or uses an unsupported feature such as aliases."""
    try:
        text = read_file(path, MOST_BYTES).decode("utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give an existing config file, such as configs/digits.yaml"
        ) from None
    except UnicodeDecodeError:
        text = ""
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: is not a config, which is YAML with keys such as 'backbones:' and 'heads:'; images are given as a folder "
            "with one folder per class, an archive of it, or a manifest (.csv, .parquet)"
        )
    return raw


def parse_yaml(text: str, origin: str) -> Any:
    """Parse a YAML text; ConfigError if it is invalid. `origin` is its name in messages."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{origin}{where}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise ConfigError(f"{origin}: cannot be read as YAML ({first_line(error)})") from None


class _Loader(yaml.SafeLoader):
    """YAML loader with the core schema of YAML 1.2 for plain scalars; it rejects repeated keys."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - as the library declares it

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few nested aliases can expand beyond any memory
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"aliases such as *{event.anchor} are not supported; write the value out",
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


_TRAINING: Final[Mapping[str, Any]] = {
    "steps": "auto", "batch_size": 32, "accumulate": 1, "replicas": 1, "optimizer": "adamw", "rate": 0.001, "rate_decay": 0.5,
    "range_test": False, "momentum": 0.9, "weight_decay": 0.01, "warmup": 0.1, "schedule": "cosine", "cooldown": 0.4,
    "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "dropout": 0.0, "augment": "crop", "smallest_crop": 0.5,
    "class_weight": None, "clip_norm": None, "precision": "auto", "batch_norm": "frozen", "ema": 0.0, "average_top": 0,
    "evaluate_every": "auto", "patience": None, "sizes": [], "profile_steps": 0, "tensorboard": False,
}  # fmt: skip
"""The defaults that 0.1 wrote into `finetune.training` of every experiment's config."""

GONE: Final[Mapping[str, tuple[object, str]]] = {
    "dataset.follow_symlinks": (False, "links to files inside the folder are followed; remove it"),
    "extraction.processes": (
        "auto",
        "one process uses all processors and one GPU, which extraction.device names; remove it",
    ),
    "tuning.device": ("auto", "heads are searched on the processor; remove it"),
    "tuning.seconds": (None, "tuning.budget, such as 10m, is the time of all heads together"),
    "tuning.whiten": (False, "tuning.pca keeps the components as they are; remove it"),
    "finetune.embedding": ("best", "write finetune.start: EMBEDDING"),
    "finetune.head": ("best", "write finetune.start: EMBEDDING/HEAD, or finetune.start: random"),
    "finetune.interpolate": (True, "interpolated weights are always tried; remove it"),
    "finetune.accumulate": (1, "set finetune.batch_size, and finetune.rate with it"),
    "finetune.weight_decay": (0.01, "it is 0.01; remove it"),
    "finetune.label_smoothing": (0.0, "remove it"),
    "finetune.mixup": (0.0, "remove it, and set finetune.augment: trivial"),
    "finetune.patience": (None, "the best weights are kept anyway; set finetune.steps lower"),
    "finetune.rate_decay": (0.5, "each stage has half the rate of the one above it; remove it"),
    "finetune.warmup": (0.1, "the rate rises in the first tenth of the steps; remove it"),
    "finetune.class_weight": (None, "class weights are those of the head that a run starts from; set it for that head"),
    "finetune.batch_norm": ("frozen", "batch norms stay frozen; remove it"),
    "finetune.ema": (0.0, "no average of the weights is made; remove it"),
    "finetune.profile_steps": (0, "write finetune.watch: [profiler]"),
    "finetune.tensorboard": (False, "write finetune.watch: [tensorboard]"),
    "finetune.training": (_TRAINING, "move its keys into finetune"),
}
"""Removed key -> (its old default, which is still accepted because old files contain it; advice for any other value)."""


def _without_gone(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a config without removed keys, and a message for each that was set to something other than its old default."""
    kept, problems = copy.deepcopy(dict(raw)), []
    for path, (default, told) in GONE.items():
        name, key = path.split(".")
        section = kept.get(name)
        if isinstance(section, dict) and key in section and section.pop(key) != default:
            problems.append(f"{path}: was removed: {told}")
    finetune = kept.get("finetune")
    if isinstance(finetune, dict) and finetune.get("unfreeze") == [{"start": 0.0, "scope": "all"}]:  # as 0.1 wrote it
        del finetune["unfreeze"]
    return kept, problems


LONGEST_SHOWN = 200
"""The longest part of a wrong value shown in an error, in characters."""


Overrides = Sequence[str] | Mapping[str, Any]
"""Either `a.b=c` texts as `--set` takes them, or a mapping: `{"a.b": c}`, `{"a__b": c}` or `{"a": {"b": c}}`."""


def load(
    given: Path | Config,
    overrides: Overrides = (),
    names: Names | None = None,
    of_photos: Mapping[str, Any] | None = None,
) -> Config:
    """Read and validate a config file with overrides applied, or build a config from `of_photos` if `given` is a folder, archive or table.

    Paths in the file are relative to its folder, those in overrides to the working folder; the returned config has them all relative to
    the working folder. `names` are the names in the tables; without them any name is accepted here.

    ConfigError with one line per problem: its location, the value found, the allowed values, and a suggestion.
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
    images = Path(config.dataset.path or "")
    for key, folder in (("output", config.output), ("store", stores)):
        place = next(place for place in (Path(folder), *Path(folder).parents, Path()) if place.exists())
        if not place.is_dir():  # otherwise everything read there would look damaged
            raise ConfigError(
                f"{path}: {key}: {place} is a file, expected a folder or a name that is free; choose another {key}"
            )
        among = config.dataset.source == "folder" and images.is_dir()
        if among and Path(folder).resolve().is_relative_to(images.resolve()):
            raise ConfigError(
                f"{path}: {key}: {folder} is inside the folder of images, {images}, where output files would be mistaken for classes "
                f"and images; choose a folder outside it (--set {key}=FOLDER)"
            )
    names_of_all = [*(head.name for head in config.heads or ()), *(section.name for section in config.backbones)]
    if any(":" in name for name in names_of_all):
        look_in(path.parent)
    return config


def parse(raw: Mapping[str, Any], origin: str, names: Names | None = None) -> Config:
    """Validate nested mappings; ConfigError with all problems. `origin` is their name in messages, `names` are the names in the tables."""
    kept, problems = _without_gone(raw)
    try:
        config = Config.model_validate(kept, context=names)
    except ValidationError as error:
        problems = [*map(_problem, error.errors()), *problems]
    if problems:
        raise ConfigError(f"{origin}: {number_of(len(problems), 'problem')}", problems)
    return config


def dump_yaml(config: Config, folder: Path) -> str:
    """Return a config as YAML text, with paths relative to `folder`; a file there reads back as the same config."""
    raw = config.model_dump(mode="json")
    for section, key, prefix, _ in _paths(raw):
        section[key] = prefix + os.path.relpath(section[key].removeprefix(prefix), folder)
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def _seen_from_here(raw: dict[str, Any], file: Path) -> None:
    """Make the paths of a config file relative to the working folder.

    A path that exists only relative to the working folder is refused: up to 0.1 paths were relative to it.
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
    """Yield every relative path in a raw config: its section, its key, the prefix before the path, and its full key."""
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
    """Apply one override `a.b.0.c=value` to the raw config; the value is literal if the field is text, and YAML otherwise."""
    path, separator, text = override.partition("=")
    keys, origin = path.split("."), f"--set {override!r}"
    if not separator or not all(keys):
        raise ConfigError(f"{origin}: expected key.key=value, such as tuning.trials=8")
    kinds = _kinds_at(keys)
    literal = kinds and all(kind is str or isinstance(kind, str) for kind in kinds) and text not in ("null", "~", "")
    _put(raw, keys, text if literal else parse_yaml(text, origin), origin)


def _put_all(raw: dict[str, Any], above: tuple[str, ...], values: Mapping[str, Any]) -> None:
    """Set values in the raw config by their keys; a mapping given for a section changes only the keys it contains."""
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
    """Return what an annotation allows except None: the members of a union, the values of a literal, or the type itself."""
    if get_origin(kind) is Annotated:
        return _kinds(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [option for each in get_args(kind) for option in _kinds(each)]
    return list(get_args(kind)) if get_origin(kind) is Literal else [kind] if kind is not NoneType else []


def _kinds_at(keys: Sequence[object]) -> list[Any]:
    """Return the types allowed at a place in the config; empty if there is no such place."""
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


def _problem(detail: Any) -> str:
    """Format one of pydantic's error records as one line."""
    location, hint = ".".join(map(str, detail["loc"])), ""
    if detail["type"] == "extra_forbidden":
        *above, key = detail["loc"]
        section = _section_of(_kinds_at(above)) or Config
        allowed = keys_of(section)
        return f"{location}: unknown key{guess(str(key), allowed)}; allowed: {', '.join(allowed)}"
    if detail["type"] == "missing":
        return f"{location}: missing, expected a value"
    if detail["type"] == "value_error":
        text = str(detail["ctx"]["error"])
        return f"{location}: {text}" if location else text
    given = list(detail["input"]) if isinstance(detail["input"], tuple) else detail["input"]
    if detail["type"] == "literal_error" and isinstance(given, str):
        hint = guess(given, re.findall(r"'([^']+)'", str(detail["ctx"]["expected"])))
    expected = detail["msg"].replace("a valid tuple", "a list")
    shown = repr(given)
    shown = shown if len(shown) <= LONGEST_SHOWN else shown[:LONGEST_SHOWN] + "…"
    return f"{location}: {expected[0].lower()}{expected[1:]}, got {shown}{hint}"
