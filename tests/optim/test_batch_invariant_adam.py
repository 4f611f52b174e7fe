import copy
import itertools

import pytest
import torch
from torch import nn

from batchlr import BatchInvariantAdam

LR, BETAS, EPS, DECAY = 0.01, (0.9, 0.99), 1e-8, 0.1


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator))
        for _ in range(count)
    ]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def loss(model, batch):
    inputs, targets = (part.double() for part in batch)
    return (model(inputs) - targets).square().mean()


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def step(model, optimizer, micro_batches):
    optimizer.zero_grad()
    for batch in micro_batches:
        (loss(model, batch) / len(micro_batches)).backward()
        optimizer.accumulate()
    optimizer.step()


def gradients(model, batch):
    return torch.autograd.grad(loss(model, batch), list(model.parameters()))


@pytest.mark.parametrize("accumulates", [True, False])
def test_one_micro_batch_a_step_is_adamw(accumulates):
    ours, theirs = network(), network()
    options = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    optimizer = BatchInvariantAdam(ours.parameters(), **options)
    adamw = torch.optim.AdamW(theirs.parameters(), **options)
    for batch in batches(20):
        if accumulates:
            step(ours, optimizer, [batch])
        else:
            optimizer.zero_grad()
            loss(ours, batch).backward()
            optimizer.step()
        adamw.zero_grad()
        loss(theirs, batch).backward()
        adamw.step()
    torch.testing.assert_close(flat(ours.parameters()), flat(theirs.parameters()))


def test_two_steps_of_four_micro_batches_by_the_paper():
    model = network()
    optimizer = BatchInvariantAdam(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY
    )
    reference = copy.deepcopy(model)
    first, second = torch.zeros(1).double(), torch.zeros(1).double()
    parts = batches(8)
    for number, part in enumerate((parts[:4], parts[4:]), start=1):
        own = torch.stack([flat(gradients(reference, batch)) for batch in part])
        beta1, beta2 = (beta**4 for beta in BETAS)
        first = beta1 * first + (1 - beta1) * own.mean(0)
        second = beta2 * second + (1 - beta2) * own.square().mean(0)
        root = (second / (1 - beta2**number)).sqrt() + EPS
        weights = flat(reference.parameters()) * (1 - LR * DECAY) ** 4
        weights = weights - 4 * LR * first / (1 - beta1**number) / root
        nn.utils.vector_to_parameters(weights, reference.parameters())
        step(model, optimizer, part)
    torch.testing.assert_close(flat(model.parameters()), flat(reference.parameters()))


@pytest.mark.parametrize("noise", [0.0, 1.0, 30.0])
def test_as_many_samples_travel_as_far_in_steps_of_any_size(noise):
    """On a slope of 1: the same distance after 4,096 micro-batches, whatever dominates."""

    def distance(count, adam):
        generator = torch.Generator().manual_seed(1)
        weight = nn.Parameter(torch.zeros(200))
        micro = 1e-4
        if adam:  # by the linear rule, with the averages' memory in samples kept
            betas = tuple(beta**count for beta in (0.9, 0.999))
            optimizer = torch.optim.Adam([weight], lr=micro * count, betas=betas)
        else:
            optimizer = BatchInvariantAdam([weight], lr=micro)
        for _ in range(4096 // count):
            optimizer.zero_grad()
            for _ in range(count):
                slope = 1 + noise * torch.randn(200, generator=generator)
                (slope @ weight / count).backward()
                if not adam:
                    optimizer.accumulate()
            optimizer.step()
        return -weight.mean().item()

    single = distance(1, adam=False)
    assert distance(32, adam=False) == pytest.approx(single, rel=0.03 if noise < 10 else 0.1)
    if noise == 30.0:  # noise dominates: Adam's line overshoots by about sqrt(32)
        assert distance(32, adam=True) > 3 * single


def test_what_is_clipped_is_the_mean_and_not_the_squares():
    model = network()
    optimizer = BatchInvariantAdam(model.parameters(), lr=LR)
    batch = batches(1)[0]
    squares = flat(gradients(model, batch)).square()
    loss(model, batch).backward()
    optimizer.accumulate()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    kept = flat(optimizer.state[p]["exp_avg_sq"] for p in model.parameters())
    torch.testing.assert_close(kept, 0.001 * squares)


def test_a_dropped_step_leaves_nothing_behind():
    model, other = network(), network()
    left, right = (BatchInvariantAdam(net.parameters(), lr=LR) for net in (model, other))
    odd, *rest = batches(3)
    loss(model, odd).backward()
    left.accumulate()
    step(model, left, rest)
    step(other, right, rest)
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))


def test_a_parameter_unused_in_some_micro_batches_has_a_gradient_of_zero_there():
    used, sometimes = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = BatchInvariantAdam([used, sometimes], lr=LR, betas=(0.0, 0.0))
    (used / 2).sum().backward()
    optimizer.accumulate()
    ((used + 2 * sometimes) / 2).sum().backward()
    optimizer.accumulate()
    optimizer.step()
    assert optimizer.state[sometimes]["exp_avg_sq"].item() == pytest.approx((0 + 2**2) / 2)


def test_a_saved_state_goes_on_identically():
    parts = [batches(2, seed) for seed in range(4)]
    whole = network()
    optimizer = BatchInvariantAdam(whole.parameters(), lr=LR)
    for part in parts[:2]:
        step(whole, optimizer, part)
    again = copy.deepcopy(whole)
    restored = BatchInvariantAdam(again.parameters(), lr=1.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for part, (model, algorithm) in itertools.product(
        parts[2:], [(whole, optimizer), (again, restored)]
    ):
        step(model, algorithm, part)
    assert torch.equal(flat(whole.parameters()), flat(again.parameters()))


def test_a_copy_steps_and_forgets_what_was_noted():
    model = network()
    optimizer = BatchInvariantAdam(model.parameters(), lr=LR)
    odd, *rest = batches(3)
    loss(model, odd).backward()
    optimizer.accumulate()
    twin, algorithm = copy.deepcopy((model, optimizer))
    (loss(twin, rest[0])).backward()
    algorithm.step()  # without accumulate(): of one micro-batch
    step(model, optimizer, rest[:1])
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def test_groups_keep_their_own_settings():
    fast, still = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = BatchInvariantAdam([{"params": [fast]}, {"params": [still], "lr": 0.0}], lr=LR)
    (fast + still).sum().backward()
    optimizer.step()
    assert fast.item() == pytest.approx(1 - LR)
    assert still.item() == 1.0


def test_a_closure_is_run_and_its_loss_returned():
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = BatchInvariantAdam([weight], lr=LR)

    def closure():
        optimizer.zero_grad()
        found = weight.square().sum()
        found.backward()
        return found.item()

    assert optimizer.step(closure) == 4.0
    assert weight.item() == pytest.approx(2 - LR)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr must be finite and at least 0, got -1.0"),
        ({"eps": float("inf")}, "eps must be finite and at least 0, got inf"),
        ({"weight_decay": float("nan")}, "weight_decay must be finite and at least 0, got nan"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_illegal_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        BatchInvariantAdam([nn.Parameter(torch.ones(1))], **options)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(3, 2, sparse=True)
    optimizer = BatchInvariantAdam(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.accumulate()
