"""The generator gives the published test vectors, and its uniform numbers are uniform."""

import numpy as np

from cluster.engine.philox import philox4x32, uniform

# kat_vectors of the authors' Random123 distribution: counter, key, result.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(texts):
    return np.array([[int(word, 16) for word in text.split()] for text in texts], np.uint64).T


def test_known_answers():
    counters, keys, answers = (words(column) for column in zip(*KNOWN_ANSWERS, strict=True))
    np.testing.assert_array_equal(philox4x32(counters, keys), answers)


def test_uniform_is_the_first_53_bits():
    words = [int(word, 16) for word in KNOWN_ANSWERS[0][2].split()]
    zero = np.zeros(1, np.uint64)
    assert uniform(zero, zero)[0] == ((words[0] << 32 | words[1]) >> 11) / 2**53


def test_uniform_uses_all_64_bits_of_seed_and_position():
    seeds = np.array([0, 1, 1 << 32, 1 << 63, 0, 0, 0], np.uint64)
    positions = np.array([0, 0, 0, 0, 1, 1 << 32, 1 << 63], np.uint64)
    assert len(set(uniform(seeds, positions).tolist())) == 7


def test_uniform_is_uniform_over_positions_and_over_seeds():
    num = 100_000
    counting, fixed = np.arange(num, dtype=np.uint64), np.full(num, 12345, np.uint64)
    for numbers in (uniform(fixed, counting), uniform(counting, fixed)):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
        chi_square = ((counts - num / 100) ** 2 / (num / 100)).sum()
        assert chi_square < 166.0  # p = 3e-5 at 99 degrees of freedom; the numbers are fixed
        correlation = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
        assert abs(correlation) < 4 / np.sqrt(num)
