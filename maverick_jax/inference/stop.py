"""Stop strings in streamed text."""

from collections.abc import Sequence

from maverick_jax.inference.checks import stop_strings


class StopStrings:
    """Passes text on until one of the stop strings appears, holding back what could be the beginning of one.

    Attributes:
      found: the one that appeared; None until then.

    Raises:
      UserError: see `stop_strings`.
    """

    def __init__(self, stop: str | Sequence[str] = ()):
        self.stop = stop_strings(stop)
        self.found: str | None = None
        self._held = ""

    @property
    def met(self) -> bool:
        return self.found is not None

    def push(self, text: str) -> str:
        """The text that is certain to stand before any stop string."""
        if not self.stop:
            return text
        if self.met:
            return ""
        text = self._held + text
        found = [(at, s) for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            (at, self.found), self._held = min(found), ""
            return text[:at]
        held = max((n for s in self.stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held
