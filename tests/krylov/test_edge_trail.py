"""What one search leaves for the next, where it can be known by hand."""

import math

import pytest
import torch

from batchlr import DenseOperator
from batchlr.krylov.edge_trail import EdgeTrail
from batchlr.krylov.rayleigh_ritz import RitzSpace
from test_lanczos import generator, with_spectrum

SIZE = 30


def random(seed=0):
    return torch.randn(SIZE, dtype=torch.float64, generator=generator(seed))


def estimate(cosine, axis):
    """A unit vector at ``cosine`` to the first axis, its error along another one."""
    vector = torch.zeros(SIZE, dtype=torch.float64)
    vector[0], vector[axis] = cosine, math.sqrt(1 - cosine**2)
    return vector


def space_of(matrix, count=5):
    space = RitzSpace(DenseOperator(matrix), 12)
    for seed in range(count):
        space.extend(random(seed))
    return space


def look(trail, space):
    out = torch.empty(SIZE, dtype=torch.float64)
    return trail.look(space, *space.ritz(), out=out)


@pytest.mark.parametrize(("kept", "lean"), [(0.5, 0.8), (0.3, 0.3), (0.1, 0.95)])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_other_share_of_the_gradient_comes_nearer_to_the_edge(kept, lean, sign):
    last, gradient = estimate(kept, 1), 7 * sign * estimate(lean, 2)
    trail = EdgeTrail("largest", vector=last, kept=kept, lean=lean)

    def cosine(vector):
        return float(vector[0] / vector.norm())

    chosen = cosine(trail.start(gradient))
    shares = torch.linspace(0, 200, 20001).tolist()
    others = [cosine(last + share * sign * gradient / gradient.norm()) for share in shares]
    assert chosen == pytest.approx(max(others), rel=1e-5)
    assert chosen > max(kept, lean)


def test_a_start_is_the_last_vector_where_the_gradient_told_less():
    trail = EdgeTrail("largest", vector=estimate(0.9, 1), kept=0.9, lean=0.8)
    assert trail.start(random()) is trail.vector
    assert EdgeTrail("largest").start(random()) is None


@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_a_look_is_the_ritz_pair_and_its_true_residual(end):
    matrix = with_spectrum(torch.linspace(-3, 5, SIZE, dtype=torch.float64))
    space = space_of(matrix)
    found = look(EdgeTrail(end), space)
    edge = found.edge(space)
    remainder = matrix @ edge.vector - edge.value * edge.vector
    assert edge.vector.norm() == pytest.approx(1)
    assert edge.value == pytest.approx(float(edge.vector @ matrix @ edge.vector))
    assert edge.residual == pytest.approx(float(remainder.norm()))
    assert edge.error == edge.residual  # a first search knows no gap
    assert not found.closed


def test_a_first_look_at_an_invariant_space_is_closed():
    found = look(EdgeTrail("largest"), space_of(2 * torch.eye(SIZE, dtype=torch.float64), 1))
    assert found.value == pytest.approx(2)
    assert found.closed


def test_errors_of_the_largest_are_relative_to_itself_and_none_is_enough_for_a_negative_one():
    spectrum = torch.linspace(-4, 3, SIZE, dtype=torch.float64)
    space = space_of(with_spectrum(spectrum), 12)
    largest, smallest = (look(EdgeTrail(end), space) for end in ("largest", "smallest"))
    assert largest.relative == pytest.approx(largest.error / largest.value)
    assert smallest.relative == pytest.approx(smallest.error / -smallest.value)
    below = space_of(with_spectrum(spectrum - 5))
    assert look(EdgeTrail("largest"), below).relative == math.inf


def test_the_explorer_becomes_the_second_eigenvector():
    spectrum = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    spectrum[-1], spectrum[-2] = 8, 6
    matrix = with_spectrum(spectrum)
    second = torch.linalg.eigh(matrix).eigenvectors[:, -2]
    trail = EdgeTrail("largest")
    for _ in range(8):
        space = space_of(matrix, 2)
        for vector in (trail.vector, trail.explorer):
            if vector is not None:
                space.extend(vector)
        trail.learn(space, look(trail, space).edge(space).vector.clone(), None)
    assert abs(float(trail.explorer @ second)) > 0.99
    assert 6 / 8 - 0.01 < trail.ratio < 6 / 8 / 0.97 + 0.01  # the largest of late
    assert trail.far <= 0


def test_it_explores_now_and_then_and_every_other_time_where_the_second_is_near():
    def searches(**memory):
        trail = EdgeTrail("largest", **memory)
        return [update for update in range(9) if trail.explores(update, every=4)]

    last = random()
    assert searches() == []
    assert searches(vector=last) == searches(vector=last, ratio=0.5) == [0, 4, 8]
    assert searches(vector=last, ratio=0.9) == [0, 2, 4, 6, 8]


def test_a_state_makes_the_same_trail_and_shares_no_vector_that_changes():
    space = space_of(with_spectrum(torch.linspace(-1, 9, SIZE, dtype=torch.float64)))
    trail = EdgeTrail("smallest")
    trail.learn(space, look(trail, space).edge(space).vector, random())
    state = trail.state_dict()
    again = EdgeTrail.of_state("smallest", state)
    assert again.state_dict().keys() == state.keys()
    for name in ("vector", "explorer"):
        assert torch.equal(getattr(again, name), state[name])
    for name in ("ratio", "far", "kept", "lean"):
        assert getattr(again, name) == state[name]
    kept = state["explorer"].clone()
    again.learn(space, again.vector, None)
    assert torch.equal(state["explorer"], kept)
