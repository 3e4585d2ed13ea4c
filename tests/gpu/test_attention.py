"""Paged attention: right for latents and for grouped heads, and a token's bits are its own."""

import pytest
import torch

from tests.gpu.rows import relative_l2

# (query heads, KV heads, key channels, value channels, latent)
MOSAIC = (4, 1, 160, 128, True)
LITE = (16, 1, 576, 512, True)
V3 = (128, 1, 576, 512, True)
GQA = (32, 4, 128, 128, False)
TINY = (6, 2, 32, 32, False)
SHAPES = (MOSAIC, LITE, V3, GQA, TINY)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Sequences:
    """Caches with some sequences in scattered blocks, and the queries of all their positions."""

    def __init__(self, shape, lengths, device, block_size=16, spare_blocks=8, seed=0):
        self.heads, self.kv_heads, self.dim, self.value_dim, latent = shape
        generator = torch.Generator().manual_seed(seed)
        width = max(-(-n // block_size) for n in lengths)
        total = len(lengths) * width + spare_blocks
        blocks = torch.randperm(total, generator=generator)[: len(lengths) * width]
        self.tables = blocks.view(len(lengths), width).int().to(device)
        self.block_size = block_size

        def random(*size):
            return torch.randn(*size, generator=generator).to(torch.bfloat16).to(device)

        self.keys = random(self.kv_heads, total, block_size, self.dim)
        self.values = self.keys
        if not latent:
            self.values = random(self.kv_heads, total, block_size, self.value_dim)
        self.queries = [random(n, self.heads, self.dim) for n in lengths]
        self.scale = 2.0 * self.dim**-0.5  # some keys stand out

    def run(self, picks, num_tokens=None):
        """The output of tokens `picks`: (sequence, position) pairs."""
        from cluster.model.cuda.attention import AttentionMeta, paged_attention

        device = self.keys.device
        real = None
        q = torch.stack([self.queries[s][p] for s, p in picks])
        if num_tokens is not None:
            real = torch.tensor([num_tokens], dtype=torch.int32, device=device)
        meta = AttentionMeta(
            positions_T=torch.tensor([p for _, p in picks], dtype=torch.int32, device=device),
            sequence_T=torch.tensor([s for s, _ in picks], dtype=torch.int32, device=device),
            block_tables_SB=self.tables,
            num_tokens=real,
        )
        return paged_attention(q, self.keys, self.values, meta, self.scale, self.value_dim)

    def wanted(self, picks):
        """The same in fp64."""
        rows = []
        for s, p in picks:
            k, v = (
                x[:, self.tables[s].long()].flatten(1, 2)[:, : p + 1].double()
                for x in (self.keys, self.values[..., : self.value_dim])
            )
            q = self.queries[s][p].double().view(self.kv_heads, -1, self.dim)
            weights = torch.softmax(self.scale * q @ k.transpose(1, 2), -1)
            rows.append((weights @ v).flatten(0, 1))
        return torch.stack(rows)


def span(sequence, first, end):
    return [(sequence, p) for p in range(first, end)]


def check_small(shape, device="cpu"):
    """Decoded, prefilled, and a mixture; more than one part; padding rows untouched."""
    from cluster.model.cuda import attention

    length = 70 if device == "cpu" else attention.PART + 90
    if device == "cpu":
        attention.PART = 64  # so that a short sequence has two parts
    some = Sequences(shape, (length, 9), torch.device(device))
    single = [(0, length - 1), (1, 3)]
    mixed = [*span(0, length - 6, length), (1, 8)]
    for picks in (single, mixed):
        assert relative_l2(some.run(picks), some.wanted(picks)) < 1e-2
    short, few = Sequences(shape, (41, 9), torch.device(device)), [(0, 40), (1, 3)]
    assert relative_l2(short.run(few), short.wanted(few)) < 1e-2
    divided = attention._MOST_SPREAD, attention._MOST_SHORT
    want, want_short = some.run(mixed), short.run(few)
    attention._MOST_SPREAD = attention._MOST_SHORT = 0  # one program for all of a token
    try:
        assert torch.equal(some.run(mixed), want)
        assert torch.equal(short.run(few), want_short)
    finally:
        attention._MOST_SPREAD, attention._MOST_SHORT = divided
    assert torch.equal(some.run([*mixed, (0, 1)], num_tokens=len(mixed))[: len(mixed)], want)


def check_interpreted():
    check_small(MOSAIC)
    check_small(TINY)
    check_refusals()


def test_attention_is_right_as_interpreted(interpreted):
    interpreted("tests.gpu.test_attention:check_interpreted")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_right(cuda, shape):
    check_small(shape, cuda)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_does_not_depend_on_its_step(cuda, shape):
    """Alone, in batches of many sizes, in another order of sequences, and in chunks of any size."""
    lengths = (1300, 40, 700, 1100)
    some = Sequences(shape, lengths, cuda)
    every = [pick for s, n in enumerate(lengths) for pick in span(s, 0, n)]
    row = {pick: i for i, pick in enumerate(every)}
    whole = some.run(every)
    checked = [*every[::61], (0, 511), (0, 512), (0, 1023), (0, 1024), (0, 1299)]
    assert relative_l2(whole[[row[p] for p in checked]], some.wanted(checked)) < 1e-2

    def check(picks):
        got, want = some.run(picks), whole[[row[p] for p in picks]]
        assert torch.equal(got, want), f"{len(picks)} tokens from {picks[0]}"

    for pick in checked[:: 1 if len(checked) < 60 else 3]:
        check([pick])
    for size in (2, 7, 17, 64, 65, 130, 300):
        check([(s, int(torch.randint(n, ()))) for s, n in enumerate(lengths)])  # as in decode
        check([(s, p) for s in (2, 0, 3, 1) for p in range(lengths[s]) if p % 1300 < size])
    for chunk in (1, 3, 5, 64, 500):
        for first in range(900, 1100, chunk)[:6]:
            check(span(0, first, min(first + chunk, 1300)))


def test_block_size_changes_no_bit(cuda):
    a = Sequences(LITE, (700,), cuda, block_size=16)
    b = Sequences(LITE, (700,), cuda, block_size=64, spare_blocks=3)
    flat = a.keys[:, a.tables[0].long()].flatten(1, 2)
    b.keys.view(1, -1, 576)[
        :, (b.tables[0].long()[:, None] * 64 + torch.arange(64, device=cuda)).flatten()[:704]
    ] = flat[:, :704]
    b.queries = a.queries
    picks = span(0, 600, 700)
    assert torch.equal(a.run(picks), b.run(picks))


def check_refusals():
    some = Sequences(TINY, (4,), torch.device("cpu"))
    some.value_dim = 16
    with pytest.raises(ValueError, match="value_dim"):
        some.run([(0, 1)])
    some.queries = [q[..., :16] for q in some.queries]
    with pytest.raises(ValueError, match="queries"):
        some.run([(0, 1)])
