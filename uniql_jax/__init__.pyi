# The public API of uniql-jax; `__init__.py` reads this list and imports each name when it is first used.

from .compression.compress import compress as compress
from .convert.to_hf import export as export
from .errors import UserError as UserError
from .evaluation.evaluate import evaluate as evaluate
from .model.causal_lm import CausalLM as CausalLM
from .model.causal_lm import forward as forward
from .model.causal_lm import prune as prune
from .model.decoding import decode as decode
from .model.decoding import init_cache as init_cache
from .model.decoding import prefill as prefill
from .runtime.generation import generate as generate
from .runtime.generation import generate_tokens as generate_tokens
from .runtime.loading import load as load
from .runtime.loading import load_source as load_source
from .runtime.session import Elastic as Elastic
from .version import __version__ as __version__
