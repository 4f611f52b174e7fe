"""Where the safeguard goes back to when a network is lost, and at what rate it goes on."""

import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from batchlr.on_the_fly.safeguard import Safeguard


class Counter(nn.Module):
    """One weight that is no layer: how much it changes says nothing."""

    def __init__(self, start=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([start], dtype=torch.float64))


class Run:
    """A weight that counts its steps, and a gradient norm and loss of the test's choice."""

    def __init__(self, peak=1.0, kind=torch.optim.SGD, **options):
        self.model = Counter()
        self.optimizer = kind(self.model.parameters(), lr=1.0)
        self.guard = Safeguard(self.optimizer, **options)
        self.guard.watch(self.model)
        self.guard.limited(peak)

    @property
    def weight(self):
        return self.model.weight.item()

    def step(self, loss, norm=1.0):
        self.guard.watch(self.model)
        return self.made(loss, norm)

    def made(self, loss, norm):
        self.model.weight.grad = torch.full_like(self.model.weight, norm)
        with torch.no_grad():
            self.model.weight.add_(1.0)
        return self.guard.observe(torch.tensor(loss))

    def steps(self, *losses, norm=1.0):
        return [event for loss in losses if (event := self.step(loss, norm))]


PLATEAU = [2.3] * 8
LEARNT = [2.3, 2.3, 1.5, 1.5, 1.4, 1.4, 1.3, 1.3]


def test_a_quiet_run_is_left_alone():
    run = Run()
    assert run.steps(*LEARNT) == []
    assert run.weight == len(LEARNT)
    assert run.guard.peak == 1.0


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e4])
def test_on_a_plateau_it_goes_back_to_the_start_under_a_ceiling(loss):
    run = Run()
    assert run.steps(*PLATEAU, 2.3, loss) == ["undone"]
    assert run.weight == 0.0
    assert run.guard.peak == 0.25
    assert run.guard.limited(0.1) == 0.1  # a lower limit applies
    assert run.guard.limited(7.0) == 0.25


def test_what_is_learnt_is_kept_from_before_the_last_quiet_look():
    run = Run()
    assert run.steps(*LEARNT, 1.2, math.nan) == ["undone"]
    assert run.weight == 6.0  # looks after 2, 4, 6 and 8 steps; the one after 6 had a quiet one
    assert run.guard.peak == 0.25
    run.steps(*[1.2] * 200)  # which comes back while it is quiet
    assert run.guard.peak == 1.0


def test_a_network_that_has_forgotten_goes_back_to_before_it_forgot():
    run = Run()
    run.steps(*LEARNT)
    assert run.steps(*[2.3] * 6) == ["undone"]
    assert run.weight == 6.0
    assert run.steps(*[1.3] * 4, *[2.3] * 9) == ["undone"]


def test_nor_is_what_it_forgot_in_a_noisy_jump_kept():
    """Two convolutions with SGD, whose losses scatter too much for a jump to be told from noise."""
    descent = [2.3, 2.3, 2.3, 2.3, 2.3, 2.2, 2.2, 2.1, 2.1, 1.7, 1.4, 1.0, 0.8, 1.0, 1.9, 1.2, 1.0]
    scatter = [0.4, 0.7, 3.6, 1.0, 1.4, 0.6, 0.7]
    jump = [2.0, 3.4, 2.8, 2.6, 6.4, 1.9, 2.3, 2.3, 2.3, 3.5]
    dead = [2.4, 2.5, 2.4, 2.4, 2.3, 2.5] + [2.3] * 40
    run = Run()
    assert run.steps(*descent, *scatter) == []
    assert run.steps(*jump) == []
    assert any(run.step(loss) == "undone" for loss in dead)  # and no step behind that
    assert run.weight < len(descent) + len(scatter)


class Leap(Run):
    """Whose steps multiply the first of two layers, too."""

    def __init__(self, kind=torch.optim.SGD):
        super().__init__()
        self.model = Counter()
        self.model.layer = nn.Linear(4, 4, bias=False)
        self.model.head = nn.Linear(4, 2, bias=False)
        self.optimizer = kind(self.model.parameters(), lr=1.0)
        self.guard = Safeguard(self.optimizer)
        self.guard.limited(1.0)

    def step(self, loss, norm=1.0, factor=1.0):
        self.guard.watch(self.model)
        with torch.no_grad():
            self.model.layer.weight.mul_(factor)
        return self.made(loss, norm)


