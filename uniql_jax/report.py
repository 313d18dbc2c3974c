"""`python -m uniql_jax.report`: see uniql_jax/commands/report.py."""

from uniql_jax.commands import entry_point

entry_point(__name__, "report")
