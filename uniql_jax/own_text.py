"""`python -m uniql_jax.own_text`: see uniql_jax/commands/own_text.py."""

from uniql_jax.commands import entry_point

entry_point(__name__, "own-text")
