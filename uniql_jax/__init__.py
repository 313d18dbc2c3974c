"""uniql-jax: sort a language model's weights once, then load it at any prune rate from 0 to 0.35.

The public API is listed, with its types, in `__init__.pyi`; each name is imported when it is first used, so that
`uniql VERB --help` answers at once.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
