"""Predicted rates beside three measured limits: mean-square, typical, survivable.

Weights frozen, a small perturbation follows the optimizer on the quadratic of the Gauss-Newton
matrix (null and negative curvature never shrink), in all its directions or, for networks of more
than a thousand weights, its leading ones:

(a) mean-square: the rate at which the second moment of the perturbation stops shrinking, from the
    exact covariance of the per-sample matrices. Where batch norm in train mode makes the samples of
    a batch interact there are none: cloned replicas on random batches, in all directions;
(b) typical: the rate at which its mean log-growth reaches zero, simulated on random batches (not
    where samples interact);
(c) survivable: the largest rate at which real training from the same weights does not diverge.

The reference for (a) and (b) is built here from autograd and scipy alone; only the prediction and
the loop of (c) are the library's. Finished cells are kept in the results file and skipped.

    python benchmarks/stable_rate.py                      # a selection: about an hour
    python benchmarks/stable_rate.py --all                # every cell: hours
    python benchmarks/stable_rate.py --only mlp-digits    # one problem, a few minutes
    python benchmarks/stable_rate.py --again              # predictions by the library as it is now
    python benchmarks/stable_rate.py --replicas           # how far they are from the exact limits
    python benchmarks/stable_rate.py --table
"""

import argparse
import json
import math
import time
from pathlib import Path

import cloned_replicas
import numpy as np
import torch
from scipy.optimize import brentq
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.func import (
    functional_call,
    grad,
    jacrev,
    jvp,
    replace_all_batch_norm_modules_,
    vjp,
    vmap,
)

from batchlr import measure_curvature, supervised
from batchlr.training.data import load_data
from batchlr.training.models import build_model
from batchlr.training.survival import largest_survivable_lr

RESULTS = Path(__file__).resolve().parent / "results" / "stable_rate.jsonl"
SAMPLES = 1280  # the data set of every problem; all of them are measured for the prediction
FLOOR = 0.002  # least curvature followed, relative to the top: with 0.02 limits rise by up to 30 %
ROUNDING = 1e-6  # likewise, of those small enough to follow every direction
EVERY = 1000  # parameters up to which every direction with any curvature is followed
DIRECTIONS = 120  # leading ones of larger networks
POINTS = {"start": 0, "middle": 150}  # steps of training before
BATCHES = (4, 16, 64, 256, 1024)
FEWER = {"preresnet": (16, 64), "vgg_bn": (64,)}  # where a cell takes replicas, 2 to 20 minutes
MOMENTA = {False: (0.0, 0.5, 0.9), True: (0.0, 0.9)}  # True: where samples interact
SURVIVED = ((16, 0.0), (16, 0.9), (256, 0.0), (256, 0.9))  # (B, momentum) of part (c)
COUPLED = ("vgg_bn", "preresnet")  # batch norm in train mode: samples of a batch interact
MEASURED = 40  # batches at most that a prediction is measured on, where samples interact
# Batches for the mean square of their gradients where samples interact. Of 64, weights that few
# samples reach looked dead, and any other batch ran away along them (docs/log.md).
GRADIENTS = 1024
CHUNK = 16  # products differentiated together: more take memory and save no time
STEPS = 100  # of a run in part (c)
TASKS = {
    "digits": lambda size: load_data("digits", seed=0, image_size=size),
    "synthetic": lambda size: load_data(
        "synthetic", seed=0, num_samples=SAMPLES, num_test_samples=10, num_classes=10,
        image_size=size, channels=1, noise=1.0,
    ),
}  # fmt: skip
MODELS = {
    "mlp": (8, "mlp", {"hidden": [12], "activation": "tanh"}),
    "vgg": (32, "vgg", {"depth": 11, "width": 0.0625, "batch_norm": False}),
    "vgg_bn": (32, "vgg", {"depth": 11, "width": 0.0625, "batch_norm": True}),
    "preresnet": (8, "preresnet", {"depth": 8, "block": "basic", "width": 0.5}),
}


