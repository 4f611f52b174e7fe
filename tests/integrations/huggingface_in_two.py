"""One of two processes that train together under the Trainer's DDP; see `test_huggingface.py`."""

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

warnings.simplefilter("default")  # transformers warns of itself while it is imported

from huggingface_runs import Net, make, rates, samples, sgd, weights  # noqa: E402

if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), sys.argv[2]
    model = Net()
    trainer = make(
        model, samples(768), folder, optimizers=sgd(model), per_device_train_batch_size=32
    )
    trainer.train()
    answer = {"rates": rates(trainer), "norm": float(weights(model).norm())}
    (folder / f"{rank}.json").write_text(json.dumps(answer))
