"""What goes wrong with the hub, in one line each that says how to mend it."""

from __future__ import annotations

from uniql_jax.errors import UserError


class HubError(UserError):
    """What the user reads; `offline` where another try, or what was downloaded before, may serve."""

    def __init__(self, message: str, offline: bool = False):
        super().__init__(message)
        self.offline = offline


def explained(error: Exception, repo: str, revision: str | None, endpoint: str) -> HubError:
    """An error of huggingface_hub or of the network, for people.

    Args:
        error: any.
        repo: owner/name.
        revision: what was asked for; None: the main branch.
        endpoint: address of the hub.
    """
    from huggingface_hub import errors

    if isinstance(error, HubError):
        return error
    if isinstance(error, UserError):
        return HubError(str(error))
    if isinstance(error, errors.GatedRepoError):
        return HubError(f"{repo} asks you to accept its terms on {endpoint} and to log in first (hf auth login)")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo} has no revision {revision!r}: give a branch, a tag or a whole commit hash")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{repo} is no folder here and no repository at {endpoint}, or a private one: log in (hf auth login)"
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return HubError(f"{repo} lacks a file that its list names ({_line(error)})")
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{repo} is no name that the hub allows")
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why the hub could not be asked
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return HubError(f"{endpoint} does not let you read {repo} (status {status}): log in (hf auth login)")
    if status == 404:
        return HubError(f"{endpoint} has no such thing as {repo} (status 404)")
    what = f"status {status}" if status else f"{type(error).__name__}: {_line(error)}"
    message = f"cannot fetch {repo}, which is no folder here, from {endpoint} ({what}); what has been downloaded stays"
    return HubError(message, offline=True)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:150]
