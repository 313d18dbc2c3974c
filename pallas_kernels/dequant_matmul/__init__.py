"""x times a packed 4-bit or 8-bit weight."""

from uniql_jax.pallas_kernels.dequant_matmul.api import default_implementation as default_implementation
from uniql_jax.pallas_kernels.dequant_matmul.api import dequant_matmul as dequant_matmul
from uniql_jax.pallas_kernels.dequant_matmul.api import preferred_layout as preferred_layout
