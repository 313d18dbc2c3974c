"""The one exception that a command turns into a single clear line and exit code 2, and the warning it prints."""


class UserError(Exception):
    """Something the user gave cannot be used; the message is one line that says what and how to mend it."""


class CheckpointWarning(UserWarning):
    """Something about a checkpoint that the user should know, though the work goes on; a command prints one line."""
