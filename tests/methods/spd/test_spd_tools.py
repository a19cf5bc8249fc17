"""What surrounds SPD: the reference's checkpoints, the training command and its fills, and counting ticks."""

from __future__ import annotations

import json
import math

import families
import pytest
import torch
from typer.testing import CliRunner

from hf_specdec import SpeculationConfig
from hf_specdec.bench.ticks import TickReport, count_ticks
from hf_specdec.commands.main import app
from hf_specdec.generation.methods.spd.depth_map import DepthMap
from hf_specdec.generation.methods.spd.draft_module import PipelineDraftModule, load_draft_module
from hf_specdec.generation.methods.spd.method import SPDConfig
from hf_specdec.training.convert_spd import convert_reference
from hf_specdec.training.data import Text, save_texts
from hf_specdec.training.spd import ModuleTraining, _ModuleRun, train_draft_module


LAYERS = 4


@pytest.fixture(scope="module")
def model():
    return families.build("Llama", seed=1, num_hidden_layers=LAYERS).float()


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(0)
    return [Text(torch.randint(3, 64, (20 + i,), generator=generator), 5) for i in range(12)]


# the reference's files


def checkpoint(module, **changes):
    """Return a module as the reference implementation stores one."""
    names = {"feature_proj.": "aggr_projs.", "layers.": "spec_layers."}
    state = {}
    for name, value in module.named_parameters():
        prefix = next((old for old in names if name.startswith(old)), "")
        state[names.get(prefix, "") + name[len(prefix) :]] = value.detach().clone()
    config = {
        "version": 11,
        "num_stages": module.depths.stages,
        "aggr_feature_bound": module.depths.features,
        "num_spec_layers": len(module.layers),
        "draft_token_ids": module.reduced.ids.tolist(),
        "trained_with_use_deepest": True,
        "max_length": 128,
    }
    return {"state_dict": state, "config": {**config, **changes}}


@pytest.mark.parametrize("family", [None, "qwen3"])
def test_a_reference_checkpoint_guesses_the_same_after_conversion(model, family, tmp_path):
    torch.manual_seed(5)
    original = PipelineDraftModule(
        model, DepthMap(LAYERS, 2), [LAYERS - 1], torch.arange(0, 64, 3), 128, family
    ).bfloat16()
    torch.save(checkpoint(original), tmp_path / "spd.pt")
    convert_reference(tmp_path / "spd.pt", model, tmp_path / "out")
    loaded = load_draft_module(model, str(tmp_path / "out"))
    assert loaded.family == family and loaded.span == 128
    assert any("q_norm" in name for name, _ in loaded.named_parameters()) == (family == "qwen3")
    assert torch.equal(loaded.reduced.ids, original.reduced.ids)
    theirs = dict(original.named_parameters())
    assert all(torch.equal(value.bfloat16(), theirs[name]) for name, value in loaded.named_parameters())
    config = SpeculationConfig.from_pretrained(tmp_path / "out")
    ids, _ = families.prompts()
    kwargs = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids[:1], **kwargs, assistant_strategy=config), model.generate(ids[:1], **kwargs))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 10}, "version 10"),
        ({"trained_with_use_deepest": False}, "fill simulation"),
        ({"num_stages": 3}, "allowed: 1, 2, 4"),
        ({"num_spec_layers": 2}, "does not fit"),
    ],
)
def test_checkpoints_that_cannot_be_converted_say_why(model, changes, message, tmp_path):
    module = PipelineDraftModule(model, DepthMap(LAYERS, 2), [LAYERS - 1], torch.arange(0, 64, 3))
    torch.save(checkpoint(module, **changes), tmp_path / "spd.pt")
    with pytest.raises(ValueError, match=message):
        convert_reference(tmp_path / "spd.pt", model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_in_a_checkpoint_is_executed(model, tmp_path):
    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"state_dict": {}, "config": Runs()}, tmp_path / "spd.pt")
    with pytest.raises(Exception, match="[Ww]eights"):
        convert_reference(tmp_path / "spd.pt", model, tmp_path / "out")
    assert not (tmp_path / "executed").exists()


# training


@pytest.mark.parametrize("rate", [None, 0.5])
def test_fills_are_drawn_with_their_chances(model, texts, rate, tmp_path):
    settings = ModuleTraining(num_stages=4, num_draft_layers=1, vocabulary_size=None, fill_rate=rate)
    run = _ModuleRun(model, texts, tmp_path, settings, {}, lambda _: None)
    counts, draws = [0] * 4, 3000
    for step in range(draws):
        run.step = step
        counts[run.fill() - 1] += 1
    expected = [1 / 6, 1 / 6, 1 / 6, 1 / 2] if rate is None else [0.5, 0.25, 0.125, 0.125]
    for count, chance in zip(counts, expected, strict=True):
        assert abs(count - draws * chance) < 5 * math.sqrt(draws * chance * (1 - chance))


