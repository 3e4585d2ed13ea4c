"""Reads the tokenizer of a checkpoint directory, and tells what single tokens stand for."""

import json
import re
from pathlib import Path

from tokenizers import Tokenizer


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used; the message names it."""


def load_tokenizer(model_dir: str | Path) -> Tokenizer | None:
    """`tokenizer.json`, or None where there is none: then clients send and get token ids only."""
    path = Path(model_dir) / "tokenizer.json"
    if not path.exists():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the Rust side raises plain Exception
        raise TokenizerError(f"{path}: cannot be read as a tokenizer: {error}") from None
    # A file may carry the settings of its training; prompts are neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TokenTexts:
    """What single tokens stand for, which for parts of characters is no text but bytes."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        decoder = "" if tokenizer is None else str(json.loads(tokenizer.to_str())["decoder"])
        self._bytes = _BYTE_LEVEL if "ByteLevel" in decoder else {}

    def text(self, token_id: int) -> str:
        """Bytes that are no whole character show as U+FFFD; without a tokenizer the id is shown."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def raw(self, token_id: int) -> bytes:
        """UTF-8; the bytes of consecutive tokens, joined, are those of their text."""
        token = self._tokenizer.id_to_token(token_id) if self._tokenizer else None
        if token is not None and (byte := _BYTE_FALLBACK.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if token is not None and self._bytes.keys() >= set(token):
            return bytes(self._bytes[char] for char in token)
        return self.text(token_id).encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: themselves where they can be seen, else those from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + idx): byte for idx, byte in enumerate(hidden)
    }


_BYTE_LEVEL = _byte_level_alphabet()
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
