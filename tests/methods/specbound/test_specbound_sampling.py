"""SpecBound's sampled text follows the model's own distribution: every way in which a call can go."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from families import build
from prefixes import AgainstLastPair
from scipy import stats
from specbound_cases import SMALL, WARPED, lower_deep_layers, random_heads
from transformers import LogitsProcessorList

from hf_specdec import SpecBoundConfig, on_speculation
from hf_specdec.generation import acceptance
from hf_specdec.generation.methods.specbound import method as specbound
from hf_specdec.generation.state import DecodingState


LAWS = {
    "plain": ({"top_k": 0}, ()),
    "temperature and top_k": ({"temperature": 0.7, "top_k": 3}, WARPED),
    "of the prefix": ({"top_k": 0, "logits_processor": [AgainstLastPair()]}, (AgainstLastPair(),)),
}


@functools.cache
def sampler(vocab=4, seed=8):
    """Return a model of few words whose rows exit at depth 1, at depth 2 or not at all."""
    changes = {"vocab_size": vocab, "hidden_size": 16, "num_hidden_layers": 4, "initializer_range": 0.3}
    model = build("Llama", seed=seed, **changes)
    lower_deep_layers(model, share=0.5, first=3)
    model.generation_config.pad_token_id = None
    return model


class Paths:
    """Enumerates sampled calls of one row: a plan has one number per random choice."""

    def __init__(self, monkeypatch):
        self.patch = monkeypatch

    def choose(self, chances):
        chances = chances.double() / chances.double().sum()
        if len(self.done) == len(self.plan):
            possible = chances.nonzero()[:, 0].tolist()
            self.plan.append(possible[0])
            self.queue += [[*self.done, other] for other in possible[1:]]
        self.done.append(self.plan[len(self.done)])
        self.mass *= float(chances[self.done[-1]])
        return self.done[-1]

    def multinomial(self, distribution, number, **_):
        return torch.tensor([[self.choose(distribution[0])]])

    def rand(self, *size, **_):
        """Give coins by which the first so many drafts are accepted and the next is not."""
        accept = self.chance[0].double().clamp(0, 1)
        stay = [accept[:j].prod() * (1 - accept[j] if j < len(accept) else 1) for j in range(len(accept) + 1)]
        coins = torch.full(self.chance.shape, 2.0, dtype=torch.float64)
        coins[0, : self.choose(torch.stack(stay))] = -1.0
        return coins

    def distribution(self, model, config, length, **kwargs):
        """Return what a call emits, as a dictionary from tokens to probability, and the last call's statistics."""
        rule = acceptance.acceptance_probability
        found, self.queue, self.stats = {}, [[]], []

        def noted_rule(*args):
            self.chance = rule(*args)
            return self.chance

        with self.patch.context() as patch, on_speculation(self.stats.append):
            patch.setattr(acceptance, "acceptance_probability", noted_rule)
            patch.setattr(torch, "multinomial", self.multinomial)
            patch.setattr(torch, "rand", self.rand)
            while self.queue:
                self.plan, self.done, self.mass = self.queue.pop(), [], 1.0
                out = model.generate(
                    SMALL % model.config.vocab_size, assistant_strategy=config, do_sample=True, max_new_tokens=length,
                    **kwargs,
                )  # fmt: skip
                key = tuple(out[0, SMALL.shape[1] :].tolist())
                found[key] = found.get(key, 0.0) + self.mass
        return found


def exact(model, length, processors):
    """Return the distribution of the model's own text by forwards without a cache."""
    chain, found = LogitsProcessorList(processors), {(): 1.0}
    for _ in range(length):
        more = torch.tensor(list(found), dtype=torch.int64).view(len(found), -1)
        text = torch.cat([(SMALL % model.config.vocab_size).expand(len(found), -1), more], dim=1)
        with torch.no_grad():
            distributions = torch.softmax(chain(text, model(text).logits[:, -1].float()).double(), dim=-1).tolist()
        found = {
            (*prefix, token): mass * chance
            for (prefix, mass), distribution in zip(found.items(), distributions, strict=True)
            for token, chance in enumerate(distribution)
            if chance
        }
    return found


def distance(one, other):
    """Return the total variation distance of two distributions."""
    return sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in {*one, *other}) / 2


SAMPLED = {"max_depth": 2, "exit_layers": [1, 2], "tau": 0.5, "alpha": 0.5}
EXACT = 3e-6  # distributions are float32


@pytest.mark.parametrize("setting", LAWS)
@pytest.mark.parametrize("mode", ["sample", "match"])
def test_sampled_sequences_have_the_models_distribution(mode, setting, monkeypatch):
    kwargs, processors = LAWS[setting]
    paths = Paths(monkeypatch)
    tau = 0.4 if "top_k" in setting else SAMPLED["tau"]  # other texts are met there
    config = SpecBoundConfig(**{**SAMPLED, "tau": tau, "sampling_draft": mode})
    found = paths.distribution(sampler(), config, 3, **kwargs)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-6)
    assert distance(found, exact(sampler(), 3, processors)) < EXACT
    met_everything(paths)


