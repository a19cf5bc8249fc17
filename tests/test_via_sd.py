"""VIA-SD: calls against a cache-free reference of the method, forwards as they are run, masks, files and training.

`Reference` decodes without any cache: it knows the drafter's, the slim verifier's and the model's distribution after
every prefix, the slim one built here by replacing modules of a copy. `Reference.lossy` gives the distribution of a
whole lossy call, with the tier of every token; greedy distributions are points, so the same function says what a
greedy call must return.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from scipy import stats
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import hf_specdec
from hf_specdec import SpeculationConfig, VegasConfig, ViaSDConfig, ViaSDQualityError, on_speculation
from hf_specdec.generation import acceptance
from hf_specdec.generation.methods.via_sd import laws
from hf_specdec.generation.methods.via_sd.slim_model import Units, load_slim, mask_hash, save_slim, slim_model
from hf_specdec.generation.methods.via_sd.tiers import Tiers
from hf_specdec.generation.models.surgery import decoder_layers
from hf_specdec.generation.runner import ModelRunner
from hf_specdec.training.data import Text
from hf_specdec.training.routing import MaskSearch, search_mask
from hf_specdec.training.scoring import SlimScorer, costs, margin_cost
from hf_specdec.training.via_sd import SlimTraining, train_slim


ALARM = 1e-4
LAYERS, SKIP = 6, (2, 3)
RULES = ("exact", "gate", "prefilter")
OFF = {"regen_min_conf": 0.0, "bonus_min_conf": 0.0, "max_pending": None, "eos_guard": False}
BARE = {**OFF, "bonus_min_conf": 1.01}
MIXED = {**OFF, "tau_accept": 0.7, "tau_escalate": 0.2, "bonus_min_conf": 0.12}  # all tiers come up


def kept(skip=SKIP, units=LAYERS):
    return [unit not in skip for unit in range(units)]


def weaken(model, layers, scale):
    """Make layers matter less, so that the model without them resembles it."""
    with torch.no_grad():
        for index in layers:
            layer = decoder_layers(model)[index]
            for name, parameter in layer.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "dense.weight", "dense_4h_to_h.weight")):
                    parameter.mul_(scale)
                if name.endswith(("dense.bias", "dense_4h_to_h.bias")):
                    parameter.mul_(scale)
    return model


@pytest.fixture(scope="module")
def pair():
    """A target whose layers 2 and 3 matter less than the others, and a noisy copy of it."""
    target = weaken(families.build("Llama", num_hidden_layers=LAYERS), SKIP, 0.2)
    return target, families.perturbed(target, 0.04)


@pytest.fixture(scope="module")
def prompt():
    return families.prompts((14,))[0]


def lossy(**changes):
    """Return settings of the lossy mode with a mask that nobody has measured."""
    changes = {"num_assistant_tokens": 3, "keep_mask": kept(), **changes}
    return ViaSDConfig(mode="lossy", force=True, **changes)


def lossless(**changes):
    """Return settings of the lossless mode whose stages do not end at once on flat distributions."""
    changes = {"num_assistant_tokens": 3, "keep_mask": kept(), "stage_stop_conf": 0.0, "stage_len": 5, **changes}
    if changes.get("lossless_rule") == "gate":
        changes = {"tau_accept": 0.7, "tau_escalate": 0.2, "regen_min_conf": 0.0, **changes}
    return ViaSDConfig(**changes)


def generate(pair, ids, config, **kwargs):
    target, draft = pair
    given = {} if config.brings_drafter else {"assistant_model": draft}
    kwargs = {"do_sample": False, "attention_mask": torch.ones_like(ids), **given, **kwargs}
    return target.generate(ids, assistant_strategy=config, **kwargs)


def measured(pair, ids, config, **kwargs):
    """Return the new tokens of the first row and the statistics, without asking for a cache."""
    seen = []
    with on_speculation(seen.append):
        out = generate(pair, ids, config, **kwargs)
    return out[0, ids.shape[1] :].tolist(), seen[0]


# a reference without caches


class _Skip(torch.nn.Module):
    """Stands where a layer was."""

    def __init__(self, layer):
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


class _NoAttention(torch.nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states), None


class _NoMLP(torch.nn.Module):
    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


def without(model, skip, granularity="layer"):
    """Return a copy of `model` without some units."""
    twin = copy.deepcopy(model)
    layers = decoder_layers(twin)
    for unit in skip:
        if granularity == "layer":
            layers[unit] = _Skip(layers[unit])
        elif unit % 2:
            layers[unit // 2].mlp = _NoMLP()
        else:
            layers[unit // 2].self_attn = _NoAttention()
    return twin


@torch.no_grad()
def slim_logits(target, slim, text, full):
    """Return the slim model's logits over `text` `[1, t]` from position `full` on, before which `target` has read."""
    if not full:
        return slim(text).logits
    cache = DynamicCache()
    target(text[:, :full], past_key_values=cache, use_cache=True)
    return slim(text[:, full:], past_key_values=cache, use_cache=True).logits


def point(logits):
    return torch.zeros(len(logits), dtype=torch.float64).index_fill_(0, logits.argmax(), 1.0)


class Reference:
    """The three distributions after any prefix.

    Args:
        pair: target and drafter.
        prompt (`torch.Tensor` of shape `[1, t]`).
        skip: units that the slim verifier lacks.
        shared: whether it reads the target's states of what the target has read.
        processors: applied to all distributions. Distributions are points unless `sample`.
    """

    def __init__(self, pair, prompt, skip=SKIP, granularity="layer", shared=True, processors=(), sample=False):
        self.target, self.draft = pair
        self.slim, self.shared = without(self.target, skip, granularity), shared
        self.prompt, self.chain, self.sample = prompt, LogitsProcessorList(processors), sample
        self.known = {}

    def text(self, new):
        return torch.cat([self.prompt, torch.tensor([new], dtype=torch.int64).view(1, -1)], dim=1)

    def distribution(self, text, logits):
        scores = self.chain(text, logits[None].float() if len(self.chain) or self.sample else logits[None])[0]
        return torch.softmax(scores.double(), dim=-1) if self.sample else point(scores)

    def _remembered(self, key, build):
        if key not in self.known:
            with torch.no_grad():
                self.known[key] = build()
        return self.known[key]

    def q(self, new):
        text = self.text(new)
        return self._remembered(("q", new), lambda: self.distribution(text, self.target(text).logits[0, -1]))

    def p(self, new):
        text = self.text(new)
        return self._remembered(("p", new), lambda: self.distribution(text, self.draft(text).logits[0, -1]))

    def s(self, new, full):
        """Return distribution, raw probabilities and which words the processors allow."""
        text, full = self.text(new), full if self.shared else 0

        def build():
            logits = slim_logits(self.target, self.slim, text, full)[0, -1]
            scores = self.chain(text, logits[None].float())[0]
            return self.distribution(text, logits), torch.softmax(logits.double(), dim=-1), scores > -torch.inf

        return self._remembered(("s", new, full), build)

    def tier(self, config, new, full, token, eos):
        """Return A, B or C by the definitions, and M."""
        _, raw, possible = self.s(new, full)
        sure, ratio = float(raw.max()), float(raw[token] / raw.max())
        if not possible[token] or (
            token in eos and config.eos_guard and not (ratio == 1 and self._enough(config, sure))
        ):
            return "C"
        accept, escalate = config.thresholds
        if ratio >= accept:
            return "A"
        return "B" if ratio >= escalate and self._enough(config, sure) else "C"

    @staticmethod
    def _enough(config, sure):
        return sure >= config.regen_min_conf

    def lossy(self, config, length, eos=()):
        """Return the probability of every (tokens, tiers) of a call, as a dictionary."""
        found, start = {}, self.prompt.shape[1]

        def emit(out, letters, token, letter, mass, then):
            out, letters = (*out, token), letters + letter
            if token in eos or len(out) == length:
                found[out, letters] = found.get((out, letters), 0.0) + mass
            else:
                then(out, letters, mass)

        def each(distribution, visit):
            for token in distribution.nonzero()[:, 0].tolist():
                if float(distribution[token]) > 1e-13:
                    visit(token, float(distribution[token]))

        def after_target(number):
            return lambda out, letters, mass: a_round(out, letters, mass, start + len(out) - 1, number + 1)

        def by_target(out, letters, mass, left, letter, number, once):
            """Speculative sampling of up to `left` drafts against the model."""
            q = self.q(out)
            if not left:
                each(q, lambda token, c: emit(out, letters, token, letter, mass * c, after_target(number)))
                return
            p = self.p(out)

            def go_on(out, letters, mass):
                if once:
                    after_target(number)(out, letters, mass)
                else:
                    by_target(out, letters, mass, left - 1, letter, number, once)

            each(torch.minimum(p, q), lambda token, c: emit(out, letters, token, letter, mass * c, go_on))
            each(
                (q - p).clamp(min=0),
                lambda token, c: emit(out, letters, token, letter, mass * c, after_target(number)),
            )

        def a_round(out, letters, mass, full, number):
            room = min(config.num_assistant_tokens, length - len(out) - 1)
            share = 1 - config.lossy_level
            strict = math.floor((number + 1) * share + 1e-9) > math.floor(number * share + 1e-9)
            if config.max_pending is not None and start + len(out) - 1 - full >= config.max_pending:
                strict = True
            if strict:
                by_target(out, letters, mass, room, "Q", number, False)
            else:
                by_tiers(out, letters, mass, room, full, number, room)

        def by_tiers(out, letters, mass, left, full, number, room):
            distribution, raw, _ = self.s(out, full)

            def on(out, letters, mass):
                by_tiers(out, letters, mass, left - 1, full, number, room)

            def end(out, letters, mass):
                a_round(out, letters, mass, full, number + 1)

            if not left:
                sure, best = float(raw.max()), int(raw.argmax())
                need = config.bonus_min_conf
                if config.eos_guard and best in eos:
                    need = max(need, config.regen_min_conf)
                if sure >= need:
                    each(distribution, lambda token, c: emit(out, letters, token, "S", mass * c, end))
                elif room:
                    end(out, letters, mass)
                else:  # nothing was drafted, and the slim verifier writes nothing
                    by_target(out, letters, mass, 0, "Q", number, False)
                return
            p, q = self.p(out), None

            def drafted(token, chance):
                nonlocal q
                tier = self.tier(config, out, full, token, eos)
                if tier == "A":
                    emit(out, letters, token, "A", mass * chance, on)
                elif tier == "B":
                    each(
                        distribution,
                        lambda y, c: emit(out, letters, y, "B", mass * chance * c, on if y == token else end),
                    )
                else:
                    q = self.q(out) if q is None else q
                    stay = min(1.0, float(q[token]) / chance)
                    once = config.escalate_scope == "token"

                    def rest(out, letters, mass):
                        if once:
                            after_target(number)(out, letters, mass)
                        else:
                            by_target(out, letters, mass, left - 1, "C", number, False)

                    if stay:
                        emit(out, letters, token, "C", mass * chance * stay, rest)
                    if stay < 1:
                        other = (q - p).clamp(min=0)
                        go = after_target(number)
                        each(
                            other / other.sum(),
                            lambda y, c: emit(out, letters, y, "C", mass * chance * (1 - stay) * c, go),
                        )

            each(p, drafted)

        def first(out, letters, mass):
            a_round(out, letters, mass, start, 0)

        each(self.q(()), lambda token, c: emit((), "", token, "Q", c, first))
        return found


