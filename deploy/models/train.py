"""Trains a mosaic model from a folder of text: `python -m deploy.models.train --help`.

Three stages. `prepare` (no accelerator): documents, tokenizer, token arrays. `train`: minutes on
one GPU. `evaluate`: held-out bits per byte against an order-5 n-gram, expert load by domain,
greedy completions, model card.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from deploy.models.card import write_evaluation
from deploy.models.prepare import prepare
from deploy.models.pretrain import train
from deploy.models.sampler import TrainConfig


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.models.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        help="folder with english*.txt, shakespeare*.txt, chinese*.txt (for prepare)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(".mosaic"),
        help="folder for documents and token arrays (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--stage", choices=("all", "prepare", "train", "evaluate"), default="all")
    parser.add_argument("--vocab-size", type=int, default=6144)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in asdict(TrainConfig()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value),
            default=value,
            help="default %(default)s",
        )
    args = parser.parse_args(argv)
    settings = replace(
        TrainConfig(), **{name: getattr(args, name) for name in asdict(TrainConfig())}
    )
    device = torch.device(args.device)
    if args.stage in ("all", "prepare"):
        if args.corpus is None:
            parser.error("--corpus is needed to prepare the text")
        prepare(args.corpus, args.work, args.vocab_size, args.max_length, settings.seed)
    if args.stage in ("all", "train"):
        train(args.work, args.out, settings, device)
    if args.stage in ("all", "evaluate"):
        write_evaluation(args.work, args.out, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
