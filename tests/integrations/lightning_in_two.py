"""One of two processes that train together under Lightning's DDP; see `test_lightning.py`."""

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

warnings.simplefilter("default")  # Lightning warns of itself while it is imported

from lightning_runs import Net, digits, fit, loader, weights  # noqa: E402
from torch.optim.lr_scheduler import CosineAnnealingLR  # noqa: E402
from torch.utils.data import DistributedSampler  # noqa: E402

from batchlr.integrations.lightning import CurvatureCallback  # noqa: E402

if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    in_order = DistributedSampler(digits(), num_replicas=2, rank=rank, shuffle=False)
    module = Net()
    rates = fit(
        module,
        [CurvatureCallback(CosineAnnealingLR)],
        loader(size=32, sampler=in_order),
        use_distributed_sampler=False,
        strategy="ddp",
        devices=2,
        max_steps=20,
    )
    answer = {"rates": rates, "norm": float(weights(module).norm())}
    (folder / f"{rank}.json").write_text(json.dumps(answer))
