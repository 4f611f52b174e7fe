"""A model sharded over processes as an ordinary one, for the time of a measurement."""

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from batchlr.operators.isolation import swapped_parameters
from batchlr.sharded_tensors import gathered, is_sharded

P = ParamSpec("P")
T = TypeVar("T")

_FSDP, _TENSOR_PARALLEL = "torch.distributed.fsdp", "torch.distributed.tensor"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


@contextmanager
def unsharded(model: nn.Module) -> Iterator[nn.Module]:
    """Context in which a model sharded by `torch.distributed.fsdp.fully_shard` is an ordinary one.

    FSDP frees weights that a second derivative still needs, so every process gets all of them, in
    the precision the optimizer keeps them in, and FSDP's hooks are taken out: a
    `MixedPrecisionPolicy` does not apply. What measures a model (`measure_curvature`,
    `CurvatureController`, ...) enters by itself; operators are made and used inside.

    Costs one all-gather of the weights and holds them whole: each process needs the memory that the
    measurement of an unsharded model takes, and all of them do the same work. Nothing is done to a
    model that is not sharded, nor by a second `unsharded` inside. Optimizers know the parameters
    outside only: no steps inside.

    Args:
        model: in every process, together. Not in the midst of a forward or backward pass.

    Yields:
        ``model``.

    Raises:
        ValueError: the weights are sharded by something else.
        RuntimeError: the weights were gathered or sharded inside, by who else runs FSDP.
    """
    check_sharding(model)
    reshard(model)
    if not _fully_sharded(model):
        yield model
        return
    stand_ins = {id(p): _stand_in(p) for p in model.parameters() if is_sharded(p)}
    try:
        with swapped_parameters(model, stand_ins), _without_hooks(model):
            try:
                yield model
            finally:
                try:
                    _check_unmoved(model, stand_ins)  # may be why it failed
                finally:
                    reshard(model)
    finally:
        for stand_in in stand_ins.values():  # an operator kept for longer notices
            stand_in.data = stand_in.data.new_empty(0)


def unsharding(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` with its argument ``model`` `unsharded`."""
    position = list(inspect.signature(function).parameters).index("model")

    @wraps(function)
    def measure(*args: P.args, **kwargs: P.kwargs) -> T:
        model = args[position] if len(args) > position else kwargs.get("model")
        if not isinstance(model, nn.Module):  # which the function itself complains about
            return function(*args, **kwargs)
        with unsharded(model):
            return function(*args, **kwargs)

    return measure


def original(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter an optimizer knows: the sharded one that this stands for, or itself."""
    found: nn.Parameter = getattr(parameter, "_stands_for", parameter)
    return found


def reshard(model: nn.Module) -> None:
    """Have the model hold the parameters an optimizer knows, whatever FSDP has left gathered."""
    for module in _fully_sharded(model):
        module.reshard()


def check_whole(model: nn.Module) -> None:
    """Raise ValueError if ``model`` is sharded and not `unsharded`."""
    check_sharding(model)
    names = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    if names or any(_of(hook, _FSDP) for m in _fully_sharded(model) for hook in _hooks(m)):
        first = f" (first {names[0]!r})" if names else ""
        msg = (
            f"the model's weights are sharded over processes{first}, and an operator needs them "
            "whole: make and use it inside `with batchlr.unsharded(model):`, in every process"
        )
        raise ValueError(msg)


def check_sharding(model: nn.Module) -> None:
    """Raise ValueError if ``model`` is sharded by anything but `fully_shard`."""
    if _FSDP in sys.modules and any(
        isinstance(m, sys.modules[_FSDP].FullyShardedDataParallel) for m in model.modules()
    ):
        msg = (
            "the model is wrapped by FullyShardedDataParallel, whose flattened weights cannot be "
            "measured; shard it with torch.distributed.fsdp.fully_shard instead"
        )
        raise ValueError(msg)
    if not any(is_sharded(p) for p in model.parameters()):
        return
    parallel = any(_of(hook, _TENSOR_PARALLEL) for m in model.modules() for hook in _hooks(m))
    if parallel or not _fully_sharded(model):
        msg = (
            "the model's weights are DTensors that fully_shard did not make, or not alone; only "
            "weights sharded by torch.distributed.fsdp.fully_shard can be measured, not tensor "
            "parallel ones: measure a copy of the model that is not parallelised"
        )
        raise ValueError(msg)


def _stand_in(parameter: Tensor) -> nn.Parameter:
    with torch.inference_mode(False):
        stand_in = nn.Parameter(gathered(parameter.detach()), parameter.requires_grad)
    stand_in._stands_for = parameter  # type: ignore[attr-defined]
    return stand_in


def _check_unmoved(model: nn.Module, stand_ins: dict[int, nn.Parameter]) -> None:
    inside = {id(p) for p in model.parameters()}
    if any(id(stand_in) not in inside for stand_in in stand_ins.values()):
        msg = (
            "FSDP gathered or sharded the weights while they were measured, so the measurement is "
            "void; loss_fn must not call unshard() or reshard() of the model"
        )
        raise RuntimeError(msg)


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """FSDP's hooks taken out, those of `register_fsdp_forward_method` as well."""
    modules = _fully_sharded(model)
    replaced: list[tuple[nn.Module, str, Any, Any]] = []
    for module in modules:
        for name in _HOOKS:
            hooks = vars(module)[name]
            others = OrderedDict((k, hook) for k, hook in hooks.items() if not _of(hook, _FSDP))
            replaced.append((module, name, hooks, others))
        for name, method in vars(module).items():
            if inspect.ismethod(method) and _of(method, _FSDP):
                replaced.append((module, name, method, vars(method.__func__)["__wrapped__"]))
    try:
        for module, name, _, inside in replaced:
            vars(module)[name] = inside
        yield
    finally:
        for module, name, outside, _ in replaced:
            vars(module)[name] = outside


def _fully_sharded(model: nn.Module) -> list[Any]:
    """The modules `fully_shard` was called on."""
    loaded = sys.modules.get(_FSDP)  # who has such a module has loaded it
    if loaded is None:
        return []
    return [module for module in model.modules() if isinstance(module, loaded.FSDPModule)]


def _hooks(module: nn.Module) -> list[Any]:
    return [hook for name in _HOOKS for hook in vars(module)[name].values()]


def _of(function: Any, package: str) -> bool:
    """Whether ``function``, or what wraps it, is defined in ``package``."""
    outermost = getattr(function, "__func__", function)
    defined_in = getattr(outermost, "__globals__", {}).get("__name__", "")
    names = (defined_in, getattr(outermost, "__module__", None) or "")
    return any(name.startswith(package) for name in names)
