"""From YAML to a config, with every problem reported at once.

The YAML is read by the rules of YAML 1.2, so `1e-3` is a number, `NO` is a text, `010` is ten, and a key given twice is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import yaml
from pydantic import ValidationError

from pipeline.config.experiment import Config
from pipeline.config.features import BackboneConfig, DatasetConfig, ExtractionConfig, PreprocessingConfig
from pipeline.config.paths import seen_from, seen_from_here
from pipeline.config.retired import KEYS, VALUES, without_defaults
from pipeline.config.section import Section, guess
from pipeline.config.training import FinetuneConfig, TrainingConfig, UnfreezeConfig
from pipeline.config.tuning import HeadConfig, TuningConfig
from pipeline.errors import ConfigError, first_line
from pipeline.io.files import read_file
from pipeline.io.imports import look_in

MOST_BYTES = 1 << 20
"""Of a config file."""
LONGEST_SHOWN = 200
"""Characters of a wrong value that an error shows."""


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read and validate a config file with `--set a.b=c` overrides applied.

    Raises
    ------
    ConfigError
        With one line for every problem: where it is, what was found, what is allowed, and a guess.
    """
    raw = read_yaml(path)
    seen_from_here(raw, path)
    for override in overrides:
        _apply(raw, override, Config)
    config = parse(raw, str(path))
    _require_folder("output", config.output, str(path))
    _require_folder("store", config.store or str(Path(config.output).parent / "features"), str(path))
    if any(":" in head.name for head in config.heads):
        look_in(path.parent)
    return config


def _require_folder(key: str, folder: str, origin: str) -> None:
    """Refuse a folder that is a file, or in one: whatever is read there would look damaged."""
    place = next(place for place in (Path(folder), *Path(folder).parents, Path()) if place.exists())
    if not place.is_dir():
        raise ConfigError(
            f"{origin}: {key}: {place} is a file, expected a folder or a name that is free; choose another {key}"
        )


def parse(raw: Mapping[str, Any], origin: str) -> Config:
    """Validate a config given as nested mappings; `origin` names it in messages."""
    try:
        return Config.model_validate(without_defaults(raw))
    except ValidationError as error:
        raise _refused(origin, error, Config) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping by the rules of YAML 1.2, refusing duplicate keys."""
    try:
        text = read_file(path, MOST_BYTES).decode("utf-8")
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


def dump_yaml(config: Config, folder: Path) -> str:
    """Return a config as the YAML text of a file in a folder, which reads back as the same config."""
    raw = config.model_dump(mode="json")
    seen_from(raw, folder)
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


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
    except RecursionError:
        raise ConfigError(f"{origin}: lists and sections within each other are too deep") from None
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:  # of a tag, or of too many digits
        raise ConfigError(f"{origin}: holds a value that cannot be read ({first_line(error)})") from None


def _is_text(root: type[Section], keys: Sequence[str]) -> bool:
    """Whether the field at a place of the config takes text and nothing else but null."""
    kind: Any = root
    for key in keys:
        options = [option for option in _options(kind) if option is not type(None)]
        section = next((each for each in options if isinstance(each, type) and issubclass(each, Section)), None)
        if section is not None and key in section.model_fields:
            kind = section.model_fields[key].annotation
        elif key.isdigit() and len(options) == 1 and get_origin(options[0]) is tuple:
            kind = get_args(options[0])[0]
        else:
            return False
    options = [option for option in _options(kind) if option is not type(None)]
    return all(option is str or isinstance(option, str) for option in options)


def _options(kind: Any) -> list[Any]:
    """What an annotation allows: the members of a union, the words of a literal, or the type itself."""
    if get_origin(kind) is Annotated:
        return _options(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType, Literal):
        return [
            option for each in get_args(kind) for option in (_options(each) if not isinstance(each, str) else [each])
        ]
    return [kind]


def _apply(raw: dict[str, Any], override: str, root: type[Section]) -> None:
    """Put one `a.b.0.c=value` into the raw config; the value is taken as it is where the field is text, and read as YAML elsewhere."""
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {override!r}: expected key.key=value, such as tuning.trials=8")
    literal = _is_text(root, keys) and text not in ("null", "~", "")
    value = text if literal else _parse_yaml(text, f"--set {override!r}")
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


def _refused(origin: str, error: ValidationError, root: type[Section]) -> ConfigError:
    """Tell every problem of a config in a line; what pydantic says of each member of a union is one problem."""
    details: dict[str, list[dict[str, Any]]] = {}
    for detail in error.errors():
        location = ".".join(str(part) for part in detail["loc"] if not _is_union_tag(part))
        details.setdefault(location, []).append(cast("dict[str, Any]", detail))
    problems = [_problem(location, same, root) for location, same in details.items()]
    plural = "problem" if len(problems) == 1 else "problems"
    return ConfigError(f"{origin}: {len(problems)} {plural}", problems)


def _problem(location: str, details: list[dict[str, Any]], root: type[Section]) -> str:
    """Turn pydantic's error records of one place into one line of ours."""
    detail = details[0]
    given = detail.get("input")
    if detail["type"] == "extra_forbidden":
        if location in KEYS:
            return f"{location}: {KEYS[location].told}"
        key = str(detail["loc"][-1])
        allowed = _keys_at(detail["loc"][:-1], root)
        return f"{location}: unknown key{guess(key, allowed)}; allowed: {', '.join(allowed)}"
    if detail["type"] == "missing":
        return f"{location}: missing, expected a value"
    if detail["type"] == "value_error":
        text = str(detail["ctx"]["error"])
        return f"{location}: {text}" if location else text
    hint = ""
    if detail["type"] == "literal_error" and isinstance(given, str):
        if (location, given) in VALUES:
            return f"{location}: {given} {VALUES[location, given]}"
        hint = guess(given, re.findall(r"'([^']+)'", str(detail["ctx"]["expected"])))
    first, *others = (each["msg"].replace("a valid tuple", "a list") for each in details)
    expected = " or ".join(
        [first[0].lower() + first[1:], *(other.removeprefix("Input should be ") for other in others)]
    )
    shown = repr(given)
    return f"{location}: {expected}, got {shown if len(shown) <= LONGEST_SHOWN else shown[:LONGEST_SHOWN] + '…'}{hint}"


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
