"""`python -m uniql_jax VERB`: the console command `uniql`."""

from uniql_jax.commands import main

main()