def met_everything(paths):
    """Check that rows exited at both depths and at none, and that drafts were right and wrong."""
    exited = sum((Counter(found.method["exits"]) for found in paths.stats), Counter())
    stopped = sum((Counter(found.method["stop_reasons"]) for found in paths.stats), Counter())
    assert exited["1"] and exited["2"] and stopped["depth"] and stopped["width"]
    drafted = sum(found.num_draft_tokens for found in paths.stats)
    assert 0 < sum(found.num_accepted_tokens for found in paths.stats) < drafted


@pytest.mark.parametrize("mode", ["sample", "match"])
def test_longer_sampled_sequences_have_the_models_distribution(mode, monkeypatch):
    """Two drafts in a round, so that a rejected one may lie between others."""
    model, paths = sampler(3, seed=10), Paths(monkeypatch)
    config = SpecBoundConfig(**{**SAMPLED, "tau": 0.6, "sampling_draft": mode})
    found = paths.distribution(model, config, 4, top_k=0)
    assert distance(found, exact(model, 4, ())) < EXACT
    assert max(len(seen.num_accepted_tokens_per_pos) for seen in paths.stats) == 2
    met_everything(paths)


@pytest.mark.parametrize("kind", ["adapter", "block"])
def test_heads_that_lack_words_sample_by_the_models_distribution(kind, monkeypatch):
    model, paths = sampler(), Paths(monkeypatch)
    heads = random_heads(model, [1, 2], kind, torch.tensor([0, 2, 3]))
    with loaded(heads) as name:
        found = paths.distribution(model, SpecBoundConfig(**{**SAMPLED, "tau": 0.45, "adapter": name}), 3, top_k=0)
    assert distance(found, exact(model, 3, ())) < EXACT
    assert sum(seen.num_accepted_tokens for seen in paths.stats) > 0


@contextmanager
def loaded(heads, name="nobody/heads"):
    """Let `adapter=name` stand for heads that are in no file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specbound, "load_exit_heads", lambda model, name: heads)
        yield name


def test_a_test_of_the_sampled_token_has_another_distribution(monkeypatch):
    """The forbidden variant: draw first, and exit if the drawn token is likely. The enumeration tells them apart."""
    drawn = []

    def own_confidence(logits, temperature):
        drawn[:] = [torch.multinomial(torch.softmax(logits, dim=-1), 1)[:, 0]]
        return torch.softmax(logits / temperature, dim=-1)[0, drawn[0]]

    monkeypatch.setattr(specbound, "annealed_confidence", own_confidence)
    monkeypatch.setattr(DecodingState, "choose", lambda self, scores: (drawn[0], self.distribution(scores)))
    model = sampler(3, seed=10)
    found = Paths(monkeypatch).distribution(model, SpecBoundConfig(**SAMPLED), 3, top_k=0)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-6)
    assert distance(found, exact(model, 3, ())) > 0.01


@pytest.mark.parametrize("mode", ["sample", "match"])
def test_sampling_by_chi_square(mode):
    """Real draws: whole sequences against their exact probabilities."""
    model, length, calls = sampler(), 3, 300
    config = SpecBoundConfig(**SAMPLED, sampling_draft=mode)
    torch.manual_seed(17)
    out = model.generate(
        SMALL, assistant_strategy=config, do_sample=True, max_new_tokens=length, num_return_sequences=calls,
        return_dict_in_generate=True, temperature=0.7, top_k=3,
    )  # fmt: skip
    counts = Counter(map(tuple, out.sequences[:, SMALL.shape[1] :].tolist()))
    distribution = exact(model, length, WARPED)
    assert set(counts) <= set(distribution)
    cells, rest = [], [0.0, 0.0]
    for key, chance in distribution.items():
        if chance * calls >= 5:
            cells.append((counts[key], chance * calls))
        else:
            rest = [rest[0] + counts[key], rest[1] + chance * calls]
    cells.append(rest)
    assert len(cells) > 10
    assert stats.chisquare(*zip(*cells, strict=True), sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("refuse", [False, True])
def test_equal_distributions_of_draft_and_model_never_give_nan(refuse, monkeypatch):
    """Deep layers that do nothing: q is p, and what a refusal by rounding would leave has no mass."""
    model = copy.deepcopy(sampler())
    lower_deep_layers(model, share=0.0, first=3)
    draw, seen = torch.multinomial, []

    def noted(distribution, number, **kwargs):
        assert distribution.isfinite().all() and distribution.sum() > 0.99
        seen.append(distribution)
        return draw(distribution, number, **kwargs)

    monkeypatch.setattr(torch, "multinomial", noted)
    if refuse:
        monkeypatch.setattr(torch, "rand", lambda size, **kwargs: torch.ones(size, **kwargs))
    out = model.generate(
        SMALL, assistant_strategy=SpecBoundConfig(max_depth=2, exit_layers=[2], tau=0.1), do_sample=True,
        max_new_tokens=12, num_return_sequences=5, return_dict_in_generate=True, top_k=0,
    )  # fmt: skip
    assert seen and out.speculation.num_draft_tokens
    assert out.speculation.num_accepted_tokens == (0 if refuse else out.speculation.num_draft_tokens)
