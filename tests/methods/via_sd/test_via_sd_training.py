"""The search for VIA-SD's mask, and the training of its LoRA."""

from __future__ import annotations

import json
import math

import families
import pytest
import torch
from safetensors.torch import load_file
from via_sd_cases import generate, kept, refused, slim_logits, stock, weaken, without

from hf_specdec import ViaSDConfig
from hf_specdec.generation.methods.via_sd.slim_model import Units, load_slim, mask_hash, save_slim
from hf_specdec.training.data import Text
from hf_specdec.training.routing import MaskSearch, search_mask
from hf_specdec.training.scoring import SlimScorer, costs, margin_cost
from hf_specdec.training.via_sd import SlimTraining, train_slim


# the search


def words(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_the_margin_cost_by_its_definition():
    q = words([0.5, 0.3, 0.2])
    assert float(margin_cost(q, q)) == 0.0
    # mild mismatch costs nothing, though the distributions differ
    tempered = q.pow(0.8) / q.pow(0.8).sum()
    assert float(margin_cost(q, tempered)) == 0.0 and float((q - tempered).abs().sum()) > 0.04
    moved = words([0.05, 0.25, 0.7])  # 3.5 times q on the last word
    expected = sum(
        float(p) * max(0.0, math.log(0.5) + math.log(p / w)) + float(w) * max(0.0, math.log(0.5) + math.log(p / w))
        for p, w in zip(moved[0].tolist(), q[0].tolist(), strict=True)
    )
    assert expected > 0.3
    assert float(margin_cost(q, moved)) == pytest.approx(expected)
    assert float(margin_cost(moved, q)) != pytest.approx(expected)  # not symmetric
    # alpha and beta stand at the places that they have in the definition
    for alpha, beta in ((0.2, 0.9), (0.5, 0.8)):
        expected = sum(
            a * max(0.0, math.log(1 - alpha) + math.log(a / b)) + b * max(0.0, math.log(beta) + math.log(a / b))
            for a, b in zip(moved[0].tolist(), q[0].tolist(), strict=True)
        )
        assert float(margin_cost(q, moved, alpha, beta)) == pytest.approx(expected)


def test_costs_are_means_of_their_definitions():
    generator = torch.Generator().manual_seed(0)
    theirs, mine = (2 * torch.randn(7, 9, generator=generator) for _ in range(2))
    q, p = theirs.double().softmax(-1), mine.double().softmax(-1)
    found = costs(theirs, mine)
    assert found["tv"] == pytest.approx(float((q - p).abs().sum(-1).mean() / 2), rel=1e-5)
    assert found["kl"] == pytest.approx(float((q * (q / p).log()).sum(-1).mean()), rel=1e-5)
    assert found["margin"] == pytest.approx(float(margin_cost(q, p).mean()), rel=1e-5)
    assert found["top1"] == pytest.approx(float((q.argmax(-1) != p.argmax(-1)).double().mean()))
    assert costs(theirs, theirs) == pytest.approx({"tv": 0, "kl": 0, "margin": 0, "top1": 0}, abs=1e-6)


def planted(layers=8, weak=(3, 5), scale=1e-3, seed=3):
    return weaken(families.build("Llama", seed=seed, num_hidden_layers=layers).float(), weak, scale)


def some_texts(model, count=6, new=20):
    ids = families.prompts((8,) * count, seed=5)[0]
    out = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=new, attention_mask=torch.ones_like(ids))
    return [Text(row, 8) for row in out]


@pytest.mark.parametrize("objective", ["tv", "kl", "margin", "top1"])
@pytest.mark.parametrize("cache", ["shared", "own"])
def test_the_search_finds_layers_that_do_nothing(tmp_path, objective, cache):
    model = planted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    units = Units(model, "layer")
    scorer = SlimScorer(model, some_texts(model), units, 16, cache)
    settings = MaskSearch(
        skip_ratio=0.25, objective=objective, slim_cache=cache, window=16, max_steps=30, stop_agreement=1.0
    )
    best = search_mask(scorer, settings, tmp_path)
    assert units.skipped(best) == [3, 5]
    report, even = scorer.report(best), scorer.report(tuple(units.even(0.25)))
    assert report["agreement"] > 0.9 > even["agreement"] and report["tv"] < 0.02 < even["tv"]
    assert report["tokens"] == 6 * 16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("cache", ["shared", "own"])
