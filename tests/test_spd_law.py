"""SPD's sampled text follows the model's own law: every token's frequency against the law after the text before it."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from test_spd import Module, prompt, spd, stock, target, twin
from torch.nn.functional import one_hot
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hf_specdec.generation import acceptance
from hf_specdec.generation.spd import SPDStrategy


VOCAB = 6
LAWS = {
    "temperature": ({"temperature": 1.3, "top_k": 0}, [TemperatureLogitsWarper(1.3)]),
    "top_k and top_p": (
        {"temperature": 1.2, "top_k": 5, "top_p": 0.9},
        [TemperatureLogitsWarper(1.2), TopKLogitsWarper(5), TopPLogitsWarper(0.9)],
    ),
}


def deviation(law, group, found):
    """Return the p-value of words `found` `[t]` under laws `[t, V]`: a chi-square over (group, word).

    Every law is given the text before it, so the deviations are a martingale's, and their covariance is known.
    """
    cells = one_hot(group * VOCAB + found, VOCAB * VOCAB).double()
    expected = torch.zeros(len(law), VOCAB * VOCAB, dtype=torch.float64)
    expected.scatter_(1, group[:, None] * VOCAB + torch.arange(VOCAB), law)
    off = (cells - expected).sum(dim=0)
    covariance = expected.sum(dim=0).diag() - expected.T @ expected
    size, axes = torch.linalg.eigh(covariance)
    real = size > 3  # directions that hardly occur are not normal yet
    return stats.chi2.sf(float(((axes.T @ off)[real] ** 2 / size[real]).sum()), int(real.sum()))


def sampled(setting, new, reduced):
    """Return laws, words before and words found of a sampled text, and its statistics."""
    model = target(layers=3, vocab_size=VOCAB, hidden_size=16, initializer_range=0.25, max_position_embeddings=1024)
    model.generation_config.pad_token_id = None
    torch.manual_seed(6)
    ids, (options, warpers) = prompt(4, vocab=VOCAB), LAWS[setting]
    often = stock(model, ids, 200, do_sample=True)[0].bincount().argmax()
    vocabulary = torch.tensor([word for word in range(VOCAB) if word != often]) if reduced else None
    module = Module(model, 3, vocabulary=vocabulary)
    out = spd(model, module, ids, new, do_sample=True, **options)
    text = out.sequences
    with torch.no_grad():
        scores = twin(model)(text).logits[0, 3:-1].float()
    for warper in warpers:
        scores = warper(None, scores)
    return scores.double().softmax(-1), text[0, 3:-1], text[0, 4:], out.speculation


@pytest.mark.parametrize("setting", LAWS)
def test_sampled_text_follows_the_law(setting):
    """Also with a draft vocabulary that lacks the most frequent word."""
    for reduced in (False, True):
        law, before, found, counts = sampled(setting, 350, reduced)
        assert not (law.gather(1, found[:, None]) == 0).any()
        assert deviation(law, before, found) > 1e-3
        assert 0.1 < counts.acceptance_rate < 0.9


@pytest.mark.parametrize("mutant", ["all accepted", "residual forgotten", "wrong draft law"])
def test_a_wrong_rule_is_found(mutant, monkeypatch):
    if mutant == "all accepted":
        monkeypatch.setattr(acceptance, "acceptance_probability", lambda drafts, *_: torch.ones(drafts.shape).double())
    elif mutant == "residual forgotten":
        monkeypatch.setattr(acceptance, "residual_law", lambda target, draft: target)
    else:
        original = SPDStrategy._judge

        def judge(state, scores, draft):
            draft.law = draft.law.roll(1, dims=-1)
            return original(state, scores, draft)

        monkeypatch.setattr(SPDStrategy, "_judge", staticmethod(judge))
    law, before, found, _ = sampled("temperature", 350, False)
    assert deviation(law, before, found) < 1e-3
