"""VIA-SD's settings: what is refused, presets, files of earlier releases, and what a lossy call needs."""

from __future__ import annotations

import re

import families
import pytest
import torch
import transformers
from via_sd_cases import LAYERS, MIXED, OFF, generate, kept, lossless, lossy, mask, refused, stock

from hf_specdec import SpeculationConfig, VegasConfig, ViaSDConfig, ViaSDQualityError
from hf_specdec.generation.methods.via_sd.slim_model import Units, save_slim


# what is refused


LOSSY_DEFAULT = {"mode": "lossy", "force": True, "adapter": mask()}


@pytest.mark.parametrize(
    "values, match",
    [
        ({"mode": "losless"}, "mode"),
        ({"lossless_rule": "gated"}, "lossless_rule"),
        ({"escalate_scope": "row"}, "escalate_scope"),
        ({"audit": "stop"}, "audit"),
        ({"slim_cache": "both"}, "slim_cache"),
        ({"num_assistant_tokens_schedule": "linear"}, "num_assistant_tokens_schedule"),
        ({"tau_accept": 0.5, "tau_escalate": 0.6}, "tau_"),
        ({"tau_accept": 0.0, "tau_escalate": 0.0}, "tau_"),
        ({"tau_accept": 1.2}, "tau_"),
        ({"tau_accept": float("nan")}, "tau_"),
        ({"tau_escalate": -0.1}, "tau_"),
        ({"tau_accept": 0.4}, "tau_"),
        ({"tau_escalate": None}, "tau_"),
        ({"tau_accept": 1.01, "tau_escalate": 1.01}, "tau_"),
        ({"lossy_level": 1.1}, "lossy_level"),
        ({"lossy_level": float("nan")}, "lossy_level"),
        ({"draft_stop": -0.1}, "draft_stop"),
        ({"stage_stop_conf": 2.0}, "stage_stop_conf"),
        ({"audit_target": -1.0}, "audit_target"),
        ({"min_slim_agreement": 85.0}, "min_slim_agreement"),
        ({"regen_min_conf": 1.5}, "regen_min_conf"),
        ({"bonus_min_conf": -0.5}, "bonus_min_conf"),
        ({"stage_len": 1}, "stage_len"),
        ({"stage_len": 65}, "stage_len"),
        ({"max_pending": 0}, "max_pending"),
        ({"num_assistant_tokens": 17}, "num_assistant_tokens"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens"),
        ({"coupled": True}, "coupled"),
        ({**LOSSY_DEFAULT, "coupled": True}, "coupled"),
        ({**LOSSY_DEFAULT, **OFF, "coupled": True, "tau_escalate": 0.3}, "coupled"),
        ({**LOSSY_DEFAULT, "drafter": "slim"}, "slim"),
    ],
)
def test_bad_settings_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        ViaSDConfig(**values)


@pytest.mark.parametrize("mask", [[1, 0, 1], [True, None], ["yes"]])
def test_masks_hold_bools(pair, tmp_path, mask):
    with pytest.raises(TypeError, match="keep_mask"):
        save_slim(tmp_path / "mask", pair[0], mask)
    assert not (tmp_path / "mask").exists()


def test_names_with_typos_raise(pair, prompt):
    kwargs = {"do_sample": False, "max_new_tokens": 4, "assistant_model": pair[1]}
    for name in ("via_ds", "viasd", "via_sd:papr", "via_sd:exact "):
        with pytest.raises((ValueError, FileNotFoundError, OSError)):
            pair[0].generate(prompt, assistant_strategy=name, **kwargs)
    with pytest.raises(ValueError, match="promt_lookup"):
        pair[0].generate(
            prompt, assistant_strategy=lossless(drafter="promt_lookup"), do_sample=False, max_new_tokens=4
        )
    with pytest.raises((ValueError, TypeError), match="loosy_level"):
        pair[0].generate(prompt, assistant_strategy="via_sd", assistant_strategy_config={"loosy_level": 0.5}, **kwargs)


@pytest.mark.parametrize("mode", ["lossless", "lossy"])
def test_masks_that_do_not_fit_are_refused(pair, prompt, tmp_path, mode):
    settings = {"mode": mode, "force": True}
    strange = [(kept(units=5), "layer"), (kept(units=2 * LAYERS), "layer"), ([], "layer"), (kept(), "sublayer")]
    protected = [(kept((unit,)), "layer") for unit in (0, LAYERS - 1)]
    protected += [(kept((unit,), 2 * LAYERS), "sublayer") for unit in (0, 2 * LAYERS - 2, 2 * LAYERS - 1)]
    for masks, match in ((strange, "entries"), (protected, "protected")):
        for keep, granularity in masks:
            refused(pair, prompt, ViaSDConfig(adapter=families.mask(keep, granularity), **settings), match)
            with pytest.raises(ValueError, match=match):
                save_slim(tmp_path / "mask", pair[0], keep, granularity)
    with pytest.raises(ValueError, match="granularity"):
        save_slim(tmp_path / "mask", pair[0], kept(), "head")
    assert not (tmp_path / "mask").exists()


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("types, kind", [("sfsfs", 1), ("ssfss", 2), ("fssfs", 1)])
def test_first_layers_of_each_kind_of_attention_are_protected(name, types, kind):
    prefix, changes = families.FAMILIES[name]
    layers = [{"s": "sliding_attention", "f": "full_attention"}[letter] for letter in types]
    model = families.build(prefix, **{**changes, "num_hidden_layers": 5, "layer_types": layers})
    units = Units(model, "layer")
    assert set(units.protected) == {0, kind, 4}
    for unit in range(5):
        if unit in (0, kind, 4):
            with pytest.raises(ValueError, match="protected"):
                units.check(kept((unit,), 5))
        else:
            units.check(kept((unit,), 5))
    halves = Units(model, "sublayer")
    assert {0, 2 * kind, 8, 9} <= set(halves.protected) and 2 * kind + 1 not in halves.protected


FIRST_RELEASE = {
    "strategy": "via_sd", "hf_specdec_version": "0.1.0.dev0", "num_assistant_tokens": 5, "compile": None,
    "kernels": "auto", "num_assistant_tokens_schedule": "constant", "draft_stop": 0.0, "drafter": None,
    "mode": "lossless", "lossless_rule": "exact", "stage_len": 8, "stage_stop_conf": 0.4, "tau_accept": None,
    "tau_escalate": None, "alpha1": None, "alpha2": None, "alpha_convention": "sorted", "lossy_level": 1.0,
    "regen_min_conf": 0.8, "bonus_min_conf": 0.8, "escalate_scope": "block", "coupled": False, "max_pending": 32,
    "eos_guard": True, "audit": True, "audit_action": "report", "audit_target": 0.05, "min_slim_agreement": 0.85,
    "force": False, "keep_mask": None, "granularity": "layer", "skip_ratio": 0.45, "skip_budget_by": "params",
    "slim_cache": None, "adapter": None,
}  # fmt: skip
"""What the first release wrote for `ViaSDConfig()`."""
PAPER = {"alpha1": 0.5, "alpha2": 0.3}


@pytest.mark.parametrize(
    "saved, meant, warning",
    [
        ({}, {}, None),
        (PAPER, {"tau_accept": 0.7, "tau_escalate": 0.5}, "alpha2=0.3.*tau_accept"),
        ({"alpha1": 0.3, "alpha2": 0.5}, {"tau_accept": 0.7, "tau_escalate": 0.5}, "tau_accept"),
        ({**PAPER, "alpha_convention": "direct"}, {"tau_accept": 0.5, "tau_escalate": 0.3}, "'direct'.*tau_accept"),
        ({**PAPER, "alpha_convention": "literal"}, {"tau_accept": 0.7, "tau_escalate": 0.7}, "'literal'.*tau_accept"),
        ({"tau_accept": 0.4}, {"tau_accept": 0.4, "tau_escalate": 0.4}, None),
        ({"tau_accept": 1.01, "tau_escalate": 1.01}, {"tau_accept": None, "tau_escalate": None}, "None.*never"),
        ({"bonus_min_conf": 1.01}, {"bonus_min_conf": None}, "bonus_min_conf=1.01.*None"),
        ({"audit": False, "audit_action": "tighten"}, {"audit": None}, "audit_action.*`audit`"),
        ({"audit_action": "tighten", "audit_target": 0.1}, {"audit": "tighten", "audit_target": 0.1}, "`audit`"),
        ({"keep_mask": kept(), "granularity": "sublayer"}, {}, "keep_mask.*save_slim"),
        ({"skip_ratio": 0.3, "skip_budget_by": "count"}, {}, "skip_ratio=0.3.*save_slim"),
    ],
)
def test_settings_of_the_first_release_are_read(saved, meant, warning, caplog):
    logger = transformers.utils.logging.get_logger("hf_specdec")
    logger.addHandler(caplog.handler)
    transformers.utils.logging.warning_once.cache_clear()
    try:
        config = SpeculationConfig.from_dict({**FIRST_RELEASE, **saved})
    finally:
        logger.removeHandler(caplog.handler)
    assert config == ViaSDConfig(**meant)
    if warning is None:
        assert not caplog.text
    else:
        assert re.search(warning, caplog.text, re.DOTALL)
    assert SpeculationConfig.from_dict(config.to_dict()) == config


def test_the_presets_are_the_specified_ones():
    from hf_specdec.registry import preset

    paper = preset("via_sd:paper")
    assert paper.mode == "lossy" and paper.gate == (0.7, 0.5, 0.0) and paper.lossy_level == 1.0
    assert (paper.regen_min_conf, paper.bonus_min_conf, paper.max_pending, paper.eos_guard) == (0, None, None, False)
    safe, usual = preset("via_sd:safe"), preset("via_sd")
    assert safe == usual.override(mode="lossy") and usual == ViaSDConfig() and usual.lossless and not safe.lossless
    assert (usual.lossless_rule, usual.stage_len, usual.stage_stop_conf, usual.max_pending) == ("exact", 8, 0.4, 32)
    assert usual.gate == (0.7, 0.5, 0.8) and (usual.bonus_min_conf, usual.min_slim_agreement) == (0.8, 0.85)


def test_lossy_decoding_needs_a_measured_mask(pair, prompt, tmp_path):
    config = ViaSDConfig(mode="lossy", adapter=mask())
    refused(pair, prompt, config, "measured|calibrat", ViaSDQualityError)
    for agreement in (0.84, 0.86):
        folder = tmp_path / str(agreement)
        save_slim(folder, pair[0], kept(), calibration={"agreement": agreement})
        config = ViaSDConfig(mode="lossy", adapter=str(folder))
        if agreement < 0.85:
            refused(pair, prompt, config, "0.84", ViaSDQualityError)
            refused(pair, prompt, config.override(min_slim_agreement=0.845), "0.84", ViaSDQualityError)
        for fine in (
            config.override(min_slim_agreement=0.83), config.override(force=True), config.override(mode="lossless"),
            config.override(lossy_level=0.0), *([config] if agreement > 0.85 else []),
        ):  # fmt: skip
            assert generate(pair, prompt, fine, max_new_tokens=8).shape[1] == prompt.shape[1] + 8


def test_a_mask_that_nobody_measured_is_warned_of(pair, prompt, caplog):
    logger = transformers.utils.logging.get_logger("hf_specdec")
    logger.addHandler(caplog.handler)
    transformers.utils.logging.warning_once.cache_clear()  # it warns once per process
    try:
        other = families.build("Qwen2", num_hidden_layers=4)
        generate((other, other), prompt, ViaSDConfig(stage_stop_conf=0.0), max_new_tokens=4)
    finally:
        logger.removeHandler(caplog.handler)
    assert "evenly" in caplog.text and "calibrate" in caplog.text


def test_drafters_that_learn_from_every_pass_are_refused_in_lossy_mode(pair, prompt):
    vegas = VegasConfig(min_context=0, min_tokens=2, kv_ratio=0.3)
    refused(pair, prompt, lossy(drafter=vegas), "vegas")
    expected = stock(pair[0], prompt, torch.ones_like(prompt))
    for config in (lossless(drafter=vegas), lossy(drafter=vegas, lossy_level=0.0)):
        assert torch.equal(generate(pair, prompt, config, max_new_tokens=40), expected)


def test_encoder_decoders_are_refused(prompt):
    shape = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 4, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**shape, decoder_start_token_id=0)).eval()
    for config in (lossless(adapter=mask((1,), 4)), lossy(adapter=mask((1,), 4))):
        with pytest.raises(ValueError):
            generate((t5, t5), prompt, config, max_new_tokens=4)


