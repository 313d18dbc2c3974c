"""`python -m uniql_jax.compress`: see uniql_jax/commands/compress.py."""

from uniql_jax.commands import entry_point

entry_point(__name__, "compress")
