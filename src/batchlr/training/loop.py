"""The training loop: a configuration and a folder become a trained network and its record."""

import math
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from batchlr.batch_size import BatchSizeTest
from batchlr.measurement.optimizer_state import get_momentum, group_value
from batchlr.on_the_fly.curvature_update import CurvatureUpdate
from batchlr.on_the_fly.safeguard import EVENTS, Event
from batchlr.training.checkpoint import latest_checkpoint, save_checkpoint
from batchlr.training.config import TrainConfig
from batchlr.training.console import RunConsole
from batchlr.training.data import Batch, train_batches
from batchlr.training.distributed import processes
from batchlr.training.evaluation import TestResult, evaluate
from batchlr.training.experiment import Experiment, build_experiment
from batchlr.training.interruption import StopAgreement, StopRequest, stop_request
from batchlr.training.metrics import MetricsLog, read_metrics, write_json
from batchlr.training.resumption import Progress, start_run
from batchlr.training.run_length import RunLength
from batchlr.training.run_record import measured_entry, run_summary, tested_entry
from batchlr.training.weight_update import update_weights

_FLUSH_EVERY = 20  # steps between two looks at the loss; each one waits for the device
_DIVERGED = 1e3  # assumed: a loss this many times its first value does not come back


class DivergedError(ArithmeticError):
    """The loss has left the numbers, or grown beyond all bounds."""


class InterruptedRun(KeyboardInterrupt):
    """The run was asked to stop and has written a checkpoint."""


