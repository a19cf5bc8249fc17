"""Training DIVERSED's head: gradients in closed form, the toy task that no fixed weight solves, and resumption."""

from __future__ import annotations

import json
import math

import pytest
import torch
from training_cases import Letters, training_pair, weights_hash

from hf_specdec import DiversedConfig, DiversedHead
from hf_specdec.training.diversed import (
    DiversedTraining,
    Rollout,
    leave_one_out,
    logit_gradient,
    replay,
    train_diversed,
    update,
)
from hf_specdec.training.tasks import Sampling, evaluate


@pytest.fixture(scope="module")
def pair():
    return training_pair()


def rollout_of(p, q, features, tokens, rewards, row):
    """Return a rollout of tokens `[N]` drawn somewhere from distributions `[N, V]`."""
    pick = tokens[:, None]
    tv = (p - q).abs().sum(-1) / 2
    return Rollout(features, p.gather(1, pick)[:, 0], q.gather(1, pick)[:, 0], tv, row, rewards)


@pytest.fixture
def distributions():
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(12, 6, generator=generator, dtype=torch.float64).softmax(-1) ** 2 for _ in range(2)]


def test_t_grad_the_closed_form_is_autograd(distributions):
    p, q = [distribution / distribution.sum(-1, keepdim=True) for distribution in distributions]
    generator = torch.Generator().manual_seed(4)
    tokens, row = torch.randint(0, 6, (12,), generator=generator), torch.arange(12) // 4
    advantage = torch.tensor([0.7, -0.4, 0.1], dtype=torch.float64)
    logit = torch.randn(12, generator=generator, dtype=torch.float64, requires_grad=True)
    found = rollout_of(p, q, torch.zeros(12, 2), tokens, advantage, row)
    w = torch.sigmoid(logit)
    v = w[:, None] * p + (1 - w[:, None]) * q
    acceptance = torch.minimum(v, q).sum(-1)
    log_v = v.gather(1, tokens[:, None])[:, 0].log()
    loss = -(advantage[row] * log_v).sum() / 3 - 0.05 * acceptance.sum() / 3
    (expected,) = torch.autograd.grad(loss, logit)
    torch.testing.assert_close(logit_gradient(logit.detach(), found, advantage, 0.05), expected, atol=1e-12, rtol=1e-8)


def test_t_reg_the_regulariser_alone_raises_acceptance(distributions):
    p, q = [distribution / distribution.sum(-1, keepdim=True) for distribution in distributions]
    head = DiversedHead(1, 1)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    found = rollout_of(p.float(), q.float(), torch.randn(12, 2), torch.zeros(12, dtype=torch.long), torch.zeros(3),
                       torch.arange(12) // 4)  # fmt: skip
    before = update(head, optimizer, found, torch.zeros(3), 1.0)["acceptance"]
    after = update(head, optimizer, found, torch.zeros(3), 1.0)["acceptance"]
    assert after > before


def test_the_baseline_of_an_answer_does_not_see_its_own_reward():
    found = leave_one_out(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), 3)
    assert found.tolist() == [1.0, -0.5, -0.5, 0.0, 0.0, 0.0]


def toy(generator, sequences):
    """Return (p, q, features, critical) of positions `[sequences * 8]`: 40 % need the gold token 0."""
    count = sequences * 8
    critical = torch.rand(count, generator=generator) < 0.4
    p, q = ((2 * torch.randn(count, 6, generator=generator)).softmax(-1) for _ in range(2))
    p[critical], q[critical] = 0.03 / 5, 0.6 / 5
    p[critical, 0], q[critical, 0] = 0.97, 0.4
    features = 0.5 * torch.randn(count, 8, generator=generator)
    features[:, 0] += torch.where(critical, 1.0, -1.0)
    return p, q, features, critical


def test_t_toy_the_head_beats_every_fixed_weight():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    head = DiversedHead(4, 4)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    row = torch.arange(64 * 8) // 8
    for _ in range(300):
        p, q, features, critical = toy(generator, 64)
        w = torch.sigmoid(head.logit(features)).detach()[:, None]
        tokens = torch.multinomial(w * p + (1 - w) * q, 1, generator=generator)[:, 0]
        rewards = ((tokens == 0) | ~critical).view(64, 8).all(dim=1).float()
        update(head, optimizer, rollout_of(p, q, features, tokens, rewards, row), leave_one_out(rewards, 64), 0.05)
    p, q, features, critical = toy(generator, 4000)
    w, tv = torch.sigmoid(head.logit(features)).detach(), (p - q).abs().sum(-1) / 2
    gold = torch.where(critical, w * p[:, 0] + (1 - w) * q[:, 0], torch.ones_like(w))
    reward, acceptance = gold.view(-1, 8).prod(dim=1).mean(), (1 - w * tv).mean()
    assert reward >= 0.85 and acceptance >= 0.62
    # what a fixed weight that accepts as much would earn
    fixed = float((1 - acceptance) / tv.mean())
    assert (0.76 + 0.228 * fixed) ** 8 < 0.5
    assert w.std() > 0.05 and w[critical].mean() > w[~critical].mean() + 0.5  # T-DYN
    torch.testing.assert_close(((w + (1 - w)) * tv).mean(), (1 - acceptance) + ((1 - w) * tv).mean())


