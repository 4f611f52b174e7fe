"""Lightning's own trainer, steered: as a loop of one's own, and otherwise undisturbed."""

import csv
import json
from pathlib import Path

import lightning.pytorch as L
import pytest
import pytorch_lightning
import torch
import torchmetrics
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning_runs import WARNINGS, Net, digits, fit, loader, weights
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

import batchlr
from batchlr.integrations.lightning import CurvatureCallback
from batchlr.integrations.training_samples import TrainingSamples
from two_processes import run_in_two

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]


def hand_written(batches, total_steps, dataset_size):
    """The rates of a loop around the controller, on the samples that the callback draws."""
    module = Net()
    optimizer = module.configure_optimizers()
    loss_fn = batchlr.supervised(torch.nn.CrossEntropyLoss())
    scheduler = batchlr.BatchAwareLR(optimizer, 1.0, lambda o: CosineAnnealingLR(o, total_steps))
    controller = batchlr.CurvatureController(
        scheduler, loss_fn, total_steps=total_steps, batch_size=64, dataset_size=dataset_size
    )
    generator = torch.Generator().manual_seed(1)
    samples = TrainingSamples(digits(), default_collate, batch_size=64, pass_size=64)

    def draw():
        torch.randint(2**31, (), generator=generator)  # of the data set's own randomness
        return samples(generator)

    rates = []
    for batch in batches:
        controller.maybe_update(module.net, draw)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss = loss_fn(module.net, batch)
        loss.backward()
        optimizer.step()
        scheduler.step()
        controller.observe(loss)
    return rates, module


def test_digits_are_learnt_at_the_rates_of_a_loop_of_ones_own():
    module, steps = Net(), 6 * 29
    data = loader(shuffle=True)
    rates = fit(module, [CurvatureCallback(CosineAnnealingLR)], data, max_epochs=6)
    pixels, labels = digits().tensors
    assert (module.net(pixels).argmax(1) == labels).double().mean() > 0.95
    expected, same = hand_written(module.seen, steps, len(labels))
    assert rates == expected
    assert torch.equal(weights(module), weights(same))


def test_accumulated_batches_are_one_batch():
    data = Subset(digits(), range(64 * 12))
    callbacks = [CurvatureCallback(), CurvatureCallback()]
    whole, parts = Net(), Net()
    rates = fit(whole, callbacks[:1], loader(data))
    again = fit(parts, callbacks[1:], loader(data, 32), accumulate_grad_batches=2)
    assert callbacks[1].controller.batch_size == 64
    assert len(again) == 24
    # Measured on passes of 16 of 64 samples in both; rounding of sums is all that differs.
    assert again == pytest.approx(rates, rel=1e-3)


class Observed(L.Callback):
    """The losses that the controller is shown."""

    def __init__(self, callback):
        self.callback, self.losses = callback, []

    def on_train_start(self, trainer, pl_module):
        controller = self.callback.controller
        show = controller.observe
        controller.observe = lambda loss, same: self.losses.append(loss) or show(loss, same)


def test_the_controller_sees_the_mean_of_a_step_however_many_batches_it_has():
    class Remembered(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.losses.append(loss.detach())
            return loss

    module, callback = Remembered(), CurvatureCallback()
    module.losses = []
    observed = Observed(callback)
    data = loader(Subset(digits(), range(96)), 32)
    fit(module, [callback, observed], data, accumulate_grad_batches=2, max_epochs=1)
    first, second, third = module.losses
    assert observed.losses == [(first + second) / 2, third]


@pytest.mark.parametrize(("algorithm", "norm"), [(None, 0.5), ("norm", 0.5), ("value", None)])
def test_clipping_of_norms_is_known(algorithm, norm):
    callback = CurvatureCallback()
    options = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": algorithm}
    fit(Net(), [callback], max_steps=1, **options)
    assert callback.controller.limit.clip_norm == norm


def test_a_run_goes_on_from_a_checkpoint_bit_identically(tmp_path):
    def callbacks():
        checkpoints = L.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1)
        return [CurvatureCallback(CosineAnnealingLR), checkpoints]

    whole = Net()
    rates = fit(whole, callbacks(), enable_checkpointing=True, max_epochs=3)
    resumed = Net()
    checkpoint = next(tmp_path.glob("*step=58*"))
    rest = fit(resumed, callbacks(), ckpt_path=checkpoint, enable_checkpointing=True, max_epochs=3)
    assert rest == rates[58:]
    assert torch.equal(weights(resumed), weights(whole))