def train(config: TrainConfig, out: Path, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Train as configured, in the folder ``out``; returns the content of ``summary.json``.

    An earlier run in ``out`` is moved aside, unless it is resumed.

    Raises:
        DataError: data is missing or corrupt.
        CheckpointError: the checkpoint to resume is missing or corrupt.
        ValueError: sizes do not fit, or the run to resume was configured otherwise.
        DivergedError: the loss is no longer finite, or the first measurement failed; the summary
            says so and the last good checkpoint is there.
        InterruptedRun: asked to stop, after writing a checkpoint.
    """
    with processes(config) as group, stop_request() as request:
        experiment = build_experiment(config, group)
        progress = start_run(experiment, out, notes)
        run = _Run(experiment, progress, out, request)
        try:
            return run.finish()
        except ArithmeticError as error:
            run.give_up(error)
            checkpoint = latest_checkpoint(out / "checkpoints")
            words = f"; the last good checkpoint is {checkpoint}" if checkpoint else ""
            msg = f"diverged by step {progress.step}: {error}{words}"
            raise DivergedError(msg) from error
        finally:
            run.console.close()


class _Run:
    """One run under way: the experiment, how far it is, and where it is written down."""

    def __init__(
        self, experiment: Experiment, progress: Progress, out: Path, request: StopRequest
    ) -> None:
        config = experiment.config
        first = experiment.processes.is_first
        self.experiment = experiment
        self.progress = progress
        self.out = out
        self.stop = StopAgreement(request, experiment.processes, experiment.device)
        self.length = RunLength(experiment, progress)
        self.same = experiment.same
        self.began = time.perf_counter() - progress.wall_seconds
        self.log = MetricsLog(out / "metrics.jsonl", first_step=progress.step, enabled=first)
        self.console = RunConsole(
            self.length.last_step, progress.step, progress=config.log.progress, enabled=first
        )
        self.updates: list[CurvatureUpdate] = []
        self.unjudged: set[int] = set()  # steps whose losses are of smaller batches' statistics
        if experiment.controller is not None:
            experiment.controller.watch(experiment.model)
        if progress.step:
            self.console.say(f"resumed after step {progress.step} of {self.length.last_step}")

    def finish(self) -> dict[str, Any]:
        """Make all the steps that are left; returns the summary."""
        config, progress = self.experiment.config, self.progress
        before = deepcopy(progress)
        self.experiment.parallel.train()
        if progress.step == 0 and config.checkpoint.every_epochs:
            self.save()  # so that a run which diverges at once has a good one
        # A run stopped after the last batch of an epoch has yet to close it.
        while not self.length.is_over or self.length.epoch_is_over:
            self.make_epoch()
        if progress.samples or not progress.result:
            self.evaluate()
        # A run that was over when it was resumed is saved already, if in this folder.
        fresh = progress != before or latest_checkpoint(self.out / "checkpoints") is None
        if self.experiment.processes.any(fresh, self.experiment.device):
            self.save()
        return self.summarize(diverged=False)

    def make_epoch(self) -> None:
        """The rest of the current epoch."""
        while not (self.length.epoch_is_over or self.length.is_over):
            self.make_steps()
        if self.length.epoch_is_over:
            self.close_epoch()
        else:
            self.check_losses()

    def make_steps(self) -> None:
        """The steps of the epoch that are left at the present batch size."""
        size = self.experiment.batch_size
        for batch in self.batches():
            self.make_step(batch)
            if self.stop.reached():
                self.check_losses()
                self.save()
                msg = (
                    f"interrupted at step {self.progress.step}; go on with resume=auto "
                    f"(checkpoint in {self.out / 'checkpoints'})"
                )
                raise InterruptedRun(msg)
            if self.length.is_over or self.experiment.batch_size != size:
                break

    def close_epoch(self) -> None:
        """Evaluate, report and maybe save after a whole epoch."""
        config, progress = self.experiment.config, self.progress
        self.check_losses()
        result = self.evaluate()
        train_loss = progress.result["train_loss"]
        peak = self.experiment.scheduler.peak
        progress.close_epoch()
        self.console.epoch(
            progress.epoch, config.train.epochs, train_loss, result, self.updates, peak
        )
        every = config.checkpoint.every_epochs
        if every and progress.epoch % every == 0 and not self.length.is_over:
            self.save()

    def batches(self) -> Iterator[Batch]:
        """This process's part of the batches left in the epoch."""
        experiment, progress = self.experiment, self.progress
        return train_batches(
            experiment.data,
            batch_size=experiment.batch_size,
            seed=experiment.config.seed,
            epoch=progress.epoch,
            start_sample=progress.samples,
            device=experiment.device,
            rank=experiment.processes.rank,
            world_size=experiment.processes.world_size,
        )

    def make_step(self, batch: Batch) -> None:
        """Measure if due, then one update of the weights and all that follows from it."""
        experiment, progress = self.experiment, self.progress
        update = self.measure()
        step, size = progress.step, experiment.batch_size
        rate = float(experiment.scheduler.get_last_lr()[0])
        entry = {
            "step": step,
            "epoch": progress.epoch,
            "lr": rate,
            "momentum": get_momentum(experiment.optimizer),
            "batch_size": size,
        }
        if experiment.is_read(step):
            entry["read"] = True
        distorted = experiment.distorts(step)
        loss = self.update_weights(batch)
        event = None
        if distorted:
            self.unjudged.add(step)
        elif experiment.controller is not None:
            event = experiment.controller.observe(loss, self.same)
        progress.advance(size, lr=rate)
        self.heed(event)
        test = self.adapt()
        self.follow_schedule()
        # The losses of all steps count for the epoch's mean; not all of them are written.
        self.log.add(
            entry | measured_entry(update) | tested_entry(test),
            loss,
            write=step % experiment.config.log.every_steps == 0
            or update is not None
            or test is not None,
        )
        self.console.step()
        if len(self.log) >= _FLUSH_EVERY or progress.step == 1:
            self.check_losses()

    def measure(self) -> CurvatureUpdate | None:
        """Let the controller measure and apply, if it is its time."""
        experiment = self.experiment
        if experiment.controller is None:
            return None
        if experiment.controller.due:
            self.check_losses()  # do not measure where training has already failed
            experiment.processes.share(experiment.model.buffers())
        update = experiment.controller.maybe_update(
            experiment.model, experiment.measurement_batches, self.same
        )
        if update is None:
            return None
        if self.same is not None:
            experiment.controller.agree(self.same)
            momentum = get_momentum(experiment.optimizer)
            update = replace(update, peak=experiment.scheduler.peak, momentum=momentum)
        if not self.updates:
            self.console.measurement(update, steers=experiment.controller.apply)
        if update.failure is not None:
            self.console.say(f"step {update.step}: kept the rate: {update.failure}")
        if experiment.processes.is_first:
            self.keep(update)
        self.updates.append(update)
        return update

    def keep(self, update: CurvatureUpdate) -> None:
        """Write what was measured in a file of its own."""
        path = self.out / "curvature" / f"step-{update.step:08d}.json"
        if update.report is not None:
            update.report.save(path)
        if update.learned is not None:
            write_json(path, asdict(update.learned))

    def update_weights(self, batch: Batch) -> Tensor:
        """One update of the weights; returns the mean loss ``()`` on the device."""
        read = self.experiment.is_read(self.progress.step)
        return update_weights(self.experiment, batch, read=read)

    def follow_schedule(self) -> None:
        """Bring the shape of the rate to the samples trained with."""
        scheduler = self.experiment.scheduler
        for _ in range(self.length.schedule_step - scheduler.last_epoch):
            scheduler.step()

    def adapt(self) -> BatchSizeTest | None:
        """After a step: the test of the batch size, if it is its time, and what follows from it."""
        experiment = self.experiment
        test = None if experiment.adaptive is None else experiment.adaptive.step()
        if test is not None and test.next_batch_size != test.batch_size:
            experiment.resize(test.next_batch_size, total_steps=self.length.total_steps)
            if self.same is not None and experiment.controller is not None:
                experiment.controller.agree(self.same)
            self.console.say(f"step {self.progress.step}: batch size {test.next_batch_size}")
            self.console.expect(self.length.last_step)
        return test

    def heed(self, event: Event | None) -> None:
        """Take note of what the controller did about the steps made so far."""
        if event is None:
            return
        if event == "undone":
            self.progress.undone = self.progress.step
            if self.experiment.adaptive is not None:
                self.experiment.adaptive.forget()
        self.progress.events.append({"step": self.progress.step - 1, "event": event})
        self.console.say(f"step {self.progress.step - 1}: {EVENTS[event]}")

    def check_losses(self) -> None:
        """Write the losses so far, and raise ArithmeticError if the run has diverged.

        Exploded losses of steps that the controller has undone are not held against it, nor counted
        in the mean. Of those that it was not shown (`Experiment.distorts`) it is told here.
        """
        progress, controller = self.progress, self.experiment.controller
        if controller is not None:
            self.heed(controller.rescue(self.same))
        losses = self.log.flush()
        for step, loss in enumerate(losses, start=progress.step - len(losses)):
            if progress.first_loss is None and math.isfinite(loss):
                progress.first_loss = loss
            first = 1.0 if progress.first_loss is None else progress.first_loss
            if math.isfinite(loss) and loss <= _DIVERGED * max(first, 1.0):
                progress.loss_sum += loss
                progress.counted += 1
                continue
            hidden = step in self.unjudged and step >= progress.undone
            if hidden and controller is not None:
                self.heed(controller.rescue(self.same, lost=True))
            if step >= progress.undone:
                msg = f"the training loss became {loss:.4g} in step {step} (first loss {first:.4g})"
                raise DivergedError(msg)
        self.unjudged.clear()

    def evaluate(self) -> TestResult:
        """Test the network and remember the result; it shows whether the last step was good.

        Raises:
            DivergedError: the loss is not finite, so the weights are not worth a checkpoint.
        """
        result = evaluate(self.experiment)
        controller = self.experiment.controller
        if not math.isfinite(result.loss) and controller is not None:
            event = controller.rescue(self.same, lost=True)
            self.heed(event)
            if event is not None:
                result = evaluate(self.experiment)
        if not math.isfinite(result.loss):
            msg = f"the test loss became {result.loss:.4g}"
            raise DivergedError(msg)
        self.progress.result = {
            "test_accuracy": result.accuracy,
            "test_loss": result.loss,
            "train_loss": self.progress.mean_loss,
        }
        return result

    def save(self) -> None:
        """Write a checkpoint; processes other than the first only lend their parts of it."""
        group = self.experiment.processes
        if not (group.is_first or group.shards):
            return
        self.progress.wall_seconds = time.perf_counter() - self.began
        state = {
            "config": self.experiment.config.model_dump(mode="json"),
            "progress": asdict(self.progress),
            "experiment": self.experiment.state_dict(),
        }
        keep = self.experiment.config.checkpoint.keep
        if group.is_first:
            save_checkpoint(self.out / "checkpoints", self.progress.step, state, keep=keep)

    def give_up(self, error: ArithmeticError) -> None:
        """Record a run that diverged."""
        self.log.flush()
        self.summarize(diverged=True, failure=str(error))

    def summarize(self, *, diverged: bool, failure: str | None = None) -> dict[str, Any]:
        """Write ``summary.json`` and the picture of the run; returns the summary."""
        self.progress.wall_seconds = time.perf_counter() - self.began
        summary = run_summary(self.experiment, self.progress, diverged=diverged, failure=failure)
        if self.experiment.processes.is_first:
            write_json(self.out / "summary.json", summary)
            self.draw()
        self.report(summary)
        return summary

    def draw(self) -> None:
        """The picture of rate, loss and largest eigenvalue over the steps."""
        from batchlr.plotting import plot_run, save_figure

        entries = read_metrics(self.out / "metrics.jsonl")
        if entries:
            nesterov = bool(group_value(self.experiment.optimizer, "nesterov"))
            save_figure(plot_run(entries, nesterov=nesterov), self.out / "run.png")

    def report(self, summary: dict[str, Any]) -> None:
        """The last words on the terminal."""
        if not summary["diverged"]:
            self.console.end(summary, self.out)