def test_a_leap_on_the_plateau_is_undone():
    run = Leap()
    run.steps(*PLATEAU)
    before = run.model.layer.weight.clone()
    run.step(2.3, factor=2.5)
    assert run.step(2.3) == "undone"
    assert torch.equal(run.model.layer.weight, before)
    assert run.guard.peak == 0.25
    assert run.steps(*[2.3] * 4) == []  # to go back is no leap


@pytest.mark.parametrize(
    ("kind", "length", "share"),
    [
        (torch.optim.Adam, 1.25, 0.64),  # four fifths of a leap, which was 1.25 leaps long
        (torch.optim.RMSprop, 2.0, 0.4),
        (torch.optim.Adam, 20.0, 0.25),
        (torch.optim.SGD, 1.25, 0.25),  # whose steps shrink with the gradient
    ],
)
def test_a_leap_of_adam_s_under_a_ceiling_tells_how_far_to_lower_it(kind, length, share):
    run = Leap(kind)
    run.steps(*PLATEAU)
    leap = 1 + math.log(2) * length
    run.step(2.3, factor=leap)
    assert run.step(2.3) == "undone"
    assert run.guard.peak == 0.25  # the first leap was of a rate that had risen for some steps
    assert run.step(2.3, factor=leap) == "undone"
    assert run.guard.peak == pytest.approx(share * 0.25, rel=1e-5)
    assert run.step(9.0) == "undone"  # any other loss says nothing of the kind
    assert run.guard.peak == pytest.approx(share * 0.25 * 0.25, rel=1e-5)


def test_a_leap_lowers_the_rate_it_was_made_at_not_the_ceiling_it_was_under():
    run = Leap(torch.optim.Adam)
    run.steps(*PLATEAU)
    leap = 1 + math.log(2) * 1.25
    run.step(2.3, factor=leap)
    assert run.step(2.3) == "undone"
    assert run.guard.limited(0.125) == 0.125  # measured since, below the ceiling of 0.25
    assert run.step(2.3, factor=leap) == "undone"
    assert run.guard.peak == pytest.approx(0.64 * 0.125, rel=1e-5)


@pytest.mark.parametrize("risen", [6.0, 500.0])
def test_a_leap_in_the_first_look_hides_no_other(risen):
    run = Leap()
    before = run.model.layer.weight.clone()
    assert [run.step(2.3, factor=4.0), run.step(risen)] == [None, "undone"]
    run.steps(*PLATEAU)
    assert "undone" in [run.step(2.3, factor=4.0), run.step(2.3)]
    assert torch.equal(run.model.layer.weight, before)


def test_weights_loaded_between_steps_are_no_leap():
    run = Leap()
    run.steps(*PLATEAU)
    with torch.no_grad():
        run.model.layer.weight.add_(9.0)
    assert run.steps(*PLATEAU) == []


def test_once_something_is_learnt_layers_may_change():
    run = Leap()
    run.steps(*LEARNT)
    assert [run.step(1.3, factor=9.0), run.step(1.3)] == [None, None]
    assert run.guard.peak == 1.0


def test_the_ceiling_falls_as_gradients_outgrow_the_plateau_s():
    run = Run()
    run.steps(*PLATEAU, norm=2.0)
    run.steps(math.nan, math.nan)
    for norm, want in [(2.0, 0.25), (1.0, 0.25), (8.0, 0.0625), (4.0, 0.125)]:
        run.step(2.3, norm)
        assert run.guard.peak == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_not_for_optimizers_whose_steps_do_not_grow_with_the_gradient(kind):
    run = Run(kind=kind)
    run.steps(*PLATEAU, math.nan, math.nan)
    for norm in (1.0, 8.0):
        run.step(2.3, norm)
        assert run.guard.peak == 0.25


def test_the_plateau_s_gradient_is_the_first_one():
    run = Run()
    run.steps(*PLATEAU)
    run.steps(2.28, 2.28, norm=5.0)  # on the way to what destroys it
    run.steps(math.nan, math.nan)
    run.step(2.3, 2.0)
    assert run.guard.peak == pytest.approx(0.125, rel=1e-6)


def test_behind_the_plateau_the_limit_measured_falls_as_gradients_grow_until_it_has_settled():
    run = Run()
    run.steps(*PLATEAU, 2.3, math.nan)
    assert run.step(2.05, norm=4.0) == "recovered"
    assert run.guard.limited(0.5) == 0.5
    for loss, norm, want in [(2.0, 4.0, 0.5), (2.0, 10.0, 0.2), (2.0, 5.0, 0.4), (1.5, 40.0, 0.5)]:
        assert run.steps(loss, loss, norm=norm) == []  # two steps a look
        assert run.guard.peak == pytest.approx(want, rel=1e-6)
    assert not run.guard.unsettled
    run.step(1.5, norm=400.0)
    assert run.guard.peak == 0.5


