"""The environment is described in JSON, whatever is installed."""

import json

import torch

from batchlr.training import environment


def test_it_names_versions_and_devices(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    described = environment.describe_environment()
    assert json.loads(json.dumps(described)) == described
    assert described["packages"]["no-such-package"] is None
    assert torch.__version__.startswith(described["packages"]["torch"])
    assert len(described["devices"]) == torch.cuda.device_count()
