"""Without a framework its integration says what to install."""

import json
import subprocess
import sys

SCRIPT = """
import importlib, json, sys
said = {}
for module in ("lightning", "huggingface", "accelerate"):
    try:
        importlib.import_module(f"batchlr.integrations.{module}")
    except ImportError as error:
        said[module] = str(error)
print(json.dumps(said))
"""


def test_the_extra_is_named():
    missing = ["lightning", "pytorch_lightning", "transformers", "accelerate"]
    hidden = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in missing)
    answer = subprocess.run(
        [sys.executable, "-c", hidden + SCRIPT], capture_output=True, text=True, check=True
    )
    said = json.loads(answer.stdout)
    for module, extra in [("lightning",) * 2, ("huggingface",) * 2, ("accelerate", "huggingface")]:
        assert said[module].endswith(f"pip install 'batchlr[{extra}]'")
