"""DIVERSED: the distribution of whole calls by exact enumeration, and of real draws."""

from __future__ import annotations

import itertools

import pytest
import torch
from diversed_cases import (
    Table,
    by_head,
    constant,
    generate,
    greedy,
    inside_target,
    mix,
    pair,
    prompt,
    random_head,
    settings,
    single_steps,
    table,
)
from scipy import stats
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
)

from hf_specdec import DiversedConfig
from hf_specdec.generation import acceptance
from hf_specdec.generation.drafting import AssistantDrafter
from hf_specdec.generation.state import DecodingState


ALARM = 1e-4
EXACT = 3e-6  # distributions are float32


def geometric(p, q, w):
    v = p**w * q ** (1 - w)
    return v / v.sum() if v.any() else p  # distributions without a common token have no geometric mean


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
        activate, accept, rule = DecodingState.activate, acceptance.accept_drafts, acceptance.acceptance_probability

        def noted_activate(state, *args):
            self.state = state
            return activate(state, *args)

        def noted_accept(drafts, counts, *args):
            self.counts = counts
            return accept(drafts, counts, *args)

        def noted_rule(*args):
            self.chance = rule(*args)
            return self.chance

        found = [{} for _ in self.texts]
        self.queue = [(kind, []) for kind in range(len(self.texts))]
        with self.patch.context() as patch:
            patch.setattr(DecodingState, "activate", noted_activate)
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


def call_distribution(monkeypatch, vocab, length, config, **kwargs):
    distribution = Paths(monkeypatch, pair(vocab), prompt(vocab)).distributions(
        config, max_new_tokens=length, **kwargs
    )[0]
    assert sum(distribution.values()) == pytest.approx(1, abs=EXACT)
    return distribution


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
            text = state.text.by_column(state.text.columns[row])[row, start:].tolist()
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


@pytest.mark.parametrize("weight", [0.3, 0.6])
def test_t_distribution_of_single_steps(distributions_of_eight, weight):
    p, q = distributions_of_eight
    _, _, tokens = single_steps(p, q, weight)
    assert draws(tokens, mix(p, q, weight)) > ALARM
    for wrong in (p, q, geometric(p, q, weight), mix(p, q, 1 - weight) if weight != 0.5 else p):
        assert draws(tokens, wrong) < ALARM / 100
