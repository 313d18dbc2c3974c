"""One thread for BLAS and LAPACK, whose own threads wait for each other where other programs use the cores.

On two cores with other work a factorization of a few hundred rows took half a second with two threads and ten
milliseconds with one; alone both take ten. Results do not depend on the number of cores either.
"""

from __future__ import annotations

import scipy.linalg  # noqa: F401  the LAPACK of jnp.linalg on CPUs: what is not loaded cannot be limited
from threadpoolctl import threadpool_limits

one_blas_thread = threadpool_limits.wrap(limits=1, user_api="blas")
"""Decorator of a function, while which runs no library for linear algebra uses more than one thread."""
