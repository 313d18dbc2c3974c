"""The state-space scan of Mamba2 (SSD): whole sequences in chunks, one token, and one token with all around it."""

from uniql_jax.pallas_kernels.ssd.api import Kernels as Kernels
from uniql_jax.pallas_kernels.ssd.api import Limits as Limits
from uniql_jax.pallas_kernels.ssd.api import Token as Token
from uniql_jax.pallas_kernels.ssd.api import Weights as Weights
from uniql_jax.pallas_kernels.ssd.api import Window as Window
from uniql_jax.pallas_kernels.ssd.api import mixer_step as mixer_step
from uniql_jax.pallas_kernels.ssd.api import scan as scan
from uniql_jax.pallas_kernels.ssd.api import step as step
