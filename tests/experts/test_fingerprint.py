"""Fingerprints: every word and its place count, on any device alike."""

import pytest
import torch

from experts.fingerprint import fingerprint


def random_bytes(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (size,), generator=generator, dtype=torch.uint8)


def test_any_change_changes_it():
    """Of a bit, of two top bits, of places inside a piece and among pieces, and among tensors."""
    data = random_bytes(700_003)
    changed = [data]
    for bit, places in ((1, [0]), (128, [3, 7]), (128, [350_003, 600_003]), (16, [700_002])):
        changed.append(data.clone())
        changed[-1][places] ^= bit
    swapped = data[:700_000].view(-1, 4)
    changed += [torch.cat([row.flatten(), data[700_000:]]) for row in (swapped.roll(1, 0),)]
    pieces = data[: 2 << 18].view(2, -1)
    changed.append(torch.cat([pieces.flip(0).flatten(), data[2 << 18 :]]))
    assert len({fingerprint(each) for each in changed}) == len(changed)
    a, b = data[:400_000], data[400_000:]
    assert len({fingerprint(a, b), fingerprint(b, a), fingerprint(a), fingerprint(b)}) == 4
    assert fingerprint() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_it_is_of_bytes_and_not_of_numbers(dtype):
    data = random_bytes(4096)
    assert (
        fingerprint(data)
        == fingerprint(data.view(dtype))
        == fingerprint(data.view(dtype).view(8, -1))
    )


def test_a_gpu_finds_the_same():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    for size in (3, 5000, 1 << 18, 40_000_005):
        data = random_bytes(size)
        assert fingerprint(data.cuda()) == fingerprint(data)
