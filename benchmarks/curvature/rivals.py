"""Ourselves and the other libraries behind one form: a case in, a product or an answer out."""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from models import Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import batchlr
from batchlr.operators.parameters import split_like

Product = Callable[[Tensor], Any]

PACKAGES = {
    "curvlinops": "curvlinops-for-pytorch",
    "hessian_eigenthings": "hessian-eigenthings==1.0.0a5",
    "pyhessian": "pyhessian",
}


def installed(module: str) -> Any | None:
    """The rival's module, or None with a line that says how to get it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError:
        print(f"{module} is left out: pip install '{PACKAGES[module]}', or '.[bench]' for all")
        return None


curvlinops = installed("curvlinops")
eigenthings = installed("hessian_eigenthings")
pyhessian = installed("pyhessian")


@contextlib.contextmanager
def math_attention() -> Iterator[None]:
    """What a user must know to do by hand: the only attention with second derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def in_context(function: Callable[..., Any], context: Callable[[], Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return wrapped


# ------------------------------------------------------------------------------ plain torch


def gradient(case: Case) -> Callable[[], Any]:
    """One ordinary gradient of the first batch: the unit of all costs."""
    model, (x, y) = case.copy(), case.batches[0]
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(case.criterion(model(x), y), parameters)


def all_gradients(case: Case) -> Callable[[], Any]:
    """One gradient of every batch: the unit where there is a loader."""
    model = case.copy()
    parameters = list(model.parameters())

    def gradients() -> None:
        for x, y in case.batches:
            torch.autograd.grad(case.criterion(model(x), y), parameters)

    return gradients


def flatten(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat([piece.reshape(-1) for piece in pieces])


def plain_hessian(case: Case) -> Product:
    """Double backward, the graph kept, with nothing around it: the floor of the exact routes."""
    model, (x, y) = case.copy(), case.batches[0]
    parameters = list(model.parameters())
    with math_attention():
        loss = case.criterion(model(x), y)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        pieces = split_like(vector, parameters)
        return flatten(torch.autograd.grad(gradients, parameters, pieces, retain_graph=True))

    return product


def plain_ggn(case: Case) -> Product:
    """Linearised forward pass and one pull-back, both kept: the cheapest known route."""
    model, (x, y) = case.copy(), case.batches[0]
    names = [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    primals = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(weights: dict[str, Tensor]) -> Tensor:
        with math_attention():
            return torch.func.functional_call(model, weights, (x,))

    _, push_forward = torch.func.linearize(outputs, primals)
    with math_attention():
        tip = model(x)
    leaf = tip.detach().requires_grad_()
    (slope,) = torch.autograd.grad(case.criterion(leaf, y), leaf, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        pieces = split_like(vector, parameters)
        pushed = push_forward(dict(zip(names, pieces, strict=True)))
        (curved,) = torch.autograd.grad(slope, leaf, pushed, retain_graph=True)
        return flatten(torch.autograd.grad(tip, parameters, curved, retain_graph=True))

    return product


# ------------------------------------------------------------------------------------ batchlr


def our_operator(kind: type, case: Case, **options: Any) -> Any:
    return kind(
        case.copy(),
        batchlr.supervised(case.criterion),
        case.batches,
        norm_mode=case.norm_mode,
        **options,
    )


def our_hessian(case: Case, **options: Any) -> Product:
    operator = our_operator(batchlr.HessianOperator, case, **options)
    return lambda vector: operator @ vector


def our_ggn(case: Case, **options: Any) -> Product:
    operator = our_operator(batchlr.GGNOperator, case, **options)
    return lambda vector: operator @ vector


# --------------------------------------------------------------------------------- PyHessian


def pyhessian_object(case: Case, *, loader: bool = False) -> Any:
    if case.norm_mode == "train":
        msg = "always measures in eval mode"
        raise NotImplementedError(msg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # backward(create_graph=True)
        return pyhessian.hessian(
            case.copy(),
            case.criterion,
            data=None if loader else case.batches[0],
            dataloader=case.batches if loader else None,
            cuda=case.device.type == "cuda",
        )


def pyhessian_hessian(case: Case) -> Product:
    measured = pyhessian_object(case)
    multiply = importlib.import_module("pyhessian.utils").hessian_vector_product
    return lambda v: multiply(measured.gradsH, measured.params, split_like(v, measured.params))


@contextlib.contextmanager
def eig_of_old() -> Iterator[None]:
    """`torch.eig`, which torch dropped and PyHessian 0.1 ends its density with."""

    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], 1), vectors

    with mock.patch.object(torch, "eig", eig):
        yield


# -------------------------------------------------------------------------------- curvlinops


def curvlinops_operator(kind: str, case: Case, *, check: bool = False) -> Any:
    model = case.copy()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(curvlinops, f"{kind}LinearOperator")(
            model, case.criterion, parameters, case.batches, check_deterministic=check
        )


def curvlinops_product(kind: str) -> Callable[[Case], Product]:
    def build(case: Case) -> Product:
        operator = curvlinops_operator(kind, case)
        return lambda vector: operator @ vector

    return build


# ----------------------------------------------------------------------- hessian-eigenthings


def eigenthings_hessian_operator(case: Case, **options: Any) -> Any:
    return eigenthings.HessianOperator(
        case.copy(), case.batches, eigenthings.supervised_loss(case.criterion), **options
    )


def eigenthings_hessian(case: Case) -> Product:
    return eigenthings_hessian_operator(case).matvec


def eigenthings_ggn(case: Case) -> Product:
    operator = eigenthings.GGNOperator(
        case.copy(),
        case.batches,
        eigenthings.supervised_forward,
        eigenthings.supervised_loss_of_output(case.criterion),
    )
    return operator.matvec


def by_hand(build: Callable[[Case], Product]) -> Callable[[Case], Product]:
    """A rival helped over its failure on attention by a user who knows."""
    built = in_context(build, math_attention)
    return lambda case: in_context(built(case), math_attention)


def hessians(case: Case) -> dict[str, Callable[[Case], Product]]:
    """Every library's Hessian product of one batch."""
    found: dict[str, Callable[[Case], Product]] = {}
    if pyhessian:
        found["PyHessian, one batch"] = pyhessian_hessian
    if curvlinops:
        found["curvlinops"] = curvlinops_product("Hessian")
    if eigenthings:
        found["hessian-eigenthings"] = eigenthings_hessian
    if case.attention:
        found |= {f"{name}, math attention by hand": by_hand(f) for name, f in found.items()}
    return found


def ggns(case: Case) -> dict[str, Callable[[Case], Product]]:
    """Every library's Gauss-Newton product of one batch."""
    found: dict[str, Callable[[Case], Product]] = {}
    if curvlinops:
        found["curvlinops"] = curvlinops_product("GGN")
    if eigenthings:
        found["hessian-eigenthings"] = eigenthings_ggn
    if case.attention:
        found |= {f"{name}, math attention by hand": by_hand(f) for name, f in found.items()}
    return found


def reason(error: Exception) -> str:
    """What a failure says, in one short line."""
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:100] if first else ''}"
