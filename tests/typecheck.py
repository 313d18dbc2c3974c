"""The run-time type checker that `conftest` puts on our packages."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# As a type checker reads it: an int is welcome where a float is declared.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
