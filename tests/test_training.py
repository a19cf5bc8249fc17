"""Training: gradients in closed form, the toy task that no fixed weight solves, resumption, rewards and data."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from families import build, perturbed
from test_trained_family import TINY
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hf_specdec import AssistedConfig, DiversedConfig, DiversedHead, load_draft
from hf_specdec.commands import main as cli
from hf_specdec.generation.models.draft_model import cut_draft, save_draft
from hf_specdec.training.data import Text, exclude, load_texts, save_texts, write_texts
from hf_specdec.training.distill import batches, frequent_words
from hf_specdec.training.diversed import (
    DiversedTraining,
    Rollout,
    leave_one_out,
    logit_gradient,
    replay,
    train_diversed,
    update,
)
from hf_specdec.training.draft import DraftTraining, train_draft
from hf_specdec.training.rewards import exact, numeric, resolve_reward, rouge2
from hf_specdec.training.tasks import Sampling, evaluate, interval


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


@pytest.fixture(scope="module")
def pair():
    target = build("Llama", num_hidden_layers=3).float()
    target.generation_config.eos_token_id = 7
    return target, perturbed(target, noise=0.3)


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


def weights_hash(model):
    state = hashlib.sha256()
    for name, value in model.state_dict().items():
        state.update(name.encode() + value.float().numpy().tobytes())
    return state.hexdigest()


class _Letters:
    """A tokenizer of numbers: enough for prompts and rewards."""

    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [int(part) for part in text.split()]}

    def decode(self, ids, **_):
        return " ".join(str(int(token)) for token in ids)


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
    found = train_diversed(target, draft, _Letters(), ITEMS, has_answer, tmp_path, SETTINGS)
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

    whole = train_diversed(target, draft, _Letters(), ITEMS, has_answer, tmp_path / "whole", SETTINGS)
    with pytest.raises(RuntimeError, match="KeyError.*item "):
        train_diversed(target, draft, _Letters(), ITEMS, failing, tmp_path / "part", SETTINGS)
    kept = json.loads((tmp_path / "part" / "checkpoint" / "progress.json").read_text())
    assert kept["found"] and len(kept["found"]) < len(whole)
    rest = train_diversed(target, draft, _Letters(), ITEMS, has_answer, tmp_path / "part", SETTINGS, resume=True)
    timeless = [{**entry, "held_out": {**entry["held_out"], "ms_per_token": 0}} for entry in whole]
    assert [{**entry, "held_out": {**entry["held_out"], "ms_per_token": 0}} for entry in rest] == timeless


def test_a_checkpoint_of_other_settings_is_refused(pair, tmp_path):
    target, draft = pair
    train_diversed(target, draft, _Letters(), ITEMS, has_answer, tmp_path, SETTINGS)
    other = DiversedTraining(**{**SETTINGS.__dict__, "samples": 3})
    with pytest.raises(ValueError, match="other settings"):
        train_diversed(target, draft, _Letters(), ITEMS, has_answer, tmp_path, other, resume=True)


@pytest.mark.parametrize(
    "change", [{"updates": 0}, {"samples": 1}, {"accept_coefs": ()}, {"sampling": Sampling(temperature=0)}]
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        DiversedTraining(**change)


def test_too_few_items_are_refused(pair, tmp_path):
    with pytest.raises(ValueError, match="at least 7, got 5"):
        train_diversed(*pair, _Letters(), ITEMS[:5], has_answer, tmp_path, SETTINGS)


def test_t_pair_a_score_has_reward_bias_and_cost(pair):
    target, draft = pair
    options = {"assistant_strategy": DiversedConfig(weight=0.5), "assistant_model": draft}
    score = evaluate("w", target, _Letters(), ITEMS, has_answer, Sampling(max_new_tokens=10), options, batch_size=8)
    assert score.items == 24 and 0 <= score.low <= score.reward <= score.high <= 1
    assert 0 < score.acceptance <= 1 and score.tokens_per_forward > 1 and score.ms_per_token > 0
    assert score.method["mean_bias"] == pytest.approx(0.5 * score.method["mean_tv"])


def test_intervals():
    low, high = interval([1.0] * 67 + [0.0] * 33)
    assert low == pytest.approx(0.573, abs=0.002) and high == pytest.approx(0.754, abs=0.002)
    low, high = interval([0.25, 0.5, 0.75] * 20)
    assert low == pytest.approx(0.5 - 1.96 * 0.2058 / 60**0.5, abs=1e-3) and high == pytest.approx(1 - low)


def test_rewards():
    assert numeric("She has 3 and then 1,204.", {"answer": 1204}) == 1
    assert numeric("It is 12.5.", {"answer": "12.5"}) == 1
    assert numeric("12 or 13", {"answer": 12}) == 0 and numeric("none", {"answer": 1}) == 0
    assert exact(" The  Cat. ", {"answer": "the cat"}) == 1 and exact("a cat", {"answer": "the cat"}) == 0
    assert rouge2("the cat sat down", {"answer": "the cat sat down"}) == 1
    assert 0 < rouge2("the cat sat up", {"answer": "the cat sat down"}) < 1
    assert resolve_reward("numeric") is numeric and resolve_reward("math:fabs") is math.fabs
    for name in ("nothing", "math:nothing", "no.such:module"):
        with pytest.raises(ValueError, match="reward"):
            resolve_reward(name)


def test_texts_survive_a_file_and_test_prompts_are_dropped(tmp_path):
    texts = [Text(torch.tensor([3, 4, 5, 6]), 2, 0.5), Text(torch.tensor([9, 8, 7]), 1, 1.0)]
    save_texts(texts, tmp_path / "a.safetensors")
    again = load_texts([tmp_path / "a.safetensors"])
    assert [(t.ids.tolist(), t.prompt_length, t.temperature) for t in again] == [
        ([3, 4, 5, 6], 2, 0.5),
        ([9, 8, 7], 1, 1),
    ]
    kept = exclude(again, _Letters(), ["4  5"])
    assert [t.ids.tolist() for t in kept] == [[9, 8, 7]]


def test_written_texts_are_answers_to_their_prompts(pair):
    target, _ = pair
    prompts = [[3, 4], [5, 6, 8], [9], [10, 11]]
    texts = write_texts(target, prompts, temperatures=(1.0, 0.5), max_new_tokens=5, batch_size=2)
    assert sorted(text.ids[: text.prompt_length].tolist() for text in texts) == sorted(prompts)
    assert {text.temperature for text in texts} == {1.0, 0.5}
    for text in texts:
        answer = text.ids[text.prompt_length :].tolist()
        assert 1 <= len(answer) <= 5 and (7 not in answer[:-1])


def test_batches_hold_every_text_once_and_fit():
    lengths = [5, 80, 33, 7, 61, 12, 40, 3]
    found = batches(lengths, 100, seed=1)
    assert sorted(index for part in found for index in part) == list(range(8))
    assert all(len(part) == 1 or len(part) * max(lengths[i] for i in part) <= 100 for part in found)
    assert found == batches(lengths, 100, seed=1) != batches(lengths, 100, seed=2)


def test_the_draft_vocabulary_is_what_answers_use():
    texts = [Text(torch.tensor([20, 3, 3, 4, 5, 5, 5]), 1)]
    ids, covered = frequent_words(texts, 3, always=[9])
    assert ids.tolist() == [3, 5, 9] and covered == pytest.approx(5 / 6)
    assert frequent_words(texts, 6)[0].tolist() == [3, 4, 5, 20]


@pytest.fixture(scope="module")
def corpus(pair):
    target, _ = pair
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(3, 30, (40, 6), generator=generator).tolist()
    return write_texts(target, prompts, temperatures=(0.5,), max_new_tokens=20, batch_size=40)


DRAFT = DraftTraining(layers=(0, 2), vocabulary_size=50, steps=60, batch_tokens=200, save_every=10, learning_rate=1e-2)


def test_a_draft_learns_its_target_and_resumes(pair, corpus, tmp_path):
    target, _ = pair
    before = weights_hash(target)
    untrained = train_draft(target, corpus, tmp_path / "none", DraftTraining(**{**DRAFT.__dict__, "steps": 1}))
    whole = train_draft(target, corpus, tmp_path / "whole", DRAFT)
    assert whole["overlap"] > untrained["overlap"] + 0.02
    assert weights_hash(target) == before
    steps = []

    def stop(figures):
        steps.append(figures["step"])
        if "loss" in figures and figures["step"] == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_draft(target, corpus, tmp_path / "part", DRAFT, report=stop)
    steps.clear()
    train_draft(target, corpus, tmp_path / "part", DRAFT, resume=True, report=lambda f: steps.append(f["step"]))
    assert steps[0] == 11
    first, second = (load_draft(target, str(tmp_path / name)) for name in ("whole", "part"))
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(first(ids).logits, second(ids).logits, atol=0.05, rtol=0.05)
    with pytest.raises(ValueError, match="other settings"):
        train_draft(target, corpus, tmp_path / "part", DraftTraining(**{**DRAFT.__dict__, "seed": 1}), resume=True)


@pytest.mark.parametrize("change", [{"steps": 0}, {"learning_rate": 0.0}, {"vocabulary_size": 0}, {"minutes": -1.0}])
def test_draft_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        DraftTraining(layers=(0,), **change)


def test_the_commands_train_and_evaluate(tmp_path):
    target, model = TINY / "target", ["--model", str(tmp_path / "target"), "--dtype", "float32"]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    (tmp_path / "target").mkdir()
    for path in target.iterdir():
        (tmp_path / "target" / path.name).write_bytes(path.read_bytes())
    tokenizer.save_pretrained(tmp_path / "target")
    lines = [{"question": f"def f{i}(x):", "answer": i} for i in range(12)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = CliRunner()

    def command(*parts):
        found = run.invoke(cli.app, [*map(str, parts), *model])
        assert found.exit_code == 0, (found.output, found.exception)
        return found.output

    items, texts, draft, scores = (tmp_path / name for name in ("items.jsonl", "t.safetensors", "draft", "s.json"))
    command("train", "text", "--prompts", items, "--out", texts, "--new-tokens", 8)
    command("train", "draft", "--data", texts, "--out", draft, "--layers", "0,1", "--vocabulary", 0, "--steps", 2)
    arms = ["--strategies", "plain assisted diversed@weight=0.5", "--assistant", draft]
    command("evaluate", "--items", items, *arms, "--new-tokens", 8, "--json", scores)
    assert [score["name"] for score in json.loads(scores.read_text())["measurements"]] == [
        "plain",
        "assisted",
        "diversed@weight=0.5",
    ]
    found = run.invoke(cli.app, ["evaluate", "--items", str(items), "--reward", "none", *model])
    assert isinstance(found.exception, ValueError)


def test_a_draft_for_diversed_can_be_named_in_its_settings(pair, tmp_path):
    target, _ = pair
    save_draft(cut_draft(target, [0, 1]), target, [0, 1], tmp_path, AssistedConfig(num_assistant_tokens=3))
    config = DiversedConfig(weight=1.0, drafter=AssistedConfig(adapter=str(tmp_path)))
    ids = torch.tensor([[3, 4, 5]])
    text = target.generate(ids, max_new_tokens=12, do_sample=False)
    assert target.generate(ids, max_new_tokens=12, do_sample=False, assistant_strategy=config).equal(text)
