"""Stop strings in text that arrives in pieces."""

from collections.abc import Sequence

from bitnet_jax.errors import UserError


class StopStrings:
    """Passes text on up to the first stop string, holding back what may be the beginning of one.

    The first is the one that is complete first; of two that end at the same character, the longer. So the result does not depend on
    how the text is cut into pieces.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Raises UserError where a string is empty, or `strings` is a single string."""
        if isinstance(strings, str):
            raise UserError(f"stop_strings={strings!r} must be a list of strings")
        if "" in strings:
            raise UserError("stop_strings holds an empty string: it would stop before the first token")
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None
        """The stop string that was met; None so far."""

    def push(self, text: str) -> str:
        """Takes more text and returns what is certain to stand before a stop string. Nothing after one was found."""
        if self.found is not None:
            return ""
        text = self._held + text
        matches = [(start + len(string), start, string) for string in self._strings if (start := text.find(string)) >= 0]
        if matches:
            _, start, self.found = min(matches)
            self._held = ""
            return text[:start]
        held = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, for no more text will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that is a beginning of `string`, and not all of it."""
    return next((size for size in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:size])), 0)
