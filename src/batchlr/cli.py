"""The ``batchlr`` command: argument parsing, messages and exit codes, nothing else.

Exit codes: 0 done, 2 usage or configuration, 3 data missing or corrupt, 4 diverged or numerically
failed, 130 interrupted.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from batchlr.training.config import LoadedConfig, TrainConfig

USAGE, DATA, NUMERICS, INTERRUPTED = 2, 3, 4, 130

app = typer.Typer(
    help="Learning rates measured from the batch Hessian.",
    epilog="After an error, BATCHLR_TRACEBACK=1 in the environment shows where it arose.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config", help="Show or check configurations.")
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data", help="Fetch or check a configuration's data.")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="A.B=VALUE", help="Changes, such as train.epochs=5."),
]
Out = Annotated[Path | None, typer.Option(help="Folder of the run.  [default: runs/NAME]")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Where to measure.  [default: at the initial weights]")
]

Checkpoints = Annotated[
    list[Path] | None,
    typer.Option(
        help="Where to measure; on a grid, any number of files and folders.  "
        "[default: at the initial weights]"
    ),
]


def _print_version(asked: bool) -> None:
    if not asked:
        return
    from batchlr.training.environment import package_version

    typer.echo(f"batchlr {package_version('batchlr') or '(not installed)'}")
    raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Learning rates measured from the batch Hessian."""


@app.command("train")
def train_command(config: ConfigPath, overrides: Overrides = None, out: Out = None) -> None:
    """Train."""
    with _exit_codes():
        loaded = _load(config, overrides)
        from batchlr.training.loop import train

        train(loaded.config, _folder(out, loaded.config), loaded.notes)


@app.command("lr")
def lr_command(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Out = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write JSON here.")] = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Tabulate the maximal SGD and Adam rates over batch sizes."""
    with _exit_codes():
        loaded = _load(config, overrides)
        from batchlr.training.analysis import measure_rates

        measure_rates(
            loaded.config,
            out=_folder(out, loaded.config),
            json_file=json_file,
            checkpoint=checkpoint,
            notes=loaded.notes,
        )


@app.command("spectrum")
def spectrum_command(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Out = None,
    checkpoint: Checkpoints = None,
) -> None:
    """Measure the spectrum of the batch Hessian, or of many batches (spectrum.batch_sizes)."""
    with _exit_codes():
        loaded = _load(config, overrides)
        folder, where = _folder(out, loaded.config), checkpoint or []
        if loaded.config.spectrum.batch_sizes:
            from batchlr.training.spectra import measure_spectra

            measure_spectra(loaded.config, out=folder, checkpoints=where, notes=loaded.notes)
            return
        from batchlr.training.analysis import measure_spectrum

        if len(where) > 1:
            msg = f"{len(where)} checkpoints are measured on a grid: set spectrum.batch_sizes"
            raise ValueError(msg)
        at = where[0] if where else None
        measure_spectrum(loaded.config, out=folder, checkpoint=at, notes=loaded.notes)


@app.command("sweep")
def sweep_command(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Out = None,
    checkpoint: Checkpoint = None,
    batch_sizes: Annotated[
        str, typer.Option("--batch-sizes", help="Batch sizes, separated by commas.")
    ] = "4,16,64,256",
    optimizers: Annotated[
        str, typer.Option("--optimizers", help="sgd, adam or both, separated by a comma.")
    ] = "sgd,adam",
    steps: Annotated[int, typer.Option(help="Steps of one run.", min=5)] = 200,
) -> None:
    """Train at many rates: the largest that survive beside those predicted."""
    with _exit_codes():
        loaded = _load(config, overrides)
        from batchlr.training.sweep import parse_batch_sizes, parse_optimizers, sweep

        sweep(
            loaded.config,
            out=_folder(out, loaded.config),
            batch_sizes=parse_batch_sizes(batch_sizes),
            optimizers=parse_optimizers(optimizers),
            steps=steps,
            checkpoint=checkpoint,
            notes=loaded.notes,
        )


@app.command("explain")
def explain_command(
    old: Annotated[
        int, typer.Option("--from", min=1, help="Batch size now, of one optimizer step.")
    ],
    new: Annotated[int, typer.Option("--to", min=1, help="Batch size to train with.")],
    optimizer: Annotated[str, typer.Option(help="sgd, adam, adamw or rmsprop.")] = "sgd",
    lr: Annotated[float | None, typer.Option(help="Learning rate now.  [default: factors]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay now.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the run now.")] = None,
    momentum: Annotated[
        float | None, typer.Option(help="Momentum or beta1 now.  [default: the report's]")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Measured before: runs/NAME/curvature/report.json.")
    ] = None,
) -> None:
    """Tabulate what to change with the batch size, and how far that holds."""
    with _exit_codes():
        from batchlr.training.decision_table import print_decision_table

        print_decision_table(
            old,
            new,
            optimizer=optimizer,  # type: ignore[arg-type]  # the table refuses others
            lr=lr,
            weight_decay=weight_decay,
            steps=steps,
            momentum=momentum,
            report=report,
        )


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write.  [default: DIR/report.html]")
    ] = None,
) -> None:
    """Write what a run has left as one HTML file."""
    with _exit_codes():
        from batchlr.report import write_report

        typer.echo(write_report(folder, out))


