"""`python -m uniql_jax.finetune`: see uniql_jax/commands/finetune.py."""

from uniql_jax.commands import entry_point

entry_point(__name__, "finetune")
