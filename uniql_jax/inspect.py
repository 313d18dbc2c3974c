"""`python -m uniql_jax.inspect`: see uniql_jax/commands/inspect.py."""

from uniql_jax.commands import entry_point

entry_point(__name__, "inspect")