def test_scores_are_those_of_the_cache_mode(cache):
    """Shared: blocks are read over the whole model's states of all that comes before."""
    model = planted(6, (2,), 0.3).double()
    units, texts = Units(model, "layer"), some_texts(model, 2)
    keep = kept((2, 3))
    scorer, slim = SlimScorer(model, texts, units, 20, cache), without(model, (2, 3))
    for index, text in enumerate(texts):
        ids, mine = text.ids[None], []
        with torch.no_grad():
            q = model(ids[:, :-1]).logits[0, 7:]
            if cache == "own":
                mine = slim(ids[:, :-1]).logits[0, 7:]
            else:
                parts = [slim_logits(model, slim, ids[:, : min(begin + 8, 27)], begin)[0] for begin in range(7, 27, 8)]
                mine = torch.cat(parts)
        assert scorer(tuple(keep), index) == pytest.approx(costs(q, mine), rel=1e-4, abs=1e-6)


def test_an_interrupted_search_ends_where_the_whole_one_does(tmp_path):
    model = planted(12, (3, 5, 8), 0.5)
    units = Units(model, "layer")
    scorer = SlimScorer(model, some_texts(model, 4, 16), units, 16, "own")
    settings = MaskSearch(
        skip_ratio=0.35, slim_cache="own", window=16, max_steps=45, theta=5, mini_batch=2, stop_agreement=1.0
    )
    whole = search_mask(scorer, settings, tmp_path / "whole")

    def stop(figures):
        if figures["step"] == 33:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_mask(scorer, settings, tmp_path / "part", report=stop)
    assert search_mask(scorer, settings, tmp_path / "part", resume=True) == whole
    noted = [json.loads((tmp_path / name / "search.json").read_text()) for name in ("whole", "part")]
    for state in noted:
        state.pop("seconds")
    assert noted[0]["costs"] == noted[1]["costs"] and noted[0] == noted[1]
    with pytest.raises(ValueError, match="other settings"):
        search_mask(scorer, MaskSearch(window=16, objective="kl"), tmp_path / "part", resume=True)
    with pytest.raises(FileNotFoundError):
        search_mask(scorer, settings, tmp_path / "nothing", resume=True)


def test_a_search_over_few_masks_ends(tmp_path):
    """Every mask of a small model is known after a while; the search must not go on proposing them."""
    model = planted(5, (2,), 0.5)
    units = Units(model, "layer")
    scorer = SlimScorer(model, some_texts(model, 2, 16), units, 16, "own")
    settings = MaskSearch(skip_ratio=0.2, slim_cache="own", window=16, stop_agreement=1.0, minutes=0.3)
    steps = []
    best = search_mask(scorer, settings, tmp_path, report=lambda figures: steps.append(figures["step"]))
    assert units.skipped(best) == [2] and len(steps) == 3
    assert json.loads((tmp_path / "search.json").read_text())["seconds"] < 10, "not by the clock"


@pytest.mark.parametrize(
    "change",
    [
        {"skip_ratio": 0.9}, {"objective": "tvd"}, {"slim_cache": "mine"}, {"beta": 0.3}, {"alpha": 1.0}, {"theta": 1},
        {"window": 8}, {"max_steps": 0}, {"patience": 0}, {"minutes": 0.0}, {"skip_budget_by": "bytes"},
    ],
)  # fmt: skip
def test_bad_search_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        MaskSearch(**change)


# training


TRAINING = {
    "steps": 24,
    "batch_tokens": 256,
    "save_every": 8,
    "vocabulary_size": None,
    "learning_rate": 2e-2,
    "rank": 4,
}


