"""DIVERSED's greedy text, stock's ensemble beside it, its numbers, its stops and other drafters."""

from __future__ import annotations

import itertools
import math
from inspect import signature

import families
import pytest
import torch
import transformers.generation.utils as stock
from diversed_cases import Rounds, by_head, constant, final, generate, greedy, mix, pair, prompt, random_head, settings
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

import hf_specdec
from hf_specdec import DiversedConfig, VegasConfig
from hf_specdec.generation import acceptance
from hf_specdec.generation.methods.diversed.head import load_head


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