def test_a_module_begins_with_another_ones_layers(model, texts, tmp_path):
    first = ModuleTraining(num_stages=2, num_draft_layers=1, vocabulary_size=32, steps=3, max_length=24)
    train_draft_module(model, texts, tmp_path / "two", first)
    other = load_draft_module(model, str(tmp_path / "two"))
    settings = ModuleTraining(num_stages=4, start=str(tmp_path / "two"), vocabulary_size=32, max_length=24)
    run = _ModuleRun(model, texts, tmp_path / "four", settings, {}, lambda _: None)
    assert torch.equal(run.vocabulary, other.reduced.ids)
    assert run.module.templates == other.templates and run.module.depths.stages == 4
    for name, value in other.named_parameters():
        same = torch.equal(run.module.get_parameter(name).bfloat16(), value.bfloat16()) if name[0] == "l" else None
        assert same in (True, None), name
    again = ModuleTraining(num_stages=2, start=str(tmp_path / "two"), vocabulary_size=32, max_length=24)
    run = _ModuleRun(model, texts, tmp_path / "again", again, {}, lambda _: None)
    theirs = dict(other.named_parameters())
    assert all(torch.equal(p.bfloat16(), theirs[n].bfloat16()) for n, p in run.module.named_parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_stages": 1}, "num_stages"),
        ({"num_stages": 3}, "allowed: 1, 2, 4"),
        ({"num_stages": 2, "layout": "some"}, "exact, shared"),
        ({"num_stages": 2, "templates": (0, 1, 2)}, "templates"),
        ({"num_stages": 2, "templates": (0, 9)}, "templates"),
        ({"num_stages": 2, "feature_layers": (0, 4)}, "at most 3"),
        ({"num_stages": 2, "fill_rate": 1.0}, "fill_rate"),
    ],
)
def test_bad_training_settings_name_what_is_allowed(model, texts, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_draft_module(model, texts, tmp_path, ModuleTraining(**changes))


def test_commands_train_and_count(model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_specdec.commands.train.load_model", lambda *_: (model, None))
    monkeypatch.setattr("hf_specdec.commands.calibrate.load_model", lambda *_: (model, None))
    monkeypatch.setattr("hf_specdec.texts.chat_ids", lambda _, turns: [5, *map(ord, turns[0][:3]), 7])
    save_texts(texts, tmp_path / "texts.safetensors")
    arguments = ["train", "spd", "--data", str(tmp_path / "texts.safetensors"), "--stages", "2", "--draft-layers", "1"]
    arguments += ["--feature-layers", "0,2,3", "--vocabulary", "32", "--steps", "2", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "specdec_config.json").read_text())["adapter"]
    assert record["feature_layers"] == [0, 2, 3] and record["train_layout"] == "exact"
    assert {"agreement", "overlap", "after_rejection"} <= set(record["held_out"])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "   "}\n{"prompt": "!!!"}\n')
    arguments = ["calibrate", "spd", "--adapter", str(tmp_path / "out"), "--prompts", str(tmp_path / "prompts.jsonl")]
    result = CliRunner().invoke(app, [*arguments, "--new-tokens", "9", "--json", str(tmp_path / "ticks.json")])
    assert result.exit_code == 0, result.output
    greedy, sampled = json.loads((tmp_path / "ticks.json").read_text())["measurements"]
    assert (greedy["temperature"], sampled["temperature"]) == (0.0, 1.0)
    assert greedy["prompts"] == 2 and greedy["tokens"] == 18


# counting


def test_the_speed_up_is_a_mean_over_prompts_and_a_pooled_ratio(model):
    oracle = SPDConfig(adapter=families.ORACLE, schedule="serial")
    prompts = [families.prompts(seed=seed)[0][:1, :width] for seed, width in ((2, 19), (3, 5))]
    report = count_ticks(model, prompts, oracle, max_new_tokens=14)
    figures = report.figures()
    assert figures["prompts"] == 2 and figures["tokens"] == 28
    # K = (N - 1) + (n - 1)(1 + R); a rejection of the last token costs nothing more
    assert report.ticks in {26 + 2 + report.judged - report.accepted - late for late in (0, 1, 2)}
    assert figures["theoretical_pooled"] == pytest.approx(2 * 28 / report.ticks)
    assert figures["theoretical_mean"] == pytest.approx(sum(report.speedups) / 2)
    assert sum(report.judged_per_fill.values()) == report.judged
    with pytest.raises(ValueError, match="empty"):
        count_ticks(model, [], oracle)


def test_figures_without_a_draft_do_not_divide_by_zero():
    report = TickReport(0.0, num_stages=2, tokens=2, ticks=2, speedups=[2.0])
    assert report.figures()["acceptance"] == 0
