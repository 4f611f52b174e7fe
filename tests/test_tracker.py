"""Tracking along paths of matrices whose eigenvalues are known, and along a training run."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlr import CurvatureTracker, DenseOperator, PreconditionedOperator
from batchlr.curvature_noise import directional_noise
from cases import CASES, BatchMatrices, DiagonalOperator
from test_lanczos import batch_matrices, generator, rotation, with_spectrum

SIZE = 120


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def drifting(seed=0, size=SIZE, speed=0.02):
    """Matrices whose eigenvectors turn and whose outliers grow; with their exact edges."""
    skew = random(size, size, seed=seed)
    turn = torch.linalg.matrix_exp(speed * (skew - skew.T) / math.sqrt(size))
    axes = rotation(size, seed)
    bulk = torch.linspace(-0.5, 1, size - 3, dtype=torch.float64)
    for step in range(30):
        spikes = torch.tensor([3.0, 5.0, 9.0], dtype=torch.float64) * 1.02**step
        spectrum = torch.cat([bulk, spikes])
        matrix = (axes * spectrum) @ axes.T
        yield (matrix + matrix.T) / 2, float(spectrum.max()), float(spectrum.min())
        axes = turn @ axes


class TestTracking:
    def test_a_drifting_edge_at_few_products(self):
        tracker = CurvatureTracker()
        errors, products = [], []
        for matrix, largest, _ in drifting():
            update = tracker.update(DenseOperator(matrix), gradient=matrix @ random(SIZE, seed=4))
            errors.append(abs(update.largest.value - largest) / largest)
            products.append(update.num_products)
            assert update.converged
        assert sum(errors) / len(errors) < 0.01
        assert max(errors) < 0.02
        assert sum(products[1:]) / len(products[1:]) < 2.5
        assert tracker.num_products == sum(products)
        assert tracker.num_updates == 30

    def test_what_a_matrix_maps_to_zero_does_not_shrink_to_subnormal_numbers(self):
        tracker, size = CurvatureTracker(explore_every=1), 60
        null = torch.zeros(size, size)
        for _ in range(12):
            for matrix, _, _ in drifting(size=size // 2):
                null[: size // 2, : size // 2] = matrix.float()
                tracker.update(DenseOperator(null))
                left = tracker.vectors[0][size // 2 :].abs()
                assert bool(((left == 0) | (left > 1e-30)).all())
        assert bool((left == 0).any())

    @pytest.mark.parametrize("unit", [1e-7, 1.0, 1e7])
    def test_units_do_not_matter(self, unit):
        tracker = CurvatureTracker()
        plain = CurvatureTracker()
        for matrix, _, _ in drifting():
            scaled = tracker.update(DenseOperator(unit * matrix))
            update = plain.update(DenseOperator(matrix))
            assert scaled.largest.value == pytest.approx(unit * update.largest.value, rel=1e-9)
            assert scaled.num_products == update.num_products

    def test_values_are_rayleigh_quotients_and_residuals_bound_them(self):
        tracker = CurvatureTracker(ends="both")
        for matrix, largest, smallest in drifting():
            update = tracker.update(DenseOperator(matrix))
            exact = torch.linalg.eigvalsh(matrix)
            for edge in (update.largest, update.smallest):
                assert edge.vector.norm() == pytest.approx(1)
                quotient = float(edge.vector @ matrix @ edge.vector)
                assert edge.value == pytest.approx(quotient, rel=1e-12)
                residual = float((matrix @ edge.vector - quotient * edge.vector).norm())
                assert edge.residual == pytest.approx(residual, rel=1e-6, abs=1e-12)
                assert float((exact - edge.value).abs().min()) <= edge.residual
                assert edge.error <= edge.residual
                assert edge.measured == edge.value
                assert edge.measured.stderr == edge.error
            assert update.largest.value <= largest + 1e-12
            assert update.smallest.value >= smallest - 1e-12

    def test_both_ends_are_followed(self):
        tracker = CurvatureTracker(ends="both")
        products = []
        for step in range(20):
            spectrum = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
            spectrum[0], spectrum[-1] = -4 - 0.1 * step, 6 + 0.1 * step
            update = tracker.update(DenseOperator(with_spectrum(spectrum)))
            assert update.smallest.value == pytest.approx(-4 - 0.1 * step, rel=0.05)
            assert update.largest.value == pytest.approx(6 + 0.1 * step, rel=0.02)
            products.append(update.num_products)
        assert max(products[1:]) <= 6

    def test_a_larger_negative_end_does_not_draw_it_away(self):
        tracker = CurvatureTracker()
        for step in range(20):
            spectrum = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
            spectrum[0], spectrum[1], spectrum[-1] = -40 - step, -30, 6 + 0.1 * step
            update = tracker.update(DenseOperator(with_spectrum(spectrum)))
            # Errors are relative to the largest magnitude.
            assert abs(update.largest.value - 6 - 0.1 * step) <= 0.02 * (40 + step)
            assert update.largest.value > 0

    @pytest.mark.parametrize("with_gradient", [True, False])
    def test_an_eigenvalue_that_overtakes_is_found(self, with_gradient):
        """Two exact eigenvectors cross; the old one, alone, would have no residual for ever."""
        size = 300
        tracker = CurvatureTracker()
        late = 0
        for step in range(60):
            spectrum = torch.linspace(-0.5, 1, size, dtype=torch.float64)
            spectrum[7], spectrum[11] = 5.0, 3.0 + 0.1 * step  # they cross at step 20
            operator = DiagonalOperator(spectrum)
            gradient = spectrum * random(size, seed=step) if with_gradient else None
            update = tracker.update(operator, gradient=gradient)
            true = float(spectrum.max())
            if update.largest.value < 0.98 * true:
                late += 1
        assert late <= 4
        assert update.largest.value == pytest.approx(true, rel=0.02)
        assert tracker.num_products <= 3 * 60

    def test_a_jump_takes_a_longer_run_and_says_so(self):
        tracker = CurvatureTracker(tol=0.03)
        spectrum = torch.cat([torch.linspace(0, 1, SIZE - 1), torch.tensor([3.0])]).double()
        first = tracker.update(DenseOperator(with_spectrum(spectrum)))
        same = tracker.update(DenseOperator(with_spectrum(spectrum)))
        jumped = tracker.update(DenseOperator(with_spectrum(spectrum, seed=5)))
        assert first.fell_back
        assert not same.fell_back
        assert jumped.fell_back
        assert jumped.num_products > tracker.max_products
        assert jumped.largest.value == pytest.approx(3, rel=0.02)

    def test_too_few_products_are_reported_not_hidden(self):
        spectrum = torch.linspace(0, 1, SIZE, dtype=torch.float64)
        tracker = CurvatureTracker(tol=1e-6, max_products=3, max_run=5)
        update = tracker.update(DenseOperator(with_spectrum(spectrum)))
        assert not update.converged
        assert update.num_products == 5
        assert update.largest.error > 1e-6

    @settings(max_examples=25, deadline=None)
    @given(
        size=st.integers(1, 8), seed=st.integers(0, 999), ends=st.sampled_from(["largest", "both"])
    )
    def test_any_small_matrix(self, size, seed, ends):
        matrix = random(size, size, seed=seed)
        matrix = matrix + matrix.T
        tracker = CurvatureTracker(ends=ends, tol=1e-9)
        exact = torch.linalg.eigvalsh(matrix)
        for shift in (0.0, 0.01):
            moved = matrix + shift * torch.eye(size, dtype=torch.float64)
            update = tracker.update(DenseOperator(moved))
            assert update.largest.value == pytest.approx(float(exact[-1]) + shift, abs=1e-6)
            if ends == "both":
                assert update.smallest.value == pytest.approx(float(exact[0]) + shift, abs=1e-6)

    @pytest.mark.parametrize("value", [0.0, -2.0])
    def test_multiples_of_the_identity(self, value):
        tracker = CurvatureTracker(ends="both")
        for _ in range(6):
            update = tracker.update(DenseOperator(value * torch.eye(10)))
            assert update.largest.value == pytest.approx(value)
            assert update.smallest.value == pytest.approx(value)
            assert update.converged

    def test_a_start_in_a_closed_space_does_not_hide_the_rest(self):
        spectrum = torch.linspace(0, 1, SIZE, dtype=torch.float64)
        spectrum[7] = 50.0
        gradient = torch.zeros(SIZE, dtype=torch.float64)
        gradient[3] = 1.0
        update = CurvatureTracker().update(DenseOperator(torch.diag(spectrum)), gradient=gradient)
        assert update.largest.value == pytest.approx(50.0, rel=0.03)

    def test_exploring_at_every_update_finds_what_overtakes_at_once(self):
        values = []
        for every in (1, 8):
            tracker = CurvatureTracker(explore_every=every)
            for step in range(6):
                spectrum = torch.linspace(0, 0.1, SIZE, dtype=torch.float64)
                spectrum[-1], spectrum[-2] = 1.0, 0.9 if step < 5 else 3.0
                update = tracker.update(DenseOperator(torch.diag(spectrum)))
            values.append(update.largest.value)
        assert values[0] == pytest.approx(3.0, rel=0.03)
        assert values[1] <= values[0]

    def test_where_the_edge_turns_quickly_it_starts_at_the_gradient(self):
        """Eigenvectors have nothing to do with those before; the gradient leans towards the top."""
        with_gradient, without = CurvatureTracker(), CurvatureTracker()
        spectrum = torch.linspace(0, 1, SIZE, dtype=torch.float64)
        spectrum[-1] = 5.0
        products = []
        for step in range(12):
            axes = rotation(SIZE, step)
            matrix = (axes * spectrum) @ axes.T
            lean = axes[:, -1] + 0.03 * random(SIZE, seed=step)  # a cosine of 0.95
            told = with_gradient.update(DenseOperator(matrix), gradient=-lean)
            untold = without.update(DenseOperator(matrix))
            assert told.largest.value == pytest.approx(5.0, rel=0.03)
            products.append((told.num_products, untold.num_products))
        assert sum(a for a, _ in products[2:]) <= 2.2 * 10  # one, a residual, at times a look
        assert all(a < b for a, b in products[2:])

    def test_a_last_vector_that_told_nothing_at_all_gives_way(self):
        """Axes that swap are orthogonal to those before, to the last bit: a cosine of 0."""
        tracker = CurvatureTracker(explore_every=1)
        for step in range(8):
            spectrum = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
            matrix = torch.diag(spectrum if step % 2 else spectrum.flip(0))
            gradient = torch.eye(3, dtype=torch.float64)[step % 3]
            update = tracker.update(DenseOperator(matrix), gradient=gradient)
            assert 1 <= update.largest.value < 3.001  # a start within an axis sees no other

    def test_where_it_turns_slowly_a_gradient_that_tells_less_is_left_out(self):
        told, untold = CurvatureTracker(explore_every=99), CurvatureTracker(explore_every=99)
        for step, (matrix, _, _) in enumerate(drifting()):
            # The same start, so that from then on only a share of the gradient could differ.
            gradient = random(SIZE, seed=step)
            one = told.update(DenseOperator(matrix), gradient=gradient)
            other = untold.update(DenseOperator(matrix), gradient=None if step else gradient)
            assert one.largest.value == other.largest.value

    def test_exploring_every_zeroth_update_is_refused(self):
        with pytest.raises(ValueError, match="explore_every must be at least 1, got 0"):
            CurvatureTracker(explore_every=0)

    def test_negative_definite_matrices_have_a_largest_eigenvalue_too(self):
        tracker = CurvatureTracker()
        for step in range(8):
            spectrum = torch.linspace(-9, -2, SIZE, dtype=torch.float64) - 0.01 * step
            spectrum[-1] = -1
            update = tracker.update(DenseOperator(with_spectrum(spectrum)))
        assert update.largest.value == pytest.approx(-1, abs=0.2)  # 2 % of the magnitude


def train(model, operator, steps, lr=0.5):
    """Plain gradient descent; the operator at every step."""
    for _ in range(steps):
        yield operator
        with torch.no_grad():
            gradients = list(operator.batch_gradients())
            mean = sum(n * g for n, g in zip(operator.samples, gradients, strict=True))
            mean = mean / sum(operator.samples)
            first = 0
            for parameter in model.parameters():
                count = parameter.numel()
                parameter -= lr * mean[first : first + count].view_as(parameter)
                first += count


class TestNetworks:
    def test_training_against_all_eigenvalues_of_the_dense_hessian(self):
        problem = CASES["mlp-tanh"]()
        operator = problem.operator("hessian")
        tracker = CurvatureTracker()
        errors, products = [], []
        for here in train(problem.model, operator, 8):
            dense = here @ torch.eye(problem.size, dtype=torch.float64)
            exact = float(torch.linalg.eigvalsh(dense)[-1])
            update = tracker.update(here)
            errors.append(abs(update.largest.value - exact) / exact)
            products.append(update.num_products)
        assert sum(errors) / len(errors) < 0.02
        assert sum(products[1:]) / len(products[1:]) <= 3

    def test_a_preconditioned_matrix_takes_its_own_gradient(self):
        problem = CASES["mlp-tanh"]()
        operator = problem.operator("hessian")
        scale = 0.5 + torch.rand(problem.size, dtype=torch.float64, generator=generator())
        tracker = CurvatureTracker()
        for here in train(problem.model, operator, 4):
            preconditioned = PreconditionedOperator(here, scale)
            slope = scale * next(here.batch_gradients())
            update = tracker.update(preconditioned, gradient=slope)
            dense = preconditioned @ torch.eye(problem.size, dtype=torch.float64)
            exact = float(torch.linalg.eigvalsh(dense)[-1])
            assert update.largest.value == pytest.approx(exact, rel=0.05)

    def test_nothing_of_the_model_changes(self):
        problem = CASES["preresnet-train"]()
        model = problem.model
        before = {name: t.clone() for name, t in model.state_dict().items()}
        modes = [m.training for m in model.modules()]
        state = torch.get_rng_state()
        CurvatureTracker(with_noise=True).update(problem.operator("hessian"))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])
        assert [m.training for m in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), state)


class TestNoise:
    def test_the_subspace_is_that_of_the_batches(self):
        tracker = CurvatureTracker(with_noise=True)
        for _ in range(3):
            operator = batch_matrices()
            space = tracker.update(operator).subspace
            dense = space.axes.T @ operator.matrices @ space.axes
            assert (space.matrices - dense).abs().max() < 1e-11
            assert space.weights.sum() == pytest.approx(1)

    def test_noise_is_that_of_one_more_product_but_takes_none(self):
        tracker = CurvatureTracker(with_noise=True)
        tracker.update(batch_matrices())
        operator = batch_matrices()
        update = tracker.update(operator)
        assert not update.fell_back
        assert update.num_products == operator.num_products == len(update.subspace.values)
        axes = update.subspace.axes
        expected = directional_noise(operator, axes[:, 0].contiguous(), others=axes[:, 1:])
        for name in ("parallel", "orthogonal", "outside"):
            ours, theirs = getattr(update.noise, name), getattr(expected, name)
            assert ours == pytest.approx(theirs, rel=1e-9)
            assert ours.stderr == pytest.approx(theirs.stderr, rel=1e-9)
        torch.testing.assert_close(update.noise.others, expected.others)

    def test_after_a_longer_run_it_takes_one(self):
        tracker = CurvatureTracker(with_noise=True, max_products=1, tol=1e-6)
        operator = batch_matrices()
        update = tracker.update(operator)
        assert update.fell_back
        axes = update.subspace.axes
        assert update.num_products == operator.num_products
        expected = directional_noise(operator, axes[:, 0].contiguous(), others=axes[:, 1:])
        assert update.noise.parallel == pytest.approx(expected.parallel, rel=1e-9)

    def test_it_finds_the_same_edge_without_it(self):
        plain, noisy = CurvatureTracker(), CurvatureTracker(with_noise=True)
        for _ in range(3):
            a, b = plain.update(batch_matrices()), noisy.update(batch_matrices())
            assert a.subspace is a.noise is None
            assert a.largest.value == pytest.approx(b.largest.value, rel=1e-9)


class TestState:
    def test_a_resumed_tracker_goes_on_bit_identically(self):
        path = [  # towards the top, so that starts have a share of it
            (DenseOperator(matrix), matrix @ (matrix @ random(SIZE, seed=4)))
            for matrix, _, _ in drifting(speed=0.6)
        ]
        one = CurvatureTracker(ends="both")
        for operator, gradient in path[:5]:
            one.update(operator, gradient=gradient)
        other = CurvatureTracker(ends="both")
        other.load_state_dict(one.state_dict())
        for operator, gradient in path[5:12]:
            a, b = (t.update(operator, gradient=gradient) for t in (one, other))
            assert a.largest.value == b.largest.value
            assert torch.equal(a.smallest.vector, b.smallest.vector)
        assert one.num_products == other.num_products

    def test_going_on_does_not_change_the_state_that_was_read(self):
        one, other = CurvatureTracker(), CurvatureTracker()
        matrices = [matrix for matrix, _, _ in drifting()]
        one.update(DenseOperator(matrices[0]))
        state = one.state_dict()
        before = {name: state["trails"]["largest"][name].clone() for name in ("vector", "explorer")}
        other.load_state_dict(state)
        other.update(DenseOperator(matrices[9]))
        for name, tensor in before.items():
            assert torch.equal(state["trails"]["largest"][name], tensor)

    def test_the_state_is_a_copy(self):
        tracker = CurvatureTracker()
        tracker.update(DenseOperator(torch.diag(torch.arange(1.0, 6.0))))
        state = tracker.state_dict()
        state["trails"]["largest"]["vector"].zero_()
        assert tracker.vectors[0].norm() == pytest.approx(1)

    def test_a_state_of_other_ends_is_refused(self):
        state = CurvatureTracker(ends="both").state_dict()
        with pytest.raises(ValueError, match=r"the state is of ends \['largest', 'smallest'\]"):
            CurvatureTracker().load_state_dict(state)

    def test_a_failed_update_leaves_it_as_it_was(self):
        tracker = CurvatureTracker()
        good = torch.diag(torch.arange(1.0, 6.0))
        tracker.update(DenseOperator(good))
        before, products = tracker.vectors[0].clone(), tracker.num_products
        bad = good.clone()
        bad[4, 4] = math.inf
        with pytest.raises(ArithmeticError, match="products are not finite"):
            tracker.update(DenseOperator(bad))
        assert torch.equal(tracker.vectors[0], before)
        assert (tracker.num_products, tracker.num_updates) == (products, 1)
        assert tracker.update(DenseOperator(good)).largest.value == pytest.approx(5, rel=0.02)


class TestRefuses:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"ends": "smallest"}, "ends must be 'largest' or 'both', got 'smallest'"),
            ({"tol": 0.0}, r"tol must lie in \(0, 1\), got 0.0"),
            ({"tol": math.nan}, r"tol must lie in \(0, 1\), got nan"),
            ({"max_products": 0}, "max_products must lie between 1 and max_run, got 0"),
            ({"max_products": 9, "max_run": 8}, "got 9 and a max_run of 8"),
        ],
    )
    def test_illegal_options(self, options, words):
        with pytest.raises(ValueError, match=words):
            CurvatureTracker(**options)

    def test_a_matrix_of_another_size(self):
        tracker = CurvatureTracker()
        tracker.update(DenseOperator(torch.eye(5)))
        with pytest.raises(
            ValueError, match=r"follows a \(5, 5\) matrix, got one of shape \(4, 4\)"
        ):
            tracker.update(DenseOperator(torch.eye(4)))

    def test_a_gradient_that_does_not_fit(self):
        with pytest.raises(ValueError, match=r"expected a vector \(5,\).* got shape \(4,\)"):
            CurvatureTracker().update(DenseOperator(torch.eye(5)), gradient=torch.ones(4))

    def test_noise_without_batches(self):
        tracker = CurvatureTracker(with_noise=True)
        words = "with_noise needs an operator of two or more batches, got DenseOperator"
        with pytest.raises(TypeError, match=words):
            tracker.update(DenseOperator(torch.eye(5)))
        single = BatchMatrices(torch.eye(5).double().unsqueeze(0), (3,))
        with pytest.raises(TypeError, match="two or more batches, got BatchMatrices"):
            tracker.update(single)
