"""Losses along a step: parabolas in closed form, the stationary half, and what stays untouched."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call

from batchlr import HessianOperator, supervised
from batchlr.loss_probe import LossProbe, mean_vertex
from cases import conv_net
from two_processes import needs_fully_shard

CROSS_ENTROPY = supervised(nn.CrossEntropyLoss())
DOUBLE = torch.float64


class Valley(nn.Module):
    """Weights ``(runs, 5)`` in ``(w - c)' H (w - c) / 2``, a batch being ``c`` and ``H``."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights, dtype=DOUBLE))

    def forward(self, batch):
        away = self.weights - batch[0]
        return 0.5 * (away @ batch[1] * away).sum()


def run(model, batch):
    return model(batch)


def hessian(curvatures, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = len(curvatures)
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=DOUBLE)).Q
    return turn @ torch.diag(torch.tensor(curvatures, dtype=DOUBLE)) @ turn.T


def step_and_probe(probe, model, optimizer, batch, held_out, loss_fn=run):
    optimizer.zero_grad()
    loss_fn(model, batch).backward()
    probe.take(model)
    optimizer.step()
    return probe.measure(model, batch, held_out)


def test_on_a_quadratic_the_vertices_are_exact():
    own, other = hessian([0.1, 0.5, 1.0, 2.0, 5.0]), hessian([0.2, 0.3, 1.0, 1.0, 4.0], seed=1)
    start = torch.arange(1.0, 6.0, dtype=DOUBLE)
    centre = -torch.ones(5, dtype=DOUBLE)
    model, lr = Valley(start.tolist()), 0.03
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    found = step_and_probe(
        LossProbe(run), model, optimizer, (torch.zeros(5, dtype=DOUBLE), own), (centre, other)
    )
    g = own @ start
    step = -lr * g
    assert found.own.vertex == pytest.approx(float(g @ g / (lr * (g @ own @ g))), rel=1e-10)
    slope, curvature = float((start - centre) @ other @ step), float(step @ other @ step)
    assert found.held_out.vertex == pytest.approx(-slope / curvature, rel=1e-10)
    assert found.held_out.slope == pytest.approx(slope, rel=1e-9)
    assert found.held_out.curvature == pytest.approx(curvature, rel=1e-9)
    for line in (found.own, found.held_out):
        assert line.r_squared == pytest.approx(1.0, abs=1e-12)
        assert line.residual < 1e-12 * abs(line.slope)
        assert line.level == pytest.approx(line.losses[0], rel=1e-12)


STATIONARY = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8),
    "adam": lambda p: torch.optim.Adam(p, lr=0.2, betas=(0.9, 0.95)),
}


def stationary_vertex(name, *, fresh):
    """Of 60 steps with curvatures 0.1 to 5 and noise along other axes, 400 runs side by side.

    Held out is a ``fresh`` batch, or the expected loss.
    """
    generator = torch.Generator().manual_seed(3)
    curvature = hessian([0.1, 0.5, 1.0, 2.0, 5.0])
    mixing = torch.randn(5, 5, generator=generator, dtype=DOUBLE) / 2

    def draw():
        return torch.randn(400, 5, generator=generator, dtype=DOUBLE) @ mixing.T, curvature

    model = Valley([[0.0] * 5] * 400)
    optimizer = STATIONARY[name](model.parameters())
    for _ in range(600):
        optimizer.zero_grad()
        run(model, draw()).backward()
        optimizer.step()
    probe, found = LossProbe(run), []
    for _ in range(60):
        held_out = draw() if fresh else (torch.zeros(5, dtype=DOUBLE), curvature)
        found.append(step_and_probe(probe, model, optimizer, draw(), held_out).held_out)
    return mean_vertex(found)


@pytest.mark.parametrize("name", STATIONARY)
def test_held_out_vertices_are_one_half_where_training_stands_still(name):
    assert stationary_vertex(name, fresh=False) == pytest.approx(0.5, abs=0.01)


def test_fresh_batches_find_the_half_within_their_error():
    vertex = stationary_vertex("sgd", fresh=True)
    assert vertex.stderr < 0.01
    assert vertex == pytest.approx(0.5, abs=4 * vertex.stderr)


def small_net(**options):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(**{"dtype": DOUBLE} | options)


def points(seed, dtype=DOUBLE):
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def test_the_own_vertex_of_a_network_is_its_gradient_s_sharpness():
    model, lr, batch = small_net(), 1e-3, points(0)
    operator = HessianOperator(model, CROSS_ENTROPY, [batch])
    (gradient,) = operator.batch_gradients()
    sharpness = float(gradient @ (operator @ gradient) / (gradient @ gradient))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    found = step_and_probe(
        LossProbe(CROSS_ENTROPY), model, optimizer, batch, points(1), CROSS_ENTROPY
    )
    assert found.own.vertex == pytest.approx(1 / (lr * sharpness), rel=0.01)  # third order: lr


