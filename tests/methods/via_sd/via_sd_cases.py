"""What VIA-SD's tests share: a small pair of models, settings, and a reference of the method without caches.

`Reference` decodes without any cache: it knows the drafter's, the slim verifier's and the model's distribution after
every prefix, the slim one built here by replacing modules of a copy. `Reference.lossy` gives the distribution of a
whole lossy call, with the tier of every token; greedy distributions are points, so the same function says what a
greedy call must return.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from contextlib import contextmanager

import families
import pytest
import torch
from scipy import stats
from transformers import DynamicCache, LogitsProcessorList

from hf_specdec import ViaSDConfig, on_speculation
from hf_specdec.generation.models.surgery import decoder_layers
from hf_specdec.generation.runner import ModelRunner


ALARM = 1e-4
LAYERS, SKIP = 6, (2, 3)
RULES = ("exact", "gate", "prefilter")
OFF = {"regen_min_conf": 0.0, "bonus_min_conf": 0.0, "max_pending": None, "eos_guard": False}
BARE = {**OFF, "bonus_min_conf": None}
MIXED = {**OFF, "tau_accept": 0.7, "tau_escalate": 0.2, "bonus_min_conf": 0.12}  # all tiers come up


def kept(skip=SKIP, units=LAYERS):
    return [unit not in skip for unit in range(units)]


def mask(skip=SKIP, units=LAYERS, granularity="layer"):
    """Return the name of a mask that lacks some units."""
    return families.mask(kept(skip, units), granularity)


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


def lossy(**changes):
    """Return settings of the lossy mode with a mask that nobody has measured."""
    changes = {"num_assistant_tokens": 3, "adapter": mask(), **changes}
    return ViaSDConfig(mode="lossy", force=True, **changes)


def lossless(**changes):
    """Return settings of the lossless mode whose stages do not end at once on flat distributions."""
    changes = {"num_assistant_tokens": 3, "adapter": mask(), "stage_stop_conf": 0.0, "stage_len": 5, **changes}
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
        accept, escalate = (math.inf if tau is None else tau for tau in (config.tau_accept, config.tau_escalate))
        if ratio >= accept:
            return "A"
        return "B" if ratio >= escalate and self._enough(config, sure) else "C"

    @staticmethod
    def _enough(config, sure):
        return config.regen_min_conf is not None and sure >= config.regen_min_conf

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
                writes = config.bonus_min_conf is not None and sure >= config.bonus_min_conf
                if config.eos_guard and best in eos:
                    writes = writes and self._enough(config, sure)
                if writes:
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


# the distribution of sampled calls: tiny vocabulary, exact distribution of every (tokens, tiers) from the reference


VOCAB, LENGTH, PER_CALL, CALLS = 4, 4, 250, 8


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


_texts = {}


def stock(model, ids, attention, **kwargs):
    key = (id(model), tuple(ids.flatten().tolist()), *sorted(kwargs.items()))
    if key not in _texts:
        _texts[key] = model.generate(
            ids, attention_mask=attention, do_sample=False, **{"max_new_tokens": 40, **kwargs}
        )
    return _texts[key]


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

        def forward(runner, tokens, starts, *request):
            out = original(runner, tokens, starts, *request)
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


def refused(pair, prompt, config, match, error=ValueError):
    """Check that a call is refused before any forward."""
    spy = Spy(*pair)
    with spy(), pytest.raises(error, match=match):
        generate(pair, prompt, config, max_new_tokens=8)
    assert not spy.calls
