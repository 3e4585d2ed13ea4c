"""Corpus to arrays: writes the documents, learns the tokenizer, encodes every split to uint16.

Layout of a prepared directory: `text/<split>.<domain>.jsonl`, `tokenizer.json`,
`tokenizer_config.json`, `tokens.npz` with one stream `<split>_<domain>` each, in which id 0 ends
every document.
"""

import hashlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deploy.models.bpe import save_tokenizer, train_tokenizer
from deploy.models.corpus import DOMAINS, SPLITS, build_corpus, read_documents, write_documents
from deploy.models.ngram import KneserNey

NGRAM_ORDER = 5
# The tokenizer sees this many characters of a domain, so that none crowds the others out.
TOKENIZER_CHARS = {
    "english": 4_500_000,
    "chinese": 1_700_000,
    "python": 3_500_000,
    "arithmetic": 400_000,
}

Documents = dict[str, list[str]]


def prepare(corpus_dir: Path, directory: Path, vocab_size: int, max_length: int, seed: int) -> None:
    """Everything that needs no accelerator: documents, tokenizer and token arrays."""
    (directory / "text").mkdir(parents=True, exist_ok=True)
    corpus = build_corpus(corpus_dir, seed)
    for split in SPLITS:
        for domain in DOMAINS:
            write_documents(directory / "text" / f"{split}.{domain}.jsonl", corpus[split][domain])
    print("learning the tokenizer ...", flush=True)
    tokenizer = train_tokenizer(_tokenizer_sample(corpus["train"], seed), vocab_size)
    save_tokenizer(tokenizer, directory, max_length)
    streams: dict[str, NDArray[np.uint16]] = {}
    for split in SPLITS:
        for domain in DOMAINS:
            documents = corpus[split][domain]
            stream = encode_stream(tokenizer, documents)
            streams[f"{split}_{domain}"] = stream
            num_bytes = sum(len(document.encode()) for document in documents)
            print(
                f"{split:6} {domain:10} {len(documents):5} documents {num_bytes:9} bytes "
                f"{len(stream):8} tokens {num_bytes / len(stream):.2f} bytes a token",
                flush=True,
            )
    np.savez_compressed(directory / "tokens.npz", allow_pickle=False, **streams)


def encode_stream(tokenizer: Tokenizer, documents: list[str]) -> NDArray[np.uint16]:
    """All documents' ids one after another, id 0 after each."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(documents):
        ids.extend(encoding.ids)
        ids.append(0)
    return np.array(ids, dtype=np.uint16)


def _tokenizer_sample(train: Documents, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for domain in DOMAINS:
        left = TOKENIZER_CHARS[domain]
        for document in rng.sample(train[domain], len(train[domain])):
            if left <= 0:
                break
            yield document[:left]
            left -= len(document)


def baselines(directory: Path, split: str = "test") -> dict[str, dict[str, float]]:
    """Bits per byte of the order-5 n-gram over bytes and over tokens, trained per domain."""
    streams = np.load(directory / "tokens.npz")
    vocab_size = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size()
    result: dict[str, dict[str, float]] = {}
    for domain in DOMAINS:
        texts = {
            part: [
                np.frombuffer(document.encode(), dtype=np.uint8)
                for document in read_documents(directory / "text" / f"{part}.{domain}.jsonl")
            ]
            for part in ("train", split)
        }
        num_bytes = sum(len(document) for document in texts[split])
        tokens = {part: split_stream(streams[f"{part}_{domain}"]) for part in ("train", split)}
        result[domain] = {
            "bytes": KneserNey(texts["train"], 256, NGRAM_ORDER).bits(texts[split]) / num_bytes,
            "tokens": KneserNey(tokens["train"], vocab_size, NGRAM_ORDER).bits(tokens[split])
            / num_bytes,
        }
        print(f"order-{NGRAM_ORDER} baseline {domain}: {result[domain]}", file=sys.stderr)
    return result


def split_stream(stream: NDArray[np.uint16]) -> list[NDArray[np.uint16]]:
    """The documents of a stream, without their end marks."""
    ends = np.flatnonzero(stream == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    return [stream[start:end] for start, end in zip(starts, ends, strict=True)]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
