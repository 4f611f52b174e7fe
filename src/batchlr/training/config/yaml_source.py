"""YAML text -> plain values, and the place of every key."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

from batchlr.training.config.problems import Keys, Place, Problem, dotted

_TEXT = "tag:yaml.org,2002:str"


@dataclass(frozen=True)
class Layer:
    """Values from one source, or merged from several, and where each key was given."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Keys, Place] = field(default_factory=dict)


class _Builder:
    """Builds values from YAML nodes; notes places, duplicate keys and keys that are not text."""

    def __init__(
        self, loader: yaml.SafeLoader, place: Callable[[yaml.Mark], Place], problems: list[Problem]
    ) -> None:
        self.loader = loader
        self.place = place
        self.problems = problems
        self.places: dict[Keys, Place] = {}
        self._checked: set[int] = set()  # mappings that were looked through for duplicates
        self._open: list[yaml.Node] = []  # from the top down to the node being built

    def build(self, node: yaml.Node, keys: Keys = ()) -> Any:
        if node in self._open:
            raise yaml.MarkedYAMLError(problem="alias inside itself", problem_mark=node.start_mark)
        self._open.append(node)
        if isinstance(node, yaml.MappingNode):
            value: Any = self._mapping(node, keys)
        elif isinstance(node, yaml.SequenceNode):
            value = [self.build(child, (*keys, i)) for i, child in enumerate(node.value)]
        else:
            value = self.loader.construct_object(node)
        self._open.pop()
        return value

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        self._check_duplicates(node, keys)
        self.loader.flatten_mapping(node)
        values = {}
        for key_node, child in node.value:
            if key_node.tag != _TEXT:
                self._refuse(
                    key_node, keys, f"key {key_node.value!r} must be text: put it in quotes"
                )
                continue
            path = (*keys, key_node.value)
            self.places[path] = self.place(key_node.start_mark)
            values[key_node.value] = self.build(child, path)
        return values

    def _check_duplicates(self, node: yaml.MappingNode, keys: Keys) -> None:
        if id(node) in self._checked:  # again, through an alias
            return
        self._checked.add(id(node))
        first: dict[str, Place] = {}
        for key_node, _ in node.value:
            if key_node.tag != _TEXT:
                continue
            if key_node.value in first:
                message = f"given twice; first at {first[key_node.value]}"
                self._refuse(key_node, (*keys, key_node.value), message)
            first.setdefault(key_node.value, self.place(key_node.start_mark))

    def _refuse(self, node: yaml.Node, keys: Keys, message: str) -> None:
        self.problems.append(Problem(self.place(node.start_mark), dotted(keys), message))


def parse(
    text: str, place: Callable[[yaml.Mark | None], Place], problems: list[Problem]
) -> tuple[Any, dict[Keys, Place]] | None:
    """The value that ``text`` spells and the places of its keys; None when it is not YAML."""
    try:
        loader = yaml.SafeLoader(text)
        builder = _Builder(loader, place, problems)
        node = loader.get_single_node()
        return (None if node is None else builder.build(node)), builder.places
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problems.append(Problem(place(mark), "", f"not valid YAML: {error.problem}"))
    except yaml.reader.ReaderError as error:
        problems.append(Problem(place(None), "", f"not valid YAML: {error.reason}"))
    except ValueError as error:  # a scalar that only looks right, such as the date 2026-13-45
        problems.append(Problem(place(None), "", f"not valid YAML: {error}"))
    return None
