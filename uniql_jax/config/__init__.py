"""What a model is: one frozen, hashable description that every family's Hugging Face config is read into.

`types` holds the description, `keys` the checks of single values, `defaults` what an absent key means, `rope` and
`families` the reading. A family is one function there and one table in `convert/`; nothing else knows its name.
"""

from uniql_jax.config.families import FAMILIES, from_hf
from uniql_jax.config.types import ConfigError, ModelConfig, Rope, Ssm

__all__ = ["FAMILIES", "ConfigError", "ModelConfig", "Rope", "Ssm", "from_hf"]
