"""`python -m uniql_jax.benchmark`: see uniql_jax/commands/benchmark.py."""

from uniql_jax.commands import entry_point

entry_point(__name__, "benchmark")
