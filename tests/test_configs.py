"""Every configuration that ships loads, says where it comes from, and repeats nothing."""

from pathlib import Path

import pytest
import yaml

from batchlr.training.config import TrainConfig, dump_config, load_config

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
RUNS = [path for path in FILES if path.parent.name != "_base"]


def named(paths):
    return pytest.mark.parametrize(
        "path", paths, ids=[str(path.relative_to(CONFIGS)) for path in paths]
    )


def test_there_are_configurations_for_every_data_set():
    assert {path.parent.name for path in FILES} == {"_base", "cifar100", "demo", "imagenet"}


@named(FILES)
def test_it_loads(path):
    loaded = load_config(path)
    assert loaded.config.name == path.stem
    assert loaded.notes == ()


@named(RUNS)
def test_its_header_says_source_expectation_and_cost(path):
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    for what in ("# Source:", "# Expected:", "# Cost:"):
        assert any(line.startswith(what) for line in header), what


@named(RUNS)
def test_its_name_says_how_the_rate_is_chosen(path):
    lr = load_config(path).config.optim.lr
    assert (lr == "auto") == (path.stem.endswith("_auto") or path.parent.name == "demo")


@named([path for path in FILES if path.parent.name in {"cifar100", "imagenet"}])
def test_it_changes_what_its_base_says(path):
    """A line that repeats the base would hide what makes this run different."""
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = yaml.safe_load((path.parent / own.pop("base")).read_text(encoding="utf-8"))
    for section, values in own.items():
        repeated = values.items() & base.get(section, {}).items() if section in base else set()
        assert not repeated, section


def test_the_first_demo_explains_every_key():
    path = CONFIGS / "demo" / "digits_vgg.yaml"
    text = path.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    assert values.keys() == TrainConfig.model_fields.keys()
    full = yaml.safe_load(dump_config(load_config(path).config))
    assert {key: set(full[key]) for key in full if isinstance(full[key], dict)} == {
        key: set(values[key]) for key in values if isinstance(values[key], dict)
    }
    lines = [line for line in text.splitlines() if ":" in line and not line.startswith("#")]
    for line in lines:
        assert line.endswith(":") or "  # " in line, f"no explanation: {line}"