def test_t_pad_a_replay_of_one_answer_is_that_of_a_batch_and_its_distributions_are_the_models(pair):
    target, draft = pair
    head = DiversedHead(target.config.hidden_size, target.config.hidden_size, input_norm="rms")
    prompts, written = [[3, 4, 5], [6, 8, 9, 10, 11], [12, 3]], [[5, 6, 7], [9, 7], [4, 4, 4, 4, 4, 7]]
    sampling, rewards = Sampling(temperature=0.7, top_k=5), torch.tensor([1.0, 0.0, 1.0])
    whole = replay(head, target, draft, prompts, written, sampling, rewards)
    assert whole.row.tolist() == [0] * 3 + [1] * 2 + [2] * 6  # the end token counts
    for i in range(3):
        part = slice(i, i + 1)
        alone = replay(head, target, draft, prompts[part], written[part], sampling, rewards[part])
        for name in ("features", "p", "q", "tv"):
            torch.testing.assert_close(
                getattr(alone, name), getattr(whole, name)[whole.row == i], atol=1e-3, rtol=1e-3
            )
    ids = torch.tensor([prompts[1] + written[1]])
    distributions = []
    for model in (target, draft):
        with torch.no_grad():
            logits = model(ids).logits[0, 4:6] / 0.7
        logits[logits < logits.topk(5).values[:, -1:]] = -math.inf
        distributions.append(logits.softmax(-1))
    picked = [distribution.gather(1, torch.tensor(written[1])[:, None])[:, 0] for distribution in distributions]
    mine = whole.row == 1
    torch.testing.assert_close(whole.p[mine], picked[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whole.q[mine], picked[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        whole.tv[mine], (distributions[0] - distributions[1]).abs().sum(-1) / 2, atol=1e-5, rtol=1e-4
    )


ITEMS = [{"question": f"{3 + i % 9} {4 + i % 7} 5", "answer": 5 + i % 3} for i in range(24)]
SETTINGS = DiversedTraining(
    accept_coefs=(0.05, 0.2),
    updates=4,
    prompts_per_update=3,
    samples=2,
    sampling=Sampling(temperature=1.0, max_new_tokens=6),
    num_assistant_tokens=2,
    evaluate_every=2,
    held_out=4,
)


def has_answer(text, item):
    return float(str(item["answer"]) in text.split())


def test_a_head_is_trained_saved_and_the_models_stay_as_they_are(pair, tmp_path):
    target, draft = pair
    before = [weights_hash(model) for model in pair]
    found = train_diversed(target, draft, Letters(), ITEMS, has_answer, tmp_path, SETTINGS)
    assert [(entry["accept_coef"], entry["update"]) for entry in found] == [(0.05, 2), (0.05, 4), (0.2, 2), (0.2, 4)]
    assert [weights_hash(model) for model in pair] == before  # T-GRAD
    assert all(parameter.grad is None for model in pair for parameter in model.parameters())
    options = {"assistant_model": draft, "max_new_tokens": 8, "do_sample": True, "return_dict_in_generate": True}
    out = target.generate(torch.tensor([[3, 4, 5]]), assistant_strategy=str(tmp_path), **options)
    assert out.speculation.method["mean_weight"] != 0.5
    record = json.loads((tmp_path / "specdec_config.json").read_text())["adapter"]
    assert record["train"]["temperature"] == 1.0 and "reward" in record["train"]["held_out"]


def test_training_resumes_where_it_stopped(pair, tmp_path):
    target, draft = pair
    calls = []

    def failing(text, item):
        calls.append(item)
        if len(calls) == 42:
            raise KeyError("broken")
        return has_answer(text, item)

    whole = train_diversed(target, draft, Letters(), ITEMS, has_answer, tmp_path / "whole", SETTINGS)
    with pytest.raises(RuntimeError, match="KeyError.*item "):
        train_diversed(target, draft, Letters(), ITEMS, failing, tmp_path / "part", SETTINGS)
    kept = json.loads((tmp_path / "part" / "checkpoint" / "progress.json").read_text())
    assert kept["found"] and len(kept["found"]) < len(whole)
    rest = train_diversed(target, draft, Letters(), ITEMS, has_answer, tmp_path / "part", SETTINGS, resume=True)
    timeless = [{**entry, "held_out": {**entry["held_out"], "ms_per_token": 0}} for entry in whole]
    assert [{**entry, "held_out": {**entry["held_out"], "ms_per_token": 0}} for entry in rest] == timeless


def test_a_checkpoint_of_other_settings_is_refused(pair, tmp_path):
    target, draft = pair
    train_diversed(target, draft, Letters(), ITEMS, has_answer, tmp_path, SETTINGS)
    other = DiversedTraining(**{**SETTINGS.__dict__, "samples": 3})
    with pytest.raises(ValueError, match="other settings"):
        train_diversed(target, draft, Letters(), ITEMS, has_answer, tmp_path, other, resume=True)


@pytest.mark.parametrize(
    "change", [{"updates": 0}, {"samples": 1}, {"accept_coefs": ()}, {"sampling": Sampling(temperature=0)}]
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        DiversedTraining(**change)


def test_too_few_items_are_refused(pair, tmp_path):
    with pytest.raises(ValueError, match="at least 7, got 5"):
        train_diversed(*pair, Letters(), ITEMS[:5], has_answer, tmp_path, SETTINGS)


def test_t_pair_a_score_has_reward_bias_and_cost(pair):
    target, draft = pair
    options = {"assistant_strategy": DiversedConfig(weight=0.5), "assistant_model": draft}
    score = evaluate("w", target, Letters(), ITEMS, has_answer, Sampling(max_new_tokens=10), options, batch_size=8)
    assert score.items == 24 and 0 <= score.low <= score.reward <= score.high <= 1
    assert 0 < score.acceptance <= 1 and score.tokens_per_forward > 1 and score.ms_per_token > 0
    assert score.method["mean_bias"] == pytest.approx(0.5 * score.method["mean_tv"])