class Problem:
    """A network after some steps of training, its data, and its Jacobians along directions."""

    def __init__(self, model, task, steps):
        size, kind, options = MODELS[model]
        torch.manual_seed(0)
        data = TASKS[task](size)
        rows = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:SAMPLES]
        self.x, self.y = next(iter(data.train.batches([rows], device=torch.device("cpu"))))
        self.model = build_model(
            kind, num_classes=10, in_channels=data.in_channels, image_size=size, **options
        ).train()
        self.coupled = model in COUPLED
        # running averages are no part of what a training step sees, and vmap cannot write them
        replace_all_batch_norm_modules_(self.model)
        self.loss_fn = supervised(torch.nn.CrossEntropyLoss())
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.03, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            rows = torch.randperm(SAMPLES, generator=generator)[:32]
            optimizer.zero_grad()
            self.loss_fn(self.model, (self.x[rows], self.y[rows])).backward()
            optimizer.step()
        optimizer.zero_grad()
        self.parameters = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        self.buffers = {k: v.detach().clone() for k, v in self.model.named_buffers()}
        self.size = sum(v.numel() for v in self.parameters.values())

    def outputs(self, x):
        def logits(p):
            buffers = {k: v.clone() for k, v in self.buffers.items()}
            return functional_call(self.model, (p, buffers), (x,))

        return logits

    def unflatten(self, vector):
        parts, start = {}, 0
        for name, value in self.parameters.items():
            parts[name] = vector[start : start + value.numel()].reshape(value.shape)
            start += value.numel()
        return parts

    def products(self, scale):
        """``(rows (R, B), w (R, P)) -> (R, P)``: each ``w`` with the matrix of its own batch."""

        def product(x, w):
            function = self.outputs(x)
            logits, tangent = jvp(function, (self.parameters,), (self.unflatten(w),))
            p = torch.softmax(logits, 1)
            inner = p * tangent - p * (p * tangent).sum(1, keepdim=True)
            (pulled,) = vjp(function, self.parameters)[1](inner / len(x))
            return torch.cat([pulled[name].reshape(-1) for name in self.parameters])

        each = vmap(product, chunk_size=CHUNK)
        return lambda rows, w: scale * each(self.x[rows], scale * w)

    def root_jacobian(self):
        """``R_i J_i`` of every sample ``(SAMPLES, 10, P)``, float32."""

        def logits(p, x):
            return functional_call(self.model, (p, self.buffers), (x[None],))[0]

        parts = []
        for rows in torch.arange(SAMPLES).split(64):
            each = vmap(jacrev(logits), (None, 0))(self.parameters, self.x[rows])
            flat = torch.cat([g.reshape(len(rows), 10, -1) for g in each.values()], 2)
            p = torch.softmax(self.model(self.x[rows]).detach(), 1)
            inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            values, vectors = torch.linalg.eigh(inner.double())
            roots = values.clamp(min=0).sqrt()[:, :, None] * vectors.transpose(1, 2)
            parts.append(roots.float() @ flat.detach())
        return torch.cat(parts)

    def scale(self, batch_size, adam):
        """``D^-1/2`` ``(P,)`` of Adam at ``batch_size``; ones for SGD."""
        if not adam:
            return torch.ones(self.size)
        return (self.second_moment(batch_size).clamp(min=0).sqrt() + 1e-8).rsqrt()

    def second_moment(self, batch_size):
        """``E g_B^2`` ``(P,)`` of batches drawn without replacement."""
        if self.coupled:
            squares = torch.zeros(self.size)
            groups = random_batches(batch_size, GRADIENTS)
            for rows in groups:
                function = self.outputs(self.x[rows])

                def batch_loss(p, f=function, y=self.y[rows]):
                    return torch.nn.functional.cross_entropy(f(p), y)

                gradients = grad(batch_loss)(self.parameters)
                squares += torch.cat([g.reshape(-1) for g in gradients.values()]) ** 2
            return squares / len(groups)
        total, squares = torch.zeros(self.size), torch.zeros(self.size)

        def loss(p, x, y):
            logits = functional_call(self.model, (p, self.buffers), (x[None],))
            return torch.nn.functional.cross_entropy(logits, y[None])

        for rows in torch.arange(SAMPLES).split(64):
            each = vmap(grad(loss), (None, 0, 0))(self.parameters, self.x[rows], self.y[rows])
            flat = torch.cat([g.reshape(len(rows), -1) for g in each.values()], 1)
            total, squares = total + flat.sum(0), squares + (flat**2).sum(0)
        mean = total / SAMPLES
        variance = (squares / SAMPLES - mean**2) * SAMPLES / (SAMPLES - 1)
        return mean**2 + variance * (1 / batch_size - 1 / SAMPLES)


