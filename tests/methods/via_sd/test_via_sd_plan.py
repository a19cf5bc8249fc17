"""VIA-SD's planner against the figures of its specification, and what it measures."""

from __future__ import annotations

import sys

import families
import pytest
import torch
import transformers

from hf_specdec import ViaSDConfig
from hf_specdec.bench.plan_via_sd import (
    Costs,
    Rates,
    ViaSDPlanner,
    costs_by_bytes,
    measure_costs,
    measure_rates,
    read_parameters,
)
from hf_specdec.commands.main import main
from hf_specdec.generation.methods.via_sd.laws import Gate
from hf_specdec.generation.methods.via_sd.slim_model import Slim, Units
from hf_specdec.training.data import Text, save_texts
from hf_specdec.training.scoring import SlimScorer


KEEP = [True, True, False, True]


def planner(a=0.73, inner=0.75, outer=0.9, tiers=(0.8, 0.1, 0.1), draft=0.03, slim=0.45, **changes):
    return ViaSDPlanner(Costs(draft, [slim], **changes), Rates(a, inner, outer, tiers))


@pytest.mark.parametrize(
    "a, draft, speed",
    [(0.6, 0.08, 1.75), (0.73, 0.03, 2.81), (0.73, 0.08, 2.25), (0.73, 0.15, 1.83), (0.85, 0.08, 3.12)],
)
def test_two_tiers(a, draft, speed):
    assert planner(a, draft=draft).plan().two_tier == pytest.approx(speed, abs=0.006)


@pytest.mark.parametrize(
    "inner, outer, slim, draft, speed",
    [
        (0.75, 0.90, 0.35, 0.03, 2.75),
        (0.75, 0.90, 0.58, 0.08, 1.88),
        (0.75, 0.95, 0.45, 0.03, 3.06),
        (0.75, 0.95, 0.45, 0.08, 2.45),
        (0.80, 0.97, 0.35, 0.03, 4.28),
        (0.80, 0.97, 0.58, 0.08, 2.60),
    ],
)
def test_lossless_tiers(inner, outer, slim, draft, speed):
    found = planner(inner=inner, outer=outer, slim=slim, draft=draft).plan()
    assert found.lossless == pytest.approx(speed, abs=0.006)
    assert ("slim tier pays" in found.advice) == (found.lossless > found.two_tier)


@pytest.mark.parametrize(
    "a, draft, slim, share", [(0.6, 0.08, 0.35, 0.43), (0.73, 0.03, 0.45, 0.19), (0.85, 0.08, 0.58, 0.09)]
)
def test_the_lossy_break_even_share_of_escalations(a, draft, slim, share):
    """At the share of the specification's table three tiers are as fast as two; a little less or more decides."""
    for moved, better in ((-0.02, True), (0.02, False)):
        tiers = (0.93 - share - moved, 0.07, share + moved)
        found = planner(a, draft=draft, slim=slim, tiers=tiers).plan()
        assert (found.lossy > found.two_tier) == better


def test_passes_are_charged_by_their_width_and_overhead_by_the_forward():
    flat, wide = planner(), ViaSDPlanner(Costs(0.03, [0.45], [1.0, 1.1, 1.2]), Rates(0.73, 0.75, 0.9, (0.8, 0.1, 0.1)))
    assert wide.two_tier(1) == pytest.approx(flat.two_tier(1) * (0.03 + 1.1) / (0.03 + 1.0))
    assert wide.two_tier(9) == pytest.approx(flat.two_tier(9) * (0.27 + 1.2) / (0.27 + 1.0))
    slow = planner(overhead=0.2)
    emitted = sum(0.73**j for j in range(5))
    assert slow.two_tier(4) == pytest.approx((4 * 0.23 + 1.2) / emitted)
    assert planner(a=1.0).two_tier(4) == pytest.approx((4 * 0.03 + 1) / 5)


def test_costs_by_bytes():
    costs = costs_by_bytes(80, 20, 0.5, 5)
    assert costs.draft == 0.05
    assert costs.slim == [0.6]
    assert costs.full == [1.0]


def test_plain_decoding_is_advised_where_nothing_pays():
    assert "Plain" in planner(a=0.1, inner=0.1, outer=0.1, draft=0.5, slim=0.9).plan().advice


@pytest.fixture(scope="module")
def measured():
    """Return a model, an assistant, and a scorer of texts that the model wrote."""
    model = families.build("Llama", num_hidden_layers=4)
    ids, mask = families.prompts((6, 6))
    texts = [
        Text(row, 6)
        for row in model.generate(ids[:, -6:], attention_mask=mask[:, -6:], max_new_tokens=20, do_sample=False)
    ]
    return model, families.perturbed(model), SlimScorer(model, texts, Units(model, "layer"), 16, "shared")


