"""`python -m uniql_jax.generate`: see uniql_jax/commands/generate.py."""

from uniql_jax.commands import entry_point

entry_point(__name__, "generate")
