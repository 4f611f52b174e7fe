"""A backward pass through a recorded backward pass that is linear in its cotangents."""

from collections.abc import Iterator
from contextlib import contextmanager

# Not thread-local: on an accelerator autograd runs the layers in threads of its own.
_active = [False]


@contextmanager
def linear_pass() -> Iterator[None]:
    """Inside, the layers of this package differentiate by their cotangents alone.

    Autograd tells a layer of Python only whether an input needs gradients at all, not whether
    anyone asked for them.
    """
    before = _active[0]
    _active[0] = True
    try:
        yield
    finally:
        _active[0] = before


def only_cotangents() -> bool:
    """Whether a `linear_pass` is under way."""
    return _active[0]
