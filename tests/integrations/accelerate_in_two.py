"""One of two processes that train together under Accelerate's DDP; see `test_accelerate.py`."""

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

warnings.simplefilter("default")  # Accelerate warns of itself

from accelerate_runs import Run, digits  # noqa: E402

if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), sys.argv[2]
    run = Run(12, data=digits(768), size=32)
    run.epoch()
    answer = {"rates": run.rates, "norm": float(run.weights().norm())}
    (folder / f"{rank}.json").write_text(json.dumps(answer))
