"""`python -m uniql_jax.serve`: see uniql_jax/commands/serve.py."""

from uniql_jax.commands import entry_point

entry_point(__name__, "serve")
