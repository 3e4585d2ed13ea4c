"""The words of the model card; `card.render` fills in the numbers."""

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: [en, zh]
---

# mosaic

A DeepSeek-V3-architecture language model small enough to ship with a program: {parameters} M
parameters in BF16, under 24 MB with its tokenizer. It exists to run, test and demonstrate
expert-parallel serving with a real checkpoint: multi-head latent attention with q-LoRA, one dense
layer, then five layers of 32 routed experts and one shared expert, top-4 of at most two of four
expert groups, sigmoid gates with a correction bias. It is a toy: it writes the manner of its four
domains, not their sense, and its sums are often wrong.

| | |
| --- | --- |
| layers | 6 (the first dense), hidden 256, 4 heads (32 + 32 rotary, values 64) |
| latents | q 128, kv 128 |
| experts | 32 routed of width 64 in 4 groups, 2 groups and 4 experts a token, 1 shared |
| vocabulary | 6,144, byte-level BPE: any text round-trips; digits stand alone; input and output tied |
| positions | 2,048, trained on sequences of 512, 1,024 and 2,048 |

## Held-out bits per byte

Lower is better. The baseline is an interpolated modified Kneser-Ney model of order 5, trained on
exactly the same training text of the one domain: over bytes, and, stronger, over mosaic's own
tokens. Held out: 5 % of the prose in contiguous regions, 5 % of the Python files, arithmetic
problems whose numbers never occur together in training. Neither tokenizer nor training saw them;
settings were chosen on a separate 2.5 %.

| domain | bytes | mosaic | 5-gram over bytes | 5-gram over tokens |
| --- | --- | --- | --- | --- |
{scores}

## Expert load

Imbalance (most loaded expert over the mean) on the held-out text of each domain, and over the mean
of the four; the last column is the least loaded expert over the mean. No expert is dead, and the
domains differ: that is meant. Counts per layer, domain and expert are in `evaluation.json`.

| layer | english | chinese | python | arithmetic | all | least, all |
| --- | --- | --- | --- | --- | --- | --- |
{loads}

Total-variation distance between the expert shares of two domains (0 same, 1 disjoint):

| layer | en-zh | en-py | en-ar | zh-py | zh-ar | py-ar |
| --- | --- | --- | --- | --- | --- | --- |
{distances}

## Greedy text

A model of this size loops when decoded greedily; sampling (temperature 0.8, top-p 0.95) reads
better. Of 32 prompts of 24 tokens, cut anywhere from the held-out text, this share of the greedy
96-token continuations loops (over half of the tokens repeat an n-gram of the row), and this share
of all tokens repeats:

| domain | looping | repeated tokens |
| --- | --- | --- |
{loops}

Greedy continuations of the demonstration prompts (chosen because they read well):

{samples}

## Training

`python -m deploy.models.train --corpus DIR --out DIR {flags}`: {steps:,} steps,
{tokens} M tokens, {minutes} minutes on one {hardware} that a second run of the same kind shared
({versions}), {date}. AdamW on fp32 master weights, BF16 model. Balance follows DeepSeek-V3's
auxiliary-loss-free rule, made light: an expert within 50 % of the mean load of the mixed batch is
left alone. A DITTO loss lets repeated text fade. The run beside it, with dropout 0.2, was better
in held-out English and Chinese (by 0.013 and 0.041 bits per byte on the validation split) and
worse in Python and arithmetic, but its greedy text looped about twice as often in English; so this
one was kept.

Evaluated on: {evaluated_on}. `python -m deploy.models.train --stage evaluate --out DIR` repeats it
on a prepared corpus and writes this card and `evaluation.json`. A training run is seeded but not bit-reproducible on a GPU,
and a new corpus or another Python's library gives other numbers.

## Data

- english: Jane Austen, Arthur Conan Doyle, Mark Twain, James Joyce; William Shakespeare. Public domain.
- chinese: 红楼梦 (Cao Xueqin), 水浒传 (Shi Nai'an). Public domain.
- python: the CPython 3.11 standard library's source, without tests and tables, under the Python
  Software Foundation License.
- arithmetic: generated with worked steps (`deploy/models/arithmetic.py`).

## Licence

The weights are licensed under Apache-2.0. The texts keep the terms named above.
"""