def random_batches(batch_size, count, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(SAMPLES, generator=generator)[:batch_size] for _ in range(count)]


class Quadratic:
    """Mean curvature and its fluctuations on the leading directions, a mean over samples."""

    def __init__(self, problem, batch_size, scale):
        self.batch_size, self._pool = batch_size, None
        self.moment = None  # the last one that grew, to start the next search from
        jacobian = problem.root_jacobian() * scale
        flat = jacobian.reshape(-1, problem.size)
        count, floor = DIRECTIONS, FLOOR
        if problem.size <= EVERY:
            count, floor = problem.size, ROUNDING
        generator = torch.Generator().manual_seed(0)
        axes = torch.linalg.qr(torch.randn(problem.size, count, generator=generator))[0]
        for _ in range(0 if count == problem.size else 6):  # subspace iteration: the dynamics
            axes = torch.linalg.qr(flat.T @ (flat @ axes))[0]  # are restricted to its result
        factors = (flat @ axes).double().numpy().reshape(SAMPLES, 10, count)
        rotation = self._leading(
            factors.reshape(-1, count).T @ factors.reshape(-1, count) / SAMPLES, floor
        )
        self.factors = (factors @ rotation).astype(np.float32)
        self.inverse = 1 / self.batch_size - 1 / SAMPLES

    def resize(self, batch_size):
        """Speak for batches of another size."""
        if batch_size != self.batch_size:
            self._pool = None
        self.batch_size, self.inverse = batch_size, 1 / batch_size - 1 / SAMPLES

    def _leading(self, mean, floor):
        """Eigenvectors ``(k, kept)`` of ``mean``; keeps their values."""
        values, rotation = np.linalg.eigh(mean)
        kept = values > floor * values[-1]
        self.values = values[kept]
        return rotation[:, kept]

    def spread(self, moment):
        """``E D X D`` of a batch's deviation ``D`` from the mean."""
        values = self.values
        f, k = self.factors, len(values)
        flat = f.reshape(-1, k)
        inner = (flat @ moment.astype(np.float32)).reshape(f.shape) @ f.transpose(0, 2, 1)
        raw = (inner @ f).reshape(-1, k).T @ flat / np.float64(len(f))
        centred = raw - values[:, None] * moment * values
        return centred * len(f) / (len(f) - 1) * self.inverse

    def step(self, generator, w):
        """``G_B w`` of a random batch, ``w`` ``(k, replicas)``."""
        if self.batch_size <= 64:  # cheaper than to read a stored matrix
            rows = generator.choice(SAMPLES, self.batch_size, replace=False)
            f = self.factors[rows].reshape(-1, len(self.values))
            return f.T @ (f @ w) / self.batch_size
        if self._pool is None:
            self._pool = np.empty((150, len(self.values), len(self.values)), np.float32)
            for index, rows in enumerate(random_batches(self.batch_size, 150, seed=3)):
                f = self.factors[rows.numpy()].reshape(-1, len(self.values))
                self._pool[index] = f.T @ f / self.batch_size
        return self._pool[generator.integers(150)] @ w


