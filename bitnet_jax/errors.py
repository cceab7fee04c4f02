"""The errors that a user can cause, each one line that names the value and the rule it broke.

The command line turns them into that line and an exit code; Python users catch `UserError` (a `ValueError`).
"""

_LONGEST = 2000


class UserError(ValueError):
    """A wrong input: an unknown field, a bad preset, shapes that do not divide, a vocabulary that does not match. Exit code 2.

    Its text is one printable line of bounded length, whatever a stranger's file put into it: no escape sequence reaches a terminal.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return "".join(c if c.isprintable() else "\ufffd" for c in (text if len(text) <= _LONGEST else text[:_LONGEST] + "…"))


class RunError(RuntimeError):
    """A run that cannot go on though its input was right: no disk space, too many non-finite losses. Exit code 1."""
