"""The one exception that a command turns into a single clear line and exit code 2."""


class UserError(Exception):
    """Something the user gave cannot be used; the message is one line that says what and how to mend it."""