@app.command("env")
def env_command() -> None:
    """Print versions and devices as JSON."""
    from batchlr.training.environment import describe_environment

    typer.echo(json.dumps(describe_environment(), indent=2))


@data_app.command("fetch")
def fetch_command(
    config: ConfigPath,
    overrides: Overrides = None,
    url: Annotated[
        str | None, typer.Option(help="Where a copy of CIFAR's archive is.  [default: its source]")
    ] = None,
) -> None:
    """Download the data, or say how to get them."""
    with _exit_codes():
        options = _data_options(_load(config, overrides).config)
        from batchlr.training.data.fetching import fetch_data

        typer.echo(fetch_data(url=url, **options))


@data_app.command("verify")
def verify_command(config: ConfigPath, overrides: Overrides = None) -> None:
    """Read all of the data: are they complete and intact?"""
    with _exit_codes():
        options = _data_options(_load(config, overrides).config)
        from batchlr.training.data.verification import verify_data

        for line in verify_data(**options):
            typer.echo(line)


@config_app.command("show")
def show_command(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the effective configuration, defaults included."""
    with _exit_codes():
        from batchlr.training.config import dump_config

        typer.echo(dump_config(_load(config, overrides).config), nl=False)


@config_app.command("check")
def check_command(
    configs: Annotated[
        list[Path], typer.Argument(metavar="CONFIG", help="Configuration files (YAML).")
    ],
) -> None:
    """Check configuration files, all of them."""
    from batchlr.training.config import ConfigError, load_config

    failed = False
    for path in configs:
        try:
            load_config(path)
            typer.echo(f"{path}: ok")
        except ConfigError as error:
            failed = True
            typer.echo(error, err=True)
    raise typer.Exit(USAGE if failed else 0)


@config_app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of a configuration, for editors."""
    from batchlr.training.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line, by default the process's own, and exits."""
    app(args=None if arguments is None else list(arguments), prog_name="batchlr")


def _load(path: Path, overrides: Sequence[str] | None) -> "LoadedConfig":
    from batchlr.training.config import load_config

    loaded = load_config(path, overrides or ())
    if _rank() == 0:
        for note in loaded.notes:
            typer.echo(f"note: {note}", err=True)
    return loaded


def _data_options(config: "TrainConfig") -> dict[str, Any]:
    return config.data.model_dump() | {"seed": config.seed}


def _folder(out: Path | None, config: "TrainConfig") -> Path:
    return out if out is not None else Path("runs") / config.name


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))  # set by torchrun


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Expected failures end in one message on stderr and their exit code; bugs, in a traceback."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        code = _exit_code(error)
        if code is None or os.environ.get("BATCHLR_TRACEBACK"):
            raise
        rank = _rank()
        if code == DATA and _is_told_elsewhere(error):
            pass
        elif rank == 0:
            typer.echo(str(error) or "interrupted", err=True)
        elif code == DATA:  # files may be missing on this machine only; all else is the same
            typer.echo(f"rank {rank}: {error}", err=True)
        raise typer.Exit(code) from None


def _is_told_elsewhere(error: BaseException) -> bool:
    from batchlr.training.distributed import ToldElsewhere

    return isinstance(error, ToldElsewhere)


def _exit_code(error: BaseException) -> int | None:
    from batchlr.training.config import ConfigError

    if isinstance(error, ConfigError | typer.Exit):
        return USAGE if isinstance(error, ConfigError) else None
    from batchlr.measurement.memory_plan import MemoryBudgetError
    from batchlr.training.checkpoint import CheckpointError
    from batchlr.training.data import DataError
    from batchlr.training.loop import InterruptedRun

    codes: dict[type[BaseException], int] = {  # the first that fits
        InterruptedRun: INTERRUPTED,
        KeyboardInterrupt: INTERRUPTED,
        ArithmeticError: NUMERICS,
        DataError: DATA,
        CheckpointError: DATA,
        OSError: DATA,
        ValueError: USAGE,
        MemoryBudgetError: USAGE,
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)), None)
