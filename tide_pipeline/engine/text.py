"""Text in, text out: the tokenizer, incremental decoding and stop strings. Knows no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from tide_pipeline.errors import CheckpointError, InvalidRequest


class TextCodec:
    """`tokenizer.json` of a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{folder}/tokenizer.json can't be read: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Raises InvalidRequest for text that is empty or is no valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"text_input is not valid UTF-8: {error.reason}") from error
        ids: list[int] = self.tokenizer.encode(text).ids
        if not ids:
            raise InvalidRequest("text_input is empty: send at least one character")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class TextStream:
    """Turns one request's tokens into text pieces, holding back half characters and what may begin a stop string."""

    def __init__(self, codec: TextCodec, stop: Sequence[str]) -> None:
        self._codec, self._stop = codec, tuple(s for s in stop if s)
        self._ids: list[int] = []
        self._from = 0                  # first token of the decoding window
        self._told = 0                  # characters of the window's text already moved to _held
        self._held = ""
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """Text that is now certain. Sets `stopped` when a stop string was completed; the text ends before it."""
        self._ids.extend(ids)
        window = self._codec.decode(self._ids[self._from:])
        if not window.endswith("\ufffd"):
            self._held += window[self._told:]
            self._told = len(window)
            if len(self._ids) - self._from > 16:
                self._from = len(self._ids) - 4     # keep a little context: some decoders look one token back
                self._told = len(self._codec.decode(self._ids[self._from:]))
        return self._release()

    def finish(self) -> str:
        """Whatever was held back when the request ended."""
        window = self._codec.decode(self._ids[self._from:])
        self._held += window[self._told:]
        text = self._release() if not self.stopped else ""
        held, self._held = self._held, ""
        return text + ("" if self.stopped else held)

    def _release(self) -> str:
        if self.stopped:
            return ""
        places = [place for s in self._stop if (place := self._held.find(s)) >= 0]
        if places:
            self.stopped = True
            return self._held[: min(places)]
        keep = max((n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text