@pytest.fixture(scope="module")
def learner():
    """A model, texts of it and a mask that costs it something."""
    torch.manual_seed(0)
    model = weaken(families.build("Llama", num_hidden_layers=5).float(), (2, 3), 0.3)
    return model, some_texts(model, 24, 24)


@pytest.fixture(scope="module")
def masked(learner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mask")
    save_slim(folder, learner[0], kept((2, 3), 5), calibration={"agreement": 0.5})
    return folder


@pytest.mark.parametrize(
    "weights", [{}, {"kl_weight": 0.0, "tv_weight": 1.0}, {"tv_weight": 0.0, "margin_weight": 0.5}]
)
def test_a_lora_learns_the_models_distribution_and_leaves_it_alone(learner, masked, tmp_path, weights):
    model, texts = learner
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    found = train_slim(
        model, texts, masked, tmp_path, SlimTraining(**TRAINING, **weights),
        report=lambda figures: losses.append(figures["loss"]) if "loss" in figures else None,
    )  # fmt: skip
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert found["tv"] < found["before"]["tv"] and found["kl"] < found["before"]["kl"]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {file.name for file in (tmp_path / "via_sd_slim").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    record = json.loads((tmp_path / "specdec_config.json").read_text())["adapter"]
    assert record["lora"]["trained_cache_mode"] == "own" and record["keep_mask"] == kept((2, 3), 5)
    assert record["lora"]["mask_hash"] == mask_hash(kept((2, 3), 5), "layer")
    assert record["calibration"]["agreement"] == pytest.approx(found["agreement"])
    names = load_file(tmp_path / "via_sd_slim" / "adapter_model.safetensors")
    assert {name.split(".layers.")[1].split(".")[0] for name in names} == {"0", "1", "4"}
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in names)
    # what was saved is what was measured
    slim = load_slim(model, str(tmp_path))
    scorer = SlimScorer(model, texts[::24], Units(model, "layer"), 512, "own")
    assert scorer.report(tuple(slim.keep), slim.terms)["tv"] == pytest.approx(found["tv"], abs=0.01)
    ids = texts[0].ids[None, :8]
    config = ViaSDConfig(adapter=str(tmp_path), stage_stop_conf=0.0)
    assert torch.equal(
        generate((model, model), ids, config, max_new_tokens=20),
        stock(model, ids, torch.ones_like(ids), max_new_tokens=20),
    )
    refused((model, model), ids, config.override(slim_cache="shared"), "shared")


def test_resumed_training_ends_where_the_whole_one_does(learner, masked, tmp_path):
    model, texts = learner
    settings = SlimTraining(**TRAINING)
    whole = train_slim(model, texts, masked, tmp_path / "whole", settings)

    def stop(figures):
        if figures.get("step") == 13 and "loss" in figures:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_slim(model, texts, masked, tmp_path / "part", settings, report=stop)
    part = train_slim(model, texts, masked, tmp_path / "part", settings, resume=True)
    assert part["tv"] == pytest.approx(whole["tv"], abs=2e-3)
    one, other = (
        load_file(tmp_path / name / "via_sd_slim" / "adapter_model.safetensors") for name in ("whole", "part")
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-2, rtol=5e-2)
    with pytest.raises(ValueError, match="other settings"):
        train_slim(model, texts, masked, tmp_path / "part", SlimTraining(**{**TRAINING, "rank": 8}), resume=True)


def test_training_takes_the_mask_of_its_own_model_only(learner, masked, tmp_path):
    model, texts = learner
    other = families.build("Llama", seed=78, num_hidden_layers=5).float()
    with pytest.raises(ValueError, match="another"):
        train_slim(other, texts, masked, tmp_path, SlimTraining(**TRAINING))
    for change in ({"rank": 0}, {"kl_weight": -1.0}, {"kl_weight": 0.0, "tv_weight": 0.0}, {"steps": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            SlimTraining(**{**TRAINING, **change})