def check_greedy(pair, prompt, config, new=40, eos=(), reference=None, **kwargs):
    """Compare tokens and tiers of a greedy call with the reference, and return its statistics."""
    reference = reference or Reference(pair, prompt, shared=config.slim_cache != "own")
    ((tokens, letters),) = reference.lossy(config, new, eos)
    out, found = measured(pair, prompt, config, max_new_tokens=new, eos_token_id=list(eos) or None, **kwargs)
    assert found.method["tier_ids"] == [letters]
    assert out == list(tokens)
    return found


LOSSY = {
    "mixed": MIXED,
    "paper": {"alpha1": 0.5, "alpha2": 0.3, **BARE},
    "safe": {"regen_min_conf": 0.15, "bonus_min_conf": 0.15, "max_pending": 6},
    "token": {**MIXED, "tau_accept": 0.9, "tau_escalate": 0.6, "escalate_scope": "token"},
    "block": {**MIXED, "tau_accept": 0.9, "tau_escalate": 0.6},
    "half": {**MIXED, "lossy_level": 0.5},
    "one pending": {**MIXED, "max_pending": 1},
    "rare": {**OFF, "tau_accept": 0.7, "tau_escalate": 0.01},
}


@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize("cache", ["shared", "own"])
@pytest.mark.parametrize("name", LOSSY)
def test_greedy_tiers_are_the_published_ones(pair, prompt, name, cache, gamma):
    config = lossy(**LOSSY[name], slim_cache=cache, num_assistant_tokens=gamma)
    found = check_greedy(pair, prompt, config)
    tiers = found.method["tiers"]
    assert sum(tiers.values()) == 40 and Counter(found.method["tier_ids"][0]) == {k: v for k, v in tiers.items() if v}
    if name in ("mixed", "block", "token") and gamma > 1:
        assert min(tiers[letter] for letter in "ABC") > 0


@pytest.mark.parametrize("cache", ["shared", "own"])
def test_greedy_tiers_under_processors_that_read_the_prefix(pair, prompt, cache):
    chain = (RepetitionPenaltyLogitsProcessor(1.4), NoRepeatNGramLogitsProcessor(2))
    config = lossy(**MIXED, slim_cache=cache)
    reference = Reference(pair, prompt, shared=cache == "shared", processors=chain)
    kwargs = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
    with_them = check_greedy(pair, prompt, config, reference=reference, **kwargs)
    assert with_them.method["tier_ids"] != measured(pair, prompt, config, max_new_tokens=40)[1].method["tier_ids"]


@pytest.mark.parametrize("skip", [(4, 7), (1, 5, 6)])
@pytest.mark.parametrize("cache", ["shared", "own"])
def test_greedy_tiers_without_halves_of_layers(pair, prompt, cache, skip):
    mask = kept(skip, 2 * LAYERS)
    config = lossy(**MIXED, slim_cache=cache, keep_mask=mask, granularity="sublayer")
    reference = Reference(pair, prompt, skip, "sublayer", shared=cache == "shared")
    check_greedy(pair, prompt, config, reference=reference)


# the distribution of sampled calls: tiny vocabulary, exact distribution of every (tokens, tiers) from the reference


VOCAB, LENGTH, PER_CALL, CALLS = 4, 4, 250, 8


@pytest.fixture(scope="module")
def tiny():
    """A target of 5 layers over four words, a rather different drafter, and a prompt."""
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 5, "initializer_range": 0.25}
    target = weaken(families.build("Llama", seed=4, **shape), (2, 3), 0.9)
    models = target, families.perturbed(target, 0.8, seed=3)
    for model in models:
        model.generation_config.pad_token_id = None
    return models, torch.tensor([[2, 1, 0, 3, 3, 1, 2]])


def sampled(tiny, config, calls=CALLS, **kwargs):
    """Return a count of (tokens, tiers) over many rows; lossless calls have no tiers."""
    pair, prompt = tiny
    found = Counter()
    for _ in range(calls):
        out = generate(
            pair, prompt, config, do_sample=True, max_new_tokens=LENGTH, num_return_sequences=PER_CALL,
            return_dict_in_generate=True, **{"top_k": 0, **kwargs},
        )  # fmt: skip
        rows = map(tuple, out.sequences[:, prompt.shape[1] :].tolist())
        letters = out.speculation.method.get("tier_ids") or [""] * PER_CALL
        found.update(zip(rows, letters, strict=True))
    return found


def p_value(found, distribution):
    """Return the chi-square test's p-value; outcomes expected fewer than ten times are pooled."""
    assert sum(distribution.values()) == pytest.approx(1, abs=1e-9)
    assert not set(found) - set(distribution), "an outcome of probability 0"
    total = sum(found.values())
    cells = [(found[key], chance * total) for key, chance in distribution.items() if chance * total >= 10]
    rest = total - sum(count for count, _ in cells), total - sum(expected for _, expected in cells)
    cells += [rest] if rest[1] > 5 else []
    observed, expected = zip(*cells, strict=True)
    assert len(cells) > 20
    return stats.chisquare(observed, expected, sum_check=False).pvalue


def own(distribution):
    """Return the distribution of the model itself for a reference's table of it."""
    found = {(): 1.0}
    for _ in range(LENGTH):
        found = {
            (*new, token): mass * float(chance)
            for new, mass in found.items()
            for token, chance in enumerate(distribution(new))
        }
    return {(key, ""): mass for key, mass in found.items()}


# settings under which all tiers come up for flat distributions of four words
FLAT = {**OFF, "tau_accept": 0.8, "tau_escalate": 0.4, "num_assistant_tokens": 2, "keep_mask": kept((2, 3), 5)}
SAMPLED = {
    "tiers": {"bonus_min_conf": 0.4},
    "token scope": {"escalate_scope": "token", "bonus_min_conf": 0.4, "tau_escalate": 0.5},
    "own confidence": {"regen_min_conf": 0.45, "bonus_min_conf": 0.45},
    "half": {"lossy_level": 0.5},
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_tokens_and_tiers_follow_the_distribution(tiny, name):
    config = lossy(**{**FLAT, **SAMPLED[name]}, slim_cache="own")
    distribution = Reference(*tiny, skip=(2, 3), shared=False, sample=True).lossy(config, LENGTH)
    shares = Counter()
    for (_, letters), mass in distribution.items():
        shares.update({letter: mass * count for letter, count in Counter(letters).items()})
    assert all(shares[letter] > 0.05 for letter in "ABC")
    torch.manual_seed(5)
    assert p_value(sampled(tiny, config), distribution) > ALARM


def test_sampled_tiers_with_warpers(tiny):
    config = lossy(**{**FLAT, **SAMPLED["tiers"]}, slim_cache="own")
    chain = (TemperatureLogitsWarper(0.7), TopKLogitsWarper(3))
    distribution = Reference(*tiny, skip=(2, 3), shared=False, sample=True, processors=chain).lossy(config, LENGTH)
    torch.manual_seed(6)
    assert p_value(sampled(tiny, config, temperature=0.7, top_k=3), distribution) > ALARM


@pytest.mark.parametrize("mutant", ["gate", "residual"])
def test_a_wrong_distribution_of_tiers_is_found(tiny, mutant, monkeypatch):
    config = lossy(**{**FLAT, **SAMPLED["tiers"]}, slim_cache="own")
    distribution = Reference(*tiny, skip=(2, 3), shared=False, sample=True).lossy(config, LENGTH)
    if mutant == "gate":
        original = laws.tiers
        monkeypatch.setattr(
            acceptance, "tiers", lambda r, m, t, *a, **k: original(r, m, (0.9 * t[0], 0.9 * t[1]), *a, **k)
        )
    else:
        monkeypatch.setattr(acceptance, "residual_distribution", lambda target, draft: target)
    torch.manual_seed(5)
    found = sampled(tiny, config)
    assert set(found) - set(distribution) or p_value(found, distribution) < ALARM


def test_the_coupled_distribution_is_that_of_tiers_a_and_b(tiny):
    """Rounds end elsewhere, tokens have one distribution: drafts in T, the slim verifier's draws for all others."""
    settings = {**FLAT, "tau_escalate": 0.0, "bonus_min_conf": 1.01, "slim_cache": "own", "num_assistant_tokens": 1}
    distribution = {}
    for (tokens, _), mass in (
        Reference(*tiny, skip=(2, 3), shared=False, sample=True).lossy(lossy(**settings), LENGTH).items()
    ):
        distribution[tokens, ""] = distribution.get((tokens, ""), 0.0) + mass
    stayed = []
    for coupled in (True, False):
        config = lossy(**settings, coupled=coupled)
        found, accepted, drafted = Counter(), 0, 0
        torch.manual_seed(7)
        for _ in range(CALLS):
            out = generate(
                tiny[0], tiny[1], config, do_sample=True, top_k=0, max_new_tokens=LENGTH,
                num_return_sequences=PER_CALL, return_dict_in_generate=True,
            )  # fmt: skip
            found.update((tuple(row), "") for row in out.sequences[:, tiny[1].shape[1] :].tolist())
            accepted += out.speculation.num_accepted_tokens
            drafted += out.speculation.num_draft_tokens
        assert p_value(found, distribution) > ALARM
        stayed.append(accepted / drafted)
    assert stayed[0] > stayed[1] + 0.02, "coupling keeps more drafts"


# the distributions by themselves


def random_distributions(seed, vocab=8, rows=50):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(rows, vocab, generator=generator, dtype=torch.float64).pow(3).mul(4).softmax(-1) for _ in "psq"]


def tiers_of(s, accept, escalate, regen=0.0):
    """Return tiers of all words by the definition: 0, 1 and 2 for A, B and C."""
    top = s.max(dim=-1, keepdim=True).values
    ratio = s / top
    below = torch.where((ratio >= escalate) & (top >= regen), 1, 2)
    return torch.where(ratio >= accept, 0, below)


@pytest.mark.parametrize(
    "accept, escalate, regen", [(0.7, 0.5, 0.0), (0.9, 0.1, 0.2), (0.5, 0.0, 0.0), (1.0, 1.0, 0.0)]
)
def test_tiers_and_distributions_by_enumeration(accept, escalate, regen):
    p, s, q = random_distributions(3)
    tier = tiers_of(s, accept, escalate, regen)
    log_ratio, confidence = laws.slim_ratio(s.log() + 3.0)
    found = laws.tiers(log_ratio, confidence[:, None], (accept, escalate), regen)
    assert torch.equal(found, tier)
    torch.testing.assert_close(confidence.double(), s.max(-1).values, rtol=1e-6, atol=0)
    lossy, gate = torch.zeros_like(p), torch.zeros_like(p)
    for row, word in itertools.product(range(len(p)), range(p.shape[1])):
        mass, distribution = float(p[row, word]), torch.zeros(p.shape[1], dtype=torch.float64)
        if tier[row, word] == 1:
            distribution += s[row]
            gate[row] += mass * s[row]
        else:
            gate[row, word] += mass
        if tier[row, word] == 0:
            distribution[word] += 1
        if tier[row, word] == 2:
            stay = min(1.0, float(q[row, word]) / mass)
            rest = (q[row] - p[row]).clamp(min=0)
            distribution[word] += stay
            distribution += (1 - stay) * rest / rest.sum()
        lossy[row] += mass * distribution
    torch.testing.assert_close(laws.tiered_distribution(p, s, q, tier), lossy, rtol=0, atol=1e-12)
    torch.testing.assert_close(laws.gate_distribution(p, s, tier), gate, rtol=0, atol=1e-12)
    assert torch.equal(laws.prefilter_distribution(p, tier), torch.where(tier == 0, p, 0))
    if not escalate:
        torch.testing.assert_close(laws.coupled_distribution(p, s, tier), lossy, rtol=0, atol=1e-12)
        # speculative sampling against it keeps at least the drafts of tier A, and emits this distribution
        both = laws.coupled_distribution(p, s, tier)
        keep = torch.minimum(p, both)
        out = keep + (1 - keep.sum(-1, keepdim=True)) * acceptance.residual_distribution(both, p)
        torch.testing.assert_close(out, lossy, rtol=0, atol=1e-12)
        assert bool((keep[tier == 0] >= p[tier == 0] - 1e-12).all())
        assert float(keep.sum()) > float(p[tier == 0].sum()) + 1


