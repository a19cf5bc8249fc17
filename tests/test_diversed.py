"""DIVERSED: the distribution of whole calls by exact enumeration, its inputs by cache-free forwards, its files and
its limits.

`Paths` goes through every way in which a sampled call can go: each row of a batch follows a plan, one number per
random choice, and the probabilities of those choices multiply to the row's. What a call emits is thereby known
exactly, and is compared with a distribution that is worked out from cache-free forwards of both models.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import pickle
from inspect import signature
from pathlib import Path

import families
import pytest
import torch
import transformers.generation.utils as stock
from safetensors.torch import load_file, save_file
from scipy import stats
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import hf_specdec
from hf_specdec import AssistedConfig, DiversedConfig, DiversedHead, SpeculationConfig, VegasConfig
from hf_specdec.configuration import ADAPTER_NAME, CONFIG_NAME
from hf_specdec.generation import acceptance
from hf_specdec.generation.drafting import AssistantDrafter
from hf_specdec.generation.methods.diversed.head import import_reference_head, load_head
from hf_specdec.generation.methods.diversed.method import DiversedStrategy
from hf_specdec.generation.state import DecodingState


ALARM = 1e-4
EXACT = 3e-6  # distributions are float32
WARPED = {"temperature": 0.7, "top_k": 4, "top_p": 0.9}
WARPERS = (TemperatureLogitsWarper(0.7), TopKLogitsWarper(4), TopPLogitsWarper(0.9))


@functools.cache
def pair(vocab):
    """Return a target and an unrelated draft of another width."""
    models = []
    for seed, width in ((7, 16), (8, 24)):
        model = families.build("Llama", seed=seed, vocab_size=vocab, hidden_size=width, initializer_range=0.25)
        model.generation_config.pad_token_id = None
        models.append(model)
    return tuple(models)


def prompt(vocab):
    return torch.tensor([[2, 1, 0, 1, 2, 2]]) % vocab


def random_head(models, seed=0, spread=2.5):
    """Return a head whose weight depends strongly on both hidden states."""
    target, draft = models
    sizes = [model.config.hidden_size for model in (draft, target)]
    head = DiversedHead(*sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(spread / math.sqrt(sum(sizes)) * torch.randn(1, sum(sizes), generator=generator))
    return head


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Return a function that saves a head for a pair and gives its folder."""

    def save(models, head=None):
        folder = tmp_path_factory.mktemp("head")
        (head or random_head(models)).save(folder, DiversedConfig(), models[1], models[0])
        return str(folder)

    return save


# what each prefix leads to, without any cache


class Table:
    """Both models' distributions and states after `text` and each continuation of fewer than `length` tokens."""

    def __init__(self, models, text, length, processors=()):
        target, draft = models
        self.vocab, self.length = target.config.vocab_size, length
        chain = LogitsProcessorList(processors)
        self.p, self.q, self.states = {}, {}, {}
        for size in range(length):
            prefixes = list(itertools.product(range(self.vocab), repeat=size))
            more = torch.tensor(prefixes, dtype=torch.int64).view(len(prefixes), size)
            whole = torch.cat([text.expand(len(prefixes), -1), more], dim=1)
            distributions, states = zip(*(final(model, whole, chain) for model in (target, draft)), strict=True)
            for row, prefix in enumerate(prefixes):
                self.p[prefix], self.q[prefix] = distributions[0][row], distributions[1][row]
                self.states[prefix] = torch.cat([states[1][row], states[0][row]])  # draft first


@torch.no_grad()
def final(model, text, chain=None, temperature=1.0):
    """Return distribution and LM head input at the last position of each row, in float64."""
    state = model.base_model(text).last_hidden_state[:, -1]
    logits = model.get_output_embeddings()(state).float()
    logits = chain(text, logits) if chain else logits
    return torch.softmax(logits.double() / temperature, dim=-1), state.double()


@functools.cache
def table(vocab, length, processors=()):
    return Table(pair(vocab), prompt(vocab), length, processors)


def constant(weight):
    return lambda state: weight


def by_head(head, offset=0.0, low=0.0, high=1.0):
    vector, bias = head.weight[0].detach().double(), head.bias.item()
    return lambda state: min(high, max(low, 1 / (1 + math.exp(-float(vector @ state) - bias - offset))))


def mix(p, q, w):
    return w * p + (1 - w) * q


def geometric(p, q, w):
    v = p**w * q ** (1 - w)
    return v / v.sum() if v.any() else p  # distributions without a common token have no geometric mean


def inside_target(p, q, w):
    v = mix(p, q, w) * (p > 0)
    return v / v.sum() if v.any() else p  # no token that both allow, and no weight on the target


def declared(table, weight, bonus, tokens, rule=mix, eos=None, stop=lambda prefix: False):
    """Return the distribution of a call's text by the rounds it is made of, as a dictionary."""
    found = {}

    def emit(prefix, token, mass, left):
        if mass <= 0:
            return
        prefix = (*prefix, token)
        if token == eos or len(prefix) == table.length:
            found[prefix] = found.get(prefix, 0.0) + mass
        else:
            walk(prefix, mass, min(tokens, table.length - len(prefix) - 1) if left is None else left)

    def walk(prefix, mass, left):
        p, q = table.p[prefix], table.q[prefix]
        v = rule(p, q, weight(table.states[prefix]))
        drafted = left > 0 and not stop(prefix)
        for token in range(table.vocab):
            if drafted:
                kept = float(torch.minimum(q, v)[token])
                emit(prefix, token, mass * kept, left - 1)
                emit(prefix, token, mass * float((v - q)[token]), None)
            else:
                emit(prefix, token, mass * float((p if bonus == "target" else v)[token]), None)

    walk((), 1.0, 0)
    return found


def step_by_step(table, weight, rule=mix):
    """Return the distribution of text that is drawn token by token from the mixture, as a dictionary."""
    found = {(): 1.0}
    for _ in range(table.length):
        found = {
            (*prefix, token): mass * chance
            for prefix, mass in found.items()
            for token, chance in enumerate(
                rule(table.p[prefix], table.q[prefix], weight(table.states[prefix])).tolist()
            )
        }
    return found


def distance(one, other):
    """Return the total variation distance of two distributions."""
    return sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in {*one, *other}) / 2


def draws(numbers, distribution):
    """Return the chi-square test's p-value of numbers drawn from `distribution` (a list); rare outcomes are pooled."""
    chances = torch.as_tensor(distribution, dtype=torch.float64)
    counts = torch.bincount(numbers, minlength=len(chances)).double()
    assert not counts[chances <= 0].any()
    expected = chances * len(numbers)
    rare = expected < 10
    cells = [torch.cat([part[~rare], part[rare].sum()[None]]) for part in (counts, expected)]
    used = cells[1] > 0
    return stats.chisquare(cells[0][used], cells[1][used], sum_check=False).pvalue


# every way a call can go


