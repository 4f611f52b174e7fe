"""One update of the weights: a batch becomes a gradient, part by part, and that a step."""

from dataclasses import replace

import torch
from torch import Tensor

from batchlr.gradients.group_gradients import GroupGradients
from batchlr.training.data import Batch
from batchlr.training.distributed import averaging
from batchlr.training.experiment import Experiment


def update_weights(experiment: Experiment, batch: Batch, *, read: bool) -> Tensor:
    """Forward, backward and step; returns the mean loss ``()``, on the device.

    Args:
        experiment: whose weights.
        batch: this process's share. It goes through the network in parts, whose gradients add up.
        read: show `Experiment.adaptive`, which is there then, how the parts' gradients differ.
    """
    config, optimizer = experiment.config, experiment.optimizer
    groups = GroupGradients(experiment.model.parameters()) if read else None
    optimizer.zero_grad(set_to_none=True)
    loss = _backward(experiment, batch, groups)
    if groups is not None:
        _read_noise(experiment, groups)
    if config.train.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(experiment.model.parameters(), config.train.clip_norm)
    optimizer.step()
    return experiment.processes.sum(loss) / experiment.processes.world_size


def _backward(experiment: Experiment, batch: Batch, groups: GroupGradients | None) -> Tensor:
    """Gradients of the batch's mean loss, which is returned, detached.

    Processes average theirs with the last part; where they are compared (``groups``) only if no
    process has a gradient of its own anyway.
    """
    size = experiment.part_size(read=groups is not None)
    images, labels = experiment.arranged(batch[0]), batch[1]
    parts = list(zip(torch.split(images, size), torch.split(labels, size), strict=True))
    half = experiment.config.train.precision == "bf16"
    total = torch.zeros((), device=experiment.device)
    for number, part in enumerate(parts, start=1):
        now = number == len(parts) if groups is None else experiment.processes.shards
        with averaging(experiment.parallel, now=now):
            with torch.autocast(experiment.device.type, dtype=torch.bfloat16, enabled=half):
                loss = experiment.loss_fn(experiment.parallel, part) / len(parts)
            loss.backward()  # type: ignore[no-untyped-call]
        if groups is not None:
            groups.add()
        total += loss.detach()
    return total


def _read_noise(experiment: Experiment, groups: GroupGradients) -> None:
    """Show the noise between groups, then average the gradients over the processes they are of."""
    together, adaptive = experiment.processes, experiment.adaptive
    assert adaptive is not None
    own = together.world_size > 1 and not together.shards
    if own:
        gradients = (p.grad for p in experiment.model.parameters())
        together.average(gradient for gradient in gradients if gradient is not None)
    scatter = groups.scatter(
        experiment.batch_size,
        dataset_size=len(experiment.data.train),
        total=together.sum if own else None,
    )
    if (same := experiment.same) is not None:
        norm, trace = same(scatter.square_norm), same(scatter.trace)
        scatter = replace(scatter, square_norm=norm, trace=trace)
    adaptive.observe(scatter)
