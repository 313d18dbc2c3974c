"""`python -m uniql_jax.chat`: see uniql_jax/commands/chat.py."""

from uniql_jax.commands import entry_point

entry_point(__name__, "chat")
