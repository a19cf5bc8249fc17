"""Training drafts: texts, batches, vocabularies, rewards, resumption and the commands."""

from __future__ import annotations

import json
import math

import pytest
import torch
from families import TINY
from training_cases import Letters, training_pair, weights_hash
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hf_specdec import AssistedConfig, DiversedConfig, load_draft
from hf_specdec.commands import main as cli
from hf_specdec.generation.models.draft_model import cut_draft, save_draft
from hf_specdec.training.data import Text, exclude, load_texts, save_texts, write_texts
from hf_specdec.training.distill import batches, frequent_words
from hf_specdec.training.draft import DraftTraining, train_draft
from hf_specdec.training.rewards import exact, numeric, resolve_reward, rouge2
from hf_specdec.training.tasks import interval


@pytest.fixture(scope="module")
def pair():
    return training_pair()


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
    kept = exclude(again, Letters(), ["4  5"])
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