class Noisy(Dataset):
    """Augments with torch's random numbers."""

    def __len__(self):
        return 256

    def __getitem__(self, row):
        pixels, label = digits()[row]
        return pixels + 0.1 * torch.randn(64), label


class Remembering(Net):
    """Everything that a training step may do beside computing a loss."""

    def __init__(self):
        super().__init__(lr=0.1)
        self.net.insert(2, torch.nn.Dropout(0.2))
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=10)
        self.steps, self.last = 0, None

    def training_step(self, batch, batch_idx):
        pixels, labels = batch.pop("pixels"), batch.pop("labels")
        outputs = self.net(pixels)
        self.accuracy(outputs, labels)
        self.log_dict({"accuracy": self.accuracy})
        self.steps, self.last = self.steps + 1, outputs.detach()
        self.seen.append(outputs.detach())
        return {"loss": torch.nn.functional.cross_entropy(outputs, labels), "more": 1}

    def on_train_epoch_end(self):
        self.counted = float(self.accuracy.compute())


def test_measuring_alone_changes_nothing():
    def collate(samples):
        pixels, labels = default_collate(samples)
        return {"pixels": pixels, "labels": labels}

    runs = []
    for callbacks in ([], [CurvatureCallback(apply=False, norm_mode="train")]):
        module = Remembering()
        torch.manual_seed(1)
        rates = fit(module, callbacks, loader(Noisy(), 32, shuffle=True, collate_fn=collate))
        runs.append((module, rates))
    (alone, rates), (measured, again) = runs
    assert callbacks[0].controller.num_products > 0
    assert again == rates == [0.1] * 16
    assert torch.equal(weights(measured), weights(alone))
    assert torch.equal(measured.last, alone.last)
    assert (measured.counted, measured.steps) == (alone.counted, 16)
    assert len(measured.seen) == 16
    assert "log" not in vars(measured)


def test_rates_and_limits_are_logged(tmp_path):
    logger = L.loggers.CSVLogger(tmp_path)
    monitor = L.callbacks.LearningRateMonitor(logging_interval="step")
    rates = fit(
        Net(), [CurvatureCallback(), monitor], logger=logger, max_steps=5, log_every_n_steps=1
    )
    with Path(logger.experiment.metrics_file_path).open() as file:
        rows = list(csv.DictReader(file))
    measured = {int(row["step"]): row for row in rows if row["max_lr"]}
    assert list(measured) == [0, 1, 2, 4]
    assert [float(row["lr"]) for row in measured.values()] == [rates[k] for k in measured]
    assert all(float(row["largest_eigenvalue"]) > 0 for row in measured.values())
    seen = [float(row["lr-SGD"]) for row in rows if row["lr-SGD"]]
    assert seen == rates


def test_the_older_package_takes_the_callback_too():
    class Old(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(64, 10)

        def training_step(self, batch):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1.0)

    callback = CurvatureCallback()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pytorch_lightning.Trainer(
        max_steps=3, accelerator="cpu", callbacks=[callback], **options
    )
    trainer.fit(Old(), loader())
    assert callback.controller.num_products > 0
    assert trainer.optimizers[0].param_groups[0]["lr"] == callback.scheduler.peak != 1.0


