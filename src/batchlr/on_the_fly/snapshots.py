"""A copy of everything an optimizer step changes, to go back to."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, final

import torch
from torch import Tensor, nn

from batchlr.sharded_tensors import local_part, sharded_like


@final
class Snapshot:
    """Weights, buffers and optimizer state of one moment, on their own devices.

    Rates, momentum, schedules, random states and data are not in it: a step undone is not made
    again. Memory is taken once: weights and buffers, and what the optimizer keeps beside them (as
    much again with SGD's momentum, twice as much with Adam); of sharded ones, this process's parts.
    Costs a copy, and no synchronisation.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._values: dict[str, Any] = {}  # what an optimizer keeps that is no tensor

    def take(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Remember the present."""
        state = _optimizer_state(optimizer)
        self._values = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
        now = _model_tensors(model) | {k: v for k, v in state.items() if isinstance(v, Tensor)}
        if self._tensors.keys() == now.keys() and all(
            _alike(self._tensors[name], tensor) for name, tensor in now.items()
        ):
            _copy([self._tensors[name] for name in now], list(now.values()))
        else:
            self._tensors = {name: tensor.detach().clone() for name, tensor in now.items()}

    def fits(self, model: nn.Module) -> bool:
        """Whether ``model`` has the weights and buffers it had then."""
        then = {name: t.shape for name, t in self._tensors.items() if name[0] != "s"}
        return then == {name: tensor.shape for name, tensor in _model_tensors(model).items()}

    def shard(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Of whole tensors, loaded for a sharded ``model``, keep this process's parts.

        For all processes to call together. Nothing is done to what is as it should be.
        """
        like = _model_tensors(model)
        like |= {f"s{number}": p for number, p in enumerate(_parameters(optimizer))}
        for name, tensor in self._tensors.items():
            key = name.partition(".")[0] if name[0] == "s" else name
            self._tensors[name] = sharded_like(tensor, like.get(key, tensor))

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make the present what was remembered, in place.

        Raises:
            ValueError: the model has other weights or buffers than it had then.
        """
        if not self.fits(model):
            msg = (
                "the model's weights are not those the snapshot was taken of: take another after "
                "layers were added or removed"
            )
            raise ValueError(msg)
        now = _model_tensors(model)
        _copy(list(now.values()), [self._tensors[name] for name in now])
        for number, parameter in enumerate(_parameters(optimizer)):
            prefix = f"s{number}."
            kept = {
                name.removeprefix(prefix): value
                for name, value in (self._tensors | self._values).items()
                if name.startswith(prefix)
            }
            if not kept:
                optimizer.state.pop(parameter, None)  # before its first step
                continue
            state = optimizer.state[parameter]
            for key in state.keys() - kept.keys():
                del state[key]
            for key, value in kept.items():
                if not isinstance(value, Tensor):
                    state[key] = value
                elif isinstance(old := state.get(key), Tensor) and old.shape == value.shape:
                    old.copy_(value)
                else:
                    device = value.device if value.dim() == 0 else parameter.device
                    state[key] = value.to(device, copy=True)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, copied to the CPU, and numbers; of sharded tensors this process's parts."""
        return {
            "tensors": {name: t.to("cpu", copy=True) for name, t in self._tensors.items()},
            "values": dict(self._values),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, or what `gathered_state` made of it: then `shard`."""
        self._tensors = {name: tensor.clone() for name, tensor in state_dict["tensors"].items()}
        self._values = dict(state_dict["values"])


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    weights = {f"w.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    return weights | {f"b.{name}": tensor.detach() for name, tensor in model.named_buffers()}


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        f"s{number}.{key}": value
        for number, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _alike(one: Tensor, other: Tensor) -> bool:
    one, other = local_part(one), local_part(other)
    same = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return same and one.stride() == other.stride()


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """In one kernel for each kind of tensor."""
    parts = zip(map(local_part, targets), map(local_part, sources), strict=True)
    kinds = groupby(sorted(parts, key=lambda pair: _kind(pair[0])), key=lambda pair: _kind(pair[0]))
    for _, pairs in kinds:
        some: Iterable[tuple[Tensor, ...]] = zip(*pairs, strict=True)
        to, of = (list(tensors) for tensors in some)
        torch._foreach_copy_(to, of)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.device} {tensor.dtype}"
