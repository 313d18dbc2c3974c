"""An elastic checkpoint to the hub: one commit of its own files and a card."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uniql_jax import console
from uniql_jax.checkpoint import Checkpoint, open_checkpoint
from uniql_jax.counting import parameter_count
from uniql_jax.errors import UserError
from uniql_jax.partial import PartialFile

CARD = "README.md"
RATES = (0.0, 0.15, 0.25, 0.35)


def upload(
    folder: str | Path,
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    message: str = "Upload elastic checkpoint",
    base_model: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> str | None:
    """Upload an elastic checkpoint.

    Args:
        folder: elastic checkpoint, as `compress` writes it.
        repo: owner/name; made if there is none.
        public: whether a new repository is public; one that exists stays as it is.
        revision: branch; None: main.
        message: of the commit.
        base_model: hub id of the original, for a card that is written.
        license: as the hub names it, for a card that is written.
        dry_run: say what would be uploaded, and end.
        say: receives lines of text.

    Returns:
        The address of the commit; None for a dry run.

    Raises:
        UserError: no elastic checkpoint, one that is not whole, or a hub that refuses.
    """
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id

    checkpoint = open_checkpoint(folder)
    files = checkpoint.files
    for path in files:
        partial = PartialFile(path)
        if partial.exists and partial.missing([(0, path.stat().st_size)]):
            raise UserError(f"{folder} was downloaded for some prune rates only: load it at rate 0 first")
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        validate_repo_id(repo)
    except ValueError:
        raise UserError(f"{repo!r} is no repository of the hub: owner/name is wanted") from None
    if "/" not in repo:
        raise UserError(f"{repo!r} is no repository of the hub: owner/name is wanted")
    written = not (checkpoint.folder / CARD).is_file()
    text = card(checkpoint, repo, base_model, license) if written else ""
    names = {path.relative_to(checkpoint.folder).as_posix(): path for path in files}
    size = sum(path.stat().st_size for path in files)
    where = f"{endpoint}/{repo}" + (f" ({revision})" if revision else "")
    say(f"{folder} -> {where}, {'public' if public else 'private'} if it is new")
    for name, path in names.items():
        say(f"  {console.format_bytes(path.stat().st_size):>9}  {name}")
    say(f"  {console.format_bytes(size):>9}  in all" + (", and this card:" if written else ""))
    if written and dry_run:
        say(text)
    if dry_run:
        return None
    api = huggingface_hub.HfApi(endpoint=endpoint)
    operations: list[Any] = [huggingface_hub.CommitOperationAdd(name, str(path)) for name, path in names.items()]
    if written:
        operations.append(huggingface_hub.CommitOperationAdd(CARD, text.encode()))
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.create_commit(repo, operations, commit_message=message, revision=revision)
    except Exception as error:
        raise refused(error, repo, endpoint) from None
    return str(done.commit_url)


def refused(error: Exception, repo: str, endpoint: str) -> UserError:
    """Why the hub did not take it, in one line."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # "Error while uploading ..."
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return UserError(f"{endpoint} does not let you write {repo} (status {status}): log in (hf auth login)")
    what = f"status {status}" if status else f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return UserError(f"cannot upload to {repo} at {endpoint} ({what}); try again")


def card(checkpoint: Checkpoint, repo: str, base_model: str | None = None, license: str | None = None) -> str:
    """A card in Markdown with the metadata that the hub reads.

    Args:
        checkpoint: what is uploaded.
        repo: where to.
        base_model: hub id of the original.
        license: as the hub names it.
    """
    config, plan = checkpoint.config, checkpoint.plan
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="uniql-jax",
        pipeline_tag="text-generation",
        tags=["uniql", "elastic", "pruning", *([f"{checkpoint.bits}-bit"] if checkpoint.bits < 16 else [])],
        base_model=base_model,
        license=license,
    )
    rows = [
        (
            f"{rate:g}",
            f"{plan.kept_fraction(rate):.1%}" if plan else "100%",
            console.format_bytes(checkpoint.weight_bytes(rate)),
        )
        for rate in (RATES if plan else (0.0,))
    ]
    table = "\n".join(f"| {rate} | {kept} | {size} |" for rate, kept, size in rows)
    return f"""---
{data.to_yaml()}
---

# {repo.rpartition("/")[2]}

An elastic checkpoint of a {config.model_type} model with {parameter_count(config) / 1e6:,.1f} M parameters at
{checkpoint.bits} bits, made by uniql-jax. One checkpoint serves every prune rate, and only the bytes of the chosen one
are downloaded:

```python
import uniql_jax

model = uniql_jax.load("{repo}", prune_rate=0.25)
```

| prune rate | kept of what can be pruned | weights |
| --- | --- | --- |
{table}
"""
