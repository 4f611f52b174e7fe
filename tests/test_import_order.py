"""The floor plan holds: imports point down, the theory is plain Python, the front door is light."""

import ast
import graphlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
LEVELS = [
    {"argument_ranges", "sharded_tensors", "inner_products", "measured", "lr_bound"},
    {"random_matrix", "learning_rates", "scaling_rules", "mean_square", "surge"}
    | {"averaging", "escape"},
    {"operators", "policies"},
    {"krylov", "gradients"},
    {"lanczos", "dataclass_files", "batch_size", "optim", "stationarity"},
    {"slq", "trace", "sampling", "curvature_noise", "probes", "loss_probe"},
    {"tracker", "layer_spectra"},
    {"measurement"},
    {"curvature_report"},
    {"curvature", "edge_laws", "schedulers", "batch_size_change"},
    {"on_the_fly", "adascale"},
    {"controller"},
    {"__init__"},  # the public names: `import batchlr` as a user writes it
    {"plotting", "integrations"},
    {"training"},
    {"report"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
THEORY = ["random_matrix", "learning_rates", "scaling_rules", "policies", "averaging", "escape"]
THEORY += ["surge", "argument_ranges", "on_the_fly.usable_curvature"]
HEAVY = ["torchvision", "matplotlib", "typer", "yaml", "pydantic", "sklearn", "batchlr.training"]
HEAVY += ["lightning", "transformers", "accelerate", "batchlr.integrations"]
HEAVY += ["jinja2", "filelock", "torch.distributed.fsdp", "torch.distributed.tensor"]


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((SOURCE / "batchlr").rglob("*.py"))}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(module: str) -> Iterator[str]:
    """The modules named by any import statement, those inside functions included."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                member = f"{base}.{alias.name}"
                yield member if member in MODULES else base


def our_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "batchlr"}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_room(module):
    assert room(module) in LEVEL, f"which room does {room(module)} belong to? Name it in LEVELS"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for name in our_imports(module):
        here, there = room(module), room(name)
        same_package = here == there and name != "batchlr"
        assert same_package or LEVEL.get(there, len(LEVELS)) < LEVEL.get(here, -1), (
            f"{module} imports {name}, which does not lie below it"
        )


def test_modules_import_in_no_circle():
    graphlib.TopologicalSorter({module: our_imports(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("module", [f"batchlr.{name}" for name in THEORY])
def test_theory_is_plain_python(module):
    outside = {name.split(".")[0] for name in imports(module)} if module in MODULES else set()
    assert not outside & {"torch", "numpy", "scipy"}


def test_importing_batchlr_loads_nothing_heavy():
    script = "import json, sys, batchlr; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert not set(json.loads(answer.stdout)) & set(HEAVY)
