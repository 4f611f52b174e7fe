"""The flag of a linear pass: what the layers see of it, and that they skip mixed terms inside."""

import threading

import pytest
import torch
import torch.nn.functional as F

from batchlr.operators.linear_pass import linear_pass, only_cotangents
from batchlr.operators.second_order import CheapSecondDerivatives

LAYERS = {
    "convolution": (lambda x, w: F.conv1d(x, w, padding=1), (2, 3, 5), (3, 3, 3)),
    "layer norm": (lambda x, w: F.layer_norm(x, (5,), w), (2, 3, 5), (5,)),
    "batch norm": (lambda x, w: F.batch_norm(x, None, None, w, training=True), (4, 3, 5), (3,)),
}


def test_it_holds_inside_and_nowhere_else():
    seen = [only_cotangents()]
    with linear_pass():
        seen.append(only_cotangents())
        with linear_pass():
            seen.append(only_cotangents())
        seen.append(only_cotangents())  # the inner one has not ended the outer one
    seen.append(only_cotangents())
    assert seen == [False, True, True, True, False]


def test_it_ends_with_an_error():
    with pytest.raises(ArithmeticError), linear_pass():
        raise ArithmeticError
    assert not only_cotangents()


def test_other_threads_see_it():
    """On an accelerator autograd runs the layers' backward passes in threads of its own."""
    seen = []
    with linear_pass():
        thread = threading.Thread(target=lambda: seen.append(only_cotangents()))
        thread.start()
        thread.join()
    assert seen == [True]


def pulled_back(layer, x_shape, w_shape):
    """A layer's variables, a cotangent of its output, and the gradients they make."""
    generator = torch.Generator().manual_seed(0)
    x, w, a = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in (x_shape, w_shape, x_shape)
    )
    with CheapSecondDerivatives():
        output = layer(x, w)
        return (x, w), a, torch.autograd.grad(output, (x, w), a, create_graph=True)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_give_the_jacobians_image_and_leave_the_mixed_terms_out(make):
    """Of ``<J' a, t>`` the derivative by ``a`` is ``J t``; those by the variables are not made."""
    variables, a, pulled = pulled_back(*make)
    tangents = [t.detach().cos() for t in variables]
    at = tuple(v.detach() for v in variables)
    _, image = torch.autograd.functional.jvp(make[0], at, tuple(tangents))  # of torch's kernels

    def derivatives():
        return torch.autograd.grad(
            pulled, (a, *variables), tangents, retain_graph=True, allow_unused=True
        )

    whole = derivatives()
    with linear_pass():
        alone = derivatives()
    for found in (whole, alone):
        torch.testing.assert_close(found[0], image, rtol=1e-10, atol=1e-12)
    assert all(float(term.abs().max()) > 1e-3 for term in whole[1:])
    assert alone[1:] == (None, None)
