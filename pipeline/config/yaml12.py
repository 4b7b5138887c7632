"""YAML by the rules of version 1.2: `1e-3` is a number, `NO` a text, `010` ten, and a key given twice is refused."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError, first_line
from pipeline.io.files import read_file

MOST_BYTES = 1 << 20
"""Of a config file."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping.

    Raises
    ------
    ConfigError
        When it cannot be read, is no mapping, has a key twice, or holds what no config needs (aliases, other tags' values).
    """
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
    """Return the value that a YAML text stands for; `origin` names it in messages.

    Raises
    ------
    ConfigError
    """
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
