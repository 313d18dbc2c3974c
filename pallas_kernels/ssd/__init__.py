"""The state-space scan of Mamba2 (SSD): whole sequences in chunks, and one token."""

from pallas_kernels.ssd.api import scan as scan
from pallas_kernels.ssd.api import step as step
