"""VIA-SD's slim model: it is the model without units; its LoRA and its files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import save_file
from via_sd_cases import (
    LAYERS,
    MIXED,
    RULES,
    SKIP,
    Reference,
    check_greedy,
    generate,
    kept,
    lossless,
    lossy,
    refused,
    spied,
    stock,
    without,
)

import hf_specdec
from hf_specdec import SpeculationConfig, ViaSDConfig
from hf_specdec.generation.methods.via_sd.slim_model import Units, load_slim, mask_hash, save_slim, slim_model


# the slim model, its LoRA and its files


@pytest.mark.parametrize("granularity, skip", [("layer", (2, 3)), ("layer", (1, 4)), ("sublayer", (1, 4, 7, 8))])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss", "qwen3"])
def test_the_slim_model_is_the_model_without_units(name, granularity, skip):
    prefix, changes = families.FAMILIES[name]
    changes = dict(changes, num_hidden_layers=LAYERS)
    if "layer_types" in changes:
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 3
        skip = tuple(unit for unit in skip if unit not in (1,) or granularity == "sublayer")
    model = families.build(prefix, **changes).float()
    ids = families.prompts((19,))[0]
    before = model(ids).logits
    units = Units(model, granularity)
    keep = kept(skip, len(units))
    units.check(keep)
    slim = slim_model(model, units, keep)
    if name != "gpt_oss" or granularity == "layer":  # its MLP returns two values
        torch.testing.assert_close(slim(ids).logits, without(model, skip, granularity)(ids).logits, rtol=0, atol=1e-5)
    assert (slim(ids).logits - before).abs().max() > 0.05
    assert torch.equal(model(ids).logits, before)
    shared = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in slim.parameters()} <= shared


def test_the_even_mask_keeps_to_its_budget():
    model = families.build("Llama", num_hidden_layers=12)
    for granularity, by, ratio in itertools.product(("layer", "sublayer"), ("params", "count"), (0.2, 0.45, 0.7)):
        units = Units(model, granularity)
        keep = units.even(ratio, by)
        units.check(keep)
        assert abs(units.share(keep, by) - ratio) <= 1 / 24 + 1e-9, (granularity, by, ratio)
        left = units.skipped(keep)
        gaps = [b - a for a, b in itertools.pairwise(left)]
        if ratio == 0.2 and granularity == "layer":
            assert min(gaps) > 1, "spread over the depth"


# PEFT asks the model for an attribute under its former name
old_names = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def write_lora(folder, model, skip=SKIP, seed=0, scale=0.3, cache_mode="own", **changes):
    """Save a mask with a random LoRA on the layers that stay, in PEFT's format, and return the folder's name."""
    generator = torch.Generator().manual_seed(seed)
    units, tensors, names = Units(model, "layer"), {}, []
    for index in range(len(units)):
        if index in skip:
            continue
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            name = f"model.layers.{index}.{name}"
            weight = model.get_submodule(name).weight
            names.append(name)
            for part, shape in (("A", (4, weight.shape[1])), ("B", (weight.shape[0], 4))):
                key = f"base_model.model.{name}.lora_{part}.weight"
                tensors[key] = scale * torch.randn(shape, generator=generator)
    inner = Path(folder) / "via_sd_slim"
    inner.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": names, "bias": "none", **changes}
    (inner / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, inner / "adapter_model.safetensors")
    config, lora = ViaSDConfig(num_assistant_tokens=3), {"trained_cache_mode": cache_mode}
    save_slim(folder, model, kept(skip, len(units)), config=config, calibration={"agreement": 0.9}, lora=lora)
    return str(folder)


def rewrite(folder, change):
    """Change the record of a saved folder."""
    file = Path(folder) / "specdec_config.json"
    values = json.loads(file.read_text())
    change(values["adapter"])
    file.write_text(json.dumps(values))


@old_names
def test_a_lora_does_what_peft_does_with_it(pair, prompt, tmp_path):
    from peft import PeftModel

    target = pair[0]
    folder = write_lora(tmp_path / "a", target)
    found = load_slim(target, folder)
    assert found.keep == kept() and found.cache_mode == "own" and found.granularity == "layer"
    before = target(prompt).logits
    slim = slim_model(target, Units(target, "layer"), found.keep, found.terms)
    expected = PeftModel.from_pretrained(without(target, SKIP), Path(folder) / "via_sd_slim")(prompt).logits
    torch.testing.assert_close(slim(prompt).logits, expected, rtol=0, atol=1e-9)
    assert (expected - without(target, SKIP)(prompt).logits).abs().max() > 0.1
    assert torch.equal(target(prompt).logits, before)


class WithTerms(Reference):
    """The reference with PEFT's own slim model."""

    def __init__(self, pair, prompt, folder):
        from peft import PeftModel

        super().__init__(pair, prompt, shared=False)
        self.slim = PeftModel.from_pretrained(self.slim, Path(folder) / "via_sd_slim")


