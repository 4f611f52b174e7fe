"""Configurations of training runs: YAML, strictly read.

``load_config`` reads a file and command-line changes into a frozen ``TrainConfig``, or raises
``ConfigError`` with every problem at its place. ``dump_config`` writes one that reads back equal.
"""

from batchlr.training.config.problems import ConfigError, Place, Problem
from batchlr.training.config.reading import LoadedConfig, load_config
from batchlr.training.config.schema import TrainConfig
from batchlr.training.config.writing import dump_config, json_schema

__all__ = [
    "ConfigError",
    "LoadedConfig",
    "Place",
    "Problem",
    "TrainConfig",
    "dump_config",
    "json_schema",
    "load_config",
]