def test_what_is_lost_right_after_it_has_settled_does_not_go_back_to_the_start():
    run = Run()
    run.steps(*PLATEAU, 2.3, math.nan, 2.05, 2.05, 2.05)
    weight = run.weight
    run.steps(1.5, 1.5)  # a quiet look after the one that was learnt at
    assert not run.guard.unsettled
    assert run.steps(math.nan, math.nan) == ["undone"]
    assert run.weight == weight


def test_what_settles_has_succeeded_whatever_it_went_back_to():
    run = Leap()
    assert [run.step(2.4, factor=4.0), run.step(2.4)][1] == "undone"
    run.steps(*[2.2] * 4)
    events = run.steps(*[2.05] * 40)
    assert events == ["recovered"]
    assert run.guard.peak == 0.25
    assert run.guard.attempts == 0


@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_a_gradient_that_is_no_number_is_none_to_compare_with(odd):
    run = Run()
    run.steps(*PLATEAU, 2.3, math.nan)
    assert run.step(2.05, norm=4.0) == "recovered"
    run.steps(2.0, 2.0, norm=odd)
    run.guard.limited(0.5)
    run.steps(2.0, 2.0, norm=8.0)
    assert run.guard.peak == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("spread", [0.1, 0.2, 0.3])
@pytest.mark.parametrize("first", [[math.nan, math.nan], [*PLATEAU, 2.3, math.nan]])
def test_a_noisy_loss_settles_and_is_not_lost_again(spread, first):
    rng = np.random.default_rng(0)
    for _ in range(3):
        run = Run()
        run.steps(*first)
        for _ in range(400):
            loss = 1.2 + 1.1 * math.exp(-run.weight / 100) + spread * rng.normal()
            if run.step(loss) == "recovered":
                run.guard.limited(0.25)
        assert run.guard.attempts == 0
        assert not run.guard.unsettled
        assert run.guard.peak == 0.25


def test_of_another_network_nothing_is_known():
    run = Run()
    run.steps(*PLATEAU, 2.3, math.nan)
    run.step(2.05)
    run.guard.limited(0.5)
    run.model = Counter()
    run.optimizer.param_groups[0]["params"] = list(run.model.parameters())
    run.optimizer.state.clear()
    run.guard.watch(run.model)
    run.guard.limited(7.0)
    run.steps(math.nan, math.nan, norm=100.0)
    run.step(2.3, norm=100.0)
    assert run.guard.peak == 1.75
    run.step(2.3, norm=200.0)
    assert run.guard.peak == pytest.approx(0.875, rel=1e-6)


def test_each_attempt_has_a_quarter_of_the_last_one_s_ceiling():
    run = Run()
    run.steps(*PLATEAU)
    for attempt in range(1, 4):
        assert run.steps(2.3, math.nan) == ["undone"]
        assert run.weight == 0.0
        assert run.guard.limited(9.0) == 0.25**attempt


def test_the_ceiling_is_lifted_when_the_loss_has_come_down():
    run = Run()
    run.steps(*PLATEAU, 2.3, math.nan)
    assert run.steps(2.3, 2.1, 2.08) == []
    assert run.steps(2.05) == ["recovered"]
    assert run.guard.peak == run.guard.free == 0.25  # until another limit is measured
    assert run.guard.limited(1.0) == 1.0
    assert run.guard.attempts == 0
    weight = run.weight
    run.steps(1.5, 1.5, 1.5, 1.5)
    assert run.steps(math.nan, math.nan) == ["undone"]
    assert run.weight >= weight  # and the plateau is left for good


def test_what_is_learnt_but_soon_forgotten_is_tried_again_from_the_start():
    run = Run()
    run.steps(*PLATEAU, 2.3, math.nan, 2.3)
    assert run.steps(2.05) == ["recovered"]
    assert run.steps(*[2.3] * 6) == ["undone"]
    assert run.weight == 0.0
    assert run.guard.peak == 0.25**2
    assert run.steps(2.05) == ["recovered"]
    assert run.steps(*[2.05] * 40) == []  # as long again: now it will last
    assert run.steps(*[2.3] * 40)[0] == "undone"
    assert run.weight > 20


def test_after_eight_attempts_in_vain_the_run_is_left_to_itself():
    run = Run()
    events = run.steps(*PLATEAU, *[math.nan] * 30)
    assert events.count("undone") == 8
    assert run.step(math.nan) is None
    assert run.weight > 8


