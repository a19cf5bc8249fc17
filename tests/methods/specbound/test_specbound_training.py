"""Exit heads are distilled, saved and loaded; the calibrator's replay agrees with what the strategy then counts."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from families import TINY, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_specdec import SpecBoundConfig, unload
from hf_specdec.bench.ablations import specbound_arms
from hf_specdec.bench.calibrate_specbound import (
    Costs,
    Trace,
    calibrate_specbound,
    profile_specbound,
    replay,
    trace_exits,
)
from hf_specdec.bench.run import make_arm, measure
from hf_specdec.commands import main as cli
from hf_specdec.generation.methods.specbound.exit_heads import ExitHeads, load_exit_heads
from hf_specdec.training.data import write_texts
from hf_specdec.training.specbound import ExitTraining, train_exit_heads


@pytest.fixture(scope="module")
def target():
    return AutoModelForCausalLM.from_pretrained(TINY / "target", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def passages():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer((TINY / "heldout.txt").read_text(encoding="utf-8"), verbose=False)["input_ids"]
    return [ids[480 * place : 480 * place + 24] for place in range(44)]


@pytest.fixture(scope="module")
def corpus(target, passages):
    target.generation_config.eos_token_id = target.generation_config.eos_token_id or 0
    return write_texts(target, passages[:36], temperatures=(0.5,), max_new_tokens=48, batch_size=36)


SETTINGS = {"layers": (2, 4), "vocabulary_size": 300, "steps": 60, "batch_tokens": 512, "save_every": 20}


@pytest.fixture(scope="module")
def trained(target, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    train_exit_heads(target, corpus, folder, ExitTraining(kind="block", learning_rate=3e-3, **SETTINGS))
    return folder


@pytest.mark.parametrize(("kind", "rank"), [("adapter", None), ("adapter", 16), ("full", None), ("block", None)])
def test_heads_learn_the_models_distribution_and_leave_it_alone(target, corpus, tmp_path, kind, rank):
    before = {name: value.clone() for name, value in target.state_dict().items()}
    settings = ExitTraining(kind=kind, rank=rank, learning_rate=3e-3, **SETTINGS)
    losses = []

    def report(figures):
        if "loss" in figures:
            losses.append(figures["loss"])

    found = train_exit_heads(target, corpus, tmp_path, settings, report=report)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]), "the divergence falls"
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    record = json.loads((tmp_path / "specdec_config.json").read_text())["adapter"]
    assert record["held_out"] == found and record["training"]["steps_done"] == 60
    heads = load_exit_heads(target, str(tmp_path))
    assert heads.layers == [2, 4] and heads.kind == kind and heads.rank == rank


def test_training_raises_exits_and_acceptance(target, corpus, passages, trained, tmp_path):
    vocabulary = load_exit_heads(target, str(trained)).reduced.ids
    ExitHeads(target, [2, 4], "block", vocabulary).save(tmp_path, SpecBoundConfig(), target)
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    counted = []
    for folder in (tmp_path, trained):
        config = SpecBoundConfig(adapter=str(folder), tau=0.3, alpha=0.0)
        stats = [
            target.generate(torch.tensor([row]), assistant_strategy=config, **options).speculation
            for row in passages[36:40]
        ]
        counted.append(sum(found.num_accepted_tokens for found in stats))
    assert counted[1] > counted[0] + 10


def test_a_resumed_run_ends_where_the_whole_one_does(target, corpus, tmp_path):
    settings = ExitTraining(kind="adapter", learning_rate=3e-3, **SETTINGS)
    train_exit_heads(target, corpus, tmp_path / "whole", settings)

    def stop(figures):
        if figures.get("step") == 30 and "loss" in figures:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_exit_heads(target, corpus, tmp_path / "part", settings, report=stop)
    train_exit_heads(target, corpus, tmp_path / "part", settings, resume=True)
    whole, part = (load_exit_heads(target, str(tmp_path / name)).own.state_dict() for name in ("whole", "part"))
    for name, value in whole.items():
        torch.testing.assert_close(part[name], value, atol=1e-4, rtol=1e-2)
    unload(target)


@pytest.mark.parametrize(
    "change", [{"kind": "final"}, {"kind": "lora"}, {"layers": (9,)}, {"layers": (4, 2)}, {"rank": 0}, {"steps": 0}]
)
def test_settings_out_of_range_are_refused(target, corpus, tmp_path, change):
    with pytest.raises(ValueError, match=r"kind|layers|rank|steps"):
        train_exit_heads(target, corpus, tmp_path, ExitTraining(**{**SETTINGS, **change}))


def test_the_command_trains_and_its_folder_is_a_strategy(target, corpus, tmp_path, monkeypatch):
    from hf_specdec.training.data import save_texts

    save_texts(corpus, tmp_path / "texts.safetensors")
    out = tmp_path / "heads"
    arguments = ["train", "specbound", "--data", str(tmp_path / "texts.safetensors"), "--layers", "3", "--steps", "2"]
    arguments += ["--model", str(TINY / "target"), "--dtype", "float32", "--vocabulary", "100", "--out", str(out)]
    monkeypatch.setattr("hf_specdec.commands.console.load_model", None)
    found = CliRunner().invoke(cli.app, [*arguments, "--kind", "final"])
    assert found.exit_code != 0
    ids = torch.tensor([[5, 6, 7]])
    train_exit_heads(target, corpus, out, ExitTraining(layers=(3,), vocabulary_size=100, steps=2))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(target.generate(ids, assistant_strategy=str(out), **options), target.generate(ids, **options))


def test_heads_follow_a_model_that_was_cast_after_they_were_loaded(trained):
    model = AutoModelForCausalLM.from_pretrained(TINY / "target", dtype=torch.bfloat16).eval()
    config, ids = SpecBoundConfig(adapter=str(trained), tau=0.3), torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    model.generate(ids, assistant_strategy=config, **options)
    model.float()
    assert torch.equal(model.generate(ids, assistant_strategy=config, **options), model.generate(ids, **options))


def test_layer_calls_fall_where_the_middle_layers_have_converged():
    model = tiny_llama(num_hidden_layers=8, hidden_size=64, vocab_size=200)
    with torch.no_grad():
        model.lm_head.weight.mul_(60.0)
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
    ids = torch.randint(3, 200, (1, 12), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "eos_token_id": 999}
    config = SpecBoundConfig(exit_layers=[2], max_depth=2, tau=0.2)
    out = model.generate(ids, assistant_strategy=config, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, model.generate(ids, **options))
    assert len(out.sequences[0, 12:].unique()) > 4, "a text that repeats one token shows nothing"
    stats = out.speculation
    assert stats.method["layer_calls"] / sum(stats.accept_lengths[0]) < 0.7 * 8


# the calibrator


def test_a_replay_is_what_its_costs_say():
    costs = Costs(layer=[1.0, 1.5], head=[4.0, 5.0, 6.0], test=0.5, token=0.25, round=2.0, plain=14.0)
    # positions 0 to 5: an exit at 1, at 2 after a failed test, a wrong one at 1, none, an exit at 1, the end
    sure = {1: [0.9, 0.1, 0.9, 0.1, 0.9, 0.1], 2: [0.9, 0.9, 0.9, 0.1, 0.9, 0.1]}
    hits = {1: [True, False, False, False, True, False], 2: [True, True, True, True, True, True]}
    trace = Trace(
        {(depth, step): hits[depth] for depth in (1, 2) for step in (0, 1)},
        {(depth, step, 0.0): sure[depth] for depth in (1, 2) for step in (0, 1)},
    )
    found = replay([trace], [1, 2], 0.0, 0.5, 2, 8, costs)
    # round 1 drafts at 0 and 1, both right, and stops by width; round 2 begins at 3 and is difficult at once; round 3
    # drafts at 4, where one more token may follow: nothing wrong was drafted, so nothing is guessed at
    one = 2.0 + 3 * 0.25 + (0.5 + 1.0) + 6.0
    # token 0 leaves at 1; token 1 takes layer 1 alone, 2 with token 0; token 2 takes both alone, the others with all
    one += 1.0 + 1.0 + 1.5 + 1.0 + 1.0 + 6 * 1.5
    two = 2.0 + 0.25 + 1.0 + 4.0 + 8.0
    three = 2.0 + 2 * 0.25 + 0.5 + 5.0 + 1.0 + 1.0 + 7 * 1.5
    assert found.tokens_per_round == 6 / 3
    assert found.speedup == pytest.approx(6 * 14.0 / (one + two + three))
    assert found.exit_depth == pytest.approx(4 / 3) and found.acceptance == 1.0


def test_predictions_are_within_a_fifth_of_the_counters(target, passages, trained):
    heads = load_exit_heads(target, str(trained))
    depth, costs = 8, Costs([1.0], [2.0], 0.5, 0.1, 0.5, 10.5)
    config = SpecBoundConfig(adapter=str(trained), tau=0.4, alpha=0.3, num_assistant_tokens=4, max_depth=4)
    options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    traces, calls, tests, pushed, rounds, tokens = [], 0, 0, 0, 0, 0
    for place, row in enumerate(passages[36:44]):
        ids = torch.tensor([row])
        if place < 4:  # predicted from these
            text = target.generate(ids, assistant_strategy="plain", **options)
            traces.append(trace_exits(target, heads, text, ids.shape[1]))
            continue
        out = target.generate(ids, assistant_strategy=config, return_dict_in_generate=True, **options)
        stats = out.speculation  # and held against these
        calls, tests = calls + stats.method["layer_calls"], tests + stats.method["tests"]
        pushed += stats.method["token_layers"] // depth
        rounds += sum(map(len, stats.accept_lengths))
        tokens += sum(map(sum, stats.accept_lengths))
    spent = calls * 1.0 + tests * 0.5 + pushed * 0.1 + rounds * 2.5
    counted = tokens * costs.plain / spent
    predicted = replay(traces, [2, 4], 0.3, 0.4, 4, depth, costs)
    assert predicted.speedup == pytest.approx(counted, rel=0.2)
    assert predicted.tokens_per_round == pytest.approx(tokens / rounds, rel=0.2)


def test_profile_and_calibration_run_and_choose_from_the_grid(target, passages, trained):
    heads = load_exit_heads(target, str(trained))
    prompts = [torch.tensor([row]) for row in passages[36:39]]
    costs = profile_specbound(target, heads, prompts[0], width=2, repeats=2)
    assert len(costs.layer) == len(costs.head) == 3 and min(*costs.layer, *costs.head, costs.test, costs.token) > 0
    config = SpecBoundConfig(adapter=str(trained))
    chosen, predicted, costs = calibrate_specbound(target, config, prompts, new_tokens=12, repeats=1)
    assert chosen.adapter == str(trained) and set(chosen.exit_layers) <= {2, 4}
    assert chosen.max_depth == chosen.exit_layers[-1] and predicted.speedup > 0 and costs.plain > 0
    with pytest.raises(ValueError, match="prompts"):
        calibrate_specbound(target, config, [])


def test_the_ablations_leave_out_one_part_each(target, trained):
    ids = torch.randint(3, 100, (1, 20), generator=torch.Generator().manual_seed(0))
    arms = specbound_arms(target, str(trained))
    names = [arm.name for arm in arms]
    assert names == [
        "complete", "without annealing", "without depth bound", "without width bound", "exit 2 only",
        "exit 4 only", "stock_early_exit@layer=2", "stock_early_exit@layer=4",
    ]  # fmt: skip
    for m in measure(target, ids, [make_arm("default", None), *arms], 8, 1):
        assert m.same_tokens == 1.0, m.name
    with pytest.raises(ValueError, match="vegas"):
        specbound_arms(target, "vegas")


def test_arms_of_stock_early_exit_need_their_layer():
    assert make_arm("stock_early_exit@layer=3", None).options == {"assistant_early_exit": 3}
    arm = make_arm("specbound@exit_layers=[1;2],max_depth=3", None)
    assert arm.fresh and arm.options["assistant_strategy"].exit_layers == [1, 2]
    with pytest.raises(ValueError, match="layer=3"):
        make_arm("stock_early_exit", None)


def test_calibrated_settings_can_be_written_into_the_adapter(target, trained, tmp_path):
    import shutil

    from hf_specdec import SpeculationConfig, VegasConfig
    from hf_specdec.generation.models.adapters import write_config

    folder = tmp_path / "heads"
    shutil.copytree(trained, folder)
    write_config(folder, SpecBoundConfig(tau=0.35, exit_layers=[2], max_depth=2))
    loaded = SpeculationConfig.from_pretrained(folder)
    assert loaded == SpecBoundConfig(tau=0.35, exit_layers=[2], max_depth=2, adapter=str(folder))
    assert load_exit_heads(target, str(folder)).layers == [2, 4]
    with pytest.raises(ValueError, match="vegas"):
        write_config(folder, VegasConfig())
    write_config(tmp_path / "new", VegasConfig())
    assert SpeculationConfig.from_pretrained(tmp_path / "new") == VegasConfig()


def test_the_command_calibrates_and_refuses(monkeypatch, tmp_path):
    for arguments in (
        ["calibrate", "vegas", "--adapter", "x"],
        ["calibrate", "vegas", "--limit", "3"],
        ["calibrate", "specbound", "--context", "512"],
        ["calibrate", "specbound", "--prompts", str(tmp_path / "nowhere.jsonl")],
        ["calibrate", "specbound", "--adapter", str(tmp_path / "nowhere")],
        ["bench", "--ablate", "vegas"],
    ):
        monkeypatch.setattr("hf_specdec.commands.calibrate.load_model", lambda *_: (tiny_llama().float(), None))
        monkeypatch.setattr("hf_specdec.texts.long_prompt", lambda *_: [3, 4, 5])
        monkeypatch.setattr(sys, "argv", ["hf-specdec", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
