"""What is wrong with a configuration, where, and the way out."""

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from batchlr.training.config.fields import Options
from batchlr.training.config.schema import SECTIONS, TrainConfig
from batchlr.training.config.variants import VARIANTS, default_name

Keys = tuple[str | int, ...]  # the way from the top to a value: ("optim", "betas", 0)


@dataclass(frozen=True)
class Place:
    """Where a value was given: a spot in a file, a whole file (line 0), or the command line."""

    source: str
    line: int = 0
    column: int = 0  # on the command line: which argument
    on_command_line: bool = False

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source

    @property
    def order(self) -> tuple[bool, str, int, int]:
        """Sorts as one reads: files from top to bottom, then the command line."""
        file = "" if self.on_command_line else self.source
        return (self.on_command_line, file, self.line, self.column)


@dataclass(frozen=True)
class Problem:
    """One thing to mend."""

    place: Place
    key: str  # dotted; empty for the file as a whole
    message: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (str(self.place), self.key, self.message)))


class ConfigError(Exception):
    """A configuration that cannot be used, with all its problems."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        unique = dict.fromkeys(problems)  # a base read twice complains twice
        self.problems = tuple(sorted(unique, key=lambda problem: problem.place.order))
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        title = f"{count} problem{'s' if count > 1 else ''} in the configuration:"
        return "\n  ".join([title, *map(str, self.problems)])


def dotted(keys: Keys) -> str:
    """``("optim", "lr")`` as a user types it: ``optim.lr``."""
    return ".".join(map(str, keys))


def shown(value: Any) -> str:
    """A value as YAML spells it, cut to a readable length."""
    words = {True: "true", False: "false", None: "null"}
    if value is None or isinstance(value, bool):
        return words[value]
    return reprlib.repr(value)


def nearest(word: Any, choices: Iterable[str]) -> str:
    """A hint at the choice that ``word`` may have meant, or nothing."""
    found = get_close_matches(str(word), choices, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def place_of(keys: Keys, places: Mapping[Keys, Place], whole: Place) -> Place:
    """Where ``keys``, or the section around them, was given."""
    for length in range(len(keys), 0, -1):
        if keys[:length] in places:
            return places[keys[:length]]
    below = [place for given, place in places.items() if given[: len(keys)] == keys]
    return below[-1] if below else whole  # a section that the command line alone has named


def problems_in(
    error: ValidationError, values: Mapping[str, Any], places: Mapping[Keys, Place], whole: Place
) -> list[Problem]:
    """The schema's refusals of ``values`` in the user's terms."""
    problems = []
    for details in _all_errors(error):
        keys, given = _without_tag(details["loc"]), details["input"]
        for key in details.get("ctx", {}).get("at", ()):  # inside a section checked as a whole
            keys = (*keys, key)
            given = given.get(key) if isinstance(given, dict) else getattr(given, key)
        message = _message({**details, "input": given}, keys, values)
        asked_by = (keys[0], "name")  # what makes a missing key required
        at = asked_by if details["type"] == "missing" and asked_by in places else keys
        problems.append(Problem(place_of(at, places, whole), dotted(keys), message))
    return problems


def _all_errors(error: ValidationError) -> Iterable[ErrorDetails]:
    """With those of a section whose misspelt name has hidden them."""
    for details in error.errors(include_url=False):
        if details["type"] != "union_tag_invalid":
            yield details
            continue
        section, given = str(details["loc"][0]), details["input"]
        yield {**details, "loc": (section, given["name"], "name")}
        choices = VARIANTS[section]
        for meant in get_close_matches(str(given["name"]), choices, n=1):
            try:
                choices[meant].model_validate({**given, "name": meant})
            except ValidationError as hidden:
                for other in hidden.errors(include_url=False):
                    if other["type"] != "extra_forbidden":  # it may belong to what was meant
                        yield {**other, "loc": (section, meant, *other["loc"])}


def _without_tag(location: Keys) -> Keys:
    """Pydantic puts the variant's name behind the section: ``optim.sgd.lr``."""
    if len(location) > 1 and location[0] in VARIANTS:
        return (location[0], *location[2:])
    return location


def _message(details: ErrorDetails, keys: Keys, values: Mapping[str, Any]) -> str:
    given = details["input"]
    match details["type"]:
        case "extra_forbidden":
            return _unknown_key(keys, values)
        case "missing":
            return "is required and missing"
        case "union_tag_invalid":
            name = given["name"]
            choices = VARIANTS[str(keys[0])]
            return f"must be one of {', '.join(choices)}, got {shown(name)}{nearest(name, choices)}"
        case "literal_error":
            expected = details["ctx"]["expected"]
            hint = nearest(given, re.findall(r"'([^']*)'", expected))
            return f"must be {expected.replace(chr(39), '')}, got {shown(given)}{hint}"
        case "string_type":
            return f"must be text, got {shown(given)}; put it in quotes"
        case "model_type" | "model_attributes_type":
            return _not_a_section(keys, given)
        case _:
            return f"{details['msg']}, got {shown(given)}"


def _unknown_key(keys: Keys, values: Mapping[str, Any]) -> str:
    *parents, key = keys
    if not parents:
        choices: Sequence[str] = [*TrainConfig.model_fields, "base"]
        return f"unknown key{nearest(key, choices) or '; the keys are ' + ', '.join(choices)}"
    section = str(parents[0])
    name, options = _section(section, values)
    for inner in parents[1:]:
        name, options = f"{name}.{inner}", _inside(options, str(inner))
    of_others = [
        other for other, kind in VARIANTS.get(section, {}).items() if key in kind.model_fields
    ]
    if of_others:
        return f"is a key of {', '.join(of_others)}, not of {name}"
    choices = list(options.model_fields)
    hint = nearest(key, choices) or f"; the keys of {name} are {', '.join(choices)}"
    return f"unknown key{hint}"


def _section(section: str, values: Mapping[str, Any]) -> tuple[str, type[Options]]:
    """What a section is called, and what it may hold."""
    if section in VARIANTS:
        name = values[section].get("name", default_name(section))
        return name, VARIANTS[section][name]
    return section, SECTIONS[section]


def _inside(options: type[Options], key: str) -> type[Options]:
    """What the mapping at ``key`` of a section may hold."""
    choices = get_args(options.model_fields[key].annotation)
    return next(c for c in choices if isinstance(c, type) and issubclass(c, Options))


def _not_a_section(keys: Keys, given: Any) -> str:
    section = str(keys[0])
    hint = ""
    if given is None:
        hint = "; remove it, or write its keys below it"
    elif isinstance(given, str) and section in VARIANTS:
        hint = f"; write {section}: {{name: {given}}}, or {section}.name={given}"
    return f"must be a mapping of keys, got {shown(given)}{hint}"
