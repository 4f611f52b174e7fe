"""Configuration -> YAML that reads back as the same configuration, and its JSON Schema."""

from decimal import Decimal
from typing import Any

import yaml

from batchlr.training.config.schema import TrainConfig
from batchlr.training.config.variants import VARIANTS, default_name


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line and small numbers as 5.0e-4, which every YAML reads as a number."""


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    sign, digits, _ = Decimal(repr(value)).as_tuple()
    exponent = Decimal(repr(value)).adjusted()
    if value == 0 or -3 < exponent < 16:
        return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))
    first, *rest = map(str, digits)
    mantissa = f"{'-' if sign else ''}{first}.{''.join(rest) or '0'}"
    return dumper.represent_scalar("tag:yaml.org,2002:float", f"{mantissa}e{exponent:+d}")


def _represent_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(list, _represent_list)


def dump_config(config: TrainConfig) -> str:
    """``config`` in full as YAML; ``load_config`` makes an equal one of it."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a configuration file, for editors."""
    schema = TrainConfig.model_json_schema()
    schema["title"] = "batchlr configuration"
    schema["properties"]["base"] = {
        "description": "configuration files to build on, relative to this one; later ones win",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    for section, variants in VARIANTS.items():
        default = variants[default_name(section)]
        for options in {*variants.values()} - {default}:
            required = schema["$defs"][options.__name__].setdefault("required", [])
            required.extend({"name"} - {*required})  # only the default may go without its name
    return schema