@pytest.mark.parametrize("sampling", [False, True])
def test_rates_are_those_of_the_logits(measured, sampling):
    model, assistant, scorer = measured
    whole = Slim("layer", [True] * 4, {})
    same = measure_rates(scorer, model, whole, Gate(0.7, 0.5), sampling=sampling)
    assert (same.two_tier, same.inner, same.outer) == pytest.approx((1, 1, 1), abs=1e-5)
    assert same.delta == pytest.approx(0, abs=1e-4)
    found = measure_rates(scorer, assistant, Slim("layer", KEEP, {}), Gate(0.7, 0.5), sampling=sampling)
    assert sum(found.tiers) == pytest.approx(1, abs=1e-5)
    expected = 0.0
    for index, text in enumerate(scorer.texts):
        with torch.no_grad():
            p, q = (m(text.ids[None, :-1]).logits[0, 5:].softmax(-1) for m in (assistant, model))
        agree = torch.minimum(p, q).sum() if sampling else (p.argmax(-1) == q.argmax(-1)).sum()
        expected += float(agree) / sum(len(t) for t in scorer.teacher)
        assert len(scorer.teacher[index]) == len(p)
    assert found.two_tier == pytest.approx(expected, abs=1e-5)
    assert found.outer < 1


def test_costs_are_measured_for_every_width(measured):
    model, assistant, scorer = measured
    seen = []
    costs = measure_costs(
        model, assistant, Slim("layer", KEEP, {}), scorer.texts[0].ids[None], 3, repeats=2, progress=seen.append
    )
    assert len(costs.full) == len(costs.slim) == 3
    assert costs.full[0] == 1.0
    assert min(*costs.slim, costs.draft) > 0
    assert len(seen) == 3
    layers, head = read_parameters(model)
    assert head == 64 * 32
    assert layers == sum(p.numel() for p in model.model.layers.parameters())


def command(monkeypatch, *arguments, fails=False):
    monkeypatch.setattr(sys, "argv", ["hf-specdec", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == (2 if fails else 0)


def test_the_commands_search_train_and_plan(monkeypatch, tmp_path, capsys):
    """From a model's own text to a mask, a LoRA and a plan; each command reads what the last one wrote."""
    model = families.build("Llama", num_hidden_layers=6).float()
    model.generation_config.eos_token_id = 1
    model.save_pretrained(tmp_path / "model")
    families.tokenizer().save_pretrained(tmp_path / "model")
    ids = torch.randint(3, 64, (12, 30), generator=torch.Generator().manual_seed(0))
    save_texts([Text(row, 8) for row in ids], tmp_path / "text.safetensors")
    data, base = ("--data", tmp_path / "text.safetensors"), ("--model", tmp_path / "model", "--dtype", "float32")
    searching = ("calibrate", "via_sd", *data, *base, "--save", tmp_path / "mask", "--texts", 4, "--window", 16)
    command(monkeypatch, *searching, "--steps", 25, "--skip-ratio", 0.3, "--slim-cache", "own")
    command(monkeypatch, *searching, "--steps", 30, "--skip-ratio", 0.3, "--slim-cache", "own", "--resume")
    other = ("--steps", 30, "--skip-ratio", 0.5, "--slim-cache", "own", "--resume")
    command(monkeypatch, *searching, *other, fails=True)  # not the settings of the search in the folder
    command(monkeypatch, *searching[:-4], "--texts", 400, fails=True)
    assert "`--texts` takes 800 texts" in capsys.readouterr().err.replace("\n", " ")
    training = ("train", "via_sd", *data, *base, "--mask", tmp_path / "mask", "--out", tmp_path / "slim")
    command(monkeypatch, *training, "--steps", 2, "--rank", 2, "--vocabulary", 0)
    planning = ("calibrate", "via_sd_plan", *data, *base, "--assistant", tmp_path / "model", "--texts", 4)
    command(monkeypatch, *planning, "--adapter", tmp_path / "slim", "--window", 16)
    command(monkeypatch, *planning, "--adapter", tmp_path / "slim", "--window", 16, "--layers", 1e9, fails=True)
    found = capsys.readouterr()
    assert "rates: a 1.000" in found.out
    assert "two-tier" in found.out
    assert "go together" in found.err
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").double()
    config = ViaSDConfig.from_pretrained(tmp_path / "slim")
    stock = model.generate(ids[:, :8], do_sample=False, max_new_tokens=20)
    out = model.generate(
        ids[:, :8], do_sample=False, max_new_tokens=20, assistant_model=model, assistant_strategy=config,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(out.sequences, stock)
    assert out.speculation.method["slim_cache"] == "own"
