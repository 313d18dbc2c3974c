"""`python -m uniql_jax.evaluate`: see uniql_jax/commands/evaluate.py."""

from uniql_jax.commands import entry_point

entry_point(__name__, "evaluate")
