"""What two processes with a model sharded by `fully_shard` find, beside what one finds alone.

Started twice by `operators/test_unsharded.py`; each process leaves a JSON file of its findings.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, Optimizer, RMSprop

import batchlr
from batchlr.measurement.optimizer_state import rate_ratios, second_moments
from batchlr.on_the_fly.collapse import _signs
from batchlr.on_the_fly.relative_update import RelativeUpdate
from batchlr.on_the_fly.update_curvature import update_curvature
from batchlr.sharded_tensors import gathered, norms_of_whole

LOSS = batchlr.supervised(nn.CrossEntropyLoss())
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p, lr=0.1: SGD(p, lr=lr, momentum=0.9),
    "adam": lambda p, lr=0.01: Adam(p, lr=lr),
    "rmsprop": lambda p, lr=0.01: RMSprop(p, lr=lr, centered=True),
}


def network() -> nn.Sequential:
    """Of layers that two processes cannot halve: 16, 1 and 3 rows."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1), nn.Linear(1, 3)]
    return nn.Sequential(*layers).double()


def sharded(**options: Any) -> nn.Sequential:
    model = network()
    fully_shard(model[0], **options)
    return fully_shard(model, **options)


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draws = range(count)
    inputs = [torch.randn(16, 8, generator=generator, dtype=torch.float64) for _ in draws]
    return [(x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()) for x in inputs]


def step(model: nn.Module, optimizer: Optimizer, batch: Any) -> Tensor:
    optimizer.zero_grad()
    loss: Tensor = LOSS(model, batch)
    loss.backward()
    optimizer.step()
    return loss.detach()


def trained(model: nn.Module, kind: str) -> Optimizer:
    optimizer = OPTIMIZERS[kind](model.parameters())
    for batch in batches(3):
        step(model, optimizer, batch)
    return optimizer


def same(value: float) -> float:
    holder = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(holder, src=0)
    return float(holder)


def evaluate(model: nn.Module) -> None:
    """A pass after which FSDP leaves the root's weights gathered."""
    with torch.no_grad():
        LOSS(model, batches(1)[0])