@old_names
def test_a_lora_works_in_slim_passes_only(pair, prompt, tmp_path, monkeypatch):
    """The model's logits stay bit-equal, its state as it was, and no context of PEFT's is entered."""
    import peft

    target = pair[0]
    folder = write_lora(tmp_path / "a", target, scale=0.15)
    reference = WithTerms(pair, prompt, folder)
    before, state = target(prompt).logits, {name: value.clone() for name, value in target.state_dict().items()}
    for name in ("disable_adapter", "__init__", "merge_and_unload"):
        monkeypatch.setattr(
            peft.PeftModel, name, lambda *_, **__: pytest.fail("PEFT is not to be used in decoding"), raising=False
        )
    config = lossy(**MIXED, adapter=folder)
    found = check_greedy(pair, prompt, config, reference=reference)
    assert found.method["slim_cache"] == "own" and found.method["tiers"]["C"] > 0
    spy = spied(pair, prompt, config, max_new_tokens=20)[2]
    first = spy.of("q")[0]
    assert torch.equal(first[3], spied(pair, prompt, lossy(**MIXED), max_new_tokens=2)[2].of("q")[0][3])
    for rule in RULES:
        config = lossless(adapter=folder, lossless_rule=rule)
        assert torch.equal(
            generate(pair, prompt, config, max_new_tokens=40), stock(target, prompt, torch.ones_like(prompt))
        )
    assert torch.equal(target(prompt).logits, before)
    assert list(target.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())


def test_no_adapter_is_switched_while_decoding():
    folder = Path(hf_specdec.__file__).parent / "generation"
    for file in folder.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        for name in (
            "disable_adapter",
            "merge_adapter",
            "merge_and_unload",
            "set_adapter",
            "import peft",
            "from peft",
        ):
            assert name not in text, f"{file.name} has {name}"


def test_mismatches_of_mask_model_and_cache_are_refused(pair, prompt, tmp_path):
    target = pair[0]
    folder = write_lora(tmp_path / "good", target)
    config = lossless(adapter=folder)
    assert torch.equal(
        generate(pair, prompt, config, max_new_tokens=40), stock(target, prompt, torch.ones_like(prompt))
    )
    refused(pair, prompt, config.override(slim_cache="shared"), "shared")
    generate(pair, prompt, config.override(slim_cache="own"), max_new_tokens=4)
    # another mask beside the LoRA
    other = write_lora(tmp_path / "mask", target)
    rewrite(other, lambda record: record.update(keep_mask=kept((1, 3))))
    refused(pair, prompt, config.override(adapter=other), "mask")
    halves = write_lora(tmp_path / "halves", target)
    rewrite(halves, lambda record: record["lora"].update(mask_hash=mask_hash(kept(), "sublayer")))
    refused(pair, prompt, config.override(adapter=halves), "mask")
    # another model: same shape, other weights; another depth; another width
    refused(((families.build("Llama", seed=77, num_hidden_layers=LAYERS)), pair[1]), prompt, config, "another")
    deeper = families.build("Llama", num_hidden_layers=LAYERS + 1)
    refused((deeper, pair[1]), prompt, config, "num_hidden_layers")
    # a LoRA that was trained on shared caches is not read from its own
    shared = write_lora(tmp_path / "shared", target, cache_mode="shared")
    refused(pair, prompt, config.override(adapter=shared, slim_cache="own"), "own")
    # kinds of adapter whose meaning is another
    for place, change in enumerate(({"use_dora": True}, {"use_rslora": True}, {"peft_type": "IA3"}, {"bias": "all"})):
        strange = write_lora(tmp_path / str(place), target, **change)
        refused(pair, prompt, config.override(adapter=strange), "LoRA")
    refused(pair, prompt, config.override(adapter=str(tmp_path)), "holds no", FileNotFoundError)
    gone = write_lora(tmp_path / "gone", target)
    (Path(gone) / "via_sd_slim" / "adapter_model.safetensors").unlink()
    refused(pair, prompt, config.override(adapter=gone), "holds no", FileNotFoundError)


def test_mask_hashes_differ():
    masks = [(kept(), "layer"), (kept((2, 4)), "layer"), (kept(), "sublayer"), (kept((), 7), "layer")]
    assert len({mask_hash(*mask) for mask in masks}) == len(masks)


def test_a_folder_is_a_strategy(pair, prompt, tmp_path):
    folder = write_lora(tmp_path / "a", pair[0])
    config = SpeculationConfig.from_pretrained(folder)
    assert config.adapter == folder and config.num_assistant_tokens == 3
    out = pair[0].generate(
        prompt, assistant_strategy=folder, assistant_model=pair[1], do_sample=False, max_new_tokens=40,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(out.sequences, stock(pair[0], prompt, torch.ones_like(prompt)))
    assert out.speculation.method["slim_cache"] == "own"
    assert out.speculation.method["skipped_share"] == pytest.approx(2 / 6)
