"""Running a model without a trace: nothing of it, or of the program around it, changes."""

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from batchlr.operators.second_order import CheapSecondDerivatives

P = ParamSpec("P")
T = TypeVar("T")

NormMode = Literal["train", "eval"]

NORM_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without the wrapper of data parallelism, which would run on other processes too."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    inner: nn.Module = model.module if isinstance(model, wrappers) else model
    return inner


def is_frozen(norm: nn.Module, model: nn.Module) -> bool:
    """Whether ``norm`` is in eval mode though ``model`` is not, and so trains in eval mode."""
    has_statistics = getattr(norm, "running_mean", None) is not None
    return has_statistics and model.training and not norm.training


def normalises_over_batches(model: nn.Module) -> bool:
    """Whether some layer's output depends on the rest of the batch in train mode."""
    return any(
        isinstance(m, NORM_LAYERS) and not is_frozen(m, model) for m in unwrapped(model).modules()
    )


def couples_samples(model: nn.Module, norm_mode: NormMode | None) -> bool:
    """Whether norms make a sample's output depend on its batch in this mode."""
    if norm_mode == "train" and normalises_over_batches(model):
        return True
    modules = unwrapped(model).modules()
    batch_norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return any(norm.running_mean is None for norm in batch_norms)  # these do in either mode


@final
class Isolation:
    """Contexts in which a model is run and differentiated; it must not be run elsewhere meanwhile.

    Inside, gradients are on, autocast, compilation and fused attention off, norms in ``norm_mode``,
    buffers copies, also those of other modules that the loss runs (a GAN's other network), and
    random numbers, torch's, Python's and numpy's, those of a seed. Backward passes belong inside
    as well: checkpointed layers run forward once more there.
    """

    def __init__(self, model: nn.Module, norm_mode: NormMode | None) -> None:
        modules = list(model.modules())
        self._modules = [m for m in modules if m._buffers]
        self._own = {id(m) for m in modules}
        self._norms = [m for m in modules if isinstance(m, NORM_LAYERS)]
        self._in_train = norm_mode == "train"
        self._model = model
        self._device = next(model.parameters()).device

    @contextmanager
    def __call__(self, seed: int) -> Iterator[None]:
        """Enter, with random numbers from ``seed``."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.full_precision())
            stack.enter_context(forked_random_state(self._device, seed))
            # Flash and memory-efficient attention have no second derivative.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_no_fast_path())
            stack.enter_context(_copied_buffers(self._modules))
            stack.enter_context(_others_buffers_copied(self._own))
            stack.enter_context(self._norm_modes())
            stack.enter_context(CheapSecondDerivatives(self._device.type))
            if "torch._dynamo" in sys.modules:  # nor has anything under torch.compile
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def full_precision(self) -> torch.autocast:
        """Autocast off: it would reach into backward passes as well."""
        return torch.autocast(self._device.type, enabled=False)

    @contextmanager
    def _norm_modes(self) -> Iterator[None]:
        modes = [m.training for m in self._norms]
        try:
            for module in self._norms:
                module.training = self._in_train and not is_frozen(module, self._model)
            yield
        finally:
            for module, mode in zip(self._norms, modes, strict=True):
                module.training = mode


@contextmanager
def _copied_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Whatever is done to buffers inside is done to copies."""
    places = [(m, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
    copies = {id(buffer): buffer.detach().clone() for _, _, buffer in places}
    try:
        for module, name, buffer in places:
            module._buffers[name] = copies[id(buffer)]
        yield
    finally:
        for module, name, buffer in places:
            module._buffers[name] = buffer


@contextmanager
def _others_buffers_copied(own: set[int]) -> Iterator[None]:
    """The same for modules that are not ``own``, by their ids, from when they are first run."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Compiled modules fire it twice, of which the second time does nothing.
        warnings.filterwarnings("ignore", message=r"Using `torch\.compile.*global hooks")
        seen: set[int] = set()

        def copy(module: nn.Module, _: Any) -> None:
            if module._buffers and id(module) not in own and id(module) not in seen:
                seen.add(id(module))
                stack.enter_context(_copied_buffers([module]))

        stack.callback(nn.modules.module.register_module_forward_pre_hook(copy).remove)
        yield


@contextmanager
def swapped_parameters(model: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, the model computes with ``tensors``, by the ``id`` of the parameter replaced."""
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in tensors
    ]
    try:
        for module, name, parameter in places:
            module._parameters[name] = tensors[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Transformer layers in eval mode otherwise call one kernel without any derivative."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def forked_random_state(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` inside, untouched outside."""
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices=devices, device_type=kind):
        # Not torch.manual_seed: it seeds every accelerator, and only this one is put back.
        torch.default_generator.manual_seed(seed)
        for accelerator in devices:
            module = torch.get_device_module(accelerator)
            with module.device(accelerator):
                module.manual_seed(seed)
        states = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def in_full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` with autocast off, which would reach into products of vectors, too."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return run


def check_norm_mode(model: nn.Module, norm_mode: NormMode | None) -> NormMode | None:
    """``norm_mode`` if it is legal for ``model``.

    Raises:
        ValueError: it is unknown, or missing although the model normalises over batches.
    """
    if norm_mode not in ("train", "eval", None):
        msg = f"norm_mode must be 'train' or 'eval', got {norm_mode!r}"
        raise ValueError(msg)
    names = [name for name, m in model.named_modules() if isinstance(m, NORM_LAYERS)]
    if names and norm_mode is None:
        msg = (
            f"the model normalises over batches ({len(names)} layers, first {names[0]!r}) and its "
            "curvature depends on how: pass norm_mode='train' (batch statistics, what a training "
            "step descends) or norm_mode='eval' (running statistics, a sum over samples)"
        )
        raise ValueError(msg)
    return norm_mode
