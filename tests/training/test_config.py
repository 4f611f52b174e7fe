"""A configuration file says what is meant, or every problem at its place."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from batchlr.policies import POLICIES
from batchlr.training.config import ConfigError, TrainConfig, load_config
from batchlr.training.config.schema import SECTIONS
from batchlr.training.config.variants import VARIANTS

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file into the working directory, so that messages show its bare name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "run.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    title, *lines = str(caught.value).splitlines()
    assert title == f"{len(lines)} problem{'s' * (len(lines) > 1)} in the configuration:"
    return [line.strip() for line in lines]


# Values ----------------------------------------------------------------------------------------


def test_an_empty_mapping_stands_for_all_defaults(write):
    config = load_config(write("{}")).config
    assert config == TrainConfig(name="run")
    assert config.data.name == "digits"
    assert config.optim.lr == "auto"
    assert config.batch.global_size == 128


def test_the_file_gives_the_run_its_name(write):
    assert load_config(write("{}", "vgg16 (new).v2.yaml")).config.name == "vgg16-new-.v2"
    assert load_config(write("{}", "²é.yaml")).config.name == "run"
    assert load_config(write("name: other", "file.yaml")).config.name == "other"


def test_numbers_may_be_written_as_yaml_1_1_reads_text(write):
    text = "optim: {lr: 1e-3, weight_decay: '5e-4'}\ntrain: {epochs: '3'}"
    config = load_config(write(text), ["optim.momentum=1e-1"]).config
    assert (config.optim.lr, config.optim.weight_decay) == (1e-3, 5e-4)
    assert (config.train.epochs, config.optim.momentum) == (3, 0.1)


def test_paths_expand_the_home_folder(write):
    config = load_config(write("data: {name: cifar10, root: ~/images}")).config
    assert config.data.root == Path.home() / "images"


def test_anchors_and_merge_keys_are_yaml_like_any_other(write):
    text = "optim: &o {name: adam, lr: 0.1}\nmodel: {name: mlp, hidden: &h [3, 4]}\n"
    config = load_config(write(text + "batch: {<<: {global_size: 6}, micro_size: 3}")).config
    assert config.model.hidden == (3, 4)
    assert (config.batch.global_size, config.batch.micro_size) == (6, 3)


@pytest.mark.parametrize(
    ("text", "size"),
    [("null", None), ("1000000", 10**6), ("2 GiB", 2 * 2**30), ("'1.5GB'", 15 * 10**8)],
)
def test_memory_is_given_in_bytes_or_with_a_unit(write, text, size):
    loaded = load_config(write(f"curvature: {{memory_budget: {text}}}"))
    assert loaded.config.curvature.memory_budget == size
    assert type(loaded.config.curvature.memory_budget) in (int, type(None))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("seed: yes", "1:1: seed: must be a whole number in [0, 2^32), got true"),
        ("seed: 4294967296", "1:1: seed: must be a whole number in [0, 2^32), got 4294967296"),
        ("train: {epochs: 0}", "1:9: train.epochs: must be a whole number of at least 1, got 0"),
        ("train: {epochs: 2.5}", "must be a whole number of at least 1, got 2.5"),
        ("train: {max_steps: a}", "must be a whole number of at least 1, or null, got 'a'"),
        ("train: {clip_norm: 0}", "train.clip_norm: must be a number above 0, or null, got 0"),
        ("train: {label_smoothing: 1}", "label_smoothing: must be a number in [0, 1), got 1"),
        ("train: {device: 0}", "train.device: must be text, got 0; put it in quotes"),
        ("train: {channels_last: 1}", "train.channels_last: must be true or false, got 1"),
        ("checkpoint: {every_epochs: -1}", "must be a whole number of at least 0, got -1"),
        ("curvature: {samples: 1}", "samples: must be a whole number of at least 2, got 1"),
        ("curvature: {growth: 1}", "curvature.growth: must be a number above 1, got 1"),
        ("curvature: {safety: 0}", "curvature.safety: must be a number in (0, 1], got 0"),
        ("curvature: {tolerance: 1}", "tolerance: must be a number in (0, 1), got 1"),
        ("curvature: {measure: 2}", "curvature.measure: must be true, false or null, got 2"),
        (
            "curvature: {measure: false}",
            "1:13: curvature.measure: must not be false when optim.lr is auto, got false",
        ),
        (
            "curvature: {policy: paper}",
            "curvature.policy: must be mean_square, edge, heavy_ball, cdat, paper_sgd, "
            "paper_momentum, paper_momentum_as_published or paper_nesterov, got 'paper'",
        ),
        (
            "curvature: {policy: paper_sgd, safety: 0.5}",
            "must be mean_square, edge or heavy_ball when safety is not 1, got 'paper_sgd'",
        ),
        (
            "curvature: {policy: paper_sgd, adjust_momentum: true}",
            "must be mean_square or edge when adjust_momentum is true, got",
        ),
        ("curvature: {every_epochs: 0}", "must be a whole number of at least 1, or null, got 0"),
        ("curvature: {memory_budget: 0}", "must be a whole number of bytes of at least 1, text"),
        ("curvature: {memory_budget: -1}", 'a unit such as "2 GiB", or null, got -1'),
        ("curvature: {memory_budget: 2 apples}", "memory_budget: must be a whole number of bytes"),
        ("curvature: {memory_budget: true}", 'a unit such as "2 GiB", or null, got true'),
        ("curvature: {fixed_samples: 1}", "fixed_samples: must be true or false, got 1"),
        (
            "{optim: {name: adamw}, curvature: {policy: paper_nesterov}}",
            "curvature.policy: must be mean_square, edge or cdat when optim.name is adamw: the "
            "others set the momentum of sgd, got 'paper_nesterov'",
        ),
        ("spectrum: {matrix: fisher}", "spectrum.matrix: must be hessian, ggn or residual, got"),
        ("spectrum: {steps: 0}", "spectrum.steps: must be a whole number of at least 1, got 0"),
        ("spectrum: {batch_sizes: [0]}", "must be a list of whole numbers of at least 1, got [0]"),
        ("spectrum: {batch_sizes: 8}", "must be a list of whole numbers of at least 1, got 8"),
        ("optim: {lr: fast}", "1:9: optim.lr: must be a number above 0, or auto, got 'fast'"),
        ("optim: {lr: true}", "optim.lr: must be a number above 0, or auto, got true"),
        ("optim: {momentum: .nan}", "optim.momentum: must be a number in [0, 1), got nan"),
        ("optim: {weight_decay: .inf}", "must be a number of at least 0, got inf"),
        ("optim: {momentum: 0, nesterov: true}", "nesterov: must be false when momentum is 0"),
        ("optim: {name: adam, betas: [0.9]}", "betas: must be two numbers in [0, 1), got [0.9]"),
        ("batch: {micro_size: x}", "must be a whole number of at least 1, or auto, got 'x'"),
        (
            "batch: {global_size: 128, micro_size: 48}",
            "must divide global_size 128; use 32 or 64, or global_size 96 or 144, got 48",
        ),
        (
            "batch: {global_size: 8, micro_size: 9}",
            "must divide global_size 8; use 4 or 8, or global_size 9, got 9",
        ),
        (
            "batch: {global_size: 1000000000000, micro_size: 999999}",
            "use 800000 or 1000000, or global_size 999999999999 or 1000000999998, got 999999",
        ),
        ("model: {name: wide_resnet, depth: 27}", "must be 6 n + 4 for wide_resnet; nearest: 22"),
        ("model: {name: preresnet, depth: 3}", "9 n + 2 for bottleneck blocks; nearest: 11, got"),
        ("model: {name: preresnet, block: basic, depth: 9}", "6 n + 2 for basic blocks; nearest"),
        ("model: {name: vgg, depth: 12}", "model.depth: must be 11, 13, 16 or 19, got 12"),
        ("model: {name: mlp, hidden: [3, -1]}", "must be a list of whole numbers of at least 1"),
        ("model: {name: torchvision}", "1:9: model.arch: is required and missing"),
        ("schedule: {name: linear_tail, hold: 0.95}", "schedule.end: must lie after hold"),
        ("schedule: {name: step, milestones: []}", "must be a list of numbers in (0, 1), got []"),
        ("schedule: {name: step, milestones: [0.5, 0.2]}", "must increase from one milestone to"),
        ("resume: true", "1:1: resume: must be false, auto or a path, got true"),
        ("name: .hidden", "1:1: name: must be text of letters a-z, digits, '_', '-' and '.',"),
        (
            "dist: {strategy: fsdpp}",
            "must be auto, single, ddp or fsdp, got 'fsdpp'; did you mean 'fsdp'?",
        ),
    ],
)
def test_values_out_of_bounds_are_refused_with_the_bounds(write, text, complaint):
    (found,) = problems(write(text))
    assert found.startswith("run.yaml:1:")
    assert complaint in found


def test_the_default_end_of_the_tail_is_checked_too():
    with pytest.raises(ValueError, match="must lie after hold"):
        TrainConfig(schedule={"name": "linear_tail", "hold": 0.95})


# Names and keys --------------------------------------------------------------------------------


def test_an_unknown_key_meets_the_nearest_known_one(write):
    text = "optim:\n  momentun: 0.9\ntrian: {}\ntrain: {foo: 1}\nxyz: 1\n"
    assert problems(write(text)) == [
        "run.yaml:2:3: optim.momentun: unknown key; did you mean 'momentum'?",
        "run.yaml:3:1: trian: unknown key; did you mean 'train'?",
        "run.yaml:4:9: train.foo: unknown key; the keys of train are epochs, max_steps, "
        "clip_norm, label_smoothing, precision, channels_last, device",
        "run.yaml:5:1: xyz: unknown key; the keys are name, seed, deterministic, data, model, "
        "optim, batch, schedule, curvature, spectrum, train, dist, log, checkpoint, resume, base",
    ]


def test_an_unknown_name_lists_the_known_ones(write):
    assert problems(write("schedule:\n  name: cosin\ndata: {name: 3}")) == [
        "run.yaml:2:3: schedule.name: must be one of cosine, constant, linear_tail, step, "
        "got 'cosin'; did you mean 'cosine'?",
        "run.yaml:3:8: data.name: must be one of digits, arrays, cifar10, cifar100, imagefolder, "
        "imagenet, synthetic, got 3",
    ]


def test_a_misspelt_name_does_not_hide_what_else_is_wrong(write):
    text = "optim: {name: sgdd, lr: -1, momentum: 2}\ntrain: {epochs: 0}"
    found = problems(write(text))
    assert [line.split(": ")[1] for line in found] == [
        "optim.name",
        "optim.lr",
        "optim.momentum",
        "train.epochs",
    ]
    assert "did you mean 'sgd'?" in found[0]
    assert [line.split(": ")[1] for line in problems(write("optim: {name: lion, lr: -1}"))] == [
        "optim.name"  # nobody knows what was meant
    ]


@pytest.mark.parametrize("name", ["[1]", "{a: 1}", "", "sgdd", "3"])
def test_a_name_that_is_none_is_refused_wherever_it_stands(write, name):
    shown = {"": "null", "{a: 1}": "{'a': 1}", "sgdd": "'sgdd'; did you mean 'sgd'?"}.get(
        name, name
    )
    complaint = f"optim.name: must be one of sgd, adam, adamw, got {shown}"
    (found,) = problems(write("optim: {momentum: 0.5}"), f"optim.name={name}")
    assert found == f"command line 'optim.name={name}': {complaint}"
    (found,) = problems(write(f"optim: {{name: {name}, lr: 1}}"))
    assert found == f"run.yaml:1:9: {complaint}"
    assert load_config(Path("run.yaml"), ["optim.name=adam"]).config.optim.name == "adam"


def test_a_section_without_a_name_takes_the_default(write):
    config = load_config(write("optim: {momentum: 0.5}\nschedule: {final: 0.1}")).config
    assert (config.optim.name, config.schedule.name) == ("sgd", "cosine")


def test_a_key_of_another_name_says_whose_it_is(write):
    assert problems(write("optim: {betas: [0.9, 0.99]}")) == [
        "run.yaml:1:9: optim.betas: is a key of adam, adamw, not of sgd"
    ]


def test_a_section_must_be_a_mapping(write):
    assert problems(write("model: vgg\noptim:\nbatch: [1]")) == [
        "run.yaml:1:1: model: must be a mapping of keys, got 'vgg'; write model: {name: vgg}, "
        "or model.name=vgg",
        "run.yaml:2:1: optim: must be a mapping of keys, got null; remove it, or write its keys "
        "below it",
        "run.yaml:3:1: batch: must be a mapping of keys, got [1]",
    ]


# Files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "run.yaml: is empty; {} stands for all defaults"),
        ("# only a comment\n", "run.yaml: is empty; {} stands for all defaults"),
        ("- a\n- b\n", "run.yaml: must be a mapping of keys, got ['a', 'b']"),
        ("a: b: c", "run.yaml:1:5: not valid YAML: mapping values are not allowed here"),
        ("a: [1,\nb: 2", "run.yaml:2:"),
        ("a: *x", "run.yaml:1:4: not valid YAML: found undefined alias 'x'"),
        ("a: &x [*x]", "run.yaml:1:4: not valid YAML: alias inside itself"),
        ("a: !!python/name:os.system ''", "run.yaml:1:4: not valid YAML: could not determine"),
        ("a: 2026-13-45", "run.yaml: not valid YAML: month must be in 1..12"),
        ("a: \x01", "run.yaml: not valid YAML: special characters are not allowed"),
        ("seed: 1\nseed: 2", "run.yaml:2:1: seed: given twice; first at run.yaml:1:1"),
        ("train: {epochs: 1, epochs: 2}", "1:20: train.epochs: given twice; first at run.yaml:1:9"),
        ("on: 1", "run.yaml:1:1: key 'on' must be text: put it in quotes"),
        ("train: {3: 1}", "run.yaml:1:9: train: key '3' must be text: put it in quotes"),
    ],
)
def test_a_file_that_is_no_configuration_says_why(write, text, complaint):
    (found,) = problems(write(text))
    assert complaint in found


def test_a_file_that_cannot_be_read_says_why(write):
    assert problems(Path("nowhere.yaml")) == [
        "nowhere.yaml: cannot read: No such file or directory"
    ]
    write("{}").write_bytes(b"name: \xff")
    assert problems(Path("run.yaml")) == ["run.yaml: is not UTF-8 text"]


def test_all_problems_come_at_once_in_reading_order(write):
    path = write("train: {epochs: many}\nseed: 1\nseed: -1\n")
    assert problems(path, "optim.lr=-1", "nonsense", "log.every_steps=0") == [
        "run.yaml:1:9: train.epochs: must be a whole number of at least 1, got 'many'",
        "run.yaml:3:1: seed: given twice; first at run.yaml:2:1",
        "run.yaml:3:1: seed: must be a whole number in [0, 2^32), got -1",
        "command line 'optim.lr=-1': optim.lr: must be a number above 0, or auto, got -1",
        "command line 'nonsense': must have the form key=value, such as train.epochs=5",
        "command line 'log.every_steps=0': log.every_steps: must be a whole number of at least 1, "
        "got 0",
    ]


# Bases -----------------------------------------------------------------------------------------


def test_files_build_on_others_key_by_key(write):
    write("seed: 1\noptim: {lr: 0.1, momentum: 0.5}\nmodel: {name: mlp, hidden: [9, 9]}", "a.yaml")
    write("seed: 2\nbase: ../a.yaml\nbatch: {global_size: 7}", "sub/b.yaml")
    loaded = load_config(
        write("base: [a.yaml, sub/b.yaml]\noptim: {lr: 0.2}\nmodel: {hidden: [1]}")
    )
    config = loaded.config
    assert (config.name, config.seed, config.batch.global_size) == ("run", 2, 7)
    assert (config.optim.lr, config.optim.momentum) == (0.2, 0.5)
    assert config.model.hidden == (1,)  # lists are replaced
    assert loaded.sources["optim.momentum"] == "a.yaml:2:18"
    assert loaded.sources["optim.lr"] == "run.yaml:2:9"
    assert "train.epochs" not in loaded.sources


def test_a_problem_in_a_base_is_reported_there(write):
    write("seed: x", "a.yaml")
    (found,) = problems(write("base: a.yaml"))
    assert found.startswith("a.yaml:1:1: seed: must be")


def test_bases_must_exist_and_form_no_circle(write):
    write("base: run.yaml", "a.yaml")
    assert problems(write("seed: 0\nbase: [a.yaml, none.yaml]")) == [
        "a.yaml:1:1: base files form a circle: run.yaml -> a.yaml -> run.yaml",
        "run.yaml:2:1: cannot read none.yaml: No such file or directory",
    ]
    assert problems(write("base: {a: 1}")) == [
        "run.yaml:1:1: base: must be a path or a list of paths, got {'a': 1}"
    ]


# Command line ----------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file(write):
    path = write("optim: {lr: 0.1}\nmodel: {name: mlp, hidden: [1]}")
    overrides = ["optim.lr=0.2", "model.hidden=[2, 3]", "train={epochs: 4}", "train.epochs=5"]
    loaded = load_config(path, [*overrides, "train.clip_norm=", "resume=auto"])
    config = loaded.config
    assert (config.optim.lr, config.model.hidden, config.train.epochs) == (0.2, (2, 3), 5)
    assert (config.train.clip_norm, config.resume) == (None, "auto")
    assert loaded.sources["optim.lr"] == "command line 'optim.lr=0.2'"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.epochs", "must have the form key=value, such as train.epochs=5"),
        ("=5", "must have the form key=value"),
        ("train..epochs=5", "must have the form key=value"),
        ("base=x.yaml", "base: can stand only in a file"),
        ("seed={", "not valid YAML: expected the node content, but found '<stream end>'"),
        ("seed.x=1", "seed: must be a whole number in [0, 2^32), got {'x': 1}"),
        ("optim=adam", "optim: must be a mapping of keys, got 'adam'; write optim: {name: adam}"),
        ("train.epoch=5", "train.epoch: unknown key; did you mean 'epochs'?"),
        ("data.name=arrays", "data.path: is required and missing"),
    ],
)
def test_problems_on_the_command_line_quote_it(write, override, complaint):
    (found,) = problems(write("seed: 1"), override)
    assert found.startswith(f"command line {override!r}: {complaint}") or (
        override == "seed.x=1" and complaint in found
    )


def test_a_broken_section_is_not_papered_over_by_the_command_line(write):
    (found,) = problems(write("optim: adam"), "optim.lr=0.1")
    assert found.startswith("run.yaml:1:1: optim: must be a mapping of keys, got 'adam'")


def test_another_name_drops_the_keys_that_only_the_old_one_knows(write):
    path = write("optim: {momentum: 0.9, nesterov: true, lr: 0.1, weight_decay: 1.0e-4}")
    loaded = load_config(path, ["optim.name=adam"])
    assert loaded.notes == (
        "optim.momentum does not apply to adam: left out",
        "optim.nesterov does not apply to adam: left out",
        "optim.lr 0.1 was given for sgd: kept for adam",
    )
    assert loaded.config.optim.options() == {
        "lr": 0.1,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 1e-4,
    }


def test_another_name_over_a_base_drops_keys_too(write):
    write("optim: {name: sgd, momentum: 0.9}", "a.yaml")
    loaded = load_config(write("base: a.yaml\noptim: {name: adamw, lr: 1.0e-3}"))
    assert loaded.notes == ("optim.momentum does not apply to adamw: left out",)


def test_a_key_that_belongs_to_neither_name_stays_an_error(write):
    path = write("optim: {momentum: 0.9, momentun: 0.9}")
    assert problems(path, "optim.name=adam") == ["run.yaml:1:24: optim.momentun: unknown key" + (
        "; the keys of adam are name, lr, betas, eps, weight_decay"
    )]  # fmt: skip
    (found,) = problems(write("{}"), "optim.name=adam", "optim.momentum=0.9")
    assert found.endswith("optim.momentum: is a key of sgd, not of adam")


def test_a_leftover_key_in_one_file_is_an_error_at_its_line(write):
    assert problems(write("optim:\n  name: adam\n  momentum: 0.9")) == [
        "run.yaml:3:3: optim.momentum: is a key of sgd, not of adam"
    ]


# The sections and what they configure ----------------------------------------------------------


def builders() -> list[Any]:
    from batchlr.training.data import DATA_SETS
    from batchlr.training.models import MODELS

    given_by_others = {"num_classes", "in_channels", "image_size"}
    rows = [("model", name, MODELS[name], given_by_others) for name in VARIANTS["model"]]
    rows += [("data", name, DATA_SETS[name], {"seed", "name"}) for name in VARIANTS["data"]]
    return [pytest.param(*row, id=f"{row[0]}-{row[1]}") for row in rows]


@pytest.mark.parametrize(("section", "name", "build", "others"), builders())
def test_a_section_has_the_options_of_what_it_builds(section, name, build, others):
    required = {"arrays": {"path": "x"}, "torchvision": {"arch": "x"}}.get(name, {})
    options = VARIANTS[section][name](name=name, **required).options()
    parameters = inspect.signature(build).parameters
    taken = {key: field.default for key, field in parameters.items() if key not in others}
    assert options.keys() == taken.keys()
    for key in options.keys() - {"root", "workers"}:  # a Path for text; 0 in the library
        assert taken[key] in (options[key], inspect.Parameter.empty), key


def test_the_policies_of_a_configuration_are_the_library_s():
    names = get_args(SECTIONS["curvature"].model_fields["policy"].annotation)
    assert names == ("mean_square", "edge", "heavy_ball", "cdat", *POLICIES)


def test_every_section_is_frozen_and_hashable():
    config = TrainConfig()
    assert hash(config) == hash(TrainConfig())
    for section in SECTIONS:
        with pytest.raises(ValueError, match="frozen"):
            getattr(config, section).anything = 1


def test_no_number_is_infinite():
    with pytest.raises(ValueError, match="must be a number above 0"):
        TrainConfig(optim={"lr": math.inf})
