"""DIVERSED's acceptance rate, the ends of its scale and golden vectors."""

from __future__ import annotations

import math

import pytest
import torch
from diversed_cases import by_head, final, generate, greedy, mix, pair, prompt, random_head, settings, single_steps

from hf_specdec import AssistedConfig, DiversedConfig
from hf_specdec.generation import acceptance
from hf_specdec.generation.methods.diversed.method import DiversedStrategy


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
            text = state.text.by_column(state.text.columns[row])[row : row + 1]
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