def weights(model: nn.Module) -> list[Tensor]:
    return [gathered(p.detach()).clone() for p in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def pair(measure: Callable[..., Any], kind: str | None = None, **options: Any) -> dict[str, Any]:
    """``measure(model, optimizer)`` of the sharded and of the whole network."""
    found = []
    for model in (sharded(**options), network()):
        optimizer = None if kind is None else trained(model, kind)
        found.append(measure(model, optimizer))
    return {"found": found[0], "expected": found[1]}


def report(matrix: str, name: str) -> Callable[[nn.Module, Optimizer], list[float]]:
    def measure(model: nn.Module, optimizer: Optimizer) -> list[float]:
        found = batchlr.measure_curvature(
            model, LOSS, batches(), optimizer=optimizer, matrix=matrix, dataset_size=1000
        )
        bound = found.max_lr(16, optimizer=name)
        return [float(found.largest), bound.value, found.loss, found.gradient_norm]

    return measure


def followed(model: nn.Module, optimizer: Optimizer | None) -> list[float]:
    tracker = batchlr.CurvatureTracker(with_noise=True)
    kind = "sgd" if optimizer is None else optimizer
    found = batchlr.track_curvature(tracker, model, LOSS, batches(), optimizer=kind)
    return [float(found.largest), found.loss]


def probes(model: nn.Module, optimizer: Optimizer) -> list[float]:
    """Everything else that measures."""
    sharpness = batchlr.batch_sharpness(model, LOSS, batches())
    with batchlr.unsharded(model):
        operator = batchlr.HessianOperator(model, LOSS, batches())
        along = update_curvature(model, operator, optimizer)
        layers = batchlr.layer_eigenpairs(operator)
    return [
        float(sharpness.value),
        along.slope,
        along.curvature,
        *followed(model, optimizer),
        *(float(pairs.values[0]) for pairs in layers.values()),
    ]


def groups(model: nn.Module, _: Any) -> list[float]:
    """Rates of groups, and an average that only some parameters have."""
    first, *rest = list(model.parameters())
    optimizer = Adam([{"params": [first], "lr": 0.1}, {"params": rest, "lr": 0.02}])
    step(model, optimizer, batches(1)[0])
    with batchlr.unsharded(model):
        ratios, moments = rate_ratios(model, optimizer), second_moments(model, optimizer)
    assert ratios is not None
    assert moments is not None
    return [*ratios.tolist(), *moments.average.tolist()]


def accumulated(model: nn.Module, _: Any) -> list[float]:
    """Norm and noise of a gradient that every pass adds to, averaged over processes."""
    noise = batchlr.GroupGradients(model.parameters())
    for batch in batches():
        (LOSS(model, batch) / 4).backward()
        noise.add()
    scatter = noise.scatter(64)
    return [scatter.square_norm, scatter.trace]


def adagrad_norm(model: nn.Module, _: Any) -> list[float]:
    """Sums of weights after steps at one rate for all of them."""
    optimizer = batchlr.AdaGradNorm(model.parameters(), 0.5, weight_decay=0.1)
    for batch in batches():
        step(model, optimizer, batch)
    return [float(weight.sum()) for weight in weights(model)]


def norms(model: nn.Module, _: Any) -> list[float]:
    """Of gradients and relative changes; the last is that of a tensor no process shares."""
    update = RelativeUpdate()
    update.take(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    loss = step(model, optimizer, batches(1)[0])
    change = update.measure(model)
    gradients = [p.grad for p in model.parameters()]
    signs = _signs(loss, gradients, change)
    gradients[0].zero_()
    return [*signs.tolist(), *_signs(loss, [*gradients, torch.ones(4)], None).tolist()]


class Tied(nn.Module):
    """A weight used twice, one that stays whole, one frozen, and a method run like `forward`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Linear(8, 8, dtype=torch.float64) for _ in range(2))
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.head = nn.Linear(8, 3, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def features(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(inputs))))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * self.head(self.features(inputs))


def tied() -> dict[str, Any]:
    found = []
    for is_sharded in (True, False):
        model = Tied()
        if is_sharded:
            fully_shard([model.first, model.second])
            fully_shard(model, ignored_params={model.scale})
            register_fsdp_forward_method(model, "features")
        LOSS(model, batches(1)[0]).backward()

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            """Through the registered method as well."""
            return LOSS(model, batch) + model.features(batch[0]).square().mean()

        result = batchlr.measure_curvature(model, loss_fn, batches())
        found.append([float(result.largest), float(result.smallest), result.num_params])
    return {"found": found[0], "expected": found[1]}


def untouched() -> dict[str, bool]:
    """Whether training goes on as if nothing had been measured, though once the loss failed."""
    plain, measured = sharded(), sharded()
    optimizers = [Adam(model.parameters(), lr=0.01) for model in (plain, measured)]

    def failing(model: nn.Module, batch: Any) -> Tensor:
        raise KeyError(type(model[0].weight).__name__)

    def hooks() -> list[list[int]]:
        modules = list(measured.modules())
        return [
            list(map(id, {**m._forward_hooks, **m._forward_pre_hooks}.values())) for m in modules
        ]

    before, parameters = hooks(), list(measured.parameters())
    raised = ""
    for number, batch in enumerate(batches()):
        if number == 2:
            try:
                batchlr.measure_curvature(measured, failing, batches())
            except KeyError as error:
                raised = error.args[0]
            evaluate(measured)
            gathered_by_root = not isinstance(measured[2].weight, DTensor)
        batchlr.measure_curvature(measured, LOSS, batches(), optimizer=optimizers[1])
        for model, optimizer in zip((plain, measured), optimizers, strict=True):
            step(model, optimizer, batch)
    return {
        "loss_fn saw whole weights": raised == "Parameter",
        "root had gathered": gathered_by_root,
        "hooks are back": hooks() == before and any(before),
        "weights are sharded": all(isinstance(p, DTensor) for p in measured.parameters()),
        "weights are the same objects": list(map(id, measured.parameters()))
        == list(map(id, parameters)),
        "steps are the same": equal(weights(plain), weights(measured)),
        "gradients are sharded": all(isinstance(p.grad, DTensor) for p in measured.parameters()),
    }


def half(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of the batch, this process's."""
    inputs, targets = batch
    return inputs.chunk(2)[dist.get_rank()], targets.chunk(2)[dist.get_rank()]


def steered(model: nn.Module, kind: str, steps: int = 20) -> dict[str, Any]:
    """Rates that a controller sets, from the losses of all processes on their halves."""
    alone = not isinstance(next(model.parameters()), DTensor)
    optimizer = OPTIMIZERS[kind](model.parameters(), 1.0)
    scheduler = batchlr.BatchAwareLR(optimizer, peak=1.0)
    controller = batchlr.CurvatureController(
        scheduler, LOSS, total_steps=steps, batch_size=16, dataset_size=1000
    )
    rates, losses = [], []
    data = batches(steps)
    for number in range(steps):
        if controller.maybe_update(model, data[:4], same) is not None:
            controller.agree(same)
        rates.append(optimizer.param_groups[0]["lr"])
        loss = step(model, optimizer, data[number] if alone else half(data[number]))
        if not alone:
            dist.all_reduce(loss)
            loss /= 2
        scheduler.step()
        controller.observe(loss, same)
        losses.append(float(loss))
    return {"rates": rates, "losses": losses}


def controlled(kind: str) -> dict[str, Any]:
    return {"found": steered(sharded(), kind), "expected": steered(network(), kind)}


def rolled_back(kind: str) -> dict[str, Any]:
    """Rates far too high until the network is lost."""
    model = sharded()
    optimizer = OPTIMIZERS[kind](model.parameters(), 1.0)
    scheduler = batchlr.BatchAwareLR(optimizer, peak=1.0)
    controller = batchlr.CurvatureController(scheduler, LOSS, total_steps=100, batch_size=16)
    start, events = weights(model), []
    moved = False
    for batch in batches(12):
        evaluate(model)
        if controller.maybe_update(model, batches(), same) is not None:
            controller.agree(same)
        scheduler.set_peak(1e4)
        loss = step(model, optimizer, batch)
        scheduler.step()
        moved = moved or not equal(weights(model), start)
        events.append(controller.observe(loss, same))
        if events[-1] == "undone":
            break
    return {
        "events": events,
        "moved": moved,
        "back": equal(weights(model), start),
        "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
        "state": len(optimizer.state),
        "goes on": math.isfinite(float(step(model, optimizer, batches(1)[0]))),
    }


def resumed(folder: Path) -> dict[str, Any]:
    """A controller's state through a file of this process's own."""
    model = sharded()
    optimizer = trained(model, "adam")
    scheduler = batchlr.BatchAwareLR(optimizer, peak=1.0)
    controller = batchlr.CurvatureController(scheduler, LOSS, total_steps=100, batch_size=16)
    controller.maybe_update(model, batches(), same)
    path = folder / f"controller-{dist.get_rank()}.pt"
    torch.save(controller.state_dict(), path)
    kept = weights(model)
    other = batchlr.CurvatureController(scheduler, LOSS, total_steps=100, batch_size=16)
    other.load_state_dict(torch.load(path))
    other.watch(model)
    step(model, optimizer, batches(1)[0])
    moments = [gathered(s["exp_avg"]).clone() for s in optimizer.state.values()]
    optimizer.state.clear()
    evaluate(model)
    event = other.rescue(same, lost=True)
    back = [gathered(s["exp_avg"]) for s in optimizer.state.values()]
    return {
        "event": event,
        "back": equal(weights(model), kept),
        "state is sharded": all(
            isinstance(s["exp_avg"], DTensor) for s in optimizer.state.values()
        ),
        "state is older": len(back) == len(moments) and not equal(back, moments),
    }


def replicated() -> dict[str, Any]:
    """Norms where one dimension of the mesh holds copies, and each process computes all."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(network(), mesh=mesh)
    parameters = list(model.parameters())
    parts = [p.to_local().detach().norm() for p in parameters]
    found = [float(norm) for norm in norms_of_whole(parts, parameters)]
    return {"found": found, "expected": [float(p.detach().norm()) for p in network().parameters()]}


def findings(folder: Path) -> dict[str, Any]:
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=False)
    return {
        "hessian, sgd": pair(report("hessian", "sgd"), "sgd"),
        "ggn, sgd": pair(report("ggn", "sgd"), "sgd"),
        "hessian, adam": pair(report("hessian", "adam"), "adam"),
        "ggn, adam": pair(report("ggn", "adam"), "adam"),
        "hessian, rmsprop": pair(report("hessian", "rmsprop"), "rmsprop"),
        "probes": pair(probes, "adam"),
        "groups": pair(groups),
        "norms": pair(norms),
        "accumulated": pair(accumulated),
        "adagrad norm": pair(adagrad_norm),
        "tied": tied(),
        "half precision": pair(followed, mp_policy=low),
        "offloaded": pair(followed, "adam", offload_policy=offload),
        "gathered for good": pair(followed, "adam", reshard_after_forward=False),
        "replicated": replicated(),
        "untouched": untouched(),
        "controlled, sgd": controlled("sgd"),
        "controlled, adam": controlled("adam"),
        "rolled back, sgd": rolled_back("sgd"),
        "rolled back, adam": rolled_back("adam"),
        "resumed": resumed(folder),
    }


if __name__ == "__main__":
    target, rank = Path(sys.argv[1]), int(sys.argv[2])
    meeting = f"file://{target / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    (target / f"rank-{rank}.json").write_text(json.dumps(findings(target)))
    dist.destroy_process_group()
