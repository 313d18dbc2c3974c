"""One thread for BLAS and LAPACK, whose own threads fight with XLA's for the cores.

A factorization of a few hundred rows took half a second with two of them, and ten milliseconds with one. Results do not
depend on the number of cores either.
"""

from __future__ import annotations

import scipy.linalg  # noqa: F401  the LAPACK of jnp.linalg on CPUs: what is not loaded cannot be limited
from threadpoolctl import threadpool_limits

one_blas_thread = threadpool_limits.wrap(limits=1, user_api="blas")
"""Decorator of a function, while which runs no library for linear algebra uses more than one thread."""