def impulse_response(values, lr, momentum, averaged):
    """``sum_t c_i(t) c_j(t)`` of heavy-ball descent, from its discrete Lyapunov equation."""
    gain = 1 - momentum if averaged else 1.0
    count = len(values)
    step = np.zeros((count, 2, 2))
    step[:, 0, 0], step[:, 0, 1] = 1 - lr * gain * values, -lr * momentum
    step[:, 1, 0], step[:, 1, 1] = gain * values, momentum
    push = gain * np.array([-lr, 1.0])
    pairs = np.einsum("iab,jcd->ijacbd", step, step).reshape(count, count, 4, 4)
    right = np.broadcast_to(np.outer(push, push).reshape(4, 1), (count, count, 4, 1))
    return np.linalg.solve(np.eye(4) - pairs, right)[..., 0, 0]


def mean_square_limit(quadratic, momentum, averaged):
    """Limit (a), to 1 %: where the spectral radius of noise times response reaches 1.

    Noise and response are both symmetric in the second moment, so their product is made so by the
    response's root, and the radius comes from Lanczos. Its inverse is nearly straight in 1/rate.
    """
    values = quadratic.values
    least = values[-1] * ((1 - momentum) if averaged else 1) / (2 * (1 + momentum))
    count = len(values)
    start = np.eye(count).ravel() if quadratic.moment is None else quadratic.moment

    def below(inverse):
        nonlocal start
        root = np.sqrt(impulse_response(values, 1 / inverse, momentum, averaged))

        def multiply(flat):
            moment = flat.reshape(count, count) * root
            return (root * quadratic.spread((moment + moment.T) / 2)).ravel()

        operator = LinearOperator((count**2, count**2), matvec=multiply, dtype=float)
        found, vectors = eigsh(operator, k=1, which="LA", v0=start, ncv=6, tol=0.05)
        start = vectors[:, 0]
        return 1 / found[0] - 1  # the error is about the square of the tolerance

    low = least * (1 + 1e-6)
    if below(low) >= 0:
        return 1 / least
    high, level = 2 * low, below(2 * low)
    while level < 0:
        low, high = high, high / min(max(1 + level, 0.1), 0.7)
        level = below(high)
    quadratic.moment = start
    return 1 / brentq(below, low, high, xtol=1e-9, rtol=1e-2)