def test_losses_are_those_of_the_weights_between_and_beyond():
    model = small_net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    multiples = (-1.0, 0.0, 0.25, 1.0, 3.0)
    probe = LossProbe(CROSS_ENTROPY, multiples=multiples)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    found = step_and_probe(probe, model, optimizer, points(0), points(1), CROSS_ENTROPY)
    for line, (x, y) in ((found.own, points(0)), (found.held_out, points(1))):
        assert line.multiples == multiples
        for multiple, loss in zip(multiples, line.losses, strict=True):
            weights = {
                n: w + multiple * (p - w)
                for (n, p), w in zip(model.named_parameters(), before.values(), strict=True)
            }
            with torch.no_grad():
                want = nn.functional.cross_entropy(functional_call(model, weights, (x,)), y)
            assert loss == pytest.approx(float(want), rel=1e-12)
        assert line.losses[3] == float(CROSS_ENTROPY(model, (x, y)).detach())  # to the bit
        want = np.polynomial.Polynomial.fit(multiples, line.losses, 2).convert().coef
        assert (line.level, line.slope, line.curvature / 2) == pytest.approx(want, rel=1e-8)


def images(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 1, 8, 8, generator=generator), torch.arange(6) % 4


def everything(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: t.detach().numpy().tobytes() for name, t in tensors.items()},
        {name: p.grad.numpy().tobytes() for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: (id(t), t.requires_grad) for name, t in tensors.items()},
        torch.get_rng_state().numpy().tobytes(),
    )


@pytest.mark.parametrize("norm_mode", ["train", "eval"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_state_are_bit_identical(norm_mode, training):
    model = conv_net().train(training)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    probe = LossProbe(CROSS_ENTROPY, norm_mode=norm_mode)
    CROSS_ENTROPY(model, images(0)).backward()
    before = everything(model)
    probe.take(model)
    assert everything(model) == before
    optimizer.step()
    before = everything(model)
    with torch.no_grad():
        found = probe.measure(model, images(0), images(1))
    assert math.isfinite(found.own.vertex)
    assert everything(model) == before


def test_norms_take_each_batchs_statistics_or_the_running_ones():
    lines = {}
    for norm_mode in ("train", "eval"):
        model = conv_net().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = LossProbe(CROSS_ENTROPY, norm_mode=norm_mode)
        found = step_and_probe(probe, model, optimizer, images(0), images(1), CROSS_ENTROPY)
        model[1].train(norm_mode == "train")  # dropout stays off
        want = float(CROSS_ENTROPY(model, images(1)).detach())
        assert found.held_out.losses[2] == pytest.approx(want, rel=1e-6)
        lines[norm_mode] = found.held_out.losses
    assert lines["train"][2] != pytest.approx(lines["eval"][2], rel=1e-3)


ROUNDING = 1e-12  # float64; older torch adds up in an order that depends on where tensors lie


def losses_of(found):
    return *found.own.losses, *found.held_out.losses


def test_dropout_draws_one_mask_for_all_losses_of_a_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = supervised(nn.MSELoss())
    batch = torch.randn(8, 6, dtype=DOUBLE), torch.randn(8, 1, dtype=DOUBLE)

    def measured(generator=None):
        probe = LossProbe(loss_fn, generator=generator)
        probe.take(start := nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 1)).double())
        return probe.measure(model, batch, batch), start

    loss_fn(model, batch).backward()
    optimizer.step()
    torch.manual_seed(1)
    found, _ = measured()
    # One mask leaves linear regression, whose loss is a parabola; several do not.
    assert found.own.r_squared == pytest.approx(1.0, abs=1e-10)
    assert found.held_out.r_squared == pytest.approx(1.0, abs=1e-10)
    assert found.own.losses != found.held_out.losses  # the same batch under two masks
    torch.manual_seed(1)
    assert losses_of(measured()[0]) == pytest.approx(losses_of(found), rel=ROUNDING)
    torch.manual_seed(1)
    other = measured(torch.Generator().manual_seed(5))[0]
    assert losses_of(other) != pytest.approx(losses_of(found), rel=1e-3)


def cubic(model, batch):
    return (model.weights**3 * batch).sum()


