"""What a framework's loop calls, on a linear model whose curvature is known."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import batchlr
from batchlr import BatchAwareLR, CurvatureController, CurvatureUpdate
from batchlr.integrations.steering import Steering, _agreement
from two_processes import run_in_two

LOSS = batchlr.supervised(nn.MSELoss())
STEPS, SIZE, COUNT = 30, 8, 64


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(COUNT, 4, dtype=torch.float64, generator=generator)
    return x, (x[:, :1] - x[:, 1:2]).tanh()


def draw(generator):
    """Four batches of eight samples, drawn anew each time."""
    x, y = data()
    rows = torch.randperm(COUNT, generator=generator)[:32].split(8)
    return [(x[part], y[part]) for part in rows]


class Run:
    """A loop as a framework makes it, without the framework."""

    def __init__(self, *, lr=0.5, seed=0, total_steps=STEPS, dataset_size=COUNT, **options):
        torch.manual_seed(0)
        self.model = nn.Linear(4, 1, bias=False).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.5)
        self.steering = Steering(
            self.optimizer,
            LOSS,
            shape=lambda o: CosineAnnealingLR(o, STEPS),
            total_steps=total_steps,
            batch_size=options.pop("batch_size", SIZE),
            dataset_size=dataset_size,
            seed=seed,
            **options,
        )
        self.made = 0

    def step(self, samples=draw, *, factor=1.0):
        """One step, whose loss is shown ``factor`` times: its rate, and what was measured."""
        x, y = data()
        rows = torch.arange(self.made * SIZE, (self.made + 1) * SIZE) % COUNT
        update = self.steering.measure(self.model, samples)
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad()
        loss = LOSS(self.model, (x[rows], y[rows]))
        loss.backward()
        self.optimizer.step()
        self.steering.step()
        shown = factor * loss.detach()
        self.steering.observe(shown)
        assert shown.isnan() or shown == factor * loss  # the loop's own stays as it is
        self.made += 1
        return rate, update

    def steps(self, count):
        return [self.step()[0] for _ in range(count)]

    @property
    def shown(self):
        """The losses that the controller has been shown and has not looked at yet."""
        return [
            float(x) for x in self.steering.controller.state_dict()["guard"]["spikes"]["pending"]
        ]


# The loop --------------------------------------------------------------------------------------


def test_it_is_a_controller_and_a_scheduler_as_by_hand():
    run, x_y = Run(seed=4), data()
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    shape = lambda o: CosineAnnealingLR(o, STEPS)  # noqa: E731
    scheduler = BatchAwareLR(optimizer, 0.5, shape, batch_size=SIZE)
    controller = CurvatureController(
        scheduler,
        LOSS,
        total_steps=STEPS,
        dataset_size=COUNT,
        generator=torch.Generator().manual_seed(4),
    )
    samples = torch.Generator().manual_seed(5)

    def batches():
        torch.randint(2**31, (), generator=samples)  # of the random states inside
        return draw(samples)

    rates = []
    for made in range(12):
        rows = torch.arange(made * SIZE, (made + 1) * SIZE) % COUNT
        controller.maybe_update(model, batches)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss = LOSS(model, tuple(part[rows] for part in x_y))
        loss.backward()
        optimizer.step()
        scheduler.step()
        controller.observe(loss)
    assert run.steps(12) == rates
    assert len(set(rates)) == 12
    assert torch.equal(run.model.weight, model.weight)


def test_the_rate_is_below_the_limit_of_the_hessian():
    """The loss is quadratic: ``2 X'X / n``, whatever the weights."""
    x, _ = data()
    update = Run(policy="mean_square", start=1.0).step()[1]
    top = float(torch.linalg.eigvalsh(2 * x.T @ x / COUNT)[-1])
    # Of 32 samples of the 64: their own top, and noise of batches of 8 on top of it.
    assert update.peak == pytest.approx(update.bound.value, rel=1e-12)
    assert 0.2 * 2 * 1.5 / top < update.bound.value < 1.3 * 2 * 1.5 / top


def test_what_is_lost_is_undone():
    """The losses reach the controller: the weights go back, to go on at a lower rate."""
    run = Run()
    run.steps(3)
    peak = run.steering.scheduler.peak
    with torch.no_grad():
        run.model.weight.fill_(1e200)
    run.steps(5)
    assert run.model.weight.detach().abs().max() < 1e3
    assert run.steering.scheduler.peak < peak


@pytest.mark.parametrize(("batch_size", "dataset_size", "size"), [
    (8, 64, 8), (100, 64, 64), (100, None, 100),
])  # fmt: skip
def test_a_step_sees_no_more_samples_than_there_are(batch_size, dataset_size, size):
    steering = Run(batch_size=batch_size, dataset_size=dataset_size).steering
    assert steering.scheduler.batch_size == steering.controller.batch_size == size
    assert steering.controller.cadence.total_steps == STEPS


def test_where_nothing_is_applied_the_optimizers_largest_rate_stays():
    run = Run(apply=False, lr=0.03)
    assert run.steering.scheduler.peak == 0.03
    rate, update = run.step()
    assert rate == pytest.approx(0.03, rel=1e-12)
    assert update.bound.value > 0


