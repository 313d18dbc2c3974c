"""`python -m uniql_jax.export`: see uniql_jax/commands/export.py."""

from uniql_jax.commands import entry_point

entry_point(__name__, "export")