def test_what_is_no_parabola_says_so():
    model = Valley([1.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    batch = torch.ones(1, dtype=DOUBLE)
    found = step_and_probe(LossProbe(cubic), model, optimizer, batch, batch, cubic).own
    x = np.array(found.multiples)
    losses = (1 - 0.9 * x) ** 3
    missed = losses - np.polyval(np.polyfit(x, losses, 2), x)
    assert found.residual == pytest.approx(math.sqrt((missed**2).sum() / 2), rel=1e-9)
    variation = ((losses - losses.mean()) ** 2).sum()
    assert found.r_squared == pytest.approx(1 - (missed**2).sum() / variation, rel=1e-9)
    assert found.r_squared < 0.999


def test_what_is_curved_down_has_no_vertex():
    model = Valley([1.0])
    down = torch.zeros(1, dtype=DOUBLE), -torch.ones(1, 1, dtype=DOUBLE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = step_and_probe(LossProbe(run), model, optimizer, down, down)
    assert found.own.curvature < 0
    assert math.isnan(found.own.vertex)
    assert math.isnan(mean_vertex([found.own, found.own]))


def test_a_step_that_goes_nowhere_measures_nothing():
    model = small_net()
    probe = LossProbe(CROSS_ENTROPY)
    probe.take(model)
    found = probe.measure(model, points(0), points(1))
    assert (found.own.slope, found.own.curvature, found.own.residual) == (0.0, 0.0, 0.0)
    assert math.isnan(found.own.vertex)
    assert math.isnan(found.own.r_squared)


def test_the_mean_vertex_is_that_of_the_mean_losses():
    steps = [
        SimpleNamespace(slope=s, curvature=c) for s, c in ((-1.0, 2.0), (-3.0, 4.0), (1.0, 1.0))
    ]
    vertex = mean_vertex(steps)
    assert vertex == pytest.approx(3 / 7)
    influences = np.array([1 - 3 / 7 * 2, 3 - 3 / 7 * 4, -1 - 3 / 7])
    assert vertex.stderr == pytest.approx(
        influences.std(ddof=1) / math.sqrt(3) / (7 / 3), rel=1e-12
    )
    with pytest.raises(ValueError, match="parabolas is empty; give those of at least one step"):
        mean_vertex([])


@needs_fully_shard
def test_sharded_and_wrapped_models_are_measured_as_ordinary_ones(alone):
    batch, held_out = points(0), points(1)

    def probed(wrap):
        model = wrap(small_net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        return step_and_probe(
            LossProbe(CROSS_ENTROPY), model, optimizer, batch, held_out, CROSS_ENTROPY
        )

    plain = pytest.approx(losses_of(probed(lambda model: model)), rel=ROUNDING)
    assert losses_of(probed(fully_shard)) == plain
    assert losses_of(probed(nn.parallel.DistributedDataParallel)) == plain


# --- the caller's mistakes -----------------------------------------------------------------------


def test_a_parabola_needs_four_multiples():
    for multiples in ((0.0, 0.5, 1.0), (0.0, 0.5, 1.0, 1.0), (0.0, 0.5, 1.0, math.inf)):
        with pytest.raises(ValueError, match="multiples must be at least four different finite"):
            LossProbe(run, multiples=multiples)


def test_a_criterion_in_place_of_a_loss_is_refused():
    with pytest.raises(TypeError, match=r"CrossEntropyLoss, .* batchlr\.supervised\(criterion\)"):
        LossProbe(nn.CrossEntropyLoss())


def test_the_weights_must_have_been_taken():
    model, probe = small_net(), LossProbe(CROSS_ENTROPY)
    with pytest.raises(ValueError, match=r"not those taken: call take\(model\) before the step"):
        probe.measure(model, points(0), points(1))
    probe.take(model)
    with pytest.raises(ValueError, match="not those taken"):
        probe.measure(nn.Linear(6, 3).double(), points(0), points(1))


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match=r"weight '0\.weight' is in bfloat16, whose rounding"):
        LossProbe(CROSS_ENTROPY).take(small_net(dtype=torch.bfloat16))
    probe, model = LossProbe(lambda m, b: CROSS_ENTROPY(m, b).half()), small_net()
    probe.take(model)
    with pytest.raises(ValueError, match=r"the loss is in float16, .* a copy of the model in fl"):
        probe.measure(model, points(0), points(1))


def test_losses_are_scalars_and_finite():
    model = small_net()
    probe = LossProbe(lambda m, b: m(b[0]))
    probe.take(model)
    with pytest.raises(ValueError, match=r"must be a scalar, got shape \(12, 3\): take its mean"):
        probe.measure(model, points(0), points(1))
    steep = Valley([1.0])
    probe = LossProbe(run, multiples=(0, 1, 2, 1e200))
    wide = torch.zeros(1, dtype=DOUBLE), torch.ones(1, 1, dtype=DOUBLE)
    with pytest.raises(ArithmeticError, match=r"own losses along the step .* inf at 1e\+200"):
        step_and_probe(probe, steep, torch.optim.SGD(steep.parameters(), lr=0.5), wide, wide)


def test_norm_modes_are_two():
    model, probe = conv_net(), LossProbe(CROSS_ENTROPY, norm_mode="both")
    probe.take(model)
    with pytest.raises(ValueError, match="norm_mode must be 'train' or 'eval', got 'both'"):
        probe.measure(model, images(0), images(1))


def test_results_are_frozen():
    model, probe = small_net(), LossProbe(CROSS_ENTROPY)
    probe.take(model)
    found = probe.measure(model, points(0), points(1))
    with pytest.raises(AttributeError, match="cannot assign"):
        found.own = found.held_out
    with pytest.raises(AttributeError, match="cannot assign"):
        found.own.slope = 0.0