def typical_limit(quadratic, momentum, averaged, steps=1000, replicas=4):
    """Limit (b): where the mean log-growth on random batches reaches 0."""
    gain = 1 - momentum if averaged else 1.0
    count = len(quadratic.values)

    def growth(log_lr):
        generator = np.random.default_rng(4)
        lr = math.exp(log_lr)
        w = generator.normal(size=(count, replicas)).astype(np.float32)
        v = np.zeros_like(w)
        total = 0.0
        for step in range(steps):
            v = momentum * v + gain * quadratic.step(generator, w)
            w = w - lr * v
            norm = np.sqrt((w**2).sum(0) + lr**2 * (v**2).sum(0))
            w, v = w / norm, v / norm
            if step >= steps // 5:
                total += np.log(norm).mean()
        return total / (steps - steps // 5)

    # below its limit the least stiff direction decays at its own, slow rate: zero is not crossed
    # by noise there as long as the run is longer than that rate
    top = 2 * (1 + momentum) / quadratic.values[-1] / ((1 - momentum) if averaged else 1)
    low, high = math.log(top) - 9, math.log(top) + 3
    grid = np.arange(high, low, -0.7)
    above = high
    for log_lr in grid:
        if growth(log_lr) <= 0:
            return math.exp(brentq(growth, log_lr, above, xtol=0.03)) if above > log_lr else top
        above = log_lr
    return math.exp(low)


def limit_by_replicas(problem, cell):
    """Limit (a) in all directions, to some percent; the search begins at the prediction."""
    adam, batch_size = cell["optimizer"] == "adam", cell["batch"]
    product = problem.products(problem.scale(batch_size, adam))
    dynamics = cloned_replicas.Dynamics(cell["momentum"], averaged=adam)

    def level(lr):
        return cloned_replicas.growth(
            product, dynamics, lr, size=problem.size, samples=SAMPLES, batch_size=batch_size
        )

    return cloned_replicas.limit(level, cell["ggn_mean-square"])


def check_replicas(rows, names):
    """Their limits over the exact ones, where all directions are followed."""
    where, problem = None, None
    for row in rows:
        # the others are not followed in all directions
        if row["problem"] not in names or not row["problem"].startswith("mlp"):
            continue
        if where != (row["problem"], row["point"]):
            where = row["problem"], row["point"]
            problem = Problem(*row["problem"].rsplit("-", 1), POINTS[row["point"]])
        ratio = limit_by_replicas(problem, row) / row["mean_square"]
        print(*where, row["optimizer"], row["momentum"], row["batch"], f"{ratio:.2f}", flush=True)


def predict(problem, batch_size, adam, cache):
    """Reports on which the prediction rests, from batches as near to ``batch_size`` as matters.

    One measurement on batches of the smallest size serves SGD at all sizes unless samples interact:
    80 batches of 16 of the same samples scatter by 15 % where single samples limit (docs/log.md).
    Adam's preconditioner is measured nearer to the size asked for.
    """
    near = min(max(batch_size, 16), SAMPLES // 8) if adam else BATCHES[0]
    cut = batch_size if problem.coupled else near
    if (cut, adam) not in cache:
        rows = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(5))
        count = min(SAMPLES // cut, MEASURED if problem.coupled else SAMPLES)
        whole = rows[: count * cut].split(cut)
        cache[cut, adam] = {
            matrix: measure_curvature(
                problem.model, problem.loss_fn, [(problem.x[r], problem.y[r]) for r in whole],
                dataset_size=SAMPLES, matrix=matrix, tol=1e-2, max_products=30, num_small_batches=0,
                optimizer="adam" if adam else "sgd",
            )
            for matrix in (("ggn",) if problem.coupled else ("ggn", "hessian"))
        }  # fmt: skip
    return cache[cut, adam]


def predictions(problem, cell, cache):
    """What every rule says of a cell."""
    found = {}
    measured = predict(problem, cell["batch"], cell["optimizer"] == "adam", cache)
    options = {"optimizer": cell["optimizer"], "momentum": cell["momentum"]}
    for matrix, report in measured.items():
        for rule in ("mean-square", "top-direction", "paper"):
            bound = report.max_lr(cell["batch"], rule=rule, **options)
            found[f"{matrix}_{rule}"] = bound.value
            if rule == "mean-square":
                found[f"{matrix}_low"], found[f"{matrix}_high"] = bound.low, bound.high
                found[f"{matrix}_reasons"] = bound.reasons
    return found


def predict_again(rows, names):
    """Today's predictions for finished cells of these problems; their limits stay."""
    problem, reports, here = None, {}, None
    for row in rows:
        if row["problem"] not in names:
            continue
        if here != (row["problem"], row["point"]):
            here = row["problem"], row["point"]
            problem, reports = Problem(*row["problem"].rsplit("-", 1), POINTS[row["point"]]), {}
        row |= predictions(problem, row, reports)
        print(*here, row["optimizer"], row["momentum"], row["batch"], flush=True)


def selected(cell):
    """Whether a cell is among those that take about an hour in all."""
    model, task = cell["problem"].rsplit("-", 1)
    if model in COUPLED:
        chosen = task == "digits" and cell["batch"] == 64
        return chosen and cell["optimizer"] == "sgd" and cell["momentum"] == 0.9
    sizes = (256,) if cell["optimizer"] == "adam" else (16, 256)
    return cell["batch"] in sizes and cell["momentum"] in (0.0, 0.9)


def cells(problem_name, points):
    model = problem_name.rsplit("-", 1)[0]
    coupled = model in COUPLED
    with_adam = BATCHES if model == "mlp" else (64,) if coupled else (16, 256)
    for point in points:
        for batch_size in FEWER.get(model, BATCHES):
            for momentum in MOMENTA[coupled]:
                yield {"problem": problem_name, "point": point, "optimizer": "sgd",
                       "momentum": momentum, "batch": batch_size}  # fmt: skip
            if batch_size in with_adam:
                yield {"problem": problem_name, "point": point, "optimizer": "adam",
                       "momentum": 0.9, "batch": batch_size}  # fmt: skip


def run(problem_name, points, finished, path, every):
    """The cells of one network and task: ``every`` one or those of a selection."""
    model, task = problem_name.rsplit("-", 1)
    problem, quadratics, reports = None, {}, {}
    for cell in cells(problem_name, points):
        key = tuple(cell.values())
        if key in finished or not (every or selected(cell)):
            continue
        began = time.perf_counter()
        if problem is None or problem[0] != cell["point"]:
            problem = cell["point"], Problem(model, task, POINTS[cell["point"]])
            quadratics, reports = {}, {}
        here, batch_size = problem[1], cell["batch"]
        row = dict(cell) | predictions(here, cell, reports)
        if here.coupled:
            row["mean_square"] = limit_by_replicas(here, row)
        else:
            adam = cell["optimizer"] == "adam"
            which = (adam, batch_size if adam else 0)
            if which not in quadratics:
                quadratics = {which: Quadratic(here, batch_size, here.scale(batch_size, adam))}
            quadratic = quadratics[which]
            quadratic.resize(batch_size)
            row |= {"directions": len(quadratic.values), "curvature": quadratic.values[-1]}
            row["mean_square"] = mean_square_limit(quadratic, cell["momentum"], adam)
            row["typical"] = typical_limit(quadratic, cell["momentum"], adam)
        # batch norm survives rates far above the limit, so that many runs are needed to find it
        affordable = ((16, 0.9),) if here.coupled else SURVIVED
        if (batch_size, cell["momentum"]) in affordable:
            matrix = "ggn" if here.coupled else "hessian"
            try:
                row["survived"] = largest_survivable_lr(
                    here.model, here.loss_fn, (here.x, here.y), optimizer=cell["optimizer"],
                    momentum=cell["momentum"], batch_size=batch_size,
                    start=row[f"{matrix}_mean-square"], steps=STEPS, worst_loss=math.log(10),
                ).lr  # fmt: skip
            except ArithmeticError:
                row["survived"] = 0.0
        row["seconds"] = time.perf_counter() - began
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{problem_name} {cell['point']} {cell['optimizer']} {cell['momentum']} "
            f"B={batch_size}: exact/predicted {row['mean_square'] / row['ggn_mean-square']:.2f}",
            flush=True,
        )


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows):
    """Markdown: the ratios to the mean-square limit, and how many cells lie within bounds."""
    lines = [
        "| problem | point | optimizer | momentum | "
        + " | ".join(f"B={b}" for b in BATCHES)
        + " |",
        "|---" * (4 + len(BATCHES)) + "|",
    ]
    groups = {}
    for row in rows:
        key = (row["problem"], row["point"], row["optimizer"], row["momentum"])
        groups.setdefault(key, {})[row["batch"]] = row
    for key, group in groups.items():
        entries = []
        for batch_size in BATCHES:
            row = group.get(batch_size)
            if row is None:
                entries.append("")
                continue
            exact = row["mean_square"]
            text = f"**{exact / row['ggn_mean-square']:.2f}**"
            text += f", {row['typical'] / exact:.1f}" if "typical" in row else ", -"
            if "survived" in row:
                text += f", {row['survived'] / exact:.1f}"
            entries.append(text)
        lines.append("| " + " | ".join(map(str, key)) + " | " + " | ".join(entries) + " |")
    lines.append("\nBold: limit (a), exact over predicted; then (b) over (a); then (c) over (a).\n")
    lines.append("| optimizer | rule | cells | in [0.8, 1.25] | in [0.6, 1.7] | range |")
    lines.append("|---|---|---|---|---|---|")
    for optimizer in ("sgd", "adam"):
        chosen = [row for row in rows if row["optimizer"] == optimizer]
        for matrix in ("ggn", "hessian"):
            for rule in ("mean-square", "top-direction", "paper"):
                ratios = np.array(
                    [
                        r["mean_square"] / r[f"{matrix}_{rule}"]
                        for r in chosen
                        if f"{matrix}_{rule}" in r
                    ]
                )
                if len(ratios) == 0:
                    continue
                near = ((ratios >= 0.8) & (ratios <= 1.25)).mean()
                far = ((ratios >= 0.6) & (ratios <= 1.7)).mean()
                lines.append(
                    f"| {optimizer} | {rule} ({matrix}) | {len(ratios)} | {near:.0%} | {far:.0%} | "
                    f"{ratios.min():.2f} .. {ratios.max():.2f} |"
                )
    outside = [r for r in rows if not 0.8 <= r["mean_square"] / r["ggn_mean-square"] <= 1.25]
    lines.append("\nOutside [0.8, 1.25] with the default rule:\n")
    for row in outside:
        inside = row["ggn_low"] <= row["mean_square"] <= row["ggn_high"]
        lines.append(
            f"- {row['problem']} {row['point']} {row['optimizer']} momentum {row['momentum']} "
            f"B={row['batch']}: {row['mean_square'] / row['ggn_mean-square']:.2f} "
            f"(the 90 % interval {'holds' if inside else 'misses'} it)"
        )
    return "\n".join(lines)


