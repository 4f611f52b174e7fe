"""What the Hessian and the Gauss-Newton matrix of a model have in common."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any, TypedDict, final

import torch
from torch import Tensor, nn

from batchlr.argument_ranges import require_count
from batchlr.operators.base import BatchedOperator
from batchlr.operators.batch_parts import BatchParts
from batchlr.operators.batches import check_batches
from batchlr.operators.graphs import (
    ComputedAnew,
    GraphStore,
    KeepGraph,
    Recording,
    computes_anew,
    holding_all,
    offloaded,
)
from batchlr.operators.isolation import (
    Isolation,
    check_norm_mode,
    couples_samples,
    unwrapped,
)
from batchlr.operators.isolation import NormMode as NormMode
from batchlr.operators.parameters import (
    Adder,
    check_module,
    common_dtype,
    named_trainable_parameters,
    split_like,
)
from batchlr.operators.repetition import RepetitionCheck
from batchlr.operators.second_order import torchs_own_layers
from batchlr.operators.supervised import LossFunction, SupervisedLoss, check_loss_function
from batchlr.operators.unsharded import check_whole


class CurvatureOptions(TypedDict, total=False):
    """Keyword arguments of every `CurvatureMatrix`, which says what they mean."""

    norm_mode: NormMode | None
    generator: torch.Generator | None
    keep_graph: KeepGraph
    memory_budget: int | None
    expected_products: int | None
    micro_batch: int | None
    offload: bool
    self_check: bool


_CALLED = (
    "the loss was called as loss_fn(model, batch); if it is a function of outputs and targets, "
    "pass batchlr.supervised(criterion)"
)


class CurvatureMatrix(BatchedOperator):
    """A curvature matrix of the mean loss over a fixed list of batches.

    ``A = sum_k w_k A_k / sum_k w_k`` with ``A_k`` the matrix of batch ``k``'s mean loss and ``w_k``
    what that mean is over: its samples, or what the loss says (`batch_weight`: tokens that are not
    padding, the sum of class weights). So it is the matrix of the mean over all data, however they
    are cut. A batch of weight zero is not run.

    Parameters are the model's trainable ones, shared ones once, flattened and concatenated in the
    order of ``model.named_parameters()``. Vectors have the widest of their dtypes, at least
    float32.

    Nothing of the model changes: weights, ``.grad``, buffers, train/eval flags and the global
    random state are bit-identical after any product. Dropout draws one mask per batch and keeps
    it. Products always refer to the model as it is: after an optimizer step, or a change of buffers
    or train/eval flags, the batches are recorded anew. Only changes in place through ``.data`` go
    unnoticed. Attention runs through torch's ``MATH`` kernels, a model wrapped for data parallelism
    without its wrapper, one sharded by `fully_shard` inside `unsharded` only.

    Args:
        model: its own flags decide everything but the normalisation layers (dropout is on if the
            model is in train mode).
        loss_fn: ``loss_fn(model, batch)``, the scalar mean loss.
        batches: kept, not copied.
        norm_mode: ``"train"`` normalises by each batch's own statistics, as a training step does;
            norms in eval mode in a model in train mode are frozen and stay so. ``"eval"`` takes
            the running statistics, which makes the loss a sum over samples. Required if the model
            has batch or instance norms, for the two differ about tenfold.
        generator: seeds the dropout masks; without one they are the same for every operator.
        keep_graph: keep graphs between products (2-3 times the memory of a backward pass for each
            batch, and 1.6 times faster than to record them for each product). ``"auto"`` keeps
            those of as many batches as ``memory_budget`` allows, by their measured size.
        memory_budget: in bytes; by default half of what is free at the first product.
        expected_products: how many will be asked for at the same weights, by default many. For one
            nothing is kept; few choose the cheaper way to a Gauss-Newton product.
        micro_batch: run at most that many samples at a time, for memory. For losses that are means
            over samples (or that say their weight), and not for norms of batch statistics.
        offload: hold graphs in main memory, where each product reads them back. Before torch 2.14
            with torch's own derivatives of all layers, as where layers are checkpointed: slower,
            and without weight norms and bags of embeddings.
        self_check: compare ``u'Av`` and ``v'Au`` of the first two vectors, and a batch's loss with
            that of the last time it was recorded. It takes no product.

    Raises:
        TypeError: ``model`` is no module, or ``loss_fn`` no function of model and batch.
        ValueError: no batches or all of weight zero, no trainable parameters or sharded ones, a
            loss that is not a scalar, ``norm_mode`` missing, or another option illegal.
        ArithmeticError: in a product, if ``self_check`` finds it inconsistent.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Sequence[Any],
        *,
        norm_mode: NormMode | None = None,
        generator: torch.Generator | None = None,
        keep_graph: KeepGraph = "auto",
        memory_budget: int | None = None,
        expected_products: int | None = None,
        micro_batch: int | None = None,
        offload: bool = False,
        self_check: bool = True,
    ) -> None:
        check_module(model)
        check_loss_function(loss_fn)
        model = unwrapped(model)
        check_whole(model)
        named = named_trainable_parameters(model)
        self.parameter_names = tuple(named)
        self._parameters = list(named.values())
        listed = check_batches(batches)
        self.norm_mode = check_norm_mode(model, norm_mode)
        self._model = model
        self._loss_fn = loss_fn
        if micro_batch is not None:
            check_micro_batch(model, norm_mode, micro_batch)
        self._parts = BatchParts(listed, loss_fn, most=micro_batch)
        self._seed = _draw_seed(generator)
        self._isolation = Isolation(model, norm_mode)
        self._state = _tensors(model)
        self._recorded_at: object = None
        self._offload = offload
        self._checkpoints = False  # whether layers were found to be computed anew
        keep = True if offload and keep_graph == "auto" else keep_graph
        self._graphs = GraphStore(keep, memory_budget, expected_products, self._state)
        narrowest = min((p.dtype for p in self._parameters), key=lambda d: torch.finfo(d).bits)
        self._check = RepetitionCheck(narrowest) if self_check else None
        self._narrowest = narrowest
        super().__init__(
            sum(p.numel() for p in self._parameters),
            dtype=common_dtype(self._parameters),
            device=self._parameters[0].device,
        )

    @final
    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(P={self.shape[0]}, batches={len(self.samples)}, "
            f"samples={sum(self.samples)}, norm_mode={self.norm_mode!r})"
        )

    @property
    @final
    def samples(self) -> tuple[int, ...]:
        """Number of samples of each batch."""
        return self._parts.samples

    @property
    @final
    def weights(self) -> tuple[float, ...]:
        """See `BatchedOperator.weights`."""
        return self._parts.weights

    @property
    @final
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What the matrix is about, in its order."""
        return tuple(self._parameters)

    @final
    def batch_products(self, vectors: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """See `BatchedOperator.batch_products`."""
        for owner, vector in zip(range(len(self.samples)), self._each(vectors), strict=True):
            product = self.chosen_batch_product(owner, vector, self._everything)
            if owner == 0 and self._check is not None:
                self._check.see("first batch", vector, product)
            yield product

    @final
    def chosen_batch_product(self, owner: int, vector: Tensor, chosen: Sequence[int]) -> Tensor:
        """``A_k v`` of the sub-matrix of the parameters numbered ``chosen``, not counted."""
        return self._sum_of_products(vector.unsqueeze(0), chosen, owner)[0]

    @final
    def chosen_products(self, rows: Tensor, chosen: Sequence[int]) -> Tensor:
        """Products ``(k, n)`` of that sub-matrix with contiguous rows ``(k, n)``, not counted."""
        return self._sum_of_products(rows, chosen, None)

    @final
    def batch_gradients(self) -> Iterator[Tensor]:
        """Gradient ``(P,)`` of each batch's mean loss in turn; zero for one of weight zero."""
        for owner in range(len(self.samples)):
            self._refresh()
            with torch.inference_mode(False):
                total = torch.empty(self.shape[0], dtype=self.dtype, device=self.device)
                adder = Adder(total, self._parameters)
                for number, share in self._parts.shares(owner):
                    with self._surroundings(number):
                        adder.add(self._record(number, 1).gradient(), share)
                adder.finish()
            yield total

    @final
    def loss(self) -> Tensor:
        """Weighted mean loss over the batches, a scalar."""
        self._refresh()
        terms = []
        for number, share in self._parts.shares():
            with self._surroundings(number):
                terms.append(share * self._record(number, 1).loss)
        return torch.stack(terms).sum()

    @property
    @final
    def num_graphs(self) -> int:
        """How many graphs are kept where all are: one for samples that are run together."""
        return len(self._parts.shares())

    @final
    def largest_graph(self) -> int:
        """Bytes of the graph that the most samples run together leave, which it records."""
        self._refresh()
        number = self._parts.largest()
        with torch.inference_mode(False), self._surroundings(number):
            return self._graphs.bytes_of(self._record(number, 1))

    @final
    def verify(self, generator: torch.Generator | None = None) -> None:
        """Check symmetry and determinism by two products: a random one, and one along its result.

        Raises:
            ArithmeticError: ``u'Av`` and ``v'Au`` differ by more than rounding.
        """
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        size, device = self.shape[0], generator.device
        u = torch.randn(size, generator=generator, dtype=self.dtype, device=device).to(self.device)
        a_u = self @ u
        v = torch.nn.functional.normalize(a_u, dim=0)
        RepetitionCheck(self._narrowest).compare(u, a_u, v, self @ v)

    @abstractmethod
    def _differentiate(self, batch: Any, uses: int, seed: int) -> Recording:
        """Record ``batch`` for ``uses`` products, in an isolation of this ``seed``."""

    def _differentiated(self, number: int, columns: int) -> Recording:
        with ExitStack() as stack:
            if self._offload:
                stack.enter_context(offloaded(self._state))
            if self._checkpoints:  # autograd computes them anew outside of any function mode
                stack.enter_context(torchs_own_layers())
            uses = self._graphs.uses(columns)
            return self._differentiate(self._parts.batch(number), uses, self._seed + number)

    @final
    def _evaluate(self, function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        """``function(model, batch)``, checked to be a tensor."""
        watched = not (self._checkpoints or self._offload)  # with offloading hooks of our own
        try:
            with holding_all() if watched else nullcontext():
                result = function(self._model, batch)
        except (TypeError, AttributeError) as error:
            if not isinstance(self._loss_fn, SupervisedLoss):
                error.add_note(_CALLED)
            raise
        if not isinstance(result, Tensor):
            msg = f"the loss function must return a tensor, got {type(result).__name__}"
            raise TypeError(msg)
        if self._offload and not self._checkpoints and computes_anew([result]):
            raise ComputedAnew
        return result

    @final
    def _multiply(self, columns: Tensor) -> Tensor:
        rows = columns.T.contiguous()
        products = self.chosen_products(rows, self._everything)
        if self._check is not None:
            for row, product in zip(rows[:2], products[:2], strict=True):
                self._check.see("mean", row, product)
        return products.T

    @property
    def _everything(self) -> range:
        return range(len(self._parameters))

    def _sum_of_products(self, rows: Tensor, chosen: Sequence[int], owner: int | None) -> Tensor:
        """Products with ``rows``, summed over the parts of one batch or of all."""
        self._refresh()
        tensors = [self._parameters[j] for j in chosen]
        with torch.inference_mode(False):
            tangents = [
                [
                    piece.to(t.dtype)
                    for piece, t in zip(split_like(row, tensors), tensors, strict=True)
                ]
                for row in rows
            ]
            totals = torch.empty(rows.shape, dtype=self.dtype, device=self.device)
            adders = [Adder(total, tensors) for total in totals]
            for number, share in self._parts.shares(owner):
                with self._surroundings(number):
                    recording = self._record(number, len(rows))  # one serves all columns
                    for adder, tangent in zip(adders, tangents, strict=True):
                        adder.add(recording.product(tangent, chosen), share)
            for adder in adders:
                adder.finish()
        return totals

    def _surroundings(self, number: int) -> AbstractContextManager[object]:
        """Where to differentiate a part: isolated, unless the model is not going to be run."""
        recording = self._graphs.get(number)
        if recording is None or recording.runs_model:
            return self._isolation(self._seed + number)
        return self._isolation.full_precision()

    def _refresh(self) -> None:
        """Forget what was recorded if the model is another one now."""
        tensors = _tensors(self._model)
        state = (_versions(tensors), [m.training for m in self._model.modules()])
        if state != self._recorded_at:
            check_whole(self._model)
            self._check_parameters()
            self._state = tensors  # held: what is freed may leave its place to another
            self._graphs.clear()
            self._recorded_at = state
            if self._check is not None:
                self._check.restart()

    def _check_parameters(self) -> None:
        now = [p for p in self._model.parameters() if p.requires_grad]
        if [id(p) for p in now] != [id(p) for p in self._parameters]:
            msg = (
                "the model's trainable parameters are others than when the operator was made "
                "(load_state_dict(assign=True), a layer replaced or frozen?); make a new operator"
            )
            raise ValueError(msg)

    def _record(self, number: int, columns: int) -> Recording:
        """The recording of a part, in isolation."""
        recording = self._graphs.get(number)
        if recording is not None:
            return recording
        before = _versions(self._state)
        try:
            recording = self._differentiated(number, columns)
        except ComputedAnew:
            self._checkpoints = True
            with self._isolation(self._seed + number):
                recording = self._differentiated(number, columns)
        if self._checkpoints:
            recording = replace(recording, runs_model=True, computed_anew=True)
        if _versions(self._state) != before:
            msg = (
                "running the model changes its weights in place (an embedding with max_norm?), so "
                "they are no longer those it was given with; switch that off to measure curvature"
            )
            raise ValueError(msg)
        if self._check is not None:
            self._check.see_loss(number, recording.loss)
        self._graphs.offer(number, recording)
        return recording


def check_micro_batch(model: nn.Module, norm_mode: NormMode | None, micro_batch: int) -> None:
    """Raise ValueError unless batches of ``model`` may be cut to ``micro_batch`` samples."""
    require_count(micro_batch=micro_batch)
    if couples_samples(model, norm_mode):
        way_out = "" if couples_samples(model, "eval") else "norm_mode='eval', or "
        msg = (
            "micro_batch would change the matrix: norms of batch statistics make the samples of a "
            f"batch depend on one another; use {way_out}smaller batches as what is measured"
        )
        raise ValueError(msg)


def _tensors(model: nn.Module) -> list[Tensor]:
    """What the model's function depends on, shared ones as often as they are held."""
    held = [entry for m in model.modules() for entry in (m._parameters, m._buffers)]
    return [tensor for entry in held for tensor in entry.values() if tensor is not None]


def _versions(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Change with every change in place; tensors made in inference mode do not count theirs."""
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _draw_seed(generator: torch.Generator | None) -> int:
    if generator is None:
        return 0
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
