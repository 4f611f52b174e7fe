"""One of two processes whose measured samples and losses differ; see `test_steering.py`."""

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from test_steering import Run, draw  # noqa: E402


def seen_by_the_second_only(rank):
    """Momentum said and set, and weights, where the second one measures and has seen other things.

    Its controller's last loss, not looked at yet, is no number: alone it would go back.
    """
    run = Run(every_steps=1, adjust_momentum=True)

    def stretched(generator):
        return [(x * torch.tensor([1.0 + 3 * rank, 1, 1, 1]), y) for x, y in draw(generator)]

    for _ in range(3):
        run.step(stretched)
    state = run.steering.state_dict()
    if rank == 1:
        state["controller"]["guard"]["detector"]["pending"] = [torch.full((4,), math.nan)]
    run.steering.load_state_dict(state)
    update = run.step(stretched)[1]
    return [update.momentum, run.optimizer.param_groups[0]["momentum"], run.model.weight.tolist()]


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    run, rates, peaks = Run(), [], []

    def scaled(generator):
        """The second process measures four times the curvature."""
        return [((1 + rank) * x, (1 + rank) * y) for x, y in draw(generator)]

    shown = []
    for made in range(10):
        if made == 4:
            shown = run.shown
        factor = 1.0 + 2 * rank
        if rank == 1 and made >= 4:
            factor = math.nan  # what is lost in the second process only is lost
        rate, update = run.step(scaled, factor=factor)
        rates.append(rate)
        peaks.append(None if update is None else update.peak)
    answer = {"rates": rates, "peaks": peaks, "end": run.steering.scheduler.peak}
    answer["shown"] = shown
    answer["weights"] = run.model.weight.tolist()
    answer["alone"] = seen_by_the_second_only(rank)
    (folder / f"{rank}.json").write_text(json.dumps(answer))
    dist.barrier()  # neither leaves while the other one is still there
    dist.destroy_process_group()
