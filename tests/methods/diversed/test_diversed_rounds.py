"""What DIVERSED's rounds see: hidden states, distributions, prefixes and caches against cache-free forwards."""

from __future__ import annotations

import families
import pytest
import torch
from diversed_cases import (
    Rounds,
    final,
    generate,
    inside_target,
    pair,
    prompt,
    random_head,
    settings,
    single_steps,
    table,
)
from tiers import tiered
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_specdec import DiversedConfig, DiversedHead
from hf_specdec.generation.methods.diversed.method import DiversedStrategy


WARPED = {"temperature": 0.7, "top_k": 4, "top_p": 0.9}
WARPERS = (TemperatureLogitsWarper(0.7), TopKLogitsWarper(4), TopPLogitsWarper(0.9))


@torch.no_grad()
def teacher_forced(model, text):
    """Return the LM head's inputs and the logits at every position of `text`, by one cache-free forward."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(text[None], use_cache=False).logits[0]
    handle.remove()
    return seen[0][0], logits


@pytest.mark.parametrize("name", tiered(["llama", "gemma3", "gpt2", "gpt_oss"]))
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
