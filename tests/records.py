"""Recorded passes of benchmarks/compress_time.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from uniql_jax.config import ModelConfig
from uniql_jax.evaluation.random_model import read_config


def config_of(settings: Mapping[str, Any]) -> ModelConfig:
    """The model that a record's settings name."""
    config = read_config(settings["config"])
    return dataclasses.replace(config, pattern=config.pattern[: settings["layers"]])
