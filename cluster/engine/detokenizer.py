"""Text from tokens as they come: whole characters only, and nothing of a stop string.

A token may end inside a character, and the text of a token may depend on the one before it (word
markers). So the last tokens are decoded together, and what they add is shown once it is complete.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from cluster.engine.stop_strings import StopStrings

_REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no character (yet)."""
_CONTEXT = 6
"""Tokens of the prompt that are decoded along, for a first token that depends on them."""
_LONG_WINDOW = 16
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8, hence tokens, that one character can take."""


class Decoder(Protocol):
    """The part of `tokenizers.Tokenizer` that is needed here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """Incremental text of one completion.

    `add` returns new text to show, perhaps empty. When a stop string is complete, `stop_string` is
    set and the text before it (with `include_stop_string`: and it) has been returned. What the first
    `min_tokens` tokens say is no stop string, nor the beginning of one. Call `finish` once at the end
    for the text that was held back; a stop token is not to be added.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        stop: Iterable[str] = (),
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        include_stop_string: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._stop_strings = StopStrings(stop, include=include_stop_string)
        self._num_unsearched = min_tokens
        """Tokens to come whose text is not searched for stop strings."""
        self._window = list(prompt_token_ids[-_CONTEXT:])
        self._num_context = len(self._window)
        """Leading tokens of the window whose text has been shown (or belongs to the prompt)."""
        self._num_shown = len(self._decode(self._window).rstrip(_REPLACEMENT))
        """Leading characters of the window's text that have been shown."""

    @property
    def stop_string(self) -> str | None:
        return self._stop_strings.matched

    def add(self, token_id: int) -> str:
        """New text to show after one more token."""
        if self.stop_string is not None:
            return ""
        self._num_unsearched -= 1
        self._window.append(token_id)
        text = self._decode(self._window)
        stable = text.rstrip(_REPLACEMENT)
        new = self._search(text[self._num_shown : len(stable)])
        self._num_shown = max(self._num_shown, len(stable))
        if len(stable) == len(text):
            del self._window[: self._num_context]
            self._num_context = len(self._window)
            self._num_shown = len(self._decode(self._window))
        elif len(self._window) > _LONG_WINDOW:
            new += self._shorten_window(text)
        return new

    def finish(self) -> str:
        """The text that is still held back: no more tokens come."""
        if self.stop_string is not None:
            return ""
        text = self._decode(self._window)
        shown = self._search(text[self._num_shown :])
        self._window.clear()
        return shown if self.stop_string is not None else shown + self._stop_strings.finish()

    def _shorten_window(self, text: str) -> str:
        """Show what no further token can change when bytes that are no text go on and on."""
        latest = len(self._window) - _LONGEST_CHARACTER
        for start in range(latest, max(self._num_context, latest - _LONGEST_CHARACTER), -1):
            before, after = self._window[:start], self._window[start:]
            settled = self._decode(before)
            if settled + self._decode(after) == text:
                new = self._search(settled[self._num_shown :])
                self._window, self._num_context = after, 0
                self._num_shown = max(0, self._num_shown - len(settled))
                return new
        return ""

    def _search(self, text: str) -> str:
        """What of more text may be shown, as far as stop strings are concerned."""
        return text if self._num_unsearched >= 0 else self._stop_strings.feed(text)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
