"""`python -m uniql_jax.upload`: see uniql_jax/commands/upload.py."""

from uniql_jax.commands import entry_point

entry_point(__name__, "upload")