def test_rates_of_zero_are_refused():
    with pytest.raises(ValueError, match=r"rates \[0\.0\] give no ratios between its groups"):
        Run(lr=0.0)


def test_rates_are_numbers_also_where_the_optimizers_are_tensors():
    run = Run(lr=torch.tensor(0.25), apply=False)
    assert run.steering.get_last_lr() == [0.25]
    assert type(run.steering.get_last_lr()[0]) is float
    run.steps(1)
    half_way = 0.25 * (1 + math.cos(math.pi / STEPS)) / 2
    assert run.steering.get_last_lr() == pytest.approx([half_way], rel=1e-6)  # of float32


# The samples -----------------------------------------------------------------------------------


def drawn(seed, count=2):
    """What measurements are given: samples, and numbers of all random states around them."""
    run, seen = Run(seed=seed, every_steps=1), []

    def watched(generator):
        batches = draw(generator)
        numbers = (float(torch.rand(())), random.random(), float(np.random.rand()))
        seen.append((torch.cat([x for x, _ in batches]).flatten().tolist(), *numbers))
        return batches

    for _ in range(count):
        run.steering.measure(run.model, watched)
    return seen


def test_every_process_draws_the_same_and_each_measurement_something_else():
    random.seed(1)
    here = drawn(seed=5)
    torch.manual_seed(123)  # another process, elsewhere in its random numbers
    random.seed(2)
    np.random.seed(3)
    assert drawn(seed=5) == here
    first, second = here
    for one, other in ((first, second), (first, drawn(seed=6)[0])):
        assert all(a != b for a, b in zip(one, other, strict=True))


def test_random_states_of_the_program_go_on_as_if_nothing_was_drawn():
    run = Run(every_steps=1)

    def wasteful(generator):
        torch.rand(3), random.random(), np.random.rand()
        return draw(generator)

    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    run.steering.measure(run.model, wasteful)
    assert state() == before


def test_nothing_is_drawn_where_nothing_is_due():
    run, calls = Run(every_steps=3), []

    def counted(generator):
        calls.append(run.made)
        return draw(generator)

    for run.made in range(7):
        update = run.steering.measure(run.model, counted)
        assert (update is None) == (run.made % 3 != 0)
    assert calls == [0, 3, 6]


@pytest.mark.parametrize("seed", [0, 4])
def test_searches_and_samples_have_seeds_of_their_own(seed):
    state = Run(seed=seed).steering.state_dict()
    for generator, own in ((state["controller"]["generator"], seed), (state["samples"], seed + 1)):
        assert torch.equal(generator, torch.Generator().manual_seed(own).get_state())


# What is known ---------------------------------------------------------------------------------


def test_figures_are_those_of_the_measurement():
    run = Run()
    update = run.steering.measure(run.model, draw)
    assert run.steering.figures(update) == {
        "lr": run.optimizer.param_groups[0]["lr"],
        "peak_lr": update.peak,
        "largest_eigenvalue": float(update.report.largest),
        "max_lr": update.bound.value,
        "max_lr_low": update.bound.low,
        "max_lr_high": update.bound.high,
    }
    assert update.bound.low < update.bound.value < update.bound.high


def test_what_is_not_known_is_no_figure():
    run = Run(apply=False)
    failed = CurvatureUpdate(3, peak=0.125, momentum=0.5, failure="the loss is nan")
    assert run.steering.figures(failed) == {"lr": 0.5, "peak_lr": 0.125}


# Checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [1, 4, 9])
def test_a_run_goes_on_from_its_state_bit_identically(tmp_path, before):
    whole, first = Run(every_steps=3), Run(every_steps=3)
    expected = whole.steps(15)
    assert first.steps(before) == expected[:before]
    state = {
        "steering": first.steering.state_dict(),
        "model": first.model.state_dict(),
        "optimizer": first.optimizer.state_dict(),
    }
    torch.save(state, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)  # tensors and primitives
    second = Run(every_steps=3, seed=77)  # whose generators come with the state
    second.model.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(saved["optimizer"])
    second.steering.load_state_dict(saved["steering"])
    second.made = before
    assert second.steps(15 - before) == expected[before:]
    assert torch.equal(second.model.weight, whole.model.weight)


# Processes -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_a_group_of_one_process_has_nothing_to_agree_on():
    assert _agreement(torch.device("cpu")) is None


@pytest.mark.slow
def test_processes_take_over_the_first_ones_rates_and_share_their_losses(tmp_path):
    run_in_two(Path(__file__).with_name("steering_in_two.py"), tmp_path, timeout=120)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    run = Run()  # alone, with the first one's samples and the mean of both losses
    updates = [run.step(factor=2.0)[1] for _ in range(4)]
    assert first["peaks"][:4] == [None if u is None else u.peak for u in updates]
    assert first["shown"] == pytest.approx(run.shown, rel=1e-12)
    assert first["end"] < first["peaks"][0]
    said, momentum, _ = first["alone"]
    assert said == momentum != 0.5  # which it began with
