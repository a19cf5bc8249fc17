"""What DIVERSED's tests share: pairs of models, heads, and the distribution of whole calls by exact enumeration.

`Paths` goes through every way in which a sampled call can go: each row of a batch follows a plan, one number per
random choice, and the probabilities of those choices multiply to the row's. What a call emits is thereby known
exactly, and is compared with a distribution that is worked out from cache-free forwards of both models.
"""

from __future__ import annotations

import functools
import itertools
import math

import families
import torch
from transformers import LogitsProcessorList

from hf_specdec import DiversedConfig, DiversedHead
from hf_specdec.generation import acceptance
from hf_specdec.generation.drafting import AssistantDrafter
from hf_specdec.generation.methods.diversed.method import DiversedStrategy


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


def inside_target(p, q, w):
    v = mix(p, q, w) * (p > 0)
    return v / v.sum() if v.any() else p  # no token that both allow, and no weight on the target


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


def settings(tokens=2, **changes):
    return DiversedConfig(num_assistant_tokens=tokens, **changes)


def single_steps(p, q, weight, rows=40_000, seed=3):
    """Return drafts, accepted counts and emitted tokens of independent single steps."""
    torch.manual_seed(seed)
    drafts, counts = torch.multinomial(q, rows, replacement=True)[:, None], torch.ones(rows, dtype=torch.int64)
    target, weights = torch.stack([p, p]).expand(rows, 2, -1), torch.full((rows, 1), weight)
    verdict = acceptance.speculative_sample(drafts, counts, target, q.expand(rows, 1, -1), weights)
    return drafts[:, 0], verdict.accepted, verdict.tokens[:, 0]


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
                    "text": state.text.tokens[row, : state.committed[slot]].clone(), "drafts": draft.tokens[slot],
                    "q": None if draft.distributions is None else draft.distributions[slot],
                    "logits": target.logits[slot],
                    "scores": result.scores[slot], "weights": self.weights[before:], "inputs": self.inputs[asked:],
                    "ahead": self.ahead[looked:],
                })  # fmt: skip
            return result

        monkeypatch.setattr(DiversedStrategy, "accept", noted_accept)
        monkeypatch.setattr(DiversedStrategy, "weights", noted_weights)
        monkeypatch.setattr(AssistantDrafter, "look_ahead", noted_look_ahead)
