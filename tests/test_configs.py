"""Every configuration that ships loads, says where it comes from, and repeats nothing."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from batchlr import min_damping
from batchlr.training.config import TrainConfig, dump_config, load_config
from batchlr.training.config.schema import AdaptiveOptions

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
RUNS = [path for path in FILES if path.parent.name != "_base"]


def named(paths):
    return pytest.mark.parametrize(
        "path", paths, ids=[str(path.relative_to(CONFIGS)) for path in paths]
    )


def test_there_are_configurations_for_every_data_set():
    assert {path.parent.name for path in FILES} == {
        "_base",
        "cifar100",
        "demo",
        "imagenet",
        "paper",
    }


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
    config = load_config(path).config
    published = config.curvature.policy.startswith("paper_")
    own = config.optim.lr == "auto" and not published
    assert own == (path.stem.endswith("_auto") or path.parent.name == "demo")
    assert published == bool(re.search(r"_ssgd(m|m_as_published|mn|mn_every_epoch)?$", path.stem))
    assert published <= (path.parent.name == "paper")


def laid_over(lower, upper):
    """Mappings merged key by key."""
    both = {
        key: laid_over(lower[key], value)
        if isinstance(value, dict) and isinstance(lower.get(key), dict)
        else value
        for key, value in upper.items()
    }
    return lower | both


def as_written(path):
    """What a file says itself, and what its bases say."""
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    bases = own.pop("base", [])
    below = {}
    for base in [bases] if isinstance(bases, str) else bases:
        said, under = as_written(path.parent / base)
        below = laid_over(below, laid_over(under, said))
    return own, below


@named([path for path in FILES if path.parent.name in {"cifar100", "imagenet", "paper"}])
def test_it_changes_what_its_base_says(path):
    """A line that repeats the base would hide what makes this run different."""
    own, base = as_written(path)
    for section, values in own.items():
        if section in base:
            below = base[section]
            same = [key for key in values if values[key] == below.get(key)]
            assert not same, f"{section}: {same}"


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


def test_the_growing_demo_explains_every_key_of_its_own():
    path = CONFIGS / "demo" / "digits_adaptive.yaml"
    text = path.read_text(encoding="utf-8")
    assert yaml.safe_load(text)["batch"]["adaptive"].keys() == AdaptiveOptions.model_fields.keys()
    for key in AdaptiveOptions.model_fields:
        assert re.search(rf"^    {key}: .*  # ", text, re.MULTILINE), key


# The paper --------------------------------------------------------------------------------------

PAPER = CONFIGS / "paper"
PAGE = (PAPER / "README.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for line in re.findall(r"^\| `(batchlr [^`]*)`", PAGE, re.MULTILINE)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_of_the_paper_s_page_is_legal(command):
    name, path, *rest = command[1:]
    overrides = [word for word in rest if "=" in word]
    loaded = load_config(CONFIGS.parent / path, overrides)
    assert loaded.notes == ()
    if name == "train":
        assert rest == overrides
    else:
        assert name == "spectrum"
        option, folder = (word for word in rest if "=" not in word)
        # It measures what a command of the same name, further up the page, has trained.
        assert (option, folder) == ("--checkpoint", f"runs/{loaded.config.name}/checkpoints")
        names = [
            load_config(CONFIGS.parent / path, overrides).config.name
            for _, kind, path, *overrides in COMMANDS[: COMMANDS.index(command)]
            if kind == "train"
        ]
        assert loaded.config.name in names


def test_the_paper_s_page_has_a_command_for_each_recipe():
    assert {Path(command[2]).name for command in COMMANDS} == {p.name for p in PAPER.glob("*.yaml")}


def paper(name):
    return load_config(PAPER / f"{name}.yaml").config


@pytest.mark.parametrize(
    ("network", "weight_decay", "lr"),
    [("vgg16", 0, 0.05), ("vgg16bn", 5e-4, 0.1), ("wrn28x10", 5e-4, 0.1)],
)
def test_sgd_s_rate_is_proportional_to_the_batch_size(network, weight_decay, lr):
    for size in (128, 256, 512):
        config = paper(f"{network}_sgd_b{size}")
        assert config.batch.global_size == size
        assert config.optim.lr == pytest.approx(lr * size / 128, rel=1e-12)
        assert (config.optim.momentum, config.optim.weight_decay) == (0.9, weight_decay)
        assert (config.train.epochs, config.schedule.hold, config.schedule.end) == (300, 0.5, 0.9)


def test_adam_s_rate_goes_with_the_root_of_the_batch_size():
    small, large = paper("vgg16_adamw_b128"), paper("vgg16_adamw_b256")
    assert (small.batch.global_size, large.batch.global_size) == (128, 256)
    assert (small.optim.lr, large.optim.lr) == (4e-4, 5.6e-4)  # rounded from 5.66e-4
    assert (small.optim.name, small.optim.eps, small.optim.weight_decay) == ("adamw", 1e-8, 0)


@pytest.mark.parametrize(("network", "lr"), [("vgg16", 0.05), ("wrn28x10", 0.1)])
def test_the_grid_is_the_paper_s(network, lr):
    config = paper(f"{network}_spectra")
    grid = config.spectrum
    assert grid.batch_sizes == tuple(2**k for k in range(11))
    assert (grid.draws, grid.steps, grid.probes, grid.matrix) == (10, 100, 1, "hessian")
    checkpoints = config.train.epochs // config.checkpoint.every_epochs + 1  # epoch 0 is one
    assert checkpoints == config.checkpoint.keep == 13
    assert (config.optim.lr, config.optim.weight_decay) == (lr, 5e-4)
    assert (config.batch.global_size, config.optim.momentum) == (128, 0.9)


def test_the_learners_are_the_paper_s():
    found = {p.stem: paper(p.stem) for p in PAPER.glob("*_ssgd*.yaml")}
    for name, config in found.items():
        curvature = config.curvature
        assert (config.optim.lr, config.schedule.name) == ("auto", "constant")
        assert (config.batch.global_size, config.train.epochs) == (128, 300)
        assert (curvature.fixed_samples, curvature.norm_mode) == (True, "train")
        assert curvature.max_products == 20
        assert curvature.every_epochs == (1 if name.endswith("every_epoch") else 20)
        assert config.optim.weight_decay == (1e-4 if "cifar10_" in name else 5e-4)
    assert {config.curvature.policy for config in found.values()} == {
        "paper_sgd",
        "paper_momentum",
        "paper_momentum_as_published",
        "paper_nesterov",
    }


def test_the_damping_table_is_min_damping():
    implied = re.search(r"`batchlr.min_damping\(lr=(.*), noise=(.*) / batch_size\)`", PAGE)
    lr, kappa = map(float, implied.groups())
    rows = re.findall(r"^\| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
    assert [(int(a), int(b)) for a, b in rows] == [(16, 16), (8, 32), (4, 64), (2, 128), (1, 256)]
    for damping, batch_size in rows:
        assert min_damping(lr=lr, noise=kappa / int(batch_size)) == float(damping)
