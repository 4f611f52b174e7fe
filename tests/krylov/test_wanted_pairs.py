"""Wanted eigenpairs of Krylov spaces, against the dense matrices whose spectra were chosen."""

import math
from dataclasses import replace

import pytest
import torch

from batchlr import DenseOperator
from batchlr.krylov.lanczos_process import LanczosProcess
from batchlr.krylov.wanted_pairs import WantedPairs, least_basis
from test_lanczos import generator, with_spectrum

SIZE = 40
SPECTRUM = torch.cat([torch.linspace(-1, 1, SIZE - 4), torch.tensor([-9.0, -5.0, 4.0, 10.0])])
SPECTRUM = SPECTRUM.double().sort().values
LARGEST = WantedPairs(k=2, which="largest", tol=1e-3, criterion="bound", settle=None)
WHICH = ["largest", "smallest", "both"]


def process(steps, *, unit=1.0, spectrum=SPECTRUM, seed=0, dtype=torch.float64):
    """A Krylov space of so many steps, the dense matrix and its eigenvalues."""
    matrix = unit * with_spectrum(spectrum)
    start = torch.randn(len(spectrum), generator=generator(seed), dtype=torch.float64).to(dtype)
    krylov = LanczosProcess(DenseOperator(matrix.to(dtype)), steps, start / start.norm())
    for _ in range(steps):
        krylov.advance()
    return krylov, matrix, unit * spectrum


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("steps", [8, 20])
def test_pairs_are_those_of_the_matrix_on_the_space(which, k, steps):
    krylov, matrix, _ = process(steps)
    basis = krylov.basis.tensor()
    ritz = torch.linalg.eigvalsh(basis @ matrix @ basis.T).flip(0)
    pairs = replace(LARGEST, k=k, which=which).judge(krylov)
    ends = {"largest": ritz[:k], "smallest": ritz[-k:], "both": torch.cat([ritz[:k], ritz[-k:]])}
    torch.testing.assert_close(pairs.values, ends[which], rtol=0, atol=1e-12)
    vectors = basis.T @ pairs.coefficients
    remainders = matrix @ vectors - vectors * pairs.values
    torch.testing.assert_close(remainders.norm(dim=0), pairs.residuals, rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("seed", range(5))
def test_an_eigenvalue_lies_within_every_bound(unit, seed):
    for steps in (4, 8, 12, 16, 24):
        krylov, _, exact = process(steps, unit=unit, seed=seed)
        pairs = replace(LARGEST, which="both").judge(krylov)
        distances = (exact - pairs.values.unsqueeze(1)).abs().min(1).values
        rounding = SIZE * 10 * torch.finfo(torch.float64).eps  # of making the matrix
        assert (distances <= pairs.bounds + rounding * unit).all()
        assert (pairs.errors <= pairs.bounds).all()
        assert (pairs.bounds <= pairs.residuals * (1 + 1e-12)).all()


def test_the_ends_are_each_other_s_mirror_image():
    """Each is certified from its own side."""
    largest, _, _ = process(5)
    smallest, _, _ = process(5, unit=-1.0)
    above, below = LARGEST.judge(largest), replace(LARGEST, which="smallest").judge(smallest)
    for name in ("bounds", "residuals", "errors"):
        torch.testing.assert_close(getattr(above, name), getattr(below, name).flip(0))
    torch.testing.assert_close(above.values, -below.values.flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [2, 12])
def test_nothing_is_claimed_below_rounding(dtype, steps):
    """Of a space with nothing left to find, and of one where ``residual^2 / gap`` is far below."""
    spectrum = SPECTRUM if steps == 12 else torch.tensor([1.0] * 9 + [10.0]).double()
    krylov, _, _ = process(steps, spectrum=spectrum, dtype=dtype)
    pairs = replace(LARGEST, k=1).judge(krylov)
    least = torch.finfo(dtype).eps * float(krylov.eigh()[0].abs().max())
    for figure in (pairs.residuals, pairs.bounds, pairs.errors):
        assert float(figure) >= least * (1 - 1e-9)
    assert float(pairs.errors) < 100 * least


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(
    ("criterion", "figure"), [("bound", "bounds"), ("residual", "residuals"), ("error", "errors")]
)
def test_a_search_ends_once_the_worst_pair_is_known_to_the_tolerance(which, criterion, figure):
    """Relative to the largest magnitude, which is that of either end."""
    wanted = replace(LARGEST, which=which, criterion=criterion)
    krylov, _, _ = process(6)
    pairs = wanted.judge(krylov)
    worst = float(getattr(pairs, figure).max() / krylov.eigh()[0].abs().max())
    assert 1e-9 < worst < 1  # far above rounding
    assert replace(wanted, tol=worst * 1.001).judge(krylov).converged
    assert not replace(wanted, tol=worst * 0.999).judge(krylov).converged


@pytest.mark.parametrize("settle", WHICH)
def test_of_both_ends_the_one_asked_for_decides(settle):
    """That of the largest is relative to the largest itself, not to the largest magnitude."""
    wanted = replace(LARGEST, k=1, which="both", settle=settle)
    krylov, _, _ = process(9, spectrum=SPECTRUM - 4)  # the smallest is of more than twice the size
    pairs, values = wanted.judge(krylov), krylov.eigh()[0]
    worst = {
        "largest": float(pairs.bounds[0] / values[-1]),
        "smallest": float(pairs.bounds[1] / values.abs().max()),
        "both": float(pairs.bounds.max() / values.abs().max()),
    }[settle]
    assert replace(wanted, tol=worst * 1.001).judge(krylov).converged
    assert not replace(wanted, tol=worst * 0.999).judge(krylov).converged


def test_a_largest_that_is_not_positive_settles_in_the_whole_space_only():
    wanted = replace(LARGEST, k=1, which="both", settle="largest", tol=0.999)
    spectrum = torch.linspace(-2, -1, 6, dtype=torch.float64)
    assert not wanted.judge(process(5, spectrum=spectrum)[0]).converged
    assert wanted.judge(process(6, spectrum=spectrum)[0]).converged


@pytest.mark.parametrize("which", WHICH)
def test_a_restart_keeps_the_wanted_pairs_and_leaves_room_for_new_ones(which):
    for k in range(1, 12):
        wanted = replace(LARGEST, k=k, which=which)
        assert wanted.count == (2 * k if which == "both" else k)
        for capacity in range(wanted.count + 2, 80):
            kept = wanted.kept(capacity)
            assert tuple(kept) == wanted.ends
            assert min(kept.values()) >= k
            assert sum(kept.values()) <= capacity - 2
            if capacity >= least_basis(wanted.count, 10**6):
                assert sum(kept.values()) > wanted.count  # some more speed them up


def test_a_space_needs_no_more_vectors_than_steps():
    assert least_basis(3, 1000) == 14
    assert least_basis(3, 10) == 10


def test_a_matrix_has_so_many_pairs_and_no_more():
    for which, most in (("largest", 7), ("smallest", 7), ("both", 3)):
        replace(LARGEST, which=which, k=most).check_size(7)
        for k in (0, most + 1):
            words = rf"k = {k} pairs \({which}\) are not to be had from a \(7, 7\) matrix"
            with pytest.raises(ValueError, match=words):
                replace(LARGEST, which=which, k=k).check_size(7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"which": "top"}, "which must be 'largest', 'smallest' or 'both', got 'top'"),
        ({"settle": "smallest"}, r"an end that is wanted \(largest\), got 'smallest'"),
        ({"settle": "both"}, r"an end that is wanted \(largest\), got 'both'"),
        ({"which": "both", "settle": "top"}, r"an end that is wanted \(both\), got 'top'"),
        ({"criterion": "value"}, "must be 'bound', 'residual' or 'error', got 'value'"),
        ({"tol": 0.0}, r"tol must lie in \(0, 1\), got 0\.0"),
        ({"tol": 1.0}, r"tol must lie in \(0, 1\), got 1\.0"),
        ({"tol": math.nan}, r"tol must lie in \(0, 1\), got nan"),
    ],
)
def test_illegal_wishes_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(LARGEST, **change)
