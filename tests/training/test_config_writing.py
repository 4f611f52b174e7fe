"""What is written reads back equal, and whatever is read ends in a configuration or its refusal."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchlr.training.config import (
    ConfigError,
    LoadedConfig,
    TrainConfig,
    dump_config,
    json_schema,
    load_config,
)
from batchlr.training.config.schema import SECTIONS
from batchlr.training.config.variants import VARIANTS


def reload(config: TrainConfig, folder: Path) -> LoadedConfig:
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return load_config(path)


def test_small_numbers_are_written_so_that_yaml_1_1_reads_numbers(tmp_path):
    config = TrainConfig(optim={"name": "adam", "lr": 5e-4, "eps": 1e-8, "weight_decay": 0.05})
    text = dump_config(config)
    assert "lr: 5.0e-4\n" in text
    assert "eps: 1.0e-8\n" in text
    assert "weight_decay: 0.05\n" in text
    assert "betas: [0.9, 0.999]\n" in text
    assert yaml.safe_load(text)["optim"]["lr"] == 5e-4
    assert reload(config, tmp_path).config == config


VALUES = {
    "optim": st.fixed_dictionaries(
        {"name": st.just("sgd")},
        optional={
            "lr": st.floats(0, exclude_min=True, allow_infinity=False) | st.just("auto"),
            "momentum": st.floats(0, 1, exclude_max=True),
            "weight_decay": st.floats(0, allow_infinity=False),
        },
    )
    | st.fixed_dictionaries(
        {"name": st.sampled_from(["adam", "adamw"])},
        optional={"betas": st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2)},
    ),
    "model": st.fixed_dictionaries(
        {"name": st.just("mlp"), "hidden": st.lists(st.integers(1, 10**6))}
    )
    | st.fixed_dictionaries({"name": st.just("torchvision"), "arch": st.text()}),
    "data": st.sampled_from(
        [{"name": "arrays", "path": "a b/c: #.npz"}, {"name": "cifar10", "root": "1e-3"}]
    ),
    "name": st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", fullmatch=True),
    "seed": st.integers(0, 2**32 - 1),
    "resume": st.sampled_from([False, "auto", "false", "no", "1e5", "~", "null"]),
    "train": st.fixed_dictionaries(
        {}, optional={"clip_norm": st.none() | st.floats(1e-300, 1e300)}
    ),
}


@given(values=st.fixed_dictionaries({}, optional=VALUES))
@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
def test_what_is_written_reads_back_equal(values: dict[str, Any], tmp_path):
    config = TrainConfig(**values)
    loaded = reload(config, tmp_path)
    assert loaded.config == config
    assert loaded.notes == ()


AWKWARD = ["", "yes", "-1", "0", "1", ".nan", "-.inf", "1e999", "text", "[]", "[1, a]", "{a: 1}"]


@pytest.mark.parametrize("section", list(TrainConfig.model_fields))
def test_whatever_is_given_loads_or_is_refused(section, tmp_path):
    """No value, anywhere, ends in another exception."""
    path = tmp_path / "run.yaml"
    path.write_text("optim: {lr: 0.1, momentum: 0.5}", encoding="utf-8")
    targets = [(section,)]
    for name, options in VARIANTS.get(section, {"": SECTIONS.get(section, TrainConfig)}).items():
        choice = f"{section}.name={name}" if name else "seed=0"
        targets += [(f"{section}.{key}", choice) for key in ["x", *options.model_fields]]
    for target, *others in targets:
        for value in AWKWARD:
            with suppress(ConfigError):
                load_config(path, [*others, f"{target}={value}"])


def test_json_schema_describes_every_key():
    schema = json_schema()
    assert "base" in schema["properties"]
    for name, definition in schema["$defs"].items():
        for key, field in definition["properties"].items():
            assert key == "name" or "description" in field, f"{name}.{key}"
    for key, field in schema["properties"].items():
        assert "description" in field, key
    assert schema["$defs"]["SGDOptions"].get("required") is None
    assert schema["$defs"]["AdamOptions"]["required"] == ["name"]
    assert schema["$defs"]["SGDOptions"]["properties"]["momentum"]["exclusiveMaximum"] == 1
