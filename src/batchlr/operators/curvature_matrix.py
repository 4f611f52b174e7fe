"""What the Hessian and the Gauss-Newton matrix of a model have in common."""

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from batchlr.operators.base import BatchedOperator
from batchlr.operators.batch_norm import DifferentiableBatchNorm
from batchlr.operators.batches import check_batches, count_samples
from batchlr.operators.supervised import LossFunction

NormMode = Literal["train", "eval"]

_NORM_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class Recording:
    """One batch, recorded for differentiation at the weights it was recorded at."""

    # The product must not refer to the operator: a cycle would keep the graph until collected.
    loss: Tensor  # () mean loss of the batch
    gradient: Tensor  # (P,) of that loss
    product: Callable[[Tensor], Tensor]  # (P,) -> (P,), the batch's curvature matrix times v


class CurvatureMatrix(BatchedOperator):
    """A curvature matrix of the mean loss over a fixed list of batches.

    ``A = sum_k n_k A_k / sum_k n_k`` with ``A_k`` the matrix of batch ``k``'s mean loss and ``n_k``
    its number of samples. Parameters are the model's trainable ones, shared ones once, flattened
    and concatenated in the order of ``model.named_parameters()``.

    Nothing of the model changes: weights, ``.grad``, buffers, train/eval flags and the global
    random state are bit-identical after any product. Dropout draws one mask per batch and keeps
    it. Products always refer to the model as it is: after an optimizer step, or a change of buffers
    or train/eval flags, the batches are recorded anew. Only changes in place through ``.data`` go
    unnoticed.

    Args:
        model: its own flags decide everything but the normalisation layers (dropout is on if the
            model is in train mode).
        loss_fn: ``loss_fn(model, batch)``, the scalar mean loss.
        batches: kept, not copied.
        norm_mode: ``"train"`` normalises by each batch's own statistics, as a training step does;
            ``"eval"`` by the running statistics, which makes the loss a sum over samples. Required
            if the model has batch or instance norms, for the two differ about tenfold.
        generator: seeds the dropout masks; without one they are the same for every operator.
        keep_graph: keep every batch's graph between products (2-3 times the memory of a backward
            pass for each batch, and about 1.6 times faster), or record it for each product.

    Raises:
        ValueError: no batches, no trainable parameters, a loss that is not a scalar, or
            ``norm_mode`` missing.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Sequence[Any],
        *,
        norm_mode: NormMode | None = None,
        generator: torch.Generator | None = None,
        keep_graph: bool = True,
    ) -> None:
        model = getattr(model, "module", model) if _is_wrapper(model) else model
        self._parameters = trainable_parameters(model)
        self._batches = check_batches(batches)
        self.norm_mode = check_norm_mode(model, norm_mode)
        self._model = model
        self._loss_fn = loss_fn
        self._loss_module = _LossModule(model, loss_fn)
        self._samples = [count_samples(batch) for batch in self._batches]
        self._seed = _draw_seed(generator)
        self._keep_graph = keep_graph
        self._recordings: dict[int, Recording] = {}
        self._recorded_at: object = None
        self._modules = list(model.modules())
        self._state = [*model.parameters(), *model.buffers()]
        first = self._parameters[0]
        size = sum(p.numel() for p in self._parameters)
        super().__init__(size, dtype=first.dtype, device=first.device)

    @final
    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(P={self.shape[0]}, batches={len(self._batches)}, "
            f"samples={sum(self._samples)}, norm_mode={self.norm_mode!r})"
        )

    @property
    @final
    def samples(self) -> tuple[int, ...]:
        """Number of samples of each batch."""
        return tuple(self._samples)

    @final
    def batch_products(self, vector: Tensor) -> Iterator[Tensor]:
        """See `BatchedOperator.batch_products`."""
        self.check(vector)
        self.num_products += 1
        for index in range(len(self._batches)):
            with self._full_precision():
                product = self._record(index).product(vector.detach())
            yield product

    @final
    def batch_gradients(self) -> Iterator[Tensor]:
        """Gradient ``(P,)`` of each batch's mean loss in turn."""
        for index in range(len(self._batches)):
            yield self._record(index).gradient

    @final
    def loss(self) -> Tensor:
        """Sample-weighted mean loss over the batches, a scalar."""
        losses = [self._record(k).loss * n for k, n in enumerate(self._samples)]
        return torch.stack(losses).sum() / sum(self._samples)

    @abstractmethod
    def _differentiate(self, batch: Any) -> Recording:
        """Record ``batch`` under the settings of `_quiet`."""

    @final
    def _evaluate(self, function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        """``function(model, batch)`` on copies of the model's buffers."""
        buffers = {f"model.{name}": b.clone() for name, b in self._model.named_buffers()}
        result = functional_call(self._loss_module, buffers, (function, batch))
        if not isinstance(result, Tensor):
            msg = f"the loss function must return a tensor, got {type(result).__name__}"
            raise TypeError(msg)
        return result

    @final
    def _multiply(self, columns: Tensor) -> Tensor:
        product = torch.zeros_like(columns)
        total = sum(self._samples)
        with self._full_precision():
            for index, samples in enumerate(self._samples):
                recording = self._record(index)  # one recording serves all columns
                for j in range(columns.shape[1]):
                    product[:, j].add_(recording.product(columns[:, j]), alpha=samples / total)
        return product

    @final
    def _record(self, index: int) -> Recording:
        state = ([_version(t) for t in self._state], [m.training for m in self._modules])
        if state != self._recorded_at:
            self._recordings.clear()
            self._recorded_at = state
        if index in self._recordings:
            return self._recordings[index]
        with self._quiet(self._seed + index):
            recording = self._differentiate(self._batches[index])
        if self._keep_graph:
            self._recordings[index] = recording
        return recording

    @contextmanager
    def _quiet(self, seed: int) -> Iterator[None]:
        """Gradients on, autocast off, norms in ``norm_mode``, random state put back."""
        norms = [m for m in self._modules if isinstance(m, _NORM_LAYERS)]
        modes = [m.training for m in norms]
        device = self._parameters[0].device
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._full_precision())
            stack.enter_context(_forked_random_state(device, seed))
            # Flash and memory-efficient attention have no second derivative.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(DifferentiableBatchNorm())
            if "torch._dynamo" in sys.modules:  # nor has anything under torch.compile
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            try:
                for module in norms:
                    module.training = self.norm_mode == "train"
                yield
            finally:
                for module, mode in zip(norms, modes, strict=True):
                    module.training = mode

    @final
    def _full_precision(self) -> torch.autocast:
        """Autocast off: it would reach into backward passes as well."""
        return torch.autocast(self._parameters[0].device.type, enabled=False)


