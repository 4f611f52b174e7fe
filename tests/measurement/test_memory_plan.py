"""How a budget is divided: nothing is given twice, and what cannot do is refused in numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlr.krylov.krylov_basis import basis_bytes, choose_form
from batchlr.measurement.memory_plan import UNLIMITED, MemoryBudgetError, divide

SIZE = 1_000
EACH = 4 * SIZE
BESIDE = 9 * EACH
GRAPH = 10_000


def shared(budget, *, device="cpu", least=20, most=100, num_graphs=4, **options):
    return divide(
        budget,
        size=SIZE,
        dtype=torch.float32,
        device=torch.device(device),
        graph=GRAPH,
        num_graphs=num_graphs,
        least=least,
        most=most,
        **options,
    )


def least_budget(**options):
    with pytest.raises(MemoryBudgetError) as caught:
        shared(1, **options)
    return caught.value.needed


@given(extra=st.integers(0, 2_000_000), least=st.integers(4, 30), num_graphs=st.integers(1, 9))
@pytest.mark.parametrize("with_adam", [False, True])
def test_the_shares_add_up_to_no_more_than_the_budget(extra, least, num_graphs, with_adam):
    options = {"least": least, "num_graphs": num_graphs, "with_adam": with_adam}
    budget = least_budget(**options) + extra
    share = shared(budget, **options)
    assert share.basis_bytes >= basis_bytes(SIZE, least, torch.float32, share.basis)
    kept = min(share.graph_bytes, num_graphs * GRAPH)
    held = (share.held_products - 3) * EACH  # three fit where the recurrence was
    beside = BESIDE + (8 * EACH if with_adam else 0) + 2 * GRAPH
    assert share.basis_bytes + kept + held + beside <= budget


def test_a_large_budget_keeps_every_graph_and_product():
    share = shared(10_000_000)
    assert share.basis == "device"
    assert share.graph_bytes >= 4 * GRAPH
    assert share.holds(100)
    assert share.basis_bytes == 100 * EACH


def test_the_least_budget_holds_the_least_basis_at_half_precision():
    needed = least_budget()
    assert needed == BESIDE + 2 * GRAPH + 20 * EACH // 2
    share = shared(needed)
    assert share.basis == "half"
    assert share.graph_bytes == 0
    assert not share.holds(4)
    cpu = torch.device("cpu")
    form = choose_form(
        share.basis, SIZE, 100, dtype=torch.float32, device=cpu, budget=share.basis_bytes, least=20
    )
    assert form == ("half", 20)


def test_an_accelerator_s_basis_goes_to_the_cpu_where_the_budget_does_not_count():
    share = shared(BESIDE + 2 * GRAPH, device="cuda")
    assert share.basis == "cpu"
    assert share.basis_bytes is None


def test_a_gauss_newton_matrix_s_space_is_counted_thrice_and_in_full():
    needed = least_budget(copies=3)
    assert needed == BESIDE + 2 * GRAPH + 3 * 20 * EACH
    share = shared(needed, copies=3)
    assert (share.basis, share.basis_bytes) == ("device", 20 * EACH)


def test_refusal_says_what_it_takes_and_the_ways_out():
    match = r"memory_budget=50 kB does not hold .* takes 96 kB: .*20 vectors 40 kB.* 36 kB.* 20 kB"
    with pytest.raises(MemoryBudgetError, match=match) as caught:
        shared(50_000)
    assert caught.value.needed == 96_000
    assert "micro_batch, num_eigenpairs=1" in str(caught.value)


@pytest.mark.parametrize("budget", [-5, float("inf"), 1e9, "1GB"])
def test_what_is_no_number_of_bytes_is_refused(budget):
    with pytest.raises(ValueError, match=r"memory_budget must be a whole number of bytes.* got"):
        shared(budget)


def test_without_a_budget_everything_is_held():
    assert UNLIMITED.holds(10**6)
    assert UNLIMITED.basis_bytes is UNLIMITED.graph_bytes is None
