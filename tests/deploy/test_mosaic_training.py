"""The parts that made the bundled model, against closed forms and brute force."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from deploy.models.arithmetic import arithmetic_documents
from deploy.models.balance import LoadBalancer
from deploy.models.corpus import DOMAINS
from deploy.models.greedy import REPEAT_TOKENS, repeats
from deploy.models.ngram import KneserNey
from deploy.models.repetition import DECAY, fading_loss, looped_rows


class FakeGate(nn.Module):
    """Chooses the top experts of fixed scores plus bias, as a DeepSeek-V3 gate would."""

    def __init__(self, scores_E: torch.Tensor):
        super().__init__()
        self.scores_E = scores_E
        self.e_score_correction_bias = nn.Buffer(torch.zeros(len(scores_E)))

    def forward(self, noise_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores_TE = torch.sigmoid(self.scores_E + noise_TE)
        ids_TK = (scores_TE + self.e_score_correction_bias).topk(2).indices
        return scores_TE, scores_TE.gather(1, ids_TK), ids_TK


@pytest.mark.parametrize("band", [0.0, 0.5])
def test_balance_brings_every_expert_into_the_band(band: float) -> None:
    torch.manual_seed(0)
    gate = FakeGate(torch.linspace(-1, 1, 8))
    balancer = LoadBalancer({1: gate}, step_size=1e-2, band=band)
    for _ in range(400):
        gate(torch.randn(512, 8))
        balancer.update()
    counts_E = torch.bincount(gate(torch.randn(8192, 8))[2].flatten(), minlength=8)
    load_E = counts_E / counts_E.float().mean()
    assert load_E.min() > 1 - band - 0.15
    assert load_E.max() < 1 + band + 0.15
    if band:
        assert load_E.max() - load_E.min() > 0.5  # light: preferences survive


def test_sums_in_generated_text_are_right() -> None:
    text = "\n".join(arithmetic_documents("train", 60_000, seed=3))
    equations = re.findall(r"(?m)(?<![\d+*-] )\b(\d+) ([+*-]) (\d+) = (\d+)", text)
    assert len(equations) > 500
    compute = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    for a, sign, b, result in equations:
        assert compute[sign](int(a), int(b)) == int(result)


def test_answers_follow_from_question_and_last_step() -> None:
    text = "\n".join(arithmetic_documents("train", 100_000, seed=4))
    products = re.findall(
        r"Question: (\d+) \* (\d+) = \?\n(?:.*\n)*?.* = (\d+)\.\nAnswer: (\d+)", text
    )
    assert len(products) > 50
    for a, b, last_step, answer in products:
        assert int(a) * int(b) == int(last_step) == int(answer)


def test_no_held_out_sum_is_trained_on() -> None:
    def sums(split: str) -> set[tuple[str, str]]:
        text = "\n".join(arithmetic_documents(split, 300_000, seed=0))
        return set(re.findall(r"Question: (?:What is )?(\d+) (?:\+|plus) (\d+)", text))

    assert len(sums("test")) > 200
    assert not sums("train") & sums("test")


def test_kneser_ney_is_a_distribution_and_learns() -> None:
    rng = np.random.default_rng(0)
    train = [np.cumsum(rng.integers(1, 3, 300)) % 5 for _ in range(20)]
    ngram = KneserNey(train, num_symbols=5, order=3)
    for context in ([0], [1, 2], [4, 4], [3, 0]):  # seen and unseen contexts
        before = ngram.bits([np.array(context)])
        total = sum(2.0 ** -(ngram.bits([np.array([*context, s])]) - before) for s in range(5))
        # The uniform floor also holds the boundary, which is never scored: a hair under 1.
        assert 0.97 < total <= 1 + 1e-9
    held_out = [np.cumsum(rng.integers(1, 3, 1000)) % 5]
    assert ngram.bits(held_out) / 1000 == pytest.approx(1.0, abs=0.05)  # one coin a symbol


def test_kneser_ney_refuses_keys_beyond_64_bits() -> None:
    with pytest.raises(ValueError, match="64 bits"):
        KneserNey([np.zeros(9, dtype=np.int64)], num_symbols=70_000, order=5)


def test_looped_rows_repeat_and_fading_loss_is_what_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    real_NT = torch.arange(300).repeat(3, 1)
    ids_NT, period_N, first_N = looped_rows(real_NT, generator)
    logits_NTV = torch.randn(3, 299, 300, dtype=torch.float64, generator=generator)
    total, count = 0.0, 0
    for row, (period, first) in enumerate(zip(period_N.tolist(), first_N.tolist(), strict=True)):
        assert ids_NT[row, :first].tolist() == list(range(first))
        for place in range(first, 300):
            token = int(ids_NT[row, place])
            assert token == ids_NT[row, place - period]
            p = logits_NTV[row, place - 1].softmax(-1)[token].item()
            earlier = logits_NTV[row, place - 1 - period].softmax(-1)[token].item()
            total -= math.log(1 - abs(p - DECAY * earlier))
            count += 1
    loss = fading_loss(logits_NTV, ids_NT, period_N, first_N).item()
    assert loss == pytest.approx(total / count, rel=1e-9)


def test_repeats_match_brute_force() -> None:
    ids_NL = torch.randint(1, 3, (8, 60), generator=torch.Generator().manual_seed(0))
    domain_N = torch.tensor([0, 1, 2, 3] * 2)
    found_NL = repeats(ids_NL, domain_N, prompt_length=10)
    for row, ids in enumerate(ids_NL.tolist()):
        n = REPEAT_TOKENS[DOMAINS[domain_N[row]]]
        for place in range(60):
            gram = ids[place - n + 1 : place + 1]
            seen = [ids[s - n + 1 : s + 1] for s in range(n - 1, place)]
            assert bool(found_NL[row, place]) == (place >= 10 and gram in seen)
    assert found_NL.any()