def test_curvature_is_measured_in_full_precision():
    found = []
    for precision in ("32-true", "bf16-mixed"):
        callback = CurvatureCallback()
        fit(Net(), [callback], max_steps=1, precision=precision)
        found.append(callback.controller.limit.last.largest)
    assert found[0] == found[1]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(digits())


def test_a_stream_is_measured_on_batches_given():
    rows = torch.arange(256).view(4, 64)
    callback = CurvatureCallback(batches=lambda: [digits()[part] for part in rows])
    rates = fit(Net(), [callback], loader(Stream()), max_steps=6, max_epochs=-1)
    assert callback.controller.batch_size == 64
    assert len(set(rates)) > 3


class Manual(Net):
    automatic_optimization = False


class Pair(Net):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    def training_step(self, batch, batch_idx): ...


class Scheduled(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [StepLR(optimizer, 10)]


class SplitStrategy(SingleDeviceStrategy):
    pass


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Manual, "optimizes manually: call batchlr.CurvatureController"),
        (Scheduled, r"a StepLR, which would undo.*CurvatureCallback\(shape=StepLR\)"),
    ],
)
def test_what_cannot_be_steered_is_refused(module, words):
    with pytest.raises(ValueError, match=words):
        fit(module(), [CurvatureCallback()])


def test_two_optimizers_are_refused():
    module = Pair()
    module.automatic_optimization = True
    with pytest.raises((ValueError, RuntimeError), match=r"one optimizer|multiple optimizers"):
        fit(module, [CurvatureCallback()])


def test_a_model_that_may_be_split_is_refused():
    strategy = SplitStrategy(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"SplitStrategy may split the model.*strategy='ddp'"):
        fit(Net(), [CurvatureCallback()], strategy=strategy)


class Silent(Net):
    def training_step(self, batch, batch_idx):
        return None


@pytest.mark.parametrize(
    ("callback", "data", "options", "words"),
    [
        ({}, loader(Stream()), {"max_steps": 2}, r"type Stream: pass CurvatureCallback\(batches="),
        (
            {},
            {"a": loader(), "b": loader()},
            {},
            r"loader of type dict .* pass CurvatureCallback\(batches=",
        ),
        (
            {},
            DataLoader(digits(), batch_sampler=[range(8)]),
            {},
            r"names no batch size: pass CurvatureCallback\(batch_size=",
        ),
        (
            {"shape": CosineAnnealingLR},
            loader(),
            {"max_epochs": -1},
            "shape of an endless run is unknown: set the Trainer's max_steps",
        ),
    ],
    ids=["stream", "two loaders", "no size", "endless"],
)
def test_what_is_missing_is_asked_for(callback, data, options, words):
    with pytest.raises(ValueError, match=words):
        fit(Net(), [CurvatureCallback(**callback)], data, **options)


def test_what_a_step_keeps_with_its_graph_is_forgotten():
    """A metric of undetached losses, which cannot be copied as it is, and a running sum."""

    class Keeps(Net):
        def __init__(self):
            super().__init__()
            self.losses = torchmetrics.CatMetric()
            self.total = torch.zeros(())

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.losses.update(loss)
            self.total += 1
            return loss

    module = Keeps()
    fit(module, [CurvatureCallback()], loader(), max_steps=6)
    assert len(module.losses.compute()) == 6
    assert module.total == 6
    assert "log" not in vars(module)


def test_a_step_without_a_loss_is_named():
    with pytest.raises(TypeError, match=r"no loss .* NoneType: pass CurvatureCallback\(loss_fn="):
        fit(Silent(), [CurvatureCallback()])


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    run_in_two(Path(__file__).with_name("lightning_in_two.py"), tmp_path, timeout=240)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    module = Net()
    rates = fit(module, [CurvatureCallback(CosineAnnealingLR)], loader(), max_steps=20)
    # Rounding of sums over 64 samples, or twice 32.
    assert first["rates"] == pytest.approx(rates, rel=1e-3)
    assert first["norm"] == pytest.approx(float(weights(module).norm()), rel=1e-3)
