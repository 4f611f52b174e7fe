"""A loop around Accelerate, steered: as a loop of one's own, and otherwise undisturbed."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType
from accelerate_runs import LOSS, Run, digits, network
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import DataLoader, IterableDataset, default_collate

import batchlr
from batchlr.integrations.accelerate import CurvatureSteering
from batchlr.integrations.training_samples import TrainingSamples
from two_processes import run_in_two


def hand_written(batches):
    """The rates of a loop around the controller, on the samples that the steering draws."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    scheduler = batchlr.BatchAwareLR(optimizer, 1.0, lambda o: CosineAnnealingLR(o, len(batches)))
    controller = batchlr.CurvatureController(
        scheduler, LOSS, total_steps=len(batches), batch_size=64, dataset_size=len(digits())
    )
    generator = torch.Generator().manual_seed(1)
    samples = TrainingSamples(digits(), default_collate, batch_size=64, pass_size=64)

    def draw():
        torch.randint(2**31, (), generator=generator)  # of the data set's own randomness
        return samples(generator)

    rates = []
    for batch in batches:
        controller.maybe_update(model, draw)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss = LOSS(model, batch)
        loss.backward()
        optimizer.step()
        scheduler.step()
        controller.observe(loss)
    return rates, model


def test_digits_are_learnt_at_the_rates_of_a_loop_of_ones_own():
    run = Run(6 * 29)
    for _ in range(6):
        run.epoch()
    pixels, labels = digits().tensors
    assert (run.model(pixels).argmax(1) == labels).double().mean() > 0.95
    rates, same = hand_written(list(DataLoader(digits(), 64)) * 6)
    assert run.rates == rates
    assert torch.equal(run.weights(), torch.cat([p.detach().flatten() for p in same.parameters()]))


def test_accumulated_batches_are_one_batch():
    whole = Run(12, data=digits(768))
    whole.epoch()
    parts = Run(12, data=digits(768), size=32, passes=2)
    parts.epoch()
    assert parts.steering.controller.batch_size == 64
    assert len(parts.rates) == 12
    assert parts.rates == pytest.approx(whole.rates, rel=1e-3)


def test_a_run_goes_on_from_a_checkpoint_bit_identically(tmp_path):
    whole = Run(58)
    whole.epoch()
    whole.accelerator.save_state(tmp_path)
    whole.epoch()
    resumed = Run(58)
    resumed.accelerator.load_state(tmp_path)
    resumed.epoch()
    assert resumed.rates == whole.rates[29:]
    assert torch.equal(resumed.weights(), whole.weights())


def test_curvature_is_measured_in_full_precision():
    found = [
        Run(None, shape=None, precision=precision).steering.measure().largest_eigenvalue
        for precision in ("no", "bf16")
    ]
    assert found[0] == found[1]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(digits(256))


def test_a_stream_is_measured_on_batches_given():
    given = [digits()[torch.arange(k, k + 32)] for k in range(0, 128, 32)]
    run = Run(4, data=Stream(), batches=lambda: given, batch_size=64)
    run.epoch()
    assert run.steering.controller.batch_size == 64
    assert len(set(run.rates)) == 4


def test_what_cannot_be_steered_is_refused():
    with pytest.raises(ValueError, match=r"type Stream: pass CurvatureSteering\(batches="):
        Run(4, data=Stream())
    with pytest.raises(ValueError, match=r"no batch size: pass CurvatureSteering\(batch_size="):
        Run(4, data=Stream(), batches=list)
    with pytest.raises(ValueError, match="endless run is unknown: pass total_steps"):
        Run(None)
    run = Run(4)
    things = (run.accelerator, run.model, run.optimizer)
    with pytest.raises(ValueError, match="of type DataLoader, is not prepared"):
        CurvatureSteering(*things, DataLoader(digits(), 8), LOSS, total_steps=4)
    run.accelerator.prepare(StepLR(run.optimizer, 1))
    with pytest.raises(ValueError, match=r"a scheduler was prepared.*prepare none"):
        CurvatureSteering(*things, run.loader, LOSS, total_steps=4)
    run.accelerator._schedulers.clear()
    run.accelerator.state.distributed_type = DistributedType.FSDP
    with pytest.raises(ValueError, match="FSDP may split the model"):
        CurvatureSteering(*things, run.loader, LOSS, total_steps=4)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    run_in_two(Path(__file__).with_name("accelerate_in_two.py"), tmp_path, timeout=240)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    run = Run(12, data=digits(768))
    run.epoch()
    # Rounding of sums over 64 samples, or twice 32.
    assert first["rates"] == pytest.approx(run.rates, rel=1e-3)
    assert first["norm"] == pytest.approx(float(run.weights().norm()), rel=1e-3)
