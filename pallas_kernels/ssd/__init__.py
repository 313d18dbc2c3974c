"""The state-space scan of Mamba2 (SSD): whole sequences in chunks, one token, and one token with all around it."""

from pallas_kernels.ssd.api import Kernels as Kernels
from pallas_kernels.ssd.api import Limits as Limits
from pallas_kernels.ssd.api import Token as Token
from pallas_kernels.ssd.api import Weights as Weights
from pallas_kernels.ssd.api import Window as Window
from pallas_kernels.ssd.api import mixer_step as mixer_step
from pallas_kernels.ssd.api import scan as scan
from pallas_kernels.ssd.api import step as step