def test_extreme_logits_have_a_ratio():
    """No softmax, so nothing underflows: a word 200 nats below the best one has log r = -200."""
    log_ratio, confidence = laws.slim_ratio(torch.tensor([[300.0, 100.0, -torch.inf]], dtype=torch.float64))
    assert log_ratio.tolist() == [[0.0, -200.0, -math.inf]] and confidence.item() == 1.0
    found = laws.tiers(log_ratio, confidence[:, None], (math.exp(-150), math.exp(-250)))
    assert found.tolist() == [[0, 1, 2]]


# lossless: every rule gives the model's own text


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gamma, stage", [(1, 2), (4, 8)])
@pytest.mark.parametrize("kind", ["usual", "useless", "whole"])
def test_greedy_lossless_equals_stock(pair, rule, gamma, stage, kind):
    """Also with a slim verifier that resembles the model in nothing, and with one that is the model."""
    mask = {"usual": kept(), "useless": kept((1, 4)), "whole": kept(())}[kind]
    ids, attention = families.prompts((14, 6))
    config = lossless(lossless_rule=rule, num_assistant_tokens=gamma, stage_len=stage, keep_mask=mask)
    expected = stock(pair[0], ids, attention)
    out = generate(pair, ids, config, attention_mask=attention, max_new_tokens=40, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    method = out.speculation.method
    assert min(method["slim_forwards"], method["stages"], method["candidates"]) > 0
    if kind == "whole":  # what the model itself has chosen stands, whatever the drafter is worth
        assert out.speculation.num_accepted_tokens == out.speculation.num_draft_tokens or rule != "exact"


_texts = {}


def stock(model, ids, attention, **kwargs):
    key = (id(model), tuple(ids.flatten().tolist()), *sorted(kwargs.items()))
    if key not in _texts:
        _texts[key] = model.generate(
            ids, attention_mask=attention, do_sample=False, **{"max_new_tokens": 40, **kwargs}
        )
    return _texts[key]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cache", ["shared", "own"])
def test_greedy_lossless_under_processors_that_read_the_prefix(pair, rule, cache):
    ids, attention = families.prompts((19, 6))
    kwargs = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    expected = stock(pair[0], ids, attention, **kwargs)
    assert not torch.equal(expected, stock(pair[0], ids, attention))
    config = lossless(lossless_rule=rule, slim_cache=cache)
    out = generate(pair, ids, config, attention_mask=attention, max_new_tokens=40, **kwargs)
    assert torch.equal(out, expected)


@pytest.fixture(scope="module")
def target_distribution(tiny):
    return own(Reference(*tiny, skip=(2, 3), sample=True).q)


FLAT_RULE = {"num_assistant_tokens": 2, "keep_mask": kept((2, 3), 5), "tau_accept": 0.8, "tau_escalate": 0.4}
LAW_OF = {
    "exact": {},
    "exact, long stages": {"stage_len": 3, "num_assistant_tokens": 1},
    "exact, own cache": {"slim_cache": "own"},
    "exact, stop": {"stage_stop_conf": 0.4},
    "gate": {"lossless_rule": "gate", "regen_min_conf": 0.0},
    "gate, all drawn anew": {"lossless_rule": "gate", "regen_min_conf": 0.0, "tau_accept": 1.0, "tau_escalate": 0.0},
    "gate, own confidence": {"lossless_rule": "gate", "regen_min_conf": 0.4, "num_assistant_tokens": 1},
    "prefilter": {"lossless_rule": "prefilter"},
    "slim": {"drafter": "slim"},
    "draft stop": {"draft_stop": 0.4, "lossless_rule": "gate", "regen_min_conf": 0.0},
}


@pytest.mark.parametrize("name", LAW_OF)
def test_sampled_lossless_text_follows_the_models_distribution(tiny, target_distribution, name):
    torch.manual_seed(11)
    found = sampled(tiny, lossless(**{**FLAT_RULE, **LAW_OF[name]}), calls=8)
    assert p_value(found, target_distribution) > ALARM


def test_sampled_lossless_text_under_point_drafts(tiny, target_distribution):
    torch.manual_seed(11)
    config = lossless(**FLAT_RULE, lossless_rule="gate", regen_min_conf=0.0, drafter="prompt_lookup")
    assert p_value(sampled(tiny, config, calls=8), target_distribution) > ALARM


MUTANTS = {
    "gate: P instead of u": ("gate", "gate_distribution", lambda draft, slim, tier: draft),
    "gate: S instead of u": ("gate", "gate_distribution", lambda draft, slim, tier: slim),
    "gate: tier B not counted": ("gate", "gate_distribution", lambda draft, slim, tier: draft * (tier != 1)),
    "prefilter: P instead of u": ("prefilter", "prefilter_distribution", lambda draft, tier: draft),
    "prefilter: dropped, then drawn from Q": ("prefilter", "prefilter_distribution", None),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_proposal_distribution_is_found(tiny, target_distribution, name, monkeypatch):
    rule, function, mutant = MUTANTS[name]
    sharp = {"tau_accept": 1.0 if rule == "gate" else 0.5, "tau_escalate": 0.0}
    if mutant is None:
        original = acceptance.draw_next

        def from_target(drafts, counts, accepted, target, draft):
            verdict = original(drafts, counts, accepted, target, draft)
            distribution = target.gather(1, accepted[:, None, None].expand(-1, 1, target.shape[-1]))[:, 0]
            plain = acceptance._assemble(drafts, accepted, torch.multinomial(distribution, 1)[:, 0])
            tokens = torch.where((accepted < counts)[:, None], verdict.tokens, plain.tokens)
            return acceptance.Verdict(accepted, tokens)

        monkeypatch.setattr(acceptance, "draw_next", from_target)
    else:
        monkeypatch.setattr(acceptance, function, mutant)
    torch.manual_seed(11)
    config = lossless(**{**FLAT_RULE, **sharp}, lossless_rule=rule, regen_min_conf=0.0)
    found = sampled(tiny, config, calls=10)
    assert p_value(found, target_distribution) < ALARM


# what is run: forwards, their widths, the cache


class Spy:
    """Notes every forward after the prompts were read: who, tokens fed, where they start, raw logits."""

    def __init__(self, target, draft=None):
        self.target, self.draft, self.calls, self.log = target, draft, [], []

    def kind(self, model):
        return "q" if model is self.target else "p" if model is self.draft else "s"

    @contextmanager
    def __call__(self):
        original = ModelRunner.forward

        def forward(runner, tokens, starts, **options):
            out = original(runner, tokens, starts, **options)
            self.calls.append((self.kind(runner.model), tokens.clone(), list(starts), out.logits.clone()))
            return out

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ModelRunner, "forward", forward)
            yield self

    def of(self, kind):
        return [call for call in self.calls if call[0] == kind]


def spied(pair, ids, config, **kwargs):
    """Return the new tokens of one row, the statistics and the spy; no cache is asked for."""
    with Spy(*pair)() as spy:
        new, found = measured(pair, ids, config, **kwargs)
    return new, found, spy


LONG = {**OFF, "tau_accept": 0.6, "tau_escalate": 0.05, "num_assistant_tokens": 4, "max_pending": 9}  # late passes


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_neox", "gpt2", "phi3"])
@pytest.mark.parametrize("cache", ["shared", "own"])
def test_forwards_equal_fresh_ones_at_every_round(name, cache):
    """After any lossy past, the model's logits are those of a run without cache; the slim model's likewise."""
    prefix, changes = families.FAMILIES[name]
    changes = dict(changes, num_hidden_layers=5)
    windows = "layer_types" in changes
    if windows:
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
    skip = (2, 3)
    target = weaken(families.build(prefix, seed=families.SEEDS.get(name, 0), **changes), skip, 0.2)
    if name in families.SINGLE:
        target.float()
    pair, ids = (target, families.perturbed(target, 0.04)), families.prompts((19,))[0]
    config = lossy(**LONG, slim_cache=cache, keep_mask=kept(skip, 5))
    new, found, spy = spied(pair, ids, config, max_new_tokens=40)
    text, slim = torch.cat([ids, torch.tensor([new])], dim=1), without(target, skip)
    tolerance = 2e-4 if name in families.SINGLE else 1e-9
    full, widths = None, []  # tokens that the model has read, as the first slim pass after it shows
    for kind, tokens, (start,), logits in spy.calls[1:]:
        fed = torch.cat([text[:, :start], tokens], dim=1)
        if kind == "q":
            assert cache == "own" or full is None or start == full, "the model goes on where it stopped"
            expected, full = target(fed).logits[:, start:], None
            widths.append(tokens.shape[1])
        elif kind == "s":
            full = start if full is None else full
            expected = slim_logits(target, slim, fed, full if cache == "shared" else 0)[:, -tokens.shape[1] :]
        else:
            continue
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
    assert max(widths) > 6, "much was pending when the model ran"


@pytest.mark.parametrize("granularity, skip", [("layer", (2, 3)), ("layer", (3,)), ("sublayer", (4, 7))])
def test_left_out_modules_are_not_run_in_slim_passes(pair, prompt, granularity, skip):
    target = pair[0]
    units = LAYERS * (1 if granularity == "layer" else 2)
    calls, running = Counter(), [None]
    original = ModelRunner.forward
    spy = Spy(*pair)

    def forward(runner, *args, **kwargs):
        running[0] = spy.kind(runner.model)
        calls[running[0], "forwards"] += 1
        out = original(runner, *args, **kwargs)
        running[0] = None
        return out

    handles = []
    for unit in range(units):
        layer = target.model.layers[unit // (units // LAYERS)]
        module = layer.mlp if granularity == "layer" or unit % 2 else layer.self_attn
        handles.append(module.register_forward_hook(lambda *_, u=unit: calls.update([(running[0], u)])))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ModelRunner, "forward", forward)
            config = lossy(**LONG, keep_mask=kept(skip, units), granularity=granularity)
            measured(pair, prompt, config, max_new_tokens=40)
    finally:
        for handle in handles:
            handle.remove()
    assert calls["s", "forwards"] > 3 and calls["q", "forwards"] > 2
    for unit in range(units):
        assert calls["q", unit] == calls["q", "forwards"]
        assert calls["s", unit] == (0 if unit in skip else calls["s", "forwards"])


def test_slim_logits_differ_unless_nothing_is_left_out(pair, prompt):
    for skip, same in ((SKIP, False), ((), True)):
        spy = spied(pair, prompt, lossy(**LONG, keep_mask=kept(skip)), max_new_tokens=3)[2]
        _, tokens, (start,), logits = spy.of("s")[0]
        fresh = pair[0](torch.cat([prompt[:, :start], tokens[:, :1]], dim=1)).logits[:, -1]
        gap = (logits[:, 0] - fresh).abs().max()
        assert (gap < 1e-9) if same else (gap > 0.1)


def test_the_model_reads_the_prompt_only_where_nothing_escalates(pair, prompt):
    config = lossy(**OFF, tau_accept=0.7, tau_escalate=0.0)
    _, found, spy = spied(pair, prompt, config, max_new_tokens=40)
    assert found.target_forwards == len(spy.of("q")[1:]) == 0 and found.method["escalations"] == 0
    assert set(found.method["tier_ids"][0][1:]) <= set("ABS")


@pytest.mark.parametrize("limit", [1, 4, 10, None])
@pytest.mark.parametrize("cache", ["shared", "own"])
def test_passes_and_their_widths_are_bounded(pair, prompt, limit, cache):
    gamma, new = 4, 40
    config = lossy(**{**MIXED, "max_pending": limit}, slim_cache=cache, num_assistant_tokens=gamma)
    _, found, spy = spied(pair, prompt, config, max_new_tokens=new)
    escalations, forced = found.method["escalations"], found.method["forced_rounds"]
    assert len(spy.of("q")[1:]) == found.target_forwards
    assert found.target_forwards - escalations - forced in (0, 1)  # the last token may have nothing drafted for it
    assert found.target_forwards <= 1 + escalations + (0 if limit is None else math.ceil(new / limit))
    assert forced > 0 or limit in (10, None)
    last, widths = prompt.shape[1], []
    for _, tokens, (start,), _ in spy.of("q")[1:]:
        assert start >= last, "what the model has read is not fed again"
        last = start
        widths.append(tokens.shape[1])
    if limit is None:
        assert max(widths) > gamma + 1
    else:  # below the limit one round more comes, then the drafts
        assert max(widths) <= limit + 2 * gamma + 2
    slim = max(tokens.shape[1] for _, tokens, _, _ in spy.of("s"))
    assert slim == gamma + 1 if cache == "shared" else gamma + 1 < slim <= 2 * (gamma + 1)


@pytest.mark.parametrize("rule", RULES)
def test_lossless_forwards_are_narrow(pair, prompt, rule):
    config = lossless(lossless_rule=rule, num_assistant_tokens=3, stage_len=6)
    _, found, spy = spied(pair, prompt, config, max_new_tokens=40)
    assert max(tokens.shape[1] for _, tokens, _, _ in spy.of("s")) == 4
    assert max(tokens.shape[1] for _, tokens, _, _ in spy.of("q")) <= 6 + 3 + 1
    assert len(spy.of("q")[1:]) == found.target_forwards < 40
    assert len(spy.of("s")) == found.method["slim_forwards"]


@pytest.mark.parametrize("cache", ["shared", "own"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_returned_cache_is_the_models_own(pair, cache, rows):
    """Also of rows that ended with tokens that the model had not read."""
    ids, attention = families.prompts((14, 6, 9)[:rows])
    config = lossy(**LONG, slim_cache=cache)
    out = generate(pair, ids, config, attention_mask=attention, max_new_tokens=33, return_dict_in_generate=True)
    assert all(letters[-6:].count("Q") + letters[-6:].count("C") < 6 for letters in out.speculation.method["tier_ids"])
    mask = torch.cat([attention, attention.new_ones(rows, 32)], dim=1)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    fresh = DynamicCache()
    pair[0](out.sequences[:, :-1], attention_mask=mask, position_ids=places, past_key_values=fresh, use_cache=True)
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
    for ours, theirs in zip(out.past_key_values.layers, fresh.layers, strict=True):
        real = mask.bool()[:, None, :, None]
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(a * real, b * real, rtol=0, atol=1e-9)


@pytest.mark.parametrize("at", [2, 5, 9])
@pytest.mark.parametrize("mode", ["lossy", "lossless"])
def test_an_exception_in_a_slim_pass_leaves_the_model_as_it_was(pair, prompt, at, mode):
    target = pair[0]
    before, state = target(prompt).logits, {name: value.clone() for name, value in target.state_dict().items()}
    children = [list(module._modules.items()) for module in target.modules()]
    implementation = target.config._attn_implementation
    original, count = ModelRunner.forward, [0]
    inside = []

    def fail(*_):
        if inside:
            raise KeyError("raised on purpose")

    def forward(runner, *args, **kwargs):
        if runner.model not in pair:
            count[0] += 1
            if count[0] == at:
                inside.append(True)
        return original(runner, *args, **kwargs)

    handle = target.model.layers[-1].mlp.register_forward_hook(fail)
    config = lossy(**MIXED) if mode == "lossy" else lossless(num_assistant_tokens=1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ModelRunner, "forward", forward)
            with pytest.raises(KeyError, match="on purpose"):
                generate(pair, prompt, config, max_new_tokens=40)
    finally:
        handle.remove()
    assert count[0] == at, "it was a slim pass that failed"
    assert torch.equal(target(prompt).logits, before)
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())
    assert children == [list(module._modules.items()) for module in target.modules()]
    assert target.config._attn_implementation == implementation
    assert not any("forward" in vars(module) for module in target.modules())


class Watcher(BaseStreamer):
    """Checks at each token that the model has read what comes before it."""

    def __init__(self, spy, start):
        self.spy, self.place, self.seen, self.waited = spy, start, [], 0

    def put(self, value):
        if value.numel() > 1:  # the prompt
            return
        self.waited = max(self.waited, sum(kind == "s" for kind, *_ in self.spy.calls))
        ends = [start + tokens.shape[1] for _, tokens, (start,), _ in self.spy.of("q")]
        assert max(ends) >= self.place, "a token that the model has not judged"
        self.place += 1
        self.seen.append(int(value))

    def end(self):
        pass


@pytest.mark.parametrize("rule", RULES)
def test_streams_get_judged_tokens_only(pair, prompt, rule):
    config = lossless(lossless_rule=rule, stage_len=12)
    spy = Spy(*pair)
    watcher = Watcher(spy, prompt.shape[1])
    with spy():
        out = generate(pair, prompt, config, max_new_tokens=40, streamer=watcher)
    assert watcher.seen == out[0, prompt.shape[1] :].tolist()
    assert torch.equal(out, stock(pair[0], prompt, torch.ones_like(prompt)))
    with pytest.raises(AssertionError, match="not judged"), spy():
        spy.calls.clear()
        generate(pair, prompt, lossy(**LONG), max_new_tokens=40, streamer=Watcher(spy, prompt.shape[1]))


# settings at their ends


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_where_all_escalates_it_is_plain_speculative_decoding(pair, prompt, gamma):
    everything = {"tau_accept": 1.01, "tau_escalate": 1.01, "bonus_min_conf": 1.01}
    new, found = measured(
        pair, prompt, lossy(**{**OFF, **everything, "num_assistant_tokens": gamma}), max_new_tokens=40
    )
    plain = []
    with on_speculation(plain.append):
        out = pair[0].generate(
            prompt, assistant_strategy="assisted", assistant_model=pair[1], num_assistant_tokens=gamma,
            do_sample=False, max_new_tokens=40,
        )  # fmt: skip
    assert new == out[0, prompt.shape[1] :].tolist() and set(found.method["tier_ids"][0]) <= set("CQ")
    for name in ("target_forwards", "accept_lengths", "num_accepted_tokens_per_pos", "num_draft_tokens"):
        assert getattr(found, name) == getattr(plain[0], name), name


def test_the_model_as_drafter_and_slim_verifier_is_kept_always(pair, prompt):
    target = pair[0]
    config = lossy(**BARE, tau_accept=1.0, keep_mask=kept(()))
    new, found = measured((target, target), prompt, config, max_new_tokens=24)
    assert new == stock(target, prompt, torch.ones_like(prompt), max_new_tokens=24)[0, prompt.shape[1] :].tolist()
    assert found.method["tier_ids"] == ["Q" + 22 * "A" + "Q"]  # nothing is drafted for the last token
    config = lossy(**OFF, tau_accept=1.0, keep_mask=kept(()))
    _, found = measured((target, target), prompt, config, max_new_tokens=24)
    assert found.method["tier_ids"] == ["Q" + 5 * "AAAS" + "AAS"]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_the_level_is_the_share_of_tiered_rounds(pair, prompt, share):
    config = lossy(**MIXED, lossy_level=share)
    new, found = measured(pair, prompt, config, max_new_tokens=60)
    again, _ = measured(pair, prompt, config, max_new_tokens=60)
    assert new == again
    text = torch.cat([prompt, torch.tensor([new])], dim=1)
    choices = pair[0](text).logits[0, prompt.shape[1] - 1 : -1].argmax(-1).tolist()
    assert config.lossless == (share == 0)
    if share == 0:
        assert new == choices and "tier_ids" not in found.method
        return
    tiered, strict = found.method["tiered_rounds"], found.method["strict_rounds"]
    assert tiered + strict == len(found.accept_lengths[0]) and abs(tiered - share * (tiered + strict)) <= 1
    (letters,) = found.method["tier_ids"]
    own_choice = [new[i] == choices[i] for i in range(60)]
    assert all(same for same, letter in zip(own_choice, letters, strict=True) if letter in "CQ")
    assert not all(own_choice)


@pytest.mark.parametrize(
    "config",
    [
        lossy(**MIXED).override(num_assistant_tokens=6),
        lossless(lossless_rule="gate", num_assistant_tokens=6),
        lossless(lossless_rule="prefilter", num_assistant_tokens=6, tau_escalate=0.2, regen_min_conf=0.0),
    ],
    ids=["lossy", "gate", "prefilter"],
)
def test_gate_does_not_move_with_the_temperature(pair, prompt, config, monkeypatch):
    seen = []
    original = laws.tiers
    monkeypatch.setattr(torch, "multinomial", lambda distribution, number, **_: distribution.argmax(-1, keepdim=True))

    def noted(log_ratio, confidence, *args, **kwargs):
        seen.append((original(log_ratio, confidence, *args, **kwargs).tolist(), confidence.tolist()))
        return original(log_ratio, confidence, *args, **kwargs)

    monkeypatch.setattr(acceptance, "tiers", noted)
    found = []
    for temperature in (0.3, 1.0, 1.5):
        seen.clear()
        generate(
            pair, prompt, config, do_sample=True, temperature=temperature, top_k=0,
            max_new_tokens=20,
        )  # fmt: skip
        found.append(seen[0])
    assert found[0] == found[1] == found[2] and len(set(found[0][0][0])) > 1


@pytest.mark.parametrize("config", [lossy(**MIXED), lossy(**OFF, tau_escalate=0.0), lossless(lossless_rule="gate")])
@pytest.mark.parametrize("sample", [False, True])
def test_words_that_a_processor_excludes_are_never_emitted(pair, prompt, config, sample):
    kwargs = {"do_sample": sample, "max_new_tokens": 40}
    torch.manual_seed(1)
    new, _ = measured(pair, prompt, config, **kwargs)
    banned = sorted(set(new))[: len(set(new)) // 2]
    torch.manual_seed(1)
    other, _ = measured(pair, prompt, config, suppress_tokens=banned, **kwargs)
    assert set(new) & set(banned) and not set(other) & set(banned)


class OnlyForSlim(LogitsProcessor):
    """Excludes a word from one call on to the next: whoever drafted it knew nothing of that."""

    def __init__(self, word):
        self.word, self.on = word, False

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        if self.on:
            scores[:, self.word] = -torch.inf
        return scores


def test_a_draft_that_the_processors_exclude_is_escalated(pair, prompt):
    config = lossy(**OFF, tau_accept=0.5, tau_escalate=0.0)
    new, found = measured(pair, prompt, config, max_new_tokens=12)
    word = new[1]
    assert found.method["tier_ids"][0][1] == "A"
    ban = OnlyForSlim(word)
    original = ModelRunner.forward

    def forward(runner, *args, **kwargs):
        ban.on = runner.model not in pair
        return original(runner, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "forward", forward)
        _, found = measured(pair, prompt, config, max_new_tokens=12, logits_processor=LogitsProcessorList([ban]))
    assert found.method["tier_ids"][0][1] == "C"


@pytest.mark.parametrize("mode", ["lossy", "lossless"])
@pytest.mark.parametrize("sample", [False, True])
def test_ids_that_only_the_drafter_has_are_never_emitted(pair, prompt, mode, sample):
    draft = families.build("Llama", seed=5, num_hidden_layers=2, vocab_size=families.VOCAB + 8)
    with torch.no_grad():
        draft.lm_head.weight[families.VOCAB :] *= 6  # it would say them often
    new = draft.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    assert (new >= families.VOCAB).sum() > 4
    config = lossy(**OFF, tau_accept=0.01, tau_escalate=0.0) if mode == "lossy" else lossless(lossless_rule="gate")
    new, _ = measured((pair[0], draft), prompt, config, max_new_tokens=40, do_sample=sample, top_k=0)
    assert max(new) < families.VOCAB
    if mode == "lossless" and not sample:
        assert new == stock(pair[0], prompt, torch.ones_like(prompt))[0, prompt.shape[1] :].tolist()


# the end of the text


@pytest.mark.parametrize("gamma", [2, 5])
@pytest.mark.parametrize("guard", [True, False])
def test_ends_of_the_text_in_tiers(pair, prompt, gamma, guard):
    """Every word of the text as the end of it in turn, so that it comes at every place of a block."""
    config = lossy(**{**MIXED, "eos_guard": guard, "regen_min_conf": 0.15}, num_assistant_tokens=gamma)
    reference = Reference(pair, prompt)
    ((tokens, _),) = reference.lossy(config, 18)
    ends = {len(tokens)}
    for word in sorted(set(tokens)):
        found = check_greedy(pair, prompt, config, 18, (word,), reference)
        ends.add(len(found.method["tier_ids"][0]))
    assert len(ends) > 5


def test_an_unsure_end_is_left_to_the_model(pair, prompt):
    """A drafted end that is no argmax of the slim verifier is kept without the guard, and escalated with it."""
    open_settings = {**OFF, "tau_accept": 0.05, "tau_escalate": 0.0, "bonus_min_conf": 1.01}
    reference = Reference(pair, prompt)
    ((tokens, letters),) = reference.lossy(lossy(**open_settings), 24)
    places = [
        i for i in range(1, 23)
        if letters[i] == "A" and tokens[i] not in tokens[:i]
        and int(slim_logits(pair[0], reference.slim, reference.text(tokens[:i]), prompt.shape[1])[0, -1].argmax())
        != tokens[i]
    ]  # fmt: skip
    assert places
    end = tokens[places[0]]
    found = {}
    for guard in (False, True):
        config = lossy(**{**open_settings, "eos_guard": guard})
        found[guard] = measured(pair, prompt, config, max_new_tokens=24, eos_token_id=end)[1].method["tier_ids"][0]
    assert found[False] == letters[: places[0]] + "A"
    assert found[True][places[0]] == "C"


@pytest.mark.parametrize("config", [lossy(**LONG), lossless(stage_len=12), lossy(**LONG, slim_cache="own")])
def test_lengths_are_never_exceeded(pair, config):
    ids, attention = families.prompts((14, 6, 9))
    for new in (1, 2, 3, 7, 19):
        out = generate(pair, ids, config, attention_mask=attention, max_new_tokens=new, return_dict_in_generate=True)
        assert out.sequences.shape[1] == ids.shape[1] + new
        assert all(layer.get_seq_length() == ids.shape[1] + new - 1 for layer in out.past_key_values.layers)


# audit


def audited(pair, prompt, config, new, found, sample=False):
    """Return what an audit must say of a single row, from passes over the whole text."""
    (letters,) = found.method["tier_ids"]
    reference = Reference(pair, prompt, shared=False, sample=sample)
    last = max(i for i, letter in enumerate(letters) if letter in "CQ")
    rows = []
    with torch.no_grad():
        text = torch.cat([prompt, torch.tensor([new])], dim=1)
        q = torch.softmax(pair[0](text).logits[0, prompt.shape[1] - 1 : -1].double(), dim=-1)
    for place in range(last):
        if letters[place] not in "ABS":
            continue
        before, token = tuple(new[:place]), new[place]
        distribution = reference.p(before) if letters[place] == "A" else reference.s(before, 0)[0]
        rows.append((int(q[place].argmax()) == token, float(q[place, token]), float(distribution[token])))
    over = sorted(share - chance for _, chance, share in rows)
    return {
        "audited": len(rows),
        "match_rate": sum(match for match, _, _ in rows) / len(rows),
        "mean_overshoot": sum(over) / len(over),
        "p99_overshoot": over[min(len(over) - 1, int(0.99 * len(over)))],
        "worst_log_probability": min(math.log(chance) for _, chance, _ in rows),
    }


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("settings", [MIXED, LONG, {**MIXED, "lossy_level": 0.6}])
def test_the_audit_is_what_a_whole_pass_says(pair, prompt, sample, settings):
    config = lossy(**settings, slim_cache="own")
    torch.manual_seed(3)
    new, found = measured(pair, prompt, config, max_new_tokens=60, do_sample=sample, top_k=0)
    expected = audited(pair, prompt, config, new, found, sample)
    assert 0 < expected["match_rate"] < 1 and expected["audited"] > 10
    assert found.method["audit"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    quiet = measured(pair, prompt, config.override(audit=False), max_new_tokens=60)[1].method["audit"]
    assert quiet == {"audited": 0}


def thresholds_over_time(pair, prompt, config, **kwargs):
    """Return tau_accept, regen_min_conf and the running share of misses after every audit."""
    noted, original = [], Tiers._audit

    def audit(self, *args):
        original(self, *args)
        noted.append((self.thresholds[0], self.regen_min_conf, self.missed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tiers, "_audit", audit)
        measured(pair, prompt, config, **kwargs)
    return noted


def test_tightening_follows_the_audit(pair, prompt):
    start = {"tau_accept": 0.4, "tau_escalate": 0.2, "regen_min_conf": 0.1, "max_pending": 3}
    config = lossy(**{**OFF, **start})
    assert {noted[:2] for noted in thresholds_over_time(pair, prompt, config, max_new_tokens=60)} == {(0.4, 0.1)}
    config = config.override(audit_action="tighten", audit_target=0.3)
    both = 0
    for noted in (
        thresholds_over_time(pair, prompt, config, max_new_tokens=100),
        # drafts that the model itself would have made: nothing to complain of
        thresholds_over_time(
            (pair[0], pair[0]), prompt, config.override(keep_mask=kept(()), audit_target=0.1), max_new_tokens=60
        ),
    ):
        accept, regen = 0.4, 0.1
        for new_accept, new_regen, missed in noted:
            target = 0.3 if noted[-1][2] else 0.1
            step = 0.05 if missed > target else -0.01 if missed < target / 2 else 0.0
            accept = max(0.4, min(1.0, accept + step))
            regen = max(0.1, min(1.0, regen + step))
            assert (new_accept, new_regen) == pytest.approx((accept, regen))
            both |= 1 if step > 0 else 2 if step < 0 else 0
    assert both == 3


def test_a_tightened_gate_decides(pair, prompt):
    """The thresholds that rise are the ones in use: fewer tokens of tier A than under the configured ones."""
    config = lossy(**{**OFF, "tau_accept": 0.3, "tau_escalate": 0.25, "max_pending": 3, "bonus_min_conf": 1.01})
    loose = measured(pair, prompt, config, max_new_tokens=100)[1].method["tiers"]
    config = config.override(audit_action="tighten", audit_target=0.01)
    tight = measured(pair, prompt, config, max_new_tokens=100)[1].method["tiers"]
    assert tight["A"] < loose["A"] - 5


@pytest.mark.parametrize("mode", ["lossy", "lossless"])
def test_the_heuristic_drafts_more_after_whole_blocks(pair, prompt, mode):
    """+2 after a block that stayed whole, -1 after any other, at most 16."""
    target = pair[0]
    for draft, expected in ((target, [3, 5, 7, 9]), (families.build("Llama", seed=9), [3, 2, 1, 1])):
        changes = {"num_assistant_tokens_schedule": "heuristic", "num_assistant_tokens": 3, "keep_mask": kept(())}
        if mode == "lossy":
            config = lossy(**OFF, tau_accept=1.0, tau_escalate=1.0, **changes)
        else:
            config = lossless(**changes, stage_len=2)
        spy = spied((target, draft), prompt, config, max_new_tokens=60)[2]
        assert [tokens.shape[1] - 1 for _, tokens, _, _ in spy.of("s")[:4]] == expected


# batches


def test_rows_of_a_lossy_batch_with_caches_of_their_own_are_those_of_single_calls(pair):
    ids, attention = families.prompts((19, 3, 12, 7))
    config = lossy(**MIXED, slim_cache="own")
    end = families.choose_eos(generate(pair, ids, config, attention_mask=attention, max_new_tokens=40)[:, 19:])
    kwargs = {"max_new_tokens": 40, "eos_token_id": end, "pad_token_id": 0, "return_dict_in_generate": True}
    out = generate(pair, ids, config, attention_mask=attention, **kwargs)
    lengths = set()
    for row in range(4):
        one = generate(pair, ids[row : row + 1, 19 - int(attention[row].sum()) :], config, **kwargs)
        new = one.sequences[0, -len(one.speculation.method["tier_ids"][0]) :].tolist()
        lengths.add(len(new))
        assert out.sequences[row, 19 : 19 + len(new)].tolist() == new
        assert not out.sequences[row, 19 + len(new) :].any()
        assert out.speculation.method["tier_ids"][row] == one.speculation.method["tier_ids"][0]
    assert len(lengths) > 1, "rows end at different columns"


@pytest.mark.parametrize("cache", ["shared", "own"])
def test_scores_are_those_of_whoever_decided(pair, prompt, cache):
    config = lossy(**MIXED, slim_cache=cache)
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = generate(pair, prompt, config, max_new_tokens=30, repetition_penalty=1.2, **wanted)
    (letters,) = out.speculation.method["tier_ids"]
    assert {"A", "B", "C"} <= set(letters)
    text, slim = out.sequences, without(pair[0], SKIP)
    start, penalty = prompt.shape[1], RepetitionPenaltyLogitsProcessor(1.2)
    whole, alone = pair[0](text).logits[0], slim(text).logits[0]
    for place, letter in enumerate(letters):
        if letter not in "CQ" and cache == "shared":
            continue  # what the slim verifier reads there depends on what the model had read
        expected = (whole if letter in "CQ" else alone)[start + place - 1]
        torch.testing.assert_close(out.logits[place][0], expected.float(), rtol=1e-5, atol=1e-5)
        scores = penalty(text[:, : start + place], expected[None].float())[0]
        torch.testing.assert_close(out.scores[place][0], scores, rtol=1e-5, atol=1e-5)


# what is refused


LOSSY_DEFAULT = {"mode": "lossy", "force": True, "keep_mask": kept()}


@pytest.mark.parametrize(
    "values, match",
    [
        ({"mode": "losless"}, "mode"),
        ({"lossless_rule": "gated"}, "lossless_rule"),
        ({"alpha_convention": "paper", "alpha1": 0.5, "alpha2": 0.3}, "alpha_convention"),
        ({"escalate_scope": "row"}, "escalate_scope"),
        ({"audit_action": "stop"}, "audit_action"),
        ({"granularity": "head"}, "granularity"),
        ({"skip_budget_by": "time"}, "skip_budget_by"),
        ({"slim_cache": "both"}, "slim_cache"),
        ({"num_assistant_tokens_schedule": "linear"}, "num_assistant_tokens_schedule"),
        ({"tau_accept": 0.5, "tau_escalate": 0.6}, "tau_"),
        ({"tau_accept": 0.0, "tau_escalate": 0.0}, "tau_"),
        ({"tau_accept": 1.2}, "tau_"),
        ({"tau_accept": float("nan")}, "tau_"),
        ({"tau_escalate": -0.1}, "tau_"),
        ({"alpha1": 0.3, "alpha2": 0.5, "alpha_convention": "direct"}, "tau_"),
        ({"alpha1": 0.5}, "alpha"),
        ({"alpha1": 0.5, "alpha2": 1.0}, "alpha2"),
        ({"alpha1": -0.1, "alpha2": 0.3}, "alpha1"),
        ({"alpha1": 0.5, "alpha2": 0.3, "tau_accept": 0.7}, "tau_"),
        ({"lossy_level": 1.1}, "lossy_level"),
        ({"lossy_level": float("nan")}, "lossy_level"),
        ({"draft_stop": -0.1}, "draft_stop"),
        ({"stage_stop_conf": 2.0}, "stage_stop_conf"),
        ({"audit_target": -1.0}, "audit_target"),
        ({"min_slim_agreement": 85.0}, "min_slim_agreement"),
        ({"regen_min_conf": 1.5}, "regen_min_conf"),
        ({"bonus_min_conf": -0.5}, "bonus_min_conf"),
        ({"stage_len": 1}, "stage_len"),
        ({"stage_len": 65}, "stage_len"),
        ({"max_pending": 0}, "max_pending"),
        ({"skip_ratio": 0.05}, "skip_ratio"),
        ({"skip_ratio": 0.8}, "skip_ratio"),
        ({"num_assistant_tokens": 17}, "num_assistant_tokens"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens"),
        ({"coupled": True}, "coupled"),
        ({**LOSSY_DEFAULT, "coupled": True}, "coupled"),
        ({**LOSSY_DEFAULT, **OFF, "coupled": True, "tau_escalate": 0.3}, "coupled"),
        ({**LOSSY_DEFAULT, "drafter": "slim"}, "slim"),
    ],
)
def test_bad_settings_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        ViaSDConfig(**values)


@pytest.mark.parametrize("mask", [[1, 0, 1], [True, None], ["yes"]])
def test_masks_hold_bools(mask):
    with pytest.raises(TypeError, match="keep_mask"):
        ViaSDConfig(keep_mask=mask)


def test_names_with_typos_raise(pair, prompt):
    kwargs = {"do_sample": False, "max_new_tokens": 4, "assistant_model": pair[1]}
    for name in ("via_ds", "viasd", "via_sd:papr", "via_sd:exact "):
        with pytest.raises((ValueError, FileNotFoundError, OSError)):
            pair[0].generate(prompt, assistant_strategy=name, **kwargs)
    with pytest.raises(ValueError, match="promt_lookup"):
        pair[0].generate(
            prompt, assistant_strategy=lossless(drafter="promt_lookup"), do_sample=False, max_new_tokens=4
        )
    with pytest.raises((ValueError, TypeError), match="loosy_level"):
        pair[0].generate(prompt, assistant_strategy="via_sd", assistant_strategy_config={"loosy_level": 0.5}, **kwargs)


def refused(pair, prompt, config, match, error=ValueError):
    """Check that a call is refused before any forward."""
    spy = Spy(*pair)
    with spy(), pytest.raises(error, match=match):
        generate(pair, prompt, config, max_new_tokens=8)
    assert not spy.calls


@pytest.mark.parametrize("mode", ["lossless", "lossy"])
def test_masks_that_do_not_fit_are_refused(pair, prompt, mode):
    settings = {"mode": mode, "force": True}
    for mask in (kept(units=5), kept(units=2 * LAYERS), []):
        refused(pair, prompt, ViaSDConfig(keep_mask=mask, **settings), "entries")
    refused(pair, prompt, ViaSDConfig(keep_mask=kept(), granularity="sublayer", **settings), "entries")
    for unit in (0, LAYERS - 1):
        refused(pair, prompt, ViaSDConfig(keep_mask=kept((unit,)), **settings), "protected")
    for unit in (0, 2 * LAYERS - 2, 2 * LAYERS - 1):
        mask = kept((unit,), 2 * LAYERS)
        refused(pair, prompt, ViaSDConfig(keep_mask=mask, granularity="sublayer", **settings), "protected")


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("types, kind", [("sfsfs", 1), ("ssfss", 2), ("fssfs", 1)])
def test_first_layers_of_each_kind_of_attention_are_protected(name, types, kind):
    prefix, changes = families.FAMILIES[name]
    layers = [{"s": "sliding_attention", "f": "full_attention"}[letter] for letter in types]
    model = families.build(prefix, **{**changes, "num_hidden_layers": 5, "layer_types": layers})
    units = Units(model, "layer")
    assert set(units.protected) == {0, kind, 4}
    for unit in range(5):
        if unit in (0, kind, 4):
            with pytest.raises(ValueError, match="protected"):
                units.check(kept((unit,), 5))
        else:
            units.check(kept((unit,), 5))
    halves = Units(model, "sublayer")
    assert {0, 2 * kind, 8, 9} <= set(halves.protected) and 2 * kind + 1 not in halves.protected


def test_the_thresholds_of_the_paper(pair, prompt, caplog):
    logger = transformers.utils.logging.get_logger("hf_specdec")
    logger.addHandler(caplog.handler)
    try:
        both = {"alpha1": 0.5, "alpha2": 0.3}
        for a in (both, {"alpha1": 0.3, "alpha2": 0.5}):
            assert lossy(**a, **BARE).thresholds == pytest.approx((0.7, 0.5))
        assert lossy(**both, **BARE, alpha_convention="direct").thresholds == pytest.approx((0.5, 0.3))
        caplog.clear()
        literal = lossy(**both, **BARE, alpha_convention="literal")
        assert "literal" in caplog.text and literal.thresholds == pytest.approx((0.7, 0.7))
    finally:
        logger.removeHandler(caplog.handler)
    assert ViaSDConfig().thresholds == (0.7, 0.5)
    counts = {
        name: measured(pair, prompt, lossy(**both, **BARE, alpha_convention=name), max_new_tokens=100)[1].method[
            "tiers"
        ]
        for name in ("sorted", "direct", "literal")
    }
    assert counts["literal"]["B"] == 0 < min(counts["sorted"]["B"], counts["direct"]["B"])


def test_the_presets_are_the_specified_ones():
    from hf_specdec.registry import preset

    paper = preset("via_sd:paper")
    assert paper.mode == "lossy" and paper.thresholds == pytest.approx((0.7, 0.5)) and paper.lossy_level == 1.0
    assert (paper.regen_min_conf, paper.bonus_min_conf, paper.max_pending, paper.eos_guard) == (0, 1.01, None, False)
    assert (paper.skip_ratio, paper.granularity, paper.skip_budget_by) == (0.45, "layer", "count")
    safe, usual = preset("via_sd:safe"), preset("via_sd")
    assert safe == usual.override(mode="lossy") and usual == ViaSDConfig() and usual.lossless and not safe.lossless
    assert (usual.lossless_rule, usual.stage_len, usual.stage_stop_conf, usual.max_pending) == ("exact", 8, 0.4, 32)
    assert (usual.regen_min_conf, usual.bonus_min_conf, usual.min_slim_agreement) == (0.8, 0.8, 0.85)


def test_lossy_decoding_needs_a_measured_mask(pair, prompt, tmp_path):
    config = ViaSDConfig(mode="lossy", keep_mask=kept())
    refused(pair, prompt, config, "measured|calibrat", ViaSDQualityError)
    units = Units(pair[0], "layer")
    for agreement in (0.84, 0.86):
        folder = tmp_path / str(agreement)
        save_slim(folder, ViaSDConfig(), pair[0], units, kept(), {"agreement": agreement})
        config = ViaSDConfig(mode="lossy", adapter=str(folder))
        if agreement < 0.85:
            refused(pair, prompt, config, "0.84", ViaSDQualityError)
            refused(pair, prompt, config.override(min_slim_agreement=0.845), "0.84", ViaSDQualityError)
        for fine in (
            config.override(min_slim_agreement=0.83), config.override(force=True), config.override(mode="lossless"),
            config.override(lossy_level=0.0), *([config] if agreement > 0.85 else []),
        ):  # fmt: skip
            assert generate(pair, prompt, fine, max_new_tokens=8).shape[1] == prompt.shape[1] + 8


def test_a_mask_that_nobody_measured_is_warned_of(pair, prompt, caplog):
    logger = transformers.utils.logging.get_logger("hf_specdec")
    logger.addHandler(caplog.handler)
    transformers.utils.logging.warning_once.cache_clear()  # it warns once per process
    try:
        other = families.build("Qwen2", num_hidden_layers=4)
        generate((other, other), prompt, ViaSDConfig(stage_stop_conf=0.0), max_new_tokens=4)
    finally:
        logger.removeHandler(caplog.handler)
    assert "evenly" in caplog.text and "calibrate" in caplog.text


def test_drafters_that_learn_from_every_pass_are_refused_in_lossy_mode(pair, prompt):
    vegas = VegasConfig(min_context=0, min_tokens=2, kv_ratio=0.3)
    refused(pair, prompt, lossy(drafter=vegas), "vegas")
    expected = stock(pair[0], prompt, torch.ones_like(prompt))
    for config in (lossless(drafter=vegas), lossy(drafter=vegas, lossy_level=0.0)):
        assert torch.equal(generate(pair, prompt, config, max_new_tokens=40), expected)


def test_encoder_decoders_are_refused(prompt):
    shape = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 4, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**shape, decoder_start_token_id=0)).eval()
    for config in (lossless(keep_mask=kept((1,), 4)), lossy(keep_mask=kept((1,), 4))):
        with pytest.raises(ValueError):
            generate((t5, t5), prompt, config, max_new_tokens=4)


def test_settings_survive_a_file(tmp_path):
    config = lossy(**MIXED, slim_cache="own", lossy_level=0.3, drafter="prompt_lookup")
    config.save_pretrained(tmp_path)
    assert SpeculationConfig.from_pretrained(tmp_path) == config


# the slim model, its LoRA and its files


@pytest.mark.parametrize("granularity, skip", [("layer", (2, 3)), ("layer", (1, 4)), ("sublayer", (1, 4, 7, 8))])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss", "qwen3"])
def test_the_slim_model_is_the_model_without_units(name, granularity, skip):
    prefix, changes = families.FAMILIES[name]
    changes = dict(changes, num_hidden_layers=LAYERS)
    if "layer_types" in changes:
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 3
        skip = tuple(unit for unit in skip if unit not in (1,) or granularity == "sublayer")
    model = families.build(prefix, **changes).float()
    ids = families.prompts((19,))[0]
    before = model(ids).logits
    units = Units(model, granularity)
    keep = kept(skip, len(units))
    units.check(keep)
    slim = slim_model(model, units, keep)
    if name != "gpt_oss" or granularity == "layer":  # its MLP returns two values
        torch.testing.assert_close(slim(ids).logits, without(model, skip, granularity)(ids).logits, rtol=0, atol=1e-5)
    assert (slim(ids).logits - before).abs().max() > 0.05
    assert torch.equal(model(ids).logits, before)
    shared = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in slim.parameters()} <= shared


def test_the_even_mask_keeps_to_its_budget():
    model = families.build("Llama", num_hidden_layers=12)
    for granularity, by, ratio in itertools.product(("layer", "sublayer"), ("params", "count"), (0.2, 0.45, 0.7)):
        units = Units(model, granularity)
        keep = units.even(ratio, by)
        units.check(keep)
        assert abs(units.share(keep, by) - ratio) <= 1 / 24 + 1e-9, (granularity, by, ratio)
        left = units.skipped(keep)
        gaps = [b - a for a, b in itertools.pairwise(left)]
        if ratio == 0.2 and granularity == "layer":
            assert min(gaps) > 1, "spread over the depth"


# PEFT asks the model for an attribute under its former name
old_names = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def write_lora(folder, model, skip=SKIP, seed=0, scale=0.3, cache_mode="own", **changes):
    """Save a mask with a random LoRA on the layers that stay, in PEFT's format, and return the folder's name."""
    generator = torch.Generator().manual_seed(seed)
    units, tensors, names = Units(model, "layer"), {}, []
    for index in range(len(units)):
        if index in skip:
            continue
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            name = f"model.layers.{index}.{name}"
            weight = model.get_submodule(name).weight
            names.append(name)
            for part, shape in (("A", (4, weight.shape[1])), ("B", (weight.shape[0], 4))):
                key = f"base_model.model.{name}.lora_{part}.weight"
                tensors[key] = scale * torch.randn(shape, generator=generator)
    inner = Path(folder) / "via_sd_slim"
    inner.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": names, "bias": "none", **changes}
    (inner / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, inner / "adapter_model.safetensors")
    config, calibration = ViaSDConfig(num_assistant_tokens=3), {"agreement": 0.9}
    save_slim(folder, config, model, units, kept(skip), calibration, {"trained_cache_mode": cache_mode})
    return str(folder)


def rewrite(folder, change):
    """Change the record of a saved folder."""
    file = Path(folder) / "specdec_config.json"
    values = json.loads(file.read_text())
    change(values["adapter"])
    file.write_text(json.dumps(values))


@old_names
def test_a_lora_does_what_peft_does_with_it(pair, prompt, tmp_path):
    from peft import PeftModel

    target = pair[0]
    folder = write_lora(tmp_path / "a", target)
    found = load_slim(target, folder)
    assert found.keep == kept() and found.cache_mode == "own" and found.granularity == "layer"
    before = target(prompt).logits
    slim = slim_model(target, Units(target, "layer"), found.keep, found.terms)
    expected = PeftModel.from_pretrained(without(target, SKIP), Path(folder) / "via_sd_slim")(prompt).logits
    torch.testing.assert_close(slim(prompt).logits, expected, rtol=0, atol=1e-9)
    assert (expected - without(target, SKIP)(prompt).logits).abs().max() > 0.1
    assert torch.equal(target(prompt).logits, before)


class WithTerms(Reference):
    """The reference with PEFT's own slim model."""

    def __init__(self, pair, prompt, folder):
        from peft import PeftModel

        super().__init__(pair, prompt, shared=False)
        self.slim = PeftModel.from_pretrained(self.slim, Path(folder) / "via_sd_slim")


@old_names
def test_a_lora_works_in_slim_passes_only(pair, prompt, tmp_path, monkeypatch):
    """The model's logits stay bit-equal, its state as it was, and no context of PEFT's is entered."""
    import peft

    target = pair[0]
    folder = write_lora(tmp_path / "a", target, scale=0.15)
    reference = WithTerms(pair, prompt, folder)
    before, state = target(prompt).logits, {name: value.clone() for name, value in target.state_dict().items()}
    for name in ("disable_adapter", "__init__", "merge_and_unload"):
        monkeypatch.setattr(
            peft.PeftModel, name, lambda *_, **__: pytest.fail("PEFT is not to be used in decoding"), raising=False
        )
    config = lossy(**MIXED, keep_mask=None, adapter=folder)
    found = check_greedy(pair, prompt, config, reference=reference)
    assert found.method["slim_cache"] == "own" and found.method["tiers"]["C"] > 0
    spy = spied(pair, prompt, config, max_new_tokens=20)[2]
    first = spy.of("q")[0]
    assert torch.equal(first[3], spied(pair, prompt, lossy(**MIXED), max_new_tokens=2)[2].of("q")[0][3])
    for rule in RULES:
        config = lossless(keep_mask=None, adapter=folder, lossless_rule=rule)
        assert torch.equal(
            generate(pair, prompt, config, max_new_tokens=40), stock(target, prompt, torch.ones_like(prompt))
        )
    assert torch.equal(target(prompt).logits, before)
    assert list(target.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())


def test_no_adapter_is_switched_while_decoding():
    folder = Path(hf_specdec.__file__).parent / "generation"
    for file in folder.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        for name in (
            "disable_adapter",
            "merge_adapter",
            "merge_and_unload",
            "set_adapter",
            "import peft",
            "from peft",
        ):
            assert name not in text, f"{file.name} has {name}"


def test_mismatches_of_mask_model_and_cache_are_refused(pair, prompt, tmp_path):
    target = pair[0]
    folder = write_lora(tmp_path / "good", target)
    config = lossless(keep_mask=None, adapter=folder)
    assert torch.equal(
        generate(pair, prompt, config, max_new_tokens=40), stock(target, prompt, torch.ones_like(prompt))
    )
    refused(pair, prompt, config.override(slim_cache="shared"), "shared")
    refused(pair, prompt, config.override(keep_mask=kept((1, 3))), "keep_mask")
    generate(pair, prompt, config.override(keep_mask=kept(), slim_cache="own"), max_new_tokens=4)
    # another mask beside the LoRA
    other = write_lora(tmp_path / "mask", target)
    rewrite(other, lambda record: record.update(keep_mask=kept((1, 3))))
    refused(pair, prompt, config.override(adapter=other), "mask")
    halves = write_lora(tmp_path / "halves", target)
    rewrite(halves, lambda record: record["lora"].update(mask_hash=mask_hash(kept(), "sublayer")))
    refused(pair, prompt, config.override(adapter=halves), "mask")
    # another model: same shape, other weights; another depth; another width
    refused(((families.build("Llama", seed=77, num_hidden_layers=LAYERS)), pair[1]), prompt, config, "another")
    deeper = families.build("Llama", num_hidden_layers=LAYERS + 1)
    refused((deeper, pair[1]), prompt, config, "num_hidden_layers")
    # a LoRA that was trained on shared caches is not read from its own
    shared = write_lora(tmp_path / "shared", target, cache_mode="shared")
    refused(pair, prompt, config.override(adapter=shared, slim_cache="own"), "own")
    # kinds of adapter whose meaning is another
    for place, change in enumerate(({"use_dora": True}, {"use_rslora": True}, {"peft_type": "IA3"}, {"bias": "all"})):
        strange = write_lora(tmp_path / str(place), target, **change)
        refused(pair, prompt, config.override(adapter=strange), "LoRA")
    refused(pair, prompt, config.override(adapter=str(tmp_path)), "holds no", FileNotFoundError)
    gone = write_lora(tmp_path / "gone", target)
    (Path(gone) / "via_sd_slim" / "adapter_model.safetensors").unlink()
    refused(pair, prompt, config.override(adapter=gone), "holds no", FileNotFoundError)


def test_mask_hashes_differ():
    masks = [(kept(), "layer"), (kept((2, 4)), "layer"), (kept(), "sublayer"), (kept((), 7), "layer")]
    assert len({mask_hash(*mask) for mask in masks}) == len(masks)


def test_a_folder_is_a_strategy(pair, prompt, tmp_path):
    folder = write_lora(tmp_path / "a", pair[0])
    config = SpeculationConfig.from_pretrained(folder)
    assert config.adapter == folder and config.num_assistant_tokens == 3
    out = pair[0].generate(
        prompt, assistant_strategy=folder, assistant_model=pair[1], do_sample=False, max_new_tokens=40,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(out.sequences, stock(pair[0], prompt, torch.ones_like(prompt)))
    assert out.speculation.method["slim_cache"] == "own"
    assert out.speculation.method["skipped_share"] == pytest.approx(2 / 6)


# the search


def words(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_the_margin_cost_by_its_definition():
    q = words([0.5, 0.3, 0.2])
    assert float(margin_cost(q, q)) == 0.0
    # mild mismatch costs nothing, though the distributions differ
    tempered = q.pow(0.8) / q.pow(0.8).sum()
    assert float(margin_cost(q, tempered)) == 0.0 and float((q - tempered).abs().sum()) > 0.04
    moved = words([0.05, 0.25, 0.7])  # 3.5 times q on the last word
    expected = sum(
        float(p) * max(0.0, math.log(0.5) + math.log(p / w)) + float(w) * max(0.0, math.log(0.5) + math.log(p / w))
        for p, w in zip(moved[0].tolist(), q[0].tolist(), strict=True)
    )
    assert expected > 0.3
    assert float(margin_cost(q, moved)) == pytest.approx(expected)
    assert float(margin_cost(moved, q)) != pytest.approx(expected)  # not symmetric
    # alpha and beta stand at the places that they have in the definition
    for alpha, beta in ((0.2, 0.9), (0.5, 0.8)):
        expected = sum(
            a * max(0.0, math.log(1 - alpha) + math.log(a / b)) + b * max(0.0, math.log(beta) + math.log(a / b))
            for a, b in zip(moved[0].tolist(), q[0].tolist(), strict=True)
        )
        assert float(margin_cost(q, moved, alpha, beta)) == pytest.approx(expected)


def test_costs_are_means_of_their_definitions():
    generator = torch.Generator().manual_seed(0)
    theirs, mine = (2 * torch.randn(7, 9, generator=generator) for _ in range(2))
    q, p = theirs.double().softmax(-1), mine.double().softmax(-1)
    found = costs(theirs, mine)
    assert found["tv"] == pytest.approx(float((q - p).abs().sum(-1).mean() / 2), rel=1e-5)
    assert found["kl"] == pytest.approx(float((q * (q / p).log()).sum(-1).mean()), rel=1e-5)
    assert found["margin"] == pytest.approx(float(margin_cost(q, p).mean()), rel=1e-5)
    assert found["top1"] == pytest.approx(float((q.argmax(-1) != p.argmax(-1)).double().mean()))
    assert costs(theirs, theirs) == pytest.approx({"tv": 0, "kl": 0, "margin": 0, "top1": 0}, abs=1e-6)


def planted(layers=8, weak=(3, 5), scale=1e-3, seed=3):
    return weaken(families.build("Llama", seed=seed, num_hidden_layers=layers).float(), weak, scale)


def some_texts(model, count=6, new=20):
    ids = families.prompts((8,) * count, seed=5)[0]
    out = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=new, attention_mask=torch.ones_like(ids))
    return [Text(row, 8) for row in out]


@pytest.mark.parametrize("objective", ["tv", "kl", "margin", "top1"])
@pytest.mark.parametrize("cache", ["shared", "own"])
def test_the_search_finds_layers_that_do_nothing(tmp_path, objective, cache):
    model = planted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    units = Units(model, "layer")
    scorer = SlimScorer(model, some_texts(model), units, 16, cache)
    settings = MaskSearch(
        skip_ratio=0.25, objective=objective, slim_cache=cache, window=16, max_steps=30, stop_agreement=1.0
    )
    best = search_mask(scorer, settings, tmp_path)
    assert units.skipped(best) == [3, 5]
    report, even = scorer.report(best), scorer.report(tuple(units.even(0.25)))
    assert report["agreement"] > 0.9 > even["agreement"] and report["tv"] < 0.02 < even["tv"]
    assert report["tokens"] == 6 * 16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("cache", ["shared", "own"])
def test_scores_are_those_of_the_cache_mode(cache):
    """Shared: blocks are read over the whole model's states of all that comes before."""
    model = planted(6, (2,), 0.3).double()
    units, texts = Units(model, "layer"), some_texts(model, 2)
    keep = kept((2, 3))
    scorer, slim = SlimScorer(model, texts, units, 20, cache), without(model, (2, 3))
    for index, text in enumerate(texts):
        ids, mine = text.ids[None], []
        with torch.no_grad():
            q = model(ids[:, :-1]).logits[0, 7:]
            if cache == "own":
                mine = slim(ids[:, :-1]).logits[0, 7:]
            else:
                parts = [slim_logits(model, slim, ids[:, : min(begin + 8, 27)], begin)[0] for begin in range(7, 27, 8)]
                mine = torch.cat(parts)
        assert scorer(tuple(keep), index) == pytest.approx(costs(q, mine), rel=1e-4, abs=1e-6)


def test_an_interrupted_search_ends_where_the_whole_one_does(tmp_path):
    model = planted(12, (3, 5, 8), 0.5)
    units = Units(model, "layer")
    scorer = SlimScorer(model, some_texts(model, 4, 16), units, 16, "own")
    settings = MaskSearch(
        skip_ratio=0.35, slim_cache="own", window=16, max_steps=45, theta=5, mini_batch=2, stop_agreement=1.0
    )
    whole = search_mask(scorer, settings, tmp_path / "whole")

    def stop(figures):
        if figures["step"] == 33:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_mask(scorer, settings, tmp_path / "part", report=stop)
    assert search_mask(scorer, settings, tmp_path / "part", resume=True) == whole
    noted = [json.loads((tmp_path / name / "search.json").read_text()) for name in ("whole", "part")]
    for state in noted:
        state.pop("seconds")
    assert noted[0]["costs"] == noted[1]["costs"] and noted[0] == noted[1]
    with pytest.raises(ValueError, match="other settings"):
        search_mask(scorer, MaskSearch(window=16, objective="kl"), tmp_path / "part", resume=True)
    with pytest.raises(FileNotFoundError):
        search_mask(scorer, settings, tmp_path / "nothing", resume=True)


def test_a_search_over_few_masks_ends(tmp_path):
    """Every mask of a small model is known after a while; the search must not go on proposing them."""
    model = planted(5, (2,), 0.5)
    units = Units(model, "layer")
    scorer = SlimScorer(model, some_texts(model, 2, 16), units, 16, "own")
    settings = MaskSearch(skip_ratio=0.2, slim_cache="own", window=16, stop_agreement=1.0, minutes=0.3)
    steps = []
    best = search_mask(scorer, settings, tmp_path, report=lambda figures: steps.append(figures["step"]))
    assert units.skipped(best) == [2] and len(steps) == 3
    assert json.loads((tmp_path / "search.json").read_text())["seconds"] < 10, "not by the clock"


@pytest.mark.parametrize(
    "change",
    [
        {"skip_ratio": 0.9}, {"objective": "tvd"}, {"slim_cache": "mine"}, {"beta": 0.3}, {"alpha": 1.0}, {"theta": 1},
        {"window": 8}, {"max_steps": 0}, {"patience": 0}, {"minutes": 0.0}, {"skip_budget_by": "bytes"},
    ],
)  # fmt: skip
def test_bad_search_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        MaskSearch(**change)


# training


TRAINING = {
    "steps": 24,
    "batch_tokens": 256,
    "save_every": 8,
    "vocabulary_size": None,
    "learning_rate": 2e-2,
    "rank": 4,
}


@pytest.fixture(scope="module")
def learner():
    """A model, texts of it and a mask that costs it something."""
    torch.manual_seed(0)
    model = weaken(families.build("Llama", num_hidden_layers=5).float(), (2, 3), 0.3)
    return model, some_texts(model, 24, 24)


@pytest.fixture(scope="module")
def masked(learner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mask")
    units = Units(learner[0], "layer")
    save_slim(folder, ViaSDConfig(), learner[0], units, kept((2, 3), 5), {"agreement": 0.5})
    return folder


@pytest.mark.parametrize(
    "weights", [{}, {"kl_weight": 0.0, "tv_weight": 1.0}, {"tv_weight": 0.0, "margin_weight": 0.5}]
)
def test_a_lora_learns_the_models_distribution_and_leaves_it_alone(learner, masked, tmp_path, weights):
    model, texts = learner
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    found = train_slim(
        model, texts, masked, tmp_path, SlimTraining(**TRAINING, **weights),
        report=lambda figures: losses.append(figures["loss"]) if "loss" in figures else None,
    )  # fmt: skip
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert found["tv"] < found["before"]["tv"] and found["kl"] < found["before"]["kl"]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {file.name for file in (tmp_path / "via_sd_slim").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    record = json.loads((tmp_path / "specdec_config.json").read_text())["adapter"]
    assert record["lora"]["trained_cache_mode"] == "own" and record["keep_mask"] == kept((2, 3), 5)
    assert record["lora"]["mask_hash"] == mask_hash(kept((2, 3), 5), "layer")
    assert record["calibration"]["agreement"] == pytest.approx(found["agreement"])
    names = load_file(tmp_path / "via_sd_slim" / "adapter_model.safetensors")
    assert {name.split(".layers.")[1].split(".")[0] for name in names} == {"0", "1", "4"}
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in names)
    # what was saved is what was measured
    slim = load_slim(model, str(tmp_path))
    scorer = SlimScorer(model, texts[::24], Units(model, "layer"), 512, "own")
    assert scorer.report(tuple(slim.keep), slim.terms)["tv"] == pytest.approx(found["tv"], abs=0.01)
    ids = texts[0].ids[None, :8]
    config = ViaSDConfig(adapter=str(tmp_path), stage_stop_conf=0.0)
    assert torch.equal(
        generate((model, model), ids, config, max_new_tokens=20),
        stock(model, ids, torch.ones_like(ids), max_new_tokens=20),
    )
    refused((model, model), ids, config.override(slim_cache="shared"), "shared")


def test_resumed_training_ends_where_the_whole_one_does(learner, masked, tmp_path):
    model, texts = learner
    settings = SlimTraining(**TRAINING)
    whole = train_slim(model, texts, masked, tmp_path / "whole", settings)

    def stop(figures):
        if figures.get("step") == 13 and "loss" in figures:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_slim(model, texts, masked, tmp_path / "part", settings, report=stop)
    part = train_slim(model, texts, masked, tmp_path / "part", settings, resume=True)
    assert part["tv"] == pytest.approx(whole["tv"], abs=2e-3)
    one, other = (
        load_file(tmp_path / name / "via_sd_slim" / "adapter_model.safetensors") for name in ("whole", "part")
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-2, rtol=5e-2)
    with pytest.raises(ValueError, match="other settings"):
        train_slim(model, texts, masked, tmp_path / "part", SlimTraining(**{**TRAINING, "rank": 8}), resume=True)


def test_training_takes_the_mask_of_its_own_model_only(learner, masked, tmp_path):
    model, texts = learner
    other = families.build("Llama", seed=78, num_hidden_layers=5).float()
    with pytest.raises(ValueError, match="another"):
        train_slim(other, texts, masked, tmp_path, SlimTraining(**TRAINING))
    for change in ({"rank": 0}, {"kl_weight": -1.0}, {"kl_weight": 0.0, "tv_weight": 0.0}, {"steps": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            SlimTraining(**{**TRAINING, **change})


def test_what_belongs_to_a_saved_mask_is_not_overridden_in_silence(tmp_path):
    """Its units, and the cache mode that its figures were measured in."""
    model = families.build("Llama", num_hidden_layers=4)
    units = Units(model, "layer")
    save_slim(
        tmp_path, ViaSDConfig(), model, units, [True, False, True, True], {"agreement": 0.5, "slim_cache": "own"}
    )
    options = {"max_new_tokens": 8, "do_sample": False, "assistant_model": model, "return_dict_in_generate": True}
    ids = families.prompts()[0][:1]
    config = ViaSDConfig(adapter=str(tmp_path))
    for chosen, mode in ((config, "own"), (config.override(slim_cache="shared"), "shared")):
        out = model.generate(ids, assistant_strategy=chosen, **options)
        assert out.speculation.method["slim_cache"] == mode
    with pytest.raises(ValueError, match="granularity='sublayer'.*which is 'layer'"):
        model.generate(ids, assistant_strategy=config.override(granularity="sublayer"), **options)


def test_draft_stop_needs_an_assistant():
    model = families.build("Llama", num_hidden_layers=4)
    with pytest.raises(ValueError, match="draft_stop=0.5.*drafter='slim'"):
        ViaSDConfig(drafter="slim", draft_stop=0.5)
    with pytest.raises(ValueError, match="draft_stop=0.5.*'prompt_lookup'"):
        model.generate(
            families.prompts()[0][:1], assistant_strategy=ViaSDConfig(drafter="prompt_lookup", draft_stop=0.5)
        )
