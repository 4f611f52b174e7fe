"""The watch must see orthogonality go before it has gone, and let be where it stays."""

import pytest
import torch

from batchlr import DenseOperator, lanczos
from batchlr.krylov import lanczos_process
from batchlr.krylov.krylov_basis import KrylovBasis
from batchlr.krylov.orthogonality import OrthogonalityWatch
from batchlr.lanczos import top_eigenpairs

SIZE, STEPS = 600, 60


def operator(eigenvalues):
    generator = torch.Generator().manual_seed(3)
    turn, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    return DenseOperator((turn * eigenvalues @ turn.T).float())


def bulk():
    """A semicircle: no eigenvalue converges within the steps made."""
    points = torch.arange(1, SIZE + 1, dtype=torch.float64) / (SIZE + 1)
    return torch.cos(torch.pi * points)


def spiked():
    """Eigenvalues far out, which converge in a few steps and would come back as ghosts."""
    values = bulk()
    values[:3] = torch.tensor([100.0, 60.0, 30.0])
    return values


@pytest.fixture(autouse=True)
def _short_vectors_are_watched(monkeypatch):
    monkeypatch.setattr(lanczos_process, "_LARGE", 1)


@pytest.fixture
def sweeps(monkeypatch):
    """Counts the sweeps over the basis."""
    counts = []
    plain = KrylovBasis.orthogonalise_

    def counted(self, vector, *, known=None, sweeps=2):
        counts.append(sweeps)
        return plain(self, vector, known=known, sweeps=sweeps)

    monkeypatch.setattr(KrylovBasis, "orthogonalise_", counted)
    return counts


def overlap(basis):
    basis = basis.double()
    return float((basis @ basis.T - torch.eye(len(basis))).abs().max())


def test_a_bulk_needs_few_sweeps(sweeps):
    found = lanczos(operator(bulk()), STEPS)
    assert sum(sweeps) < STEPS / 2
    assert overlap(found.basis) < 1e-4


def test_spikes_are_watched(sweeps):
    matrix = operator(spiked())
    found = lanczos(matrix, STEPS)
    assert STEPS / 4 < sum(sweeps) <= STEPS + 5
    assert overlap(found.basis) < 1e-4
    values, _ = found.eigh()
    torch.testing.assert_close(values[-3:].float(), torch.tensor([30.0, 60.0, 100.0]))
    assert values[-4] < 1.1  # no ghosts


def test_without_sweeps_the_spikes_come_back(monkeypatch):
    """So the two tests above would fail without the watch."""
    monkeypatch.setattr(OrthogonalityWatch, "due", lambda *_: False)
    found = lanczos(operator(spiked()), STEPS)
    assert overlap(found.basis) > 0.1
    assert found.eigh()[0][-4] > 20


def test_restarts_are_watched():
    pairs = top_eigenpairs(operator(spiked()), 4, tol=1e-4, max_basis=20, max_steps=150)
    assert pairs.converged
    torch.testing.assert_close(pairs.values[:3].float(), torch.tensor([100.0, 60.0, 30.0]))
    assert overlap(pairs.vectors.T) < 1e-4


def three_sweeps(watch, matrix):
    """The first three steps, after which none is due."""
    for m in range(1, 4):
        watch.due(matrix[:m, :m], torch.tensor(1.0))
        watch.swept(torch.full((m,), 1e-7))
    assert not watch.due(matrix[:4, :4], torch.tensor(1.0))


class TestEstimate:
    def test_grows_along_what_has_converged(self):
        """Overlaps are carried on by differences of the diagonal."""
        watch = OrthogonalityWatch(10, torch.float32)
        matrix = torch.diag(torch.tensor([1000.0, 1.0, 1.0, 1.0], dtype=torch.float64))
        for m in range(1, 4):
            assert watch.due(matrix[:m, :m], torch.tensor(1.0))  # the first three in any case
            watch.swept(torch.full((m,), 1e-7))
        assert watch.due(matrix, torch.tensor(1.0))  # (1000 - 1) times the rounding

    def test_sweeps_come_in_pairs(self):
        watch = OrthogonalityWatch(10, torch.float32)
        matrix = torch.zeros(8, 8, dtype=torch.float64)
        three_sweeps(watch, matrix)
        assert watch.due(matrix[:5, :5], torch.tensor(torch.nan))
        watch.swept(torch.full((5,), 1e-7))
        assert watch.due(matrix[:6, :6], torch.tensor(1.0))
        watch.swept(torch.full((6,), 1e-7))
        assert not watch.due(matrix[:7, :7], torch.tensor(1.0))

    def test_is_not_believed_once_it_was_overtaken(self):
        watch = OrthogonalityWatch(12, torch.float32)
        matrix = torch.zeros(12, 12, dtype=torch.float64)
        three_sweeps(watch, matrix)
        assert watch.due(matrix[:5, :5], torch.tensor(torch.nan))
        watch.swept(torch.full((5,), 1e-2))
        assert all(watch.due(matrix[:m, :m], torch.tensor(1.0)) for m in range(6, 10))
