"""The byte-level BPE of mosaic: any text round-trips, digits stay single, no text is normalised."""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# Words keep one leading mark or space; digits stand alone, so that sums align by place.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(documents: Iterator[str], vocab_size: int) -> Tokenizer:
    """Learns the merges; id 0 is the end of text, ids 1 to 256 are the bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Writes tokenizer.json (compact) and tokenizer_config.json."""
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(
        "{\n"
        '  "tokenizer_class": "PreTrainedTokenizerFast",\n'
        f'  "bos_token": "{END_OF_TEXT}",\n'
        f'  "eos_token": "{END_OF_TEXT}",\n'
        '  "add_bos_token": false,\n'
        '  "add_eos_token": false,\n'
        '  "clean_up_tokenization_spaces": false,\n'
        f'  "model_max_length": {max_length}\n'
        "}\n",
        encoding="utf-8",
    )