@final
class _LossModule(nn.Module):
    """Makes ``function(model, batch)`` a forward pass, so that buffers can be swapped for it."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        return function(self.model, batch)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors into one vector ``(P,)``, detached."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def split_like(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flatten`: pieces of ``vector`` ``(P,)`` in the shapes of ``tensors``."""
    pieces = torch.split(vector, [t.numel() for t in tensors])
    return [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters a curvature matrix is about, in its order; shared ones once.

    Raises:
        ValueError: there is none, or they differ in dtype or device.
    """
    parameters = [p for _, p in model.named_parameters() if p.requires_grad]
    if not parameters:
        frozen = sum(1 for _ in model.parameters())
        msg = (
            f"the model has no trainable parameters ({frozen} frozen); "
            "set requires_grad=True on the ones to measure"
        )
        raise ValueError(msg)
    kinds = {(p.dtype, p.device) for p in parameters}
    if len(kinds) > 1:
        msg = (
            f"trainable parameters must share one dtype and device, got {sorted(map(str, kinds))}; "
            "convert the model or freeze the odd ones"
        )
        raise ValueError(msg)
    return parameters


def check_norm_mode(model: nn.Module, norm_mode: NormMode | None) -> NormMode | None:
    """``norm_mode`` if it is legal for ``model``.

    Raises:
        ValueError: it is unknown, or missing although the model normalises over batches.
    """
    if norm_mode not in ("train", "eval", None):
        msg = f"norm_mode must be 'train' or 'eval', got {norm_mode!r}"
        raise ValueError(msg)
    names = [name for name, m in model.named_modules() if isinstance(m, _NORM_LAYERS)]
    if names and norm_mode is None:
        msg = (
            f"the model normalises over batches ({len(names)} layers, first {names[0]!r}) and its "
            "curvature depends on how: pass norm_mode='train' (batch statistics, what a training "
            "step descends) or norm_mode='eval' (running statistics, a sum over samples)"
        )
        raise ValueError(msg)
    return norm_mode


def normalises_over_batches(model: nn.Module) -> bool:
    """Whether some layer's output depends on the rest of the batch in train mode."""
    return any(isinstance(m, _NORM_LAYERS) for m in model.modules())


def _is_wrapper(model: nn.Module) -> bool:
    return isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))


def _version(tensor: Tensor) -> tuple[int, int]:
    """Changes with every in-place change; tensors made in inference mode do not count theirs."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _draw_seed(generator: torch.Generator | None) -> int:
    if generator is None:
        return 0
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device))


@contextmanager
def _forked_random_state(device: torch.device, seed: int) -> Iterator[None]:
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices=devices, device_type=kind):
        # Not torch.manual_seed: it seeds every accelerator, and only this one is put back.
        torch.default_generator.manual_seed(seed)
        for accelerator in devices:
            module = torch.get_device_module(accelerator)
            with module.device(accelerator):
                module.manual_seed(seed)
        yield
