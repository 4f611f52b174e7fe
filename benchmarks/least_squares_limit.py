"""The mean-square rate beside the exact threshold, on random least-squares problems.

The rival is the exact mean-square limit of Mulayoff & Michaeli (2024), from the full second-moment
operator. A positive error is on the unsafe side.

    python benchmarks/least_squares_limit.py --problems 400
"""

import argparse

import numpy as np

from batchlr import max_sgd_lr

SAMPLES, DIMENSION = 60, 5
BATCHES = (1, 2, 4, 8, 16, 32)
BINS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of lambda_2 / lambda_1


def exact_limit(rows, batch_size):
    """``2 / largest eigenvalue of C^+ D`` for per-sample Hessians ``x x'``."""
    n, d = rows.shape
    hessians = rows[:, :, None] * rows[:, None, :]
    mean = hessians.mean(0)
    share = (n - batch_size) / (batch_size * (n - 1))
    identity = np.eye(d)
    drift = (np.kron(mean, identity) + np.kron(identity, mean)) / 2
    squares = np.mean([np.kron(h, h) for h in hessians], axis=0)
    spread = (1 - share) * np.kron(mean, mean) + share * squares
    return 2 / np.linalg.eigvals(np.linalg.solve(drift, spread)).real.max()


def formula(rows, batch_size):
    """`max_sgd_lr` with the exact variances along and across the top eigenvector."""
    n = len(rows)
    mean = rows.T @ rows / n
    values, vectors = np.linalg.eigh(mean)
    top = vectors[:, -1]
    products = rows * (rows @ top)[:, None]  # H_i v_1
    variance = ((products - mean @ top) ** 2).sum() / (n - 1)  # r1 + c1
    noise = variance * (1 / batch_size - 1 / n) / values[-1]
    return max_sgd_lr(values[-1], noise)


def random_problem(generator):
    """Gaussian rows with random scales; returns them and ``lambda_2 / lambda_1``."""
    rows = generator.normal(size=(SAMPLES, DIMENSION)) * generator.uniform(0.1, 2, size=DIMENSION)
    values = np.linalg.eigvalsh(rows.T @ rows / SAMPLES)
    return rows, values[-2] / values[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=400)
    count = parser.parse_args().problems
    generator = np.random.default_rng(0)
    errors = {k: [] for k in range(len(BINS) - 1)}
    for _ in range(count):
        rows, ratio = random_problem(generator)
        row = [formula(rows, b) / exact_limit(rows, b) - 1 for b in BATCHES]
        errors[min(int(np.searchsorted(BINS, ratio, side="right")) - 1, len(BINS) - 2)].append(row)
    print("Error in percent, lowest / median / highest, and share of problems on the unsafe side")
    print("| lambda_2/lambda_1 | problems | " + " | ".join(f"B={b}" for b in BATCHES) + " |")
    print("|---" * (2 + len(BATCHES)) + "|")
    for k, rows in errors.items():
        if not rows:
            continue
        table = 100 * np.array(rows)
        low, middle, high = table.min(0), np.median(table, axis=0), table.max(0)
        unsafe = 100 * (table > 0).mean(0)
        cells = [
            f"{a:+.0f} / {m:+.0f} / {z:+.0f}, {u:.0f} %"
            for a, m, z, u in zip(low, middle, high, unsafe, strict=True)
        ]
        print(f"| {BINS[k]} - {BINS[k + 1]} | {len(rows)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
