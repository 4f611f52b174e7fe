"""Files and command line -> one checked configuration.

Later sources win: defaults, base files, the file, the command line. Mappings merge key by key,
everything else is replaced, and the result is checked once.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from batchlr.training.config.problems import (
    ConfigError,
    Place,
    Problem,
    dotted,
    place_of,
    problems_in,
    shown,
)
from batchlr.training.config.schema import SECTIONS, TrainConfig
from batchlr.training.config.variants import VARIANTS, default_name
from batchlr.training.config.yaml_source import Layer, parse


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration, and how it came about."""

    config: TrainConfig
    notes: tuple[str, ...]  # what was left out or carried over, for the user to read
    sources: Mapping[str, str]  # dotted key -> where it was given; absent = default


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedConfig:
    """The configuration in a YAML file, changed by ``a.b=value`` overrides.

    Args:
        path: The file. It may name others to build on: ``base: ../_base/cifar100.yaml``.
        overrides: Changes in command-line form; values are YAML.

    Raises:
        ConfigError: With every problem found, not only the first.
    """
    path = Path(path)
    reading = _Reading()
    layers = reading.files(path, Place(str(path)))
    layers.append(reading.command_line(overrides))
    if reading.incomplete:  # without a whole file, further complaints might be wrong
        raise ConfigError(reading.problems)
    merged, notes = Layer(), []
    for layer in layers:
        merged, said = merge(merged, layer)
        notes += said
    values = {"name": _run_name(path)} | merged.values
    try:
        config = TrainConfig.model_validate(values)
    except ValidationError as error:
        found = problems_in(error, values, merged.places, Place(str(path)))
        raise ConfigError([*reading.problems, *found]) from None
    if reading.problems:
        raise ConfigError(reading.problems)
    return LoadedConfig(config, tuple(notes), _sources(merged))


@dataclass
class _Reading:
    """Reads layers and gathers problems on the way."""

    problems: list[Problem] = field(default_factory=list)
    incomplete: bool = False  # a file could not be read to its end

    def files(self, path: Path, asked_at: Place, above: tuple[Path, ...] = ()) -> list[Layer]:
        """The layers of a file, those of its bases first."""
        if path.resolve() in above:
            chain = " -> ".join(p.name for p in (*above, path))
            return self._give_up(asked_at, f"base files form a circle: {chain}")
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            which = f" {path}" if above else ""
            return self._give_up(asked_at, f"cannot read{which}: {error.strerror}")
        except UnicodeDecodeError:
            return self._give_up(Place(str(path)), "is not UTF-8 text")
        layer = self._top_level(text, path)
        if layer is None:
            return []
        bases = layer.values.pop("base", [])
        asked_at = place_of(("base",), layer.places, asked_at)
        layers: list[Layer] = []
        for base in self._base_paths(bases, asked_at):
            file = Path(os.path.normpath(path.parent / base))
            layers += self.files(file, asked_at, (*above, path.resolve()))
        return [*layers, layer]

    def command_line(self, overrides: Sequence[str]) -> Layer:
        """All overrides as one layer; of two that disagree, the later wins."""
        merged = Layer()
        for index, override in enumerate(overrides):
            place = Place(f"command line {override!r}", column=index, on_command_line=True)
            path, equals, text = override.partition("=")
            keys = tuple(path.split("."))
            if not equals or not all(keys):
                message = "must have the form key=value, such as train.epochs=5"
                self.problems.append(Problem(place, "", message))
            elif keys[0] == "base":
                self.problems.append(Problem(place, "base", "can stand only in a file"))
            elif parsed := parse(text, partial(_anywhere, place), self.problems):
                value, inner = parsed
                places = {keys: place} | {keys + below: at for below, at in inner.items()}
                for key in reversed(keys):
                    value = {key: value}
                values = _merged(merged.values, value)
                merged = Layer(values, merged.places | places)
        return merged

    def _top_level(self, text: str, path: Path) -> Layer | None:
        def place(mark: yaml.Mark | None) -> Place:
            return Place(str(path), mark.line + 1, mark.column + 1) if mark else Place(str(path))

        parsed = parse(text, place, self.problems)
        if parsed is None:
            self.incomplete = True
            return None
        value, places = parsed
        if isinstance(value, dict):
            return Layer(value, places)
        if value is None:
            self._give_up(place(None), "is empty; {} stands for all defaults")
        else:
            self._give_up(place(None), f"must be a mapping of keys, got {shown(value)}")
        return None

    def _base_paths(self, bases: Any, place: Place) -> list[str]:
        paths = [bases] if isinstance(bases, str) else bases
        if isinstance(paths, list) and all(isinstance(base, str) for base in paths):
            return paths
        message = f"must be a path or a list of paths, got {shown(bases)}"
        self.problems.append(Problem(place, "base", message))
        return []

    def _give_up(self, place: Place, message: str) -> list[Layer]:
        self.incomplete = True
        self.problems.append(Problem(place, "", message))
        return []


def merge(lower: Layer, upper: Layer) -> tuple[Layer, list[str]]:
    """``upper`` over ``lower``, with notes on what a changed ``name`` meant for the keys below.

    A section that gets another name in ``upper`` loses those keys of ``lower`` that only its old
    name knows. Keys that neither name knows stay, to be refused.
    """
    values, notes = dict(lower.values), []
    above = dict(upper.values)
    for section in SECTIONS:
        if section not in above or section not in values:
            continue
        if not isinstance(values[section], dict):  # wrong below: to be refused, not papered over
            del above[section]
        elif section in VARIANTS and isinstance(above[section], dict):
            values[section], said = _adapt(section, values[section], above[section])
            notes += said
    return Layer(_merged(values, above), lower.places | upper.places), notes


def _adapt(
    section: str, below: dict[str, Any], above: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    variants = VARIANTS[section]
    old = below.get("name", default_name(section))
    new = above.get("name", old)
    if old == new or not all(name in [*variants] for name in (old, new)):  # may be no text at all
        return below, []
    known, takes = variants[old].model_fields, variants[new].model_fields
    gone = [key for key in below if key in known and key not in {*takes, *above}]
    notes = [f"{section}.{key} does not apply to {new}: left out" for key in gone]
    if below.get("lr", "auto") != "auto" and "lr" not in above:
        notes.append(f"{section}.lr {below['lr']} was given for {old}: kept for {new}")
    return {key: value for key, value in below.items() if key not in gone}, notes


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(lower)
    for key, value in upper.items():
        below = values.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            values[key] = _merged(below, value)
        else:
            values[key] = value
    return values


def _anywhere(place: Place, _: yaml.Mark | None) -> Place:
    return place


def _run_name(path: Path) -> str:
    """The file's name without its ending, in characters that any file system takes."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip("-.") or "run"


def _sources(layer: Layer) -> dict[str, str]:
    """Where each value that stands in ``layer`` was given, by dotted key."""
    sources = {}
    for keys, place in layer.places.items():
        value: Any = layer.values
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict):
            sources[dotted(keys)] = str(place)
    return sources
