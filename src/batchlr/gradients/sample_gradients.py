"""Every sample's own gradient."""

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

from batchlr.operators.parameters import named_trainable_parameters
from batchlr.operators.supervised import LossFunction, check_loss_function


def sample_gradients(
    model: nn.Module, loss_fn: LossFunction, batch: Any, *, chunk_size: int | None = None
) -> list[Tensor]:
    """Gradients of each sample's loss, one tensor ``(B, *parameter.shape)`` a parameter.

    About the cost of one backward pass over the batch, and the memory of ``B`` gradients; nothing
    of the model changes, ``.grad`` included. Dropout draws anew for each sample, from the global
    generator. `scatter_of_gradients` makes statistics of them.

    Args:
        model: without layers that make samples depend on one another, or with these in eval mode.
        loss_fn: ``(model, batch) -> mean loss``.
        batch: a tensor, or tuples, lists and dicts of them, samples along dimension 0.
        chunk_size: samples differentiated at a time; None is all.

    Raises:
        TypeError: ``loss_fn`` is no function of model and batch.
        ValueError: batch statistics make the samples' gradients undefined.
    """
    check_loss_function(loss_fn)
    _check_norms(model)
    named = named_trainable_parameters(model)
    loss = _Loss(model, loss_fn)

    def of_sample(parameters: dict[str, Tensor], sample: Any) -> Tensor:
        alone = tree_map(lambda tensor: tensor.unsqueeze(0), sample)
        value: Tensor = functional_call(loss, parameters, (alone,))
        return value

    parameters = {f"model.{name}": parameter.detach() for name, parameter in named.items()}
    each = vmap(grad(of_sample), in_dims=(None, 0), randomness="different", chunk_size=chunk_size)
    return list(each(parameters, batch).values())


class _Loss(nn.Module):
    """A loss function as the module that `functional_call` takes."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model
        self._loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self._loss_fn(self.model, batch)


def coupling_layers(model: nn.Module) -> list[str]:
    """Names of the layers that make samples depend on one another: batch norm by the batch."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (module.training or module.running_mean is None)
    ]


def _check_norms(model: nn.Module) -> None:
    coupled = coupling_layers(model)
    if coupled:
        msg = (
            f"a sample has no gradient of its own under batch statistics ({len(coupled)} layers, "
            f"first {coupled[0]!r}): put these layers in eval mode, or compare the gradients of "
            "micro-batches (GroupGradients), which are what training descends"
        )
        raise ValueError(msg)