def picture(rows, path):
    from matplotlib.figure import Figure

    names = list(dict.fromkeys((r["problem"], r["point"]) for r in rows))
    figure = Figure(figsize=(12, 2.6 * math.ceil(len(names) / 4)), layout="constrained")
    for index, name in enumerate(names):
        ax = figure.add_subplot(math.ceil(len(names) / 4), 4, index + 1)
        for colour, momentum in enumerate(MOMENTA[False]):
            group = [r for r in rows if (r["problem"], r["point"]) == name
                     and r["optimizer"] == "sgd" and r["momentum"] == momentum]  # fmt: skip
            sizes = [r["batch"] for r in group]
            ax.plot(sizes, [r["ggn_mean-square"] for r in group], f"C{colour}", label=f"{momentum}")
            ax.plot(sizes, [r["mean_square"] for r in group], f"C{colour}o", markersize=4)
        ax.set(xscale="log", yscale="log", title=" ".join(name))
    figure.axes[0].legend(title="momentum")
    figure.supxlabel("batch size")
    figure.supylabel("rate: predicted (line), exact mean-square limit (points)")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [f"{model}-{task}" for model in MODELS for task in TASKS]
    parser.add_argument("--only", action="append", choices=names)
    parser.add_argument("--point", action="append", choices=POINTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    parser.add_argument("--all", action="store_true", help="every cell, not a selection")
    parser.add_argument("--again", action="store_true", help="only predict finished cells anew")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--replicas", action="store_true", help="compare them with exact limits")
    options = parser.parse_args()
    rows = read(options.out)
    if options.replicas:
        check_replicas(rows, options.only or names)
        return
    if options.again:
        predict_again(rows, options.only or names)
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif not options.table:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        keys = ("problem", "point", "optimizer", "momentum", "batch")
        finished = {tuple(row[key] for key in keys) for row in rows}
        for name in options.only or names:
            run(name, options.point or POINTS, finished, options.out, options.all)
        rows = read(options.out)
    print(table(rows))
    if options.picture:
        picture(rows, options.picture)


if __name__ == "__main__":
    main()