class Paths:
    """Enumerates calls; `distribution` is what row `i`, one of `texts`, emits."""

    def __init__(self, monkeypatch, models, texts, masks=None, rows=192):
        self.patch, self.models, self.rows = monkeypatch, models, rows
        self.texts = texts
        self.masks = torch.ones_like(texts) if masks is None else masks
        self.calls = 0

    def choose(self, row, chances):
        chances = chances.double() / chances.double().sum()
        done, plan = self.done[row], self.plans[row]
        if len(done) == len(plan):
            possible = chances.nonzero()[:, 0].tolist()
            plan.append(possible[0])
            self.queue += [(self.kinds[row], [*done, other]) for other in possible[1:]]
        done.append(plan[len(done)])
        self.mass[row] *= float(chances[done[-1]])
        return done[-1]

    def multinomial(self, distribution, number, **_):
        return torch.tensor([[self.choose(row, distribution[slot])] for slot, row in enumerate(self.state.active)])

    def rand(self, *size, **kwargs):
        coins = torch.full(self.chance.shape, 2.0, dtype=torch.float64)
        for slot, row in enumerate(self.state.active):
            count, accept = int(self.counts[slot]), self.chance[slot].double()
            stay = [accept[:j].prod() * (1 - accept[j] if j < count else 1) for j in range(count + 1)]
            coins[slot, : self.choose(row, torch.stack(stay))] = -1.0
        return coins

    def distributions(self, config, **kwargs):
        """Return one distribution per text, each a dictionary from emitted tokens to probability."""
        begin, accept, rule = DecodingState.begin, acceptance.accept_drafts, acceptance.acceptance_probability

        def noted_begin(state, *args):
            self.state = state
            return begin(state, *args)

        def noted_accept(drafts, counts, *args):
            self.counts = counts
            return accept(drafts, counts, *args)

        def noted_rule(*args):
            self.chance = rule(*args)
            return self.chance

        found = [{} for _ in self.texts]
        self.queue = [(kind, []) for kind in range(len(self.texts))]
        with self.patch.context() as patch:
            patch.setattr(DecodingState, "begin", noted_begin)
            patch.setattr(acceptance, "accept_drafts", noted_accept)
            patch.setattr(acceptance, "acceptance_probability", noted_rule)
            patch.setattr(torch, "multinomial", self.multinomial)
            patch.setattr(torch, "rand", self.rand)
            while self.queue:
                # from both ends: long and short plans, and all texts, meet in one batch
                part = self.queue[: self.rows // 2] + self.queue[self.rows // 2 :][-(self.rows // 2) :]
                self.queue = self.queue[self.rows // 2 :][: -(self.rows // 2)]
                self.kinds, self.plans = [kind for kind, _ in part], [list(plan) for _, plan in part]
                self.done, self.mass = [[] for _ in part], [1.0] * len(part)
                self.calls += 1
                out = generate(
                    self.models, self.texts[self.kinds], config, attention_mask=self.masks[self.kinds], **kwargs
                )
                eos = kwargs.get("eos_token_id")
                for row, kind in enumerate(self.kinds):
                    text = out[row, self.texts.shape[1] :].tolist()
                    key = tuple(text[: text.index(eos) + 1] if eos in text else text)
                    found[kind][key] = found[kind].get(key, 0.0) + self.mass[row]
        return found


def generate(models, ids, config, **kwargs):
    """Sample with the pair, warpers off unless asked for."""
    target, draft = models
    # an explicit mask: stock takes pad tokens inside a text for padding
    kwargs = {
        "do_sample": True,
        "top_k": 0,
        "assistant_model": draft,
        "attention_mask": torch.ones_like(ids),
        **kwargs,
    }
    return target.generate(ids, assistant_strategy=config, **kwargs)


def call_distribution(monkeypatch, vocab, length, config, **kwargs):
    distribution = Paths(monkeypatch, pair(vocab), prompt(vocab)).distributions(
        config, max_new_tokens=length, **kwargs
    )[0]
    assert sum(distribution.values()) == pytest.approx(1, abs=EXACT)
    return distribution


def settings(tokens=2, **changes):
    return DiversedConfig(num_assistant_tokens=tokens, **changes)


# the distribution of whole calls


def test_the_pair_is_worth_testing():
    """Draft and target differ, and no distribution is a point."""
    distributions = table(3, 4)
    tv = [float((distributions.p[prefix] - distributions.q[prefix]).abs().sum() / 2) for prefix in distributions.p]
    assert min(tv) < 0.1 and max(tv) > 0.5 and sum(tv) / len(tv) > 0.3
    assert (
        min(float(distribution.min()) for distribution in [*distributions.p.values(), *distributions.q.values()])
        > 0.01
    )
    weights = [by_head(random_head(pair(3)))(state) for state in distributions.states.values()]
    assert min(weights) < 0.5 and max(weights) > 0.9


@pytest.mark.parametrize("bonus", ["target", "mixture"])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_t_bonus_distribution_of_a_fixed_weight(monkeypatch, bonus, weight):
    distributions, config = table(3, 4), settings(weight=weight, bonus=bonus)
    emitted = call_distribution(monkeypatch, 3, 4, config)
    assert distance(emitted, declared(distributions, constant(weight), bonus, 2)) < EXACT
    mixture = step_by_step(distributions, constant(weight))
    if bonus == "mixture" or weight == 1:
        assert distance(emitted, mixture) < EXACT
    else:
        assert distance(emitted, mixture) > 0.05
    for other in (0.0, 0.4, 1.0):
        if other != weight:
            assert distance(emitted, declared(distributions, constant(other), bonus, 2)) > 0.03


@pytest.mark.parametrize("bonus", ["target", "mixture"])
def test_t_distribution_with_a_head_that_depends_on_the_hidden_states(monkeypatch, heads, bonus):
    head, distributions = random_head(pair(3)), table(3, 4)
    emitted = call_distribution(monkeypatch, 3, 4, settings(adapter=heads(pair(3)), bonus=bonus))
    assert distance(emitted, declared(distributions, by_head(head), bonus, 2)) < EXACT
    shifted = {prefix: distributions.states[prefix[:-1]] for prefix in distributions.states}
    other = Table.__new__(Table)
    other.__dict__ = {**vars(distributions), "states": shifted}  # hidden states one position early
    assert distance(emitted, declared(other, by_head(head), bonus, 2)) > 0.01
    assert distance(emitted, declared(distributions, constant(0.5), bonus, 2)) > 0.01


def test_t_distribution_with_offset_and_limits(monkeypatch, heads):
    head, folder = random_head(pair(3)), heads(pair(3))
    config = settings(adapter=folder, bonus="mixture", weight_offset=0.8, w_min=0.45, w_max=0.7)
    emitted = call_distribution(monkeypatch, 3, 3, config)
    assert distance(emitted, step_by_step(table(3, 3), by_head(head, 0.8, 0.45, 0.7))) < EXACT
    assert distance(emitted, step_by_step(table(3, 3), by_head(head, 0.8))) > 0.01
    assert distance(emitted, step_by_step(table(3, 3), by_head(head, 0.0, 0.45, 0.7))) > 0.005


def test_t_distribution_limits_hold_for_a_fixed_weight(monkeypatch):
    emitted = call_distribution(monkeypatch, 3, 3, settings(weight=0.1, w_min=0.6, bonus="mixture"))
    assert distance(emitted, step_by_step(table(3, 3), constant(0.6))) < EXACT


def test_t_distribution_the_default_weight_is_seven_tenths(monkeypatch):
    emitted = call_distribution(monkeypatch, 3, 3, "diversed")
    assert distance(emitted, declared(table(3, 3), constant(0.7), "target", 5)) < EXACT


@pytest.mark.parametrize("bonus", ["target", "mixture"])
def test_t_distribution_of_logit_mixing_is_the_geometric_mean(monkeypatch, bonus):
    distributions, config = table(3, 4), settings(weight=0.4, mix_space="logit", bonus=bonus)
    emitted = call_distribution(monkeypatch, 3, 4, config)
    assert distance(emitted, declared(distributions, constant(0.4), bonus, 2, geometric)) < EXACT
    assert distance(emitted, declared(distributions, constant(0.4), bonus, 2)) > 0.005


@pytest.mark.parametrize("bonus", ["target", "mixture"])
@pytest.mark.parametrize("mode", ["plain", "support", "logit"])
def test_t_distribution_under_warpers(monkeypatch, bonus, mode):
    """Distributions with zeros, and supports that overlap in part."""
    distributions = table(4, 3, (TopKLogitsWarper(2),))
    rules = {"plain": mix, "support": inside_target, "logit": geometric}
    changes = {"plain": {}, "support": {"restrict_to_target_support": True}, "logit": {"mix_space": "logit"}}
    overlap = {
        int(((distributions.p[prefix] > 0) & (distributions.q[prefix] > 0)).sum()) for prefix in distributions.p
    }
    assert {0, 1} <= overlap
    emitted = call_distribution(monkeypatch, 4, 3, settings(weight=0.5, bonus=bonus, **changes[mode]), top_k=2)
    assert distance(emitted, declared(distributions, constant(0.5), bonus, 2, rules[mode])) < EXACT
    outside = sum(mass for text, mass in emitted.items() if distributions.p[text[:1]][text[1]] == 0)
    assert (outside > 0.01) if mode == "plain" else (outside == 0)


@pytest.mark.parametrize("mode", ["support", "logit"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_t_num_ends_of_the_scale_under_warpers(monkeypatch, mode, weight):
    distributions = table(4, 3, (TopKLogitsWarper(2),))
    rule = {"support": inside_target, "logit": lambda p, q, w: p if w else q}[mode]
    changes = {"support": {"restrict_to_target_support": True}, "logit": {"mix_space": "logit"}}[mode]
    emitted = call_distribution(monkeypatch, 4, 3, settings(weight=weight, bonus="mixture", **changes), top_k=2)
    assert distance(emitted, step_by_step(distributions, constant(weight), rule)) < EXACT


def test_t_prefix_distribution_under_processors_that_read_the_text(monkeypatch):
    distributions = table(3, 4, (RepetitionPenaltyLogitsProcessor(1.8),))
    emitted = call_distribution(monkeypatch, 3, 4, settings(weight=0.4, bonus="mixture"), repetition_penalty=1.8)
    assert distance(emitted, step_by_step(distributions, constant(0.4))) < EXACT
    assert distance(emitted, step_by_step(table(3, 4), constant(0.4))) > 0.02


@pytest.mark.parametrize("bonus", ["target", "mixture"])
def test_t_adapt_draft_lengths_that_follow_the_text(monkeypatch, heads, bonus):
    """A stopping rule that looks at what has been drafted so far; rows of one batch draft 0, 1 or 2."""
    head, distributions, start = random_head(pair(3)), table(3, 4), prompt(3).shape[1]
    propose, seen = AssistantDrafter.propose, set()

    def stop(prefix):
        return sum((place + 1) * (token + 1) for place, token in enumerate(prefix)) % 3 == 0

    def shorter(drafter, state):
        draft = propose(drafter, state)
        for slot, row in enumerate(state.active):
            text = state.ids[row, start : state.columns[row]].tolist()
            prefixes = [(*text, *draft.tokens[slot, :n].tolist()) for n in range(draft.counts[slot])]
            draft.counts[slot] = next((n for n, prefix in enumerate(prefixes) if stop(prefix)), len(prefixes))
        seen.update(draft.counts)
        return draft

    monkeypatch.setattr(AssistantDrafter, "propose", shorter)
    emitted = call_distribution(monkeypatch, 3, 4, settings(adapter=heads(pair(3)), bonus=bonus))
    assert seen == {0, 1, 2}
    assert distance(emitted, declared(distributions, by_head(head), bonus, 2, stop=stop)) < EXACT
    if bonus == "mixture":
        assert distance(emitted, step_by_step(distributions, by_head(head))) < EXACT
    else:
        assert distance(emitted, declared(distributions, by_head(head), bonus, 2)) > 0.01


@pytest.mark.parametrize("bonus", ["target", "mixture"])
def test_t_batch_rows_of_different_lengths(monkeypatch, heads, bonus):
    """Two texts, left-padded, meet each other's rows in every stage."""
    head, models = random_head(pair(3)), pair(3)
    texts = torch.tensor([[2, 1, 0, 1, 2, 2], [0, 0, 0, 2, 1, 1]])
    masks = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    paths = Paths(monkeypatch, models, texts, masks)
    found = paths.distributions(settings(adapter=heads(models), bonus=bonus), max_new_tokens=3, pad_token_id=0)
    wanted = [declared(Table(models, text, 3), by_head(head), bonus, 2) for text in (texts[:1], texts[1:, 3:])]
    for emitted, distribution in zip(found, wanted, strict=True):
        assert distance(emitted, distribution) < EXACT
    assert distance(*wanted) > 0.05


def test_t_batch_greedy_rows_do_not_see_their_neighbours(llama, tmp_path):
    models = (llama.model, llama.assistant)
    random_head(models).save(tmp_path, settings(3), *models[::-1])
    together = greedy(models, llama.ids, DiversedConfig(adapter=str(tmp_path)), attention_mask=llama.mask)
    for row in range(4):
        alone = llama.ids[row : row + 1, llama.ids.shape[1] - int(llama.mask[row].sum()) :]
        text = greedy(models, alone, DiversedConfig(adapter=str(tmp_path)))
        assert text[0, alone.shape[1] :].tolist() == together[row, llama.ids.shape[1] :].tolist()


@pytest.mark.parametrize("bonus", ["target", "mixture"])
def test_t_stop_distribution_with_an_end_token(monkeypatch, bonus):
    """The end token comes as an accepted draft, as a replacement and as the bonus token; nothing follows it."""
    distributions, weight = table(3, 4), constant(0.5)
    emitted = call_distribution(monkeypatch, 3, 4, settings(weight=0.5, bonus=bonus), eos_token_id=1, pad_token_id=0)
    assert distance(emitted, declared(distributions, weight, bonus, 2, eos=1)) < EXACT
    assert {len(text) for text in emitted if text[-1] == 1} == {1, 2, 3, 4}


# the distribution of real draws


def sampled(config, rows, length, seed, vocab=5, **kwargs):
    torch.manual_seed(seed)
    text = prompt(vocab)
    parts = [
        generate(pair(vocab), text, config, max_new_tokens=length, num_return_sequences=1000, **kwargs)
        for _ in range(rows // 1000)
    ]
    return torch.cat(parts)[:, text.shape[1] :]


@pytest.mark.parametrize("learned", [False, True])
def test_t_seq_distribution_of_two_drafted_tokens(heads, learned):
    """Three tokens with more drafts than that: the second and third are judged, the first comes from the target."""
    head, distributions = random_head(pair(5)), table(5, 3)
    weight = by_head(head) if learned else constant(0.4)
    config = settings(4, adapter=heads(pair(5))) if learned else settings(4, weight=0.4)
    text = sampled(config, 6000, 6, seed=5)[:, :3]
    numbers = text @ torch.tensor([25, 5, 1])

    def distribution(rule, w):
        found = []
        for prefix in itertools.product(range(5), repeat=3):
            chance = float(distributions.p[()][prefix[0]])
            for place in (1, 2):
                before = prefix[:place]
                chance *= float(
                    rule(distributions.p[before], distributions.q[before], w(distributions.states[before]))[
                        prefix[place]
                    ]
                )
            found.append(chance)
        return found

    assert draws(numbers, distribution(mix, weight)) > ALARM
    assert draws(numbers, distribution(mix, constant(1.0))) < ALARM / 100
    assert draws(numbers, distribution(mix, constant(0.0))) < ALARM / 100
    assert draws(numbers, distribution(mix, constant(0.8))) < ALARM


@pytest.fixture(scope="module")
def distributions_of_eight():
    generator = torch.Generator().manual_seed(7)
    return [torch.softmax(1.5 * torch.randn(8, generator=generator), dim=0) for _ in range(2)]


def single_steps(p, q, weight, rows=40_000, seed=3):
    """Return drafts, accepted counts and emitted tokens of independent single steps."""
    torch.manual_seed(seed)
    drafts, counts = torch.multinomial(q, rows, replacement=True)[:, None], torch.ones(rows, dtype=torch.int64)
    target, weights = torch.stack([p, p]).expand(rows, 2, -1), torch.full((rows, 1), weight)
    verdict = acceptance.speculative_sample(drafts, counts, target, q.expand(rows, 1, -1), weights)
    return drafts[:, 0], verdict.accepted, verdict.tokens[:, 0]


@pytest.mark.parametrize("weight", [0.3, 0.6])
def test_t_distribution_of_single_steps(distributions_of_eight, weight):
    p, q = distributions_of_eight
    _, _, tokens = single_steps(p, q, weight)
    assert draws(tokens, mix(p, q, weight)) > ALARM
    for wrong in (p, q, geometric(p, q, weight), mix(p, q, 1 - weight) if weight != 0.5 else p):
        assert draws(tokens, wrong) < ALARM / 100


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_t_acc_is_one_minus_w_tv(distributions_of_eight, weight):
    p, q = distributions_of_eight
    tv = float((p - q).abs().sum() / 2)
    assert tv > 0.3
    every = torch.arange(8)[:, None]
    target, proposal = p.expand(8, 1, -1), q.expand(8, 1, -1)
    chance = acceptance.acceptance_probability(every, target, proposal, torch.full((8, 1), weight))[:, 0]
    assert float(chance @ q) == pytest.approx(1 - weight * tv, abs=1e-6)
    _, accepted, _ = single_steps(p, q, weight)
    wanted = 1 - weight * tv
    sigma = math.sqrt(wanted * (1 - wanted) / len(accepted))
    assert abs(float(accepted.double().mean()) - wanted) <= 4 * sigma


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_t_acc_of_calls(weight):
    """Of the positions that were tested, the mean of 1 - w TV is accepted; the statistics say what they should."""
    torch.manual_seed(1)
    out = generate(
        pair(5), prompt(5), settings(3, weight=weight), max_new_tokens=13, num_return_sequences=300,
        return_dict_in_generate=True,
    )  # fmt: skip
    method = out.speculation.method
    tested, tv = method["tested_tokens"], method["mean_tv"]
    assert method["mean_weight"] == pytest.approx(weight)
    assert method["mean_bias"] == pytest.approx((1 - weight) * tv, abs=1e-6)
    rate = out.speculation.num_accepted_tokens / tested
    sigma = math.sqrt(weight * tv * (1 - weight * tv) / tested)
    assert tv > 0.1 and abs(rate - (1 - weight * tv)) <= 4 * sigma + 1e-9
    assert (rate == 1) == (weight == 0)


def test_t_acc_statistics_are_those_of_the_tested_positions(monkeypatch, heads):
    """Weights and distances recomputed from what was judged, up to and including the first refusal."""
    accept, sums = DiversedStrategy.accept, [0.0, 0.0, 0.0, 0]
    head = random_head(pair(5))

    def noted(strategy, state, draft, target):
        result = accept(strategy, state, draft, target)
        for slot, row in enumerate(state.active):
            text = state.ids[row : row + 1, : state.columns[row]]
            for place in range(min(result.accepted[slot] + 1, draft.counts[slot])):
                whole = torch.cat([text, draft.tokens[slot : slot + 1, :place]], dim=1)
                (p, target_state), (q, draft_state) = (final(model, whole) for model in pair(5))
                w = by_head(head)(torch.cat([draft_state[0], target_state[0]]))
                tv = float((p - q).abs().sum() / 2)
                for index, value in enumerate((w, tv, (1 - w) * tv, 1)):
                    sums[index] += value
        return result

    monkeypatch.setattr(DiversedStrategy, "accept", noted)
    out = generate(
        pair(5), prompt(5), settings(3, adapter=heads(pair(5))), max_new_tokens=9, num_return_sequences=4,
        return_dict_in_generate=True,
    )  # fmt: skip
    method = out.speculation.method
    assert method["tested_tokens"] == sums[3] > 20
    for name, value in zip(("mean_weight", "mean_tv", "mean_bias"), sums, strict=False):
        assert method[name] == pytest.approx(value / sums[3], abs=1e-5)


# the ends of the scale


@pytest.mark.parametrize("how", ["weight", "limit"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_t_ends_weight_one_is_lossless(llama, tmp_path, how, do_sample):
    models = (llama.model, llama.assistant)
    random_head(models).save(tmp_path, DiversedConfig(), *models[::-1])
    ends = {"weight": {"weight": 1.0}, "limit": {"adapter": str(tmp_path), "w_min": 1.0}}
    config = settings(3, **ends[how])
    texts = []
    for strategy in (config, AssistedConfig(num_assistant_tokens=3), settings(3, weight=0.3)):
        torch.manual_seed(4)
        texts.append(generate(models, llama.ids, strategy, do_sample=do_sample, attention_mask=llama.mask,
                              max_new_tokens=24, temperature=1.2 if do_sample else None))  # fmt: skip
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert config.lossless and not settings(weight=0.99).lossless and not settings().lossless


def test_t_ends_weight_zero_accepts_everything():
    out = generate(pair(5), prompt(5), settings(3, weight=0.0), max_new_tokens=20, num_return_sequences=50,
                   return_dict_in_generate=True)  # fmt: skip
    counts = out.speculation
    assert counts.num_accepted_tokens == counts.num_draft_tokens > 500


def test_t_ends_weight_zero_greedy_text_is_the_drafts(llama):
    models = (llama.model, llama.assistant)
    text = greedy(models, llama.ids, settings(3, weight=0.0, bonus="mixture"), attention_mask=llama.mask)
    own = llama.assistant.generate(llama.ids, attention_mask=llama.mask, do_sample=False, max_new_tokens=24)
    other = llama.model.generate(llama.ids, attention_mask=llama.mask, do_sample=False, max_new_tokens=24)
    assert torch.equal(text, own) and not torch.equal(text, other)


# golden vectors


P, Q = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.7, 0.2, 0.05, 0.05])


def test_golden_vector_of_sampling():
    drafts = torch.arange(4)[:, None]
    chance = acceptance.acceptance_probability(
        drafts, P.expand(4, 1, -1), Q.expand(4, 1, -1), torch.full((4, 1), 0.6)
    )[:, 0]
    torch.testing.assert_close(chance, torch.tensor([0.742857, 1.0, 1.0, 1.0]))
    assert float(chance @ Q) == pytest.approx(0.82, abs=1e-6)
    residual = acceptance.residual_distribution(P[None], Q[None])[0]
    torch.testing.assert_close(residual, torch.tensor([0, 1 / 3, 1 / 2, 1 / 6]))
    emitted = chance * Q + (1 - chance @ Q) * residual
    torch.testing.assert_close(emitted, torch.tensor([0.52, 0.26, 0.14, 0.08]))
    strategy = DiversedStrategy(settings(weight=0.6), pair(3)[1])
    torch.testing.assert_close(strategy.mixture(P, Q, torch.tensor(0.6)), emitted)
    assert float((emitted - P).abs().sum() / 2) == pytest.approx(0.12, abs=1e-6)


@pytest.mark.parametrize(("weight", "choice"), [(0.5, 1), (0.8, 1), (0.9, 0)])
def test_golden_vector_of_greedy_decoding(weight, choice):
    p, q = torch.tensor([0.45, 0.35, 0.2]), torch.tensor([0.2, 0.7, 0.1])
    strategy = DiversedStrategy(settings(weight=weight), pair(3)[1])
    assert int(strategy.mixture(p, q, torch.tensor(weight)).argmax()) == choice


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
def test_t_res_does_not_depend_on_the_weight(monkeypatch, distributions_of_eight, weight):
    """What replaces a refused draft is drawn from the residual of p, which is that of v as well."""
    p, q = distributions_of_eight
    seen = []
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.full((1, 1), 0.999999, dtype=torch.float64))
    monkeypatch.setattr(
        torch,
        "multinomial",
        lambda distribution, _: seen.append(distribution) or distribution.argmax(-1, keepdim=True),
    )
    drafts = (q / p).argmax()[None, None]
    verdict = acceptance.speculative_sample(
        drafts, torch.ones(1).long(), p.expand(1, 2, -1), q.expand(1, 1, -1), torch.full((1, 1), weight)
    )
    assert verdict.accepted.tolist() == [0]
    for distribution in (p, mix(p, q, weight)):
        rest = (distribution - q).clamp(min=0)
        torch.testing.assert_close(seen[0][0], rest / rest.sum())


def greedy(models, ids, config, tokens=24, **kwargs):
    return generate(models, ids, config, do_sample=False, top_k=None, max_new_tokens=tokens, **kwargs)


# what the rounds of a call saw


class Rounds(list):
    """Notes, for each round and row, its text, its drafts, and what draft and target said of them."""

    def __init__(self, monkeypatch):
        accept, weights, look_ahead = DiversedStrategy.accept, DiversedStrategy.weights, AssistantDrafter.look_ahead
        self.weights, self.inputs, self.ahead = [], [], []

        def noted_weights(strategy, state, draft, target):
            self.inputs.append((draft, target))
            self.weights.append(weights(strategy, state, draft, target))
            return self.weights[-1]

        def noted_look_ahead(drafter, state, draft):
            self.ahead.append(look_ahead(drafter, state, draft))
            return self.ahead[-1]

        def noted_accept(strategy, state, draft, target):
            before, asked, looked = len(self.weights), len(self.inputs), len(self.ahead)
            result = accept(strategy, state, draft, target)
            for slot, row in enumerate(state.active):
                self.append({
                    "row": row, "slot": slot, "count": draft.counts[slot], "accepted": result.accepted[slot],
                    "text": state.text[row, : state.committed[slot]].clone(), "drafts": draft.tokens[slot],
                    "q": None if draft.distributions is None else draft.distributions[slot],
                    "logits": target.logits[slot],
                    "scores": result.scores[slot], "weights": self.weights[before:], "inputs": self.inputs[asked:],
                    "ahead": self.ahead[looked:],
                })  # fmt: skip
            return result

        monkeypatch.setattr(DiversedStrategy, "accept", noted_accept)
        monkeypatch.setattr(DiversedStrategy, "weights", noted_weights)
        monkeypatch.setattr(AssistantDrafter, "look_ahead", noted_look_ahead)


@torch.no_grad()
def teacher_forced(model, text):
    """Return the LM head's inputs and the logits at every position of `text`, by one cache-free forward."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(text[None], use_cache=False).logits[0]
    handle.remove()
    return seen[0][0], logits


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_t_align_hidden_states_are_those_before_each_draft(monkeypatch, tmp_path, name, do_sample):
    """Position L - 1 + n predicts draft n, in both models; the bonus token's position follows the last draft."""
    family = families.family(name)
    models = (family.model, family.assistant)
    random_head(models).save(tmp_path, DiversedConfig(), *models[::-1])
    rounds, config = Rounds(monkeypatch), settings(3, adapter=str(tmp_path), bonus="mixture")
    generate(models, family.ids, config, do_sample=do_sample, attention_mask=family.mask, max_new_tokens=12)
    drafted, bonuses = 0, 0
    for seen in rounds:
        count, slot, start = seen["count"], seen["slot"], len(seen["text"]) - 1
        whole = torch.cat([seen["text"], seen["drafts"][:count]])
        states = [teacher_forced(model, whole)[0] for model in models[::-1]]
        for given in seen["inputs"]:
            bonus = given[0].dim() == 2
            for part, state in zip(given, states, strict=True):
                found = part[slot] if bonus else part[slot, :count]
                wanted = state[start + count] if bonus else state[start : start + count]
                if not bonus or seen["accepted"] == count:
                    assert found.shape == wanted.shape
                    torch.testing.assert_close(found, wanted, atol=family.tolerance, rtol=family.tolerance)
            bonuses, drafted = bonuses + bonus, drafted + count
    assert bonuses > 5 and drafted > 20


def test_t_blind_weights_do_not_see_the_drafted_token(monkeypatch, heads):
    """Changing draft n leaves the weights of drafts 1 to n as they are, and changes the later ones."""
    models, folder = pair(5), heads(pair(5))

    def weights(drafts):
        with monkeypatch.context() as patch:
            rounds, script = Rounds(patch), iter([1, *drafts])
            patch.setattr(torch, "multinomial", lambda distribution, _: torch.tensor([[next(script, 0)]]))
            generate(models, prompt(5), settings(4, adapter=folder), max_new_tokens=6)
        first = next(seen for seen in rounds if seen["count"])
        assert first["drafts"].tolist() == list(drafts)
        return first["weights"][0][0]

    plain = weights((1, 2, 3, 4))
    for place, other in enumerate([(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)]):
        changed = weights(other)
        torch.testing.assert_close(changed[: place + 1], plain[: place + 1], atol=1e-6, rtol=0)
        assert (changed[place + 1 :] != plain[place + 1 :]).all()


def test_t_q_distributions_are_processed_once(monkeypatch):
    """The distribution that judges a draft is the one it was drawn from: the caller's warpers, once."""
    rounds = Rounds(monkeypatch)
    torch.manual_seed(0)
    generate(pair(8), prompt(8), settings(3, weight=0.5), max_new_tokens=16, num_return_sequences=4, **WARPED)
    once, twice = LogitsProcessorList(WARPERS), LogitsProcessorList(WARPERS * 2)
    apart, drafted = [], 0
    for seen in rounds:
        whole = torch.cat([seen["text"], seen["drafts"][: seen["count"]]])
        raw = [teacher_forced(model, whole)[1][len(seen["text"]) - 1 :].float() for model in pair(8)]
        p, q = (torch.softmax(once(None, logits), dim=-1) for logits in raw)
        torch.testing.assert_close(torch.softmax(seen["scores"][: seen["count"] + 1], -1), p, atol=1e-6, rtol=0)
        if seen["count"]:
            torch.testing.assert_close(seen["q"][: seen["count"]], q[:-1], atol=1e-6, rtol=0)
            assert (q[:-1].gather(1, seen["drafts"][: seen["count"], None]) > 0).all()
            apart.append(float((torch.softmax(twice(None, raw[1]), -1)[:-1] - q[:-1]).abs().max()))
            drafted += seen["count"]
    assert drafted > 30 and max(apart) > 0.05


@pytest.mark.parametrize(
    "options, processor",
    [
        ({"repetition_penalty": 1.7}, RepetitionPenaltyLogitsProcessor(1.7)),
        ({"no_repeat_ngram_size": 2}, NoRepeatNGramLogitsProcessor(2)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_t_prefix_rows_are_processed_with_their_own_text(monkeypatch, options, processor):
    rounds = Rounds(monkeypatch)
    torch.manual_seed(0)
    generate(pair(8), prompt(8), settings(3, weight=0.5), max_new_tokens=12, num_return_sequences=3, **options)
    changed = 0
    for seen in rounds:
        for place in range(seen["count"] + 1):
            whole = torch.cat([seen["text"], seen["drafts"][:place]])
            (p, q), (raw, _) = (
                [final(model, whole[None], chain)[0][0] for model in pair(8)]
                for chain in (LogitsProcessorList([processor]), None)
            )
            torch.testing.assert_close(torch.softmax(seen["scores"][place].double(), -1), p, atol=1e-6, rtol=0)
            if place < seen["count"]:
                torch.testing.assert_close(seen["q"][place].double(), q, atol=1e-6, rtol=0)
            changed += float((raw - p).abs().max()) > 0.01
    assert changed > 10


def test_t_ban_tokens_that_are_banned_never_appear():
    """At a low weight whatever the draft proposes passes; it must be held to the same constraints."""
    config = settings(3, weight=0.1)
    options = {"max_new_tokens": 10, "num_return_sequences": 500}
    torch.manual_seed(0)
    free = generate(pair(5), prompt(5), config, **options)[:, 6:]
    distributions = table(5, 3)
    banned = int(sum(distributions.q.values()).argmax())
    assert float((free == banned).double().mean()) > 0.15
    for ban in ({"suppress_tokens": [banned]}, {"bad_words_ids": [[banned]]}):
        text = generate(pair(5), prompt(5), config, **ban, **options)[:, 6:]
        assert text.numel() == 5000 and not (text == banned).any()
    ends = {"eos_token_id": banned, "pad_token_id": 0 if banned else 1}
    text = generate(pair(5), prompt(5), config, min_new_tokens=6, **ends, **options)[:, 6:]
    assert not (text[:, :6] == banned).any() and (text[:, 6:] == banned).any()


def test_t_ban_a_token_that_only_the_target_excludes():
    """Without the constraint on the draft a token of p = 0 passes with probability 1 - w; the option refuses it."""
    p, q = torch.tensor([0.0, 0.6, 0.4]), torch.tensor([0.5, 0.25, 0.25])
    _, _, tokens = single_steps(p, q, 0.1, rows=2000)
    assert float((tokens == 0).double().mean()) == pytest.approx(0.45, abs=0.05)
    strategy = DiversedStrategy(settings(weight=0.1, restrict_to_target_support=True), pair(3)[1])
    distribution = strategy.mixture(p, q, torch.tensor(0.1))
    assert distribution[0] == 0
    torch.testing.assert_close(distribution, inside_target(p, q, 0.1))


@pytest.mark.parametrize("bonus", ["target", "mixture"])
@pytest.mark.parametrize(
    "kind, low, high", [("refused", 0.0, 0.15), ("half", 0.3, 0.8), ("accepted", 1.0, 1.0)], ids=lambda v: str(v)
)
def test_t_cache_logits_equal_cache_free_forwards(monkeypatch, llama, kind, low, high, bonus):
    """Both caches after refusals, after rounds that were accepted whole, and after the extra draft forward."""
    draft = families.perturbed(llama.model, 0.12)
    if kind == "refused":
        head = draft.get_output_embeddings().weight
        head.data = head.data.roll(7, dims=0)
    weight = {"refused": 1.0, "half": 0.9, "accepted": 0.0}[kind]
    rounds, models = Rounds(monkeypatch), (llama.model, draft)
    torch.manual_seed(0)
    out = generate(models, llama.ids, settings(3, weight=weight, bonus=bonus), attention_mask=llama.mask,
                   do_sample=kind != "refused", max_new_tokens=90, return_dict_in_generate=True)  # fmt: skip
    assert low <= out.speculation.acceptance_rate <= high and out.speculation.target_forwards >= 20
    ahead = 0
    for seen in rounds[::2]:
        start, count = len(seen["text"]) - 1, seen["count"]
        whole = torch.cat([seen["text"], seen["drafts"][:count]])
        logits, own = (teacher_forced(model, whole)[1][start:] for model in models)
        torch.testing.assert_close(seen["logits"][: count + 1], logits, atol=1e-8, rtol=0)
        if count:
            torch.testing.assert_close(seen["q"][:count].double(), torch.softmax(own[:-1], -1), atol=1e-6, rtol=0)
        for distribution, _ in seen["ahead"]:
            if seen["accepted"] == count:
                wanted = torch.softmax(own[-1], -1)
                torch.testing.assert_close(distribution[seen["slot"]].double(), wanted, atol=1e-6, rtol=0)
                ahead += 1
    assert (ahead > 1) == (bonus == "mixture")


# greedy decoding


def mixture_text(models, ids, weight, tokens, chain=None, temperature=1.0):
    """Return the greedy text of the mixture model, token by token and without a cache; `weight` of hidden states."""
    for _ in range(tokens):
        (p, target), (q, draft) = (final(model, ids, chain, temperature) for model in models)
        v = mix(p[0], q[0], weight(torch.cat([draft[0], target[0]])))
        ids = torch.cat([ids, v.argmax()[None, None]], dim=1)
    return ids


@pytest.mark.parametrize("weight", [0.3, 0.5, 0.6, "head"])
def test_t_greedy_text_is_that_of_the_mixture(llama, tmp_path, weight):
    models = (llama.model, families.perturbed(llama.model, 0.3))
    head = random_head(models, spread=1.0)
    head.save(tmp_path, DiversedConfig(), *models[::-1])
    changes = {"adapter": str(tmp_path)} if weight == "head" else {"weight": weight}
    text = greedy(models, llama.one["input_ids"], settings(3, bonus="mixture", **changes), 32)
    rule = by_head(head) if weight == "head" else constant(weight)
    assert torch.equal(text, mixture_text(models, llama.one["input_ids"], rule, 32))
    for other in (0.0, 1.0):
        assert not torch.equal(text, mixture_text(models, llama.one["input_ids"], constant(other), 32))
    again = greedy(models, llama.one["input_ids"], settings(3, bonus="mixture", **changes), 32)
    assert torch.equal(text, again)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_t_greedy_temperature_of_the_mixed_distributions(llama, temperature):
    models = (llama.model, families.perturbed(llama.model, 0.3))
    config = settings(3, bonus="mixture", weight=0.5, greedy_temperature=temperature)
    text = greedy(models, llama.one["input_ids"], config, 40)
    texts = [
        mixture_text(models, llama.one["input_ids"], constant(0.5), 40, None, t)
        for t in (temperature, 5 - temperature)
    ]
    assert torch.equal(text, texts[0]) and not torch.equal(text, texts[1])


def test_t_greedy_processors_act_before_the_mix(llama):
    models = (llama.model, families.perturbed(llama.model, 0.3))
    config, ids = settings(3, bonus="mixture", weight=0.5), llama.one["input_ids"]
    text = greedy(models, ids, config, 24, repetition_penalty=1.5)
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)])
    assert torch.equal(text, mixture_text(models, ids, constant(0.5), 24, chain))
    assert not torch.equal(text, mixture_text(models, ids, constant(0.5), 24))


@pytest.mark.parametrize("weight", [0.3, 0.4])
def test_t_greedy_bonus_token_of_the_target(llama, weight):
    """Round by round: accept while the draft is the mixture's choice; the token after all drafts is the target's."""
    models, tokens, count = (llama.model, families.perturbed(llama.model, 0.3)), 30, 3
    ids = llama.one["input_ids"]

    def choose(text, w):
        p, q = (final(model, text)[0][0] for model in models)
        return int(mix(p, q, w).argmax())

    end, wanted = ids.shape[1] + tokens, torch.cat([ids, torch.tensor([[choose(ids, 1.0)]])], dim=1)
    while wanted.shape[1] < end:
        for _ in range(min(count, end - wanted.shape[1] - 1)):
            drafted, token = choose(wanted, 0.0), choose(wanted, weight)
            wanted = torch.cat([wanted, torch.tensor([[token]])], dim=1)
            if drafted != token:
                break
        else:
            wanted = torch.cat([wanted, torch.tensor([[choose(wanted, 1.0)]])], dim=1)
    text = greedy(models, ids, settings(count, weight=weight), tokens)
    assert torch.equal(text, wanted)
    assert not torch.equal(text, mixture_text(models, ids, constant(weight), tokens))


# numbers


@pytest.mark.parametrize("bonus", ["target", "mixture"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("mode", [{}, {"restrict_to_target_support": True}, {"mix_space": "logit"}], ids=str)
def test_t_num_identical_models_accept_everything(llama, mode, do_sample, bonus):
    model = llama.model.__class__(llama.model.config).float().eval()
    model.load_state_dict(llama.model.state_dict())
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    for scale in (1.0, 1e4):
        model.get_output_embeddings().weight.data.copy_(scale * llama.model.get_output_embeddings().weight)
        out = generate((model, model), llama.ids, settings(3, weight=0.5, bonus=bonus, **mode), max_new_tokens=24,
                       do_sample=do_sample, attention_mask=llama.mask, return_dict_in_generate=True)  # fmt: skip
        counts = out.speculation
        # the two forwards round differently
        assert counts.num_accepted_tokens >= 0.97 * counts.num_draft_tokens > 50
        assert counts.method["mean_tv"] < (1e-4 if scale == 1 else 0.05)


@pytest.mark.parametrize("mode", [{}, {"restrict_to_target_support": True}, {"mix_space": "logit"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("do_sample", [False, True])
def test_t_num_huge_logits_of_unlike_models(heads, dtype, do_sample, mode):
    """Distributions that are points, mostly on different tokens: nothing underflows into a NaN."""
    models = [families.build("Llama", seed=seed, vocab_size=8, hidden_size=16) for seed in (1, 2)]
    for model in models:
        model.get_output_embeddings().weight.data *= 1e4
        model.to(dtype)
    folder = heads(models)
    for bonus, change in itertools.product(("target", "mixture"), ({"weight": 0.5}, {"adapter": folder})):
        config = settings(3, bonus=bonus, **change, **mode)
        out = generate(models, prompt(8), config, do_sample=do_sample, max_new_tokens=10,
                       return_dict_in_generate=True)  # fmt: skip
        assert out.sequences.shape == (1, 16)
        assert all(math.isfinite(value) for value in out.speculation.method.values())
        assert out.speculation.method["mean_tv"] > 0.3


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_t_num_restricted_distributions_without_a_common_token(weight, do_sample):
    """Both models are sure, of different tokens; what the target excludes must not appear, so its own text does."""
    models = [families.build("Llama", seed=seed, vocab_size=8, hidden_size=16) for seed in (1, 2)]
    for model in models:
        model.get_output_embeddings().weight.data *= 1e4
    mask = {"attention_mask": torch.ones_like(prompt(8))}
    own = [model.generate(prompt(8), **mask, do_sample=False, max_new_tokens=16) for model in models]
    config = settings(3, weight=weight, bonus="mixture", restrict_to_target_support=True)
    text = generate(models, prompt(8), config, do_sample=do_sample, max_new_tokens=16)
    assert torch.equal(text, own[0]) and not torch.equal(*own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_t_dtype_the_weight_is_not_rounded(monkeypatch, heads, dtype):
    """Half precision models, a float32 head: weights equal those of exact arithmetic on the same hidden states."""
    models = [families.build("Llama", seed=seed, vocab_size=8, hidden_size=16).to(dtype) for seed in (1, 2)]
    head, rounds = random_head(models), Rounds(monkeypatch)
    folder = heads(models, head)
    generate(models, prompt(8), settings(3, adapter=folder, bonus="mixture"), max_new_tokens=30)
    loaded = load_head(models[0], models[1], folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    exact = by_head(head)
    values = []
    for (draft, target), weights in zip(rounds.inputs, rounds.weights, strict=True):
        assert draft.dtype == target.dtype == dtype and weights.dtype == torch.float32
        states = torch.cat([draft, target], dim=-1).double().flatten(0, -2)
        torch.testing.assert_close(
            weights.flatten().double(), torch.tensor([exact(s) for s in states]).double(), atol=2e-6, rtol=0
        )
        values += weights.flatten().tolist()
    assert len({round(value, 5) for value in values}) > len({round(value, 2) for value in values})


def test_t_dtype_distributions_of_half_precision_models_are_float32(monkeypatch):
    models = [families.build("Llama", seed=seed, vocab_size=8, hidden_size=16).bfloat16() for seed in (1, 2)]
    accept, seen = acceptance.accept_drafts, []
    monkeypatch.setattr(acceptance, "accept_drafts", lambda *args: seen.append(args) or accept(*args))
    generate(models, prompt(8), settings(3, weight=0.5), max_new_tokens=10)
    for _, _, p, q, w in seen:
        assert p.dtype == w.dtype == torch.float32 and (q is None or q.dtype == torch.float32)


# the head


def test_t_order_the_draft_comes_first():
    torch.manual_seed(0)
    head = DiversedHead(4, 6)
    draft, target = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    with torch.no_grad():
        head.weight[0, 4:] = torch.randn(6)
    weights = head(draft, target)
    assert weights.shape == (3, 5) and weights.dtype == torch.float32
    assert torch.equal(head(torch.randn_like(draft), target), weights)
    assert (head(draft, torch.randn_like(target)) != weights).all()
    with torch.no_grad():
        head.weight[0] = torch.cat([torch.randn(4), torch.zeros(6)])
        head.bias.fill_(0.3)
    by_hand = torch.sigmoid(draft @ head.weight[0, :4] + 0.3)
    torch.testing.assert_close(head(draft, torch.randn_like(target)), by_hand)


@pytest.mark.parametrize("half", ["draft", "target"])
def test_t_order_in_a_call(monkeypatch, heads, half):
    """A head of one half only: the weights follow that model's hidden states and no other's."""
    models = pair(5)
    head = random_head(models)
    with torch.no_grad():
        head.weight[:, slice(24, None) if half == "draft" else slice(24)] = 0
    rounds = Rounds(monkeypatch)
    generate(models, prompt(5), settings(3, adapter=heads(models, head)), max_new_tokens=12)
    part = head.weight[0].double()[slice(24) if half == "draft" else slice(24, None)]
    for given, weights in zip(rounds.inputs, rounds.weights, strict=True):
        state = given[0 if half == "draft" else 1]
        torch.testing.assert_close(weights.double(), torch.sigmoid(state @ part), atol=1e-6, rtol=0)


def test_an_untrained_head_gives_one_weight_everywhere():
    for weight in (0.5, 0.8):
        found = DiversedHead(4, 6, init_weight=weight)(torch.randn(7, 4), torch.randn(7, 6))
        torch.testing.assert_close(found, torch.full((7,), weight))
    for bad in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="init_weight"):
            DiversedHead(4, 6, init_weight=bad)
    with pytest.raises(ValueError, match="input_norm"):
        DiversedHead(4, 6, input_norm="layer")


def test_rms_norm_scales_each_model_apart(tmp_path):
    head = random_head(pair(3))
    head.input_norm = "rms"
    torch.manual_seed(0)
    draft, target = 30 * torch.randn(5, 24), 0.01 * torch.randn(5, 16)
    parts = [state / state.square().mean(-1, keepdim=True).sqrt() for state in (draft, target)]
    torch.testing.assert_close(head(draft, target), torch.sigmoid((torch.cat(parts, -1) @ head.weight.T)[:, 0]))
    head.save(tmp_path, DiversedConfig(), pair(3)[1], pair(3)[0])
    loaded = load_head(*pair(3), str(tmp_path))
    assert torch.equal(loaded(draft, target), head(draft, target))


# files


def test_t_io_round_trip_is_exact(heads):
    head, folder = random_head(pair(3)), heads(pair(3))
    loaded = load_head(*pair(3), folder)
    assert torch.equal(loaded.weight, head.weight) and torch.equal(loaded.bias, head.bias)
    tensors = load_file(f"{folder}/{ADAPTER_NAME}")
    assert {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()} == {
        "weight": ((1, 40), torch.float32), "bias": ((1,), torch.float32),
    }  # fmt: skip
    assert loaded.record["input_order"] == ["draft", "target"] and loaded.record["weight_semantics"] == "target"


def test_t_io_a_folder_is_a_strategy(tmp_path):
    """`assistant_strategy=folder` uses the settings that the head was saved with."""
    config = settings(3, bonus="mixture", weight=None)
    random_head(pair(5)).save(tmp_path, config, pair(5)[1], pair(5)[0])
    read = SpeculationConfig.from_pretrained(tmp_path)
    assert read == config.override(adapter=str(tmp_path))
    texts = []
    for strategy in (str(tmp_path), config.override(adapter=str(tmp_path)), config.override(weight=0.5)):
        torch.manual_seed(0)
        texts.append(generate(pair(5), prompt(5), strategy, max_new_tokens=30))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def edited(folder, to, record=None, tensors=None):
    """Copy an adapter with changes."""
    values = json.loads(Path(folder, CONFIG_NAME).read_text())
    values["adapter"].update(record or {})
    to.mkdir(exist_ok=True)
    (to / CONFIG_NAME).write_text(json.dumps(values))
    save_file(tensors or load_file(f"{folder}/{ADAPTER_NAME}"), to / ADAPTER_NAME)
    return str(to)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"format_version": 2}, "format version 2"),
        ({"format_version": None}, "format version"),
        ({"kind": "draft"}, "kind 'draft'"),
        ({"head_type": "mlp"}, "head_type 'mlp'"),
        ({"input_order": ["target", "draft"]}, "input_order"),
        ({"weight_semantics": "draft"}, "weight_semantics 'draft'"),
        ({"activation": "softmax"}, "activation"),
        ({"hidden_source": "hidden_states"}, "hidden_source"),
        ({"draft_hidden_size": 16, "target_hidden_size": 24}, "size 24 from the `model`"),
        ({"draft_hidden_size": 32}, "shapes"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_t_io_heads_that_do_not_fit(heads, tmp_path, record, message):
    folder = edited(heads(pair(3)), tmp_path / "head", record)
    with pytest.raises(ValueError, match=message):
        generate(pair(3), prompt(3), settings(adapter=folder), max_new_tokens=4)


@pytest.mark.parametrize("tensors", [{"weight": torch.zeros(1, 41)}, {"weight": torch.zeros(2, 40)}, {"other": 0}])
def test_t_io_tensors_that_do_not_fit(heads, tmp_path, tensors):
    tensors = {"weight": torch.zeros(1, 40), "bias": torch.zeros(1)} | {
        name: torch.as_tensor(value) for name, value in tensors.items()
    }
    folder = edited(heads(pair(3)), tmp_path / "head", tensors=tensors)
    with pytest.raises(ValueError, match="shapes"):
        load_head(*pair(3), folder)


def test_t_io_models_that_do_not_fit(heads):
    target, draft = pair(3)
    folder = heads((target, draft))
    with pytest.raises(ValueError, match="size 16 from the `model`"):
        load_head(draft, target, folder)
    wide = families.build("Llama", vocab_size=3, hidden_size=32)
    with pytest.raises(ValueError, match="size 24 from the `assistant_model`; this one's have 32"):
        load_head(target, wide, folder)
    other = families.build("Llama", seed=99, vocab_size=3, hidden_size=24)
    with pytest.raises(ValueError, match="another `assistant_model`"):
        load_head(target, other, folder)
    other = families.build("Llama", seed=99, vocab_size=3, hidden_size=16)
    with pytest.raises(ValueError, match="another `model`"):
        load_head(other, draft, folder)


def test_t_io_a_swapped_pair_of_one_width(heads):
    target, draft = (families.build("Llama", seed=seed, vocab_size=3, hidden_size=16) for seed in (1, 2))
    folder = heads((target, draft))
    load_head(target, draft, folder)
    with pytest.raises(ValueError, match="another `model`"):
        load_head(draft, target, folder)


def test_t_io_a_pair_with_another_vocabulary(heads):
    folder = heads(pair(3))
    wider = families.build("Llama", seed=7, vocab_size=4, hidden_size=16)
    with pytest.raises(ValueError, match="vocab_size"):
        load_head(wider, pair(3)[1], folder)


def test_t_io_folders_without_a_head(tmp_path, heads):
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        generate(pair(3), prompt(3), settings(adapter=str(tmp_path / "nowhere")), max_new_tokens=4)
    with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
        load_head(*pair(3), str(tmp_path))
    folder = edited(heads(pair(3)), tmp_path / "head")
    (tmp_path / "head" / ADAPTER_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=ADAPTER_NAME):
        load_head(*pair(3), folder)


def reference_file(folder, weight, bias, beside=None):
    path = folder / "ensemble_head.bin"
    torch.save({"summary.weight": weight, "summary.bias": bias}, path)
    if beside:
        (folder / "config.json").write_text(json.dumps(beside))
    return path


@pytest.mark.parametrize("beside", [None, {"draft_hidden_size": 4, "target_hidden_size": 6}])
def test_t_io_import_of_the_reference_format(tmp_path, beside):
    """Two outputs under a softmax, the draft's weight first; `w` is the second."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(10, 2).bfloat16()
    path = reference_file(tmp_path, layer.weight.detach(), layer.bias.detach(), beside)
    head = import_reference_head(path, None if beside else 4)
    draft, target = torch.randn(20, 4), torch.randn(20, 6)
    both = torch.softmax(layer.float()(torch.cat([draft, target], dim=1)), dim=-1)
    torch.testing.assert_close(head(draft, target), both[:, 1])
    assert (head(draft, target) - both[:, 0]).abs().max() > 0.1
    assert head.weight.dtype == torch.float32 and head.weight.shape == (1, 10)
    assert head.record["train"]["mix_space"] == "logit"


def test_t_io_import_of_known_weights(tmp_path):
    weight = torch.zeros(2, 10)
    weight[1, 0], weight[0, 9] = 1.0, 2.0
    head = import_reference_head(reference_file(tmp_path, weight, torch.tensor([0.5, 0.25])), 4)
    assert head.weight[0].tolist() == [1.0, *[0.0] * 8, -2.0] and head.bias.tolist() == [-0.25]


def test_t_io_an_imported_head_can_be_saved_and_used(tmp_path):
    torch.manual_seed(0)
    path = reference_file(tmp_path, torch.randn(2, 40).bfloat16(), torch.randn(2).bfloat16())
    head = import_reference_head(path, 24)
    head.save(tmp_path / "head", settings(), pair(5)[1], pair(5)[0])
    assert torch.equal(load_head(*pair(5), str(tmp_path / "head")).weight, head.weight)
    assert load_head(*pair(5), str(tmp_path / "head")).record["train"]["mix_space"] == "logit"
    generate(pair(5), prompt(5), str(tmp_path / "head"), max_new_tokens=5)


class Evil:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize(
    "content", [Evil(), {"summary.weight": Evil(), "summary.bias": torch.zeros(2)}], ids=["o", "d"]
)
def test_t_io_import_refuses_other_pickles(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "head.bin")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        import_reference_head(tmp_path / "head.bin", 4)
    (tmp_path / "head.bin").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        import_reference_head(tmp_path / "head.bin", 4)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(2, 10)],
        {"summary.weight": torch.zeros(2, 10)},
        {"summary.weight": torch.zeros(1, 10), "summary.bias": torch.zeros(1)},
        {"summary.weight": torch.zeros(10, 2), "summary.bias": torch.zeros(2)},
        {"summary.weight": torch.zeros(2, 10), "summary.bias": torch.zeros(2), "more": torch.zeros(1)},
        {"summary.weight": torch.zeros(2, 10), "summary.bias": "zero"},
    ],
    ids=range(6),
)
def test_t_io_import_refuses_other_tensors(tmp_path, content):
    torch.save(content, tmp_path / "head.bin")
    with pytest.raises(ValueError, match="summary.weight"):
        import_reference_head(tmp_path / "head.bin", 4)


@pytest.mark.parametrize("size", [None, 0, 10, 11])
def test_t_io_import_needs_the_split(tmp_path, size):
    path = reference_file(tmp_path, torch.zeros(2, 10), torch.zeros(2))
    with pytest.raises(ValueError, match="draft_size"):
        import_reference_head(path, size)


@pytest.mark.parametrize(
    "config",
    [
        settings(4, weight=0.3, bonus="mixture", w_min=0.2, mix_space="logit", greedy_temperature=2.0),
        settings(adapter="somewhere", weight_offset=-1.5, restrict_to_target_support=True),
        settings(drafter=AssistedConfig(adapter="draft")),
        settings(drafter=VegasConfig(kv_ratio=0.2)),
    ],
    ids=range(4),
)
def test_t_io_settings_round_trip(config):
    assert SpeculationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_head_trained_under_other_warpers_is_announced(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_specdec.generation.methods.diversed.method.logger.warning_once", said.append)
    train = {"temperature": 0.7, "top_k": 0, "top_p": 1.0}
    random_head(pair(5)).save(tmp_path, settings(), pair(5)[1], pair(5)[0], train)
    generate(pair(5), prompt(5), str(tmp_path), max_new_tokens=4, temperature=0.7)
    assert not said
    generate(pair(5), prompt(5), str(tmp_path), max_new_tokens=4, temperature=1.0)
    assert len(said) == 1 and "temperature=0.7" in said[0]


# stock


def test_t_stock_calls_without_a_strategy_are_untouched(llama):
    """Same tokens and same random numbers with and without the package, stock's own ensemble included."""
    calls = [
        {"do_sample": True},
        {"do_sample": True, "assistant_model": llama.assistant},
        {"do_sample": True, "assistant_model": llama.assistant, "assistant_ensemble_weight": 0.6},
        {"do_sample": False, "assistant_model": llama.assistant, "assistant_ensemble_weight": 0.6},
    ]

    def run():
        found = []
        for call in calls:
            torch.manual_seed(3)
            text = llama.model.generate(**llama.one, max_new_tokens=20, **call)
            found.append((text, torch.get_rng_state()))
        return found

    ours = run()
    hf_specdec.uninstall()
    try:
        theirs = run()
    finally:
        hf_specdec.install()
    for (text, random), (wanted, state) in zip(ours, theirs, strict=True):
        assert torch.equal(text, wanted) and torch.equal(random, state)


@pytest.mark.parametrize("weight", [0.2, 0.45, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_t_parity_greedy_text_is_that_of_stocks_ensemble(llama, weight, noise):
    """Our first token comes from the prompt's own forward, so stock starts one token later."""
    models, ids = [families.perturbed(llama.model, scale) for scale in (0.0, noise)], llama.one["input_ids"]
    for model in models:
        model.generation_config.pad_token_id = None  # stock's assistant would mask pad tokens in the text
    for count in (3, 5):
        text = greedy(models, ids, settings(count, weight=weight), 40)
        assistant = models[1]
        assistant.generation_config.num_assistant_tokens = count
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0
        stocks = models[0].generate(
            text[:, : ids.shape[1] + 1], assistant_model=assistant, assistant_ensemble_weight=weight,
            do_sample=False, max_new_tokens=39,
        )  # fmt: skip
        assert torch.equal(text, stocks)
    if noise == 0.3 and weight < 0.7:
        assert not torch.equal(text, llama.model.generate(ids, do_sample=False, max_new_tokens=40))


@pytest.mark.parametrize("weight", [0.3, 0.7])
@pytest.mark.parametrize("count", [2, 4])
def test_t_parity_sampling_decides_like_stock(monkeypatch, weight, count):
    """The same uniforms and distributions: as many drafts stay, and the next token's distribution is the same."""
    torch.manual_seed(count)
    # 5.17 also asks whether the draft ended the text
    more = [False] if "is_done_candidate" in signature(stock._speculative_sampling).parameters else []
    seen, found = [], set()
    monkeypatch.setattr(
        torch,
        "multinomial",
        lambda distribution, *_, num_samples=1: seen.append(distribution) or distribution.argmax(-1)[:, None],
    )
    for _ in range(60):
        target, draft = 1.5 * torch.randn(1, count + 1, 8), 1.5 * torch.randn(1, count, 8)
        p, q = torch.softmax(target, -1), torch.softmax(draft, -1)
        drafts = torch.distributions.Categorical(logits=draft).mode if not found else torch.randint(8, (1, count))
        coins = torch.rand(count)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand_like", lambda *_, coins=coins: coins)
            patch.setattr(torch, "rand", lambda *_, coins=coins, **__: coins[None].double())
            theirs, matches = stock._speculative_sampling(
                drafts, draft, count, target, *more, assistant_ensemble_weight=weight
            )
            ours = acceptance.speculative_sample(drafts, torch.tensor([count]), p, q, torch.full((1, count), weight))
        assert int(ours.accepted) == int(matches)
        assert ours.tokens[0, : int(matches) + 1].tolist() == theirs[0].tolist()
        torch.testing.assert_close(seen[-1], seen[-2])
        found.add(int(matches))
    assert found == set(range(count + 1))


# stopping


class Listener(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("bonus", ["target", "mixture"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9])
def test_t_stop_at_the_limit_and_in_order(bonus, length):
    for seed in range(4):
        torch.manual_seed(seed)
        listener = Listener()
        text = generate(pair(5), prompt(5), settings(3, weight=0.3, bonus=bonus), max_new_tokens=length,
                        streamer=listener)  # fmt: skip
        assert text.shape[1] == 6 + length and listener.tokens == text[0].tolist() and listener.ended == 1


def test_t_stop_end_tokens_of_every_origin(monkeypatch):
    """An end token that is an accepted draft, a replacement, or a bonus token ends the row there and then."""
    rounds, origins, eos = Rounds(monkeypatch), set(), 1
    for seed in range(40):
        rounds.clear()
        torch.manual_seed(seed)
        listener = Listener()
        text = generate(pair(5), prompt(5), settings(3, weight=0.5), max_new_tokens=12, eos_token_id=eos,
                        pad_token_id=0, streamer=listener)[0].tolist()  # fmt: skip
        assert listener.tokens == text and eos not in text[6:-1]
        last = rounds[-1]
        if text[-1] == eos and len(rounds) > 1:
            place = len(text) - len(last["text"]) - 1
            assert place <= last["accepted"]
            drafted = place < last["accepted"]
            origins.add("draft" if drafted else "bonus" if last["accepted"] == last["count"] else "replacement")
    assert origins == {"draft", "replacement", "bonus"}


# other drafters


@pytest.mark.parametrize("mode", [{}, {"restrict_to_target_support": True}, {"mix_space": "logit"}], ids=str)
def test_a_drafter_that_reads_part_of_the_cache(llama, mode):
    """Vegas drafts with the target itself; a weight of 1 is the target's own text, and 0 accepts every draft."""
    drafter = VegasConfig(min_context=0, min_tokens=2, kv_ratio=0.2)
    texts, rates = [], []
    for weight in (1.0, 0.0):
        out = llama.model.generate(
            llama.ids, attention_mask=llama.mask, do_sample=False, max_new_tokens=20, return_dict_in_generate=True,
            assistant_strategy=settings(3, weight=weight, drafter=drafter, **mode),
        )  # fmt: skip
        texts.append(out.sequences)
        rates.append(out.speculation.acceptance_rate)
    own = llama.model.generate(llama.ids, attention_mask=llama.mask, do_sample=False, max_new_tokens=20)
    assert torch.equal(texts[0], own)
    assert rates[0] < 1 and (rates[1] == 1 or mode.get("restrict_to_target_support"))


def test_the_drafters_number_of_tokens_gives_way():
    strategy = DiversedStrategy(settings(2, drafter=VegasConfig(num_assistant_tokens=9)))
    assert strategy.drafter.config.num_assistant_tokens == 2


# bad input


@pytest.mark.parametrize(
    "changes, error, name",
    [
        ({"weight": -0.1}, ValueError, "weight"),
        ({"weight": 1.1}, ValueError, "weight"),
        ({"weight": math.nan}, ValueError, "weight"),
        ({"weight": "half"}, TypeError, "weight"),
        ({"weight": True}, TypeError, "weight"),
        ({"weight": 0.5, "adapter": "head"}, ValueError, "exclude"),
        ({"mix_space": "probability"}, ValueError, "mix_space.*prob, logit"),
        ({"bonus": "draft"}, ValueError, "bonus.*target, mixture"),
        ({"w_min": 0.6, "w_max": 0.5}, ValueError, "w_min"),
        ({"w_min": -0.1}, ValueError, "w_min"),
        ({"w_max": 1.1}, ValueError, "w_max"),
        ({"w_min": math.nan}, ValueError, "w_min"),
        ({"weight_offset": 0.5}, ValueError, "weight_offset"),
        ({"weight": 0.5, "weight_offset": 0.5}, ValueError, "weight_offset"),
        ({"adapter": "head", "weight_offset": math.nan}, ValueError, "weight_offset"),
        ({"greedy_temperature": 0.0}, ValueError, "greedy_temperature"),
        ({"greedy_temperature": -1.0}, ValueError, "greedy_temperature"),
        ({"greedy_temperature": math.nan}, ValueError, "greedy_temperature"),
        ({"num_assistant_tokens": 0}, ValueError, "num_assistant_tokens"),
        ({"drafter": 5}, TypeError, "drafter"),
        ({"restrict_to_target_support": 1}, TypeError, "restrict_to_target_support"),
    ],
    ids=str,
)
def test_wrong_settings(changes, error, name):
    with pytest.raises(error, match=name):
        DiversedConfig(**changes)
    with pytest.raises(error, match=name):
        pair(3)[0].generate(
            prompt(3), assistant_model=pair(3)[1], assistant_strategy="diversed", assistant_strategy_config=changes,
            max_new_tokens=4,
        )  # fmt: skip


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"adapter": "head", "drafter": VegasConfig()}, "hidden states"),
        ({"drafter": hf_specdec.PlainConfig()}, "must be a strategy that drafts"),
        ({"bonus": "mixture", "drafter": VegasConfig()}, "bonus='mixture'"),
        ({"drafter": "plain"}, "must be a strategy that drafts"),
        ({"drafter": "eagle"}, "`drafter='eagle'`.*the known ones are .*prompt_lookup"),
        ({"drafter": "vegas:wide"}, "`drafter='vegas:wide'`.*its presets: .*window"),
    ],
    ids=["head and vegas", "plain", "mixture and vegas", "plain by name", "no strategy", "no preset"],
)
def test_wrong_drafters(changes, name):
    with pytest.raises(ValueError, match=name):
        pair(3)[0].generate(prompt(3), assistant_strategy=settings(**changes), max_new_tokens=4)


def test_no_assistant_at_all():
    with pytest.raises(ValueError, match="assistant_model"):
        pair(3)[0].generate(prompt(3), assistant_strategy="diversed", max_new_tokens=4)


def test_an_assistant_that_would_not_be_used():
    with pytest.raises(ValueError, match="assistant_model"):
        generate(pair(3), prompt(3), settings(weight=0.5, drafter=VegasConfig()), max_new_tokens=4)


def test_stocks_own_ensemble_and_ours_at_once():
    with pytest.raises(ValueError, match="assistant_ensemble_weight"):
        generate(pair(3), prompt(3), settings(), max_new_tokens=4, assistant_ensemble_weight=0.5)
