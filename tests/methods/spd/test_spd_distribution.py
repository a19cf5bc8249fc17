"""SPD's sampled text follows the model's own distribution, token by token."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from spd_cases import Module, prompt, spd, stock, target, twin
from torch.nn.functional import one_hot
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hf_specdec.generation import acceptance
from hf_specdec.generation.methods.spd.method import SPDStrategy


VOCAB = 6
LAWS = {
    "temperature": ({"temperature": 1.3, "top_k": 0}, [TemperatureLogitsWarper(1.3)]),
    "top_k and top_p": (
        {"temperature": 1.2, "top_k": 5, "top_p": 0.9},
        [TemperatureLogitsWarper(1.2), TopKLogitsWarper(5), TopPLogitsWarper(0.9)],
    ),
}


def deviation(distribution, group, found):
    """Return the p-value of words `found` `[t]` under distributions `[t, V]`: a chi-square over (group, word).

    Every distribution is given the text before it, so deviations are a martingale's, of known covariance.
    """
    cells = one_hot(group * VOCAB + found, VOCAB * VOCAB).double()
    expected = torch.zeros(len(distribution), VOCAB * VOCAB, dtype=torch.float64)
    expected.scatter_(1, group[:, None] * VOCAB + torch.arange(VOCAB), distribution)
    off = (cells - expected).sum(dim=0)
    covariance = expected.sum(dim=0).diag() - expected.T @ expected
    size, axes = torch.linalg.eigh(covariance)
    real = size > 3  # directions that hardly occur are not normal yet
    return stats.chi2.sf(float(((axes.T @ off)[real] ** 2 / size[real]).sum()), int(real.sum()))


def leaning(distribution, guessed, found):
    """Return the p-value of how far words lean towards those that were guessed, as they do under a wrong rule."""
    mean = (distribution * guessed).sum(dim=-1)
    off = guessed.gather(1, found[:, None])[:, 0] - mean
    spread = ((distribution * guessed**2).sum(dim=-1) - mean**2).sum().sqrt()
    return 2 * stats.norm.sf(abs(float(off.sum() / spread)))


def sampled(setting, new, reduced):
    """Return the p-values of a sampled text, and its statistics."""
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
    distribution, found = scores.double().softmax(-1), text[0, 4:]
    assert not (distribution.gather(1, found[:, None]) == 0).any()
    guessed = torch.zeros_like(distribution)
    for rows, _, _, logits in module.calls:  # the last guess of a place is the one that was judged
        guessed[rows.shape[1] - 4] = module.scatter(logits)[0].double().softmax(-1)
    return deviation(distribution, text[0, 3:-1], found), leaning(distribution, guessed, found), out.speculation


@pytest.mark.parametrize("setting", LAWS)
def test_sampled_text_follows_the_distribution(setting):
    """Also with a draft vocabulary that lacks the most frequent word."""
    for reduced in (False, True):
        *chances, counts = sampled(setting, 400, reduced)
        assert min(chances) > 1e-3
        assert 0.1 < counts.acceptance_rate < 0.9


@pytest.mark.parametrize(
    "mutant", ["all accepted", "residual forgotten", "wrong draft distribution", "flat draft distribution"]
)
def test_a_wrong_rule_is_found(mutant, monkeypatch):
    if mutant == "all accepted":
        monkeypatch.setattr(acceptance, "acceptance_probability", lambda drafts, *_: torch.ones(drafts.shape).double())
    elif mutant == "residual forgotten":
        monkeypatch.setattr(acceptance, "residual_distribution", lambda target, draft: target)
    else:
        # what a draft was drawn from, as it is told to those who judge it
        change = (
            (lambda distribution: distribution.roll(1, dims=-1))
            if mutant == "wrong draft distribution"
            else torch.ones_like
        )
        enter = SPDStrategy._enter

        def entered(self, token, position, distribution):
            distribution = None if distribution is None else change(distribution)
            return enter(self, token, position, None if distribution is None else distribution / distribution.sum())

        monkeypatch.setattr(SPDStrategy, "_enter", entered)
    *chances, _ = sampled("temperature", 400, False)
    assert min(chances) < 1e-3