def test_losses_settle_and_what_failed_for_good_never_does():
    run = Run()
    assert run.guard.unsettled
    run.steps(*PLATEAU)
    assert run.guard.unsettled
    run.steps(*[1.0] * 10)
    assert not run.guard.unsettled
    failed = Run()
    failed.steps(*PLATEAU, *[math.nan] * 40)
    assert not failed.guard.rollback
    assert failed.guard.unsettled
    assert not Run(rollback=False).guard.unsettled


def test_attempts_long_past_do_not_count():
    run = Run()
    run.steps(*LEARNT)
    for _ in range(12):
        assert run.steps(*[1.3] * 150, *[math.nan] * 10)[-1] == "undone"


def test_a_network_lost_before_the_first_look_goes_back_and_may_recover():
    run = Run()
    assert run.steps(math.nan, math.nan) == ["undone"]
    assert (run.weight, run.guard.peak) == (0.0, 0.25)
    assert run.steps(2.3, 2.3, 1.0) == ["recovered"]


def test_who_knows_the_network_is_lost_can_say_so():
    run = Run()
    run.steps(*LEARNT)
    assert run.guard.rescue(lost=True) == "undone"
    assert run.weight == 6.0
    assert run.guard.peak == 0.25


def test_a_rescue_comes_before_the_look_only_if_need_be():
    run = Run()
    run.steps(*LEARNT, *[1.3] * 80)
    run.steps(1.3, 1.3)
    assert run.guard.rescue() is None
    pending = len(run.guard.detector.pending)
    assert pending > 0
    run.step(math.nan)
    assert len(run.guard.detector.pending) == pending + 1
    assert run.guard.rescue() == "undone"
    assert run.guard.rescue() is None


def test_without_rollback_it_only_slows_down():
    run = Run(rollback=False)
    assert run.steps(*[2.3] * 10, *[math.nan] * 10) == ["slowed"]
    assert run.weight == 20.0
    assert run.guard.peak == 0.5
    assert "sure" not in run.guard.state_dict()
    assert run.guard.rescue() is None


def test_an_undone_jump_is_not_counted_as_a_jump_too():
    run = Run()
    run.steps(*LEARNT, *[1.3] * 4)
    assert run.steps(*[1.3] * 6, 1.3, 1e6) == ["undone"]  # the twentieth step, a look of both
    assert run.guard.spikes.pending == []
    assert run.guard.peak == 0.25


def test_other_weights_cannot_be_gone_back_to():
    run = Run()
    run.steps(*PLATEAU[:4])
    run.model.register_buffer("late", torch.zeros(1))
    assert run.steps(2.3, math.nan) == []


def test_another_network_goes_back_to_its_own_weights():
    run = Run()
    run.steps(*LEARNT)
    run.model = Counter(100.0)
    run.optimizer.param_groups[0]["params"] = list(run.model.parameters())
    run.guard.watch(run.model)
    assert run.steps(*PLATEAU, 2.3, math.nan)[-1] == "undone"
    assert run.weight == 100.0


def test_what_nobody_shows_losses_to_holds_no_weights():
    run = Run()
    assert run.guard.unused
    run.guard.stop()
    assert run.guard.state_dict().keys().isdisjoint({"sure", "latest"})
    assert run.steps(*PLATEAU, 2.3, math.nan)[-1] == "slowed"
    assert run.weight == 10.0


def test_rates_scale_with_the_batch_size():
    run = Run()
    run.steps(*PLATEAU, 2.3, math.nan)
    run.guard.rescale(3.0)
    assert run.guard.peak == 0.75
    run.step(2.3, norm=2.0)
    assert run.guard.peak == pytest.approx(0.375, rel=1e-6)


@pytest.mark.parametrize("cut", [3, 6, 9, 13, 14, 15, 16, 18, 20])
def test_the_state_goes_round_at_any_time(cut):
    losses = [*PLATEAU, 2.3, math.nan, 2.3, 9.0, 2.3, 2.0, *[2.05] * 5, math.nan, *[2.3] * 3, 1.9]
    losses += [1.9, math.nan, math.nan, 1.9]

    def step(run, number):
        loss = losses[number]
        event = run.step(loss, norm=1.0 + number % 5 + loss if math.isfinite(loss) else 1.0)
        if event == "recovered":
            run.guard.limited(0.5)
        return event

    one, two = Run(), Run()
    for number in range(cut):
        step(one, number)
    file = io.BytesIO()
    parts = (one.model, one.optimizer, one.guard)
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    for part, state in zip((two.model, two.optimizer, two.guard), states, strict=True):
        part.load_state_dict(state)
    for number in range(cut, len(losses)):
        assert step(one, number) == step(two, number)
        assert (one.weight, one.guard.peak) == (two.weight, two.guard.peak)
