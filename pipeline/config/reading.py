"""From a YAML file to a config, with every problem told at once and a guess at what was meant."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from pipeline.config.retired import without_retired
from pipeline.config.sections import LOCAL_DIR, VECTORS, WEIGHTS_FILES, Config, Names, Section, guess, source_of
from pipeline.config.yaml12 import parse_yaml, read_yaml
from pipeline.errors import ConfigError, number_of
from pipeline.io.imports import look_in
from pipeline.io.remote import address_of

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

    Raises
    ------
    ConfigError
        With one line for every problem: where it is, what was found, what is allowed, and a guess.
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
    """Validate a config given as nested mappings; `origin` names it in messages, `names` are the words of the tables.

    Raises
    ------
    ConfigError
        With one line for every problem.
    """
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