def test_settings_survive_a_file(tmp_path):
    config = lossy(**MIXED, slim_cache="own", lossy_level=0.3, drafter="prompt_lookup", adapter=None)
    config.save_pretrained(tmp_path)
    assert SpeculationConfig.from_pretrained(tmp_path) == config


def test_what_belongs_to_a_saved_mask_is_not_overridden_in_silence(tmp_path):
    """The cache mode that its figures were measured in."""
    model = families.build("Llama", num_hidden_layers=4)
    save_slim(tmp_path, model, [True, False, True, True], calibration={"agreement": 0.5, "slim_cache": "own"})
    options = {"max_new_tokens": 8, "do_sample": False, "assistant_model": model, "return_dict_in_generate": True}
    ids = families.prompts()[0][:1]
    config = ViaSDConfig(adapter=str(tmp_path))
    for chosen, mode in ((config, "own"), (config.override(slim_cache="shared"), "shared")):
        out = model.generate(ids, assistant_strategy=chosen, **options)
        assert out.speculation.method["slim_cache"] == mode


def test_draft_stop_needs_an_assistant():
    model = families.build("Llama", num_hidden_layers=4)
    with pytest.raises(ValueError, match="draft_stop=0.5.*drafter='slim'"):
        ViaSDConfig(drafter="slim", draft_stop=0.5)
    with pytest.raises(ValueError, match="draft_stop=0.5.*'prompt_lookup'"):
        model.generate(
            families.prompts()[0][:1], assistant_strategy=ViaSDConfig(drafter="prompt_lookup", draft_stop=0.5)
        )
