"""The errors that a user can cause, each one line that names the value and the rule it broke.

The command line turns them into that line and an exit code; Python users catch `UserError` (a `ValueError`).
"""


class UserError(ValueError):
    """A wrong input: an unknown field, a bad preset, shapes that do not divide, a vocabulary that does not match. Exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on though its input was right: no disk space, too many non-finite losses. Exit code 1."""
