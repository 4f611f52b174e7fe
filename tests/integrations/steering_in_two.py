"""One of two processes whose measured samples and losses differ; see `test_steering.py`."""

import json
import math
import sys
from pathlib import Path

import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from test_steering import Run, draw  # noqa: E402

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
    (folder / f"{rank}.json").write_text(json.dumps(answer))
    dist.barrier()  # neither leaves while the other one is still there
    dist.destroy_process_group()
