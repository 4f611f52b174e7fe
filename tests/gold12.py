"""Twelve per-sample gradients of nine coordinates, with statistics worked out independently."""

import math

import torch

GRADIENTS = torch.tensor(
    [
        [1 + math.sin(k + j) for j in range(6)] + [0.5 + math.cos(2 * k + j) for j in range(3)]
        for k in range(12)
    ],
    dtype=torch.float64,
)  # (12, 9)
TRACE = 4.903046807350915
SQUARE_NORM = 6.639453136831401
ALONG = 0.4939415294381924
ACROSS = 4.828651895713068
MEAN_SQUARE = 6.230865902885491
NOISE_SCALE = 0.7868965379403097
# Trace from the means of J groups of neighbours.
OF_GROUPS = {2: 0.006019086894745966, 3: 4.38168877, 4: 6.03763146, 6: 6.60340767, 12: TRACE}
