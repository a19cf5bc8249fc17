"""Fixtures of these tests."""

from __future__ import annotations

import families
import pytest
import torch
import transformers
from via_sd_cases import BARE, LAYERS, MIXED, OFF, generate, kept, lossless, lossy, measured, refused, stock

from hf_specdec import SpeculationConfig, VegasConfig, ViaSDConfig, ViaSDQualityError
from hf_specdec.generation.methods.via_sd.slim_model import Units, save_slim


# what is refused


LOSSY_DEFAULT = {"mode": "lossy", "force": True, "keep_mask": kept()}


@pytest.mark.parametrize(
    "values, match",
    [
        ({"mode": "losless"}, "mode"),
        ({"lossless_rule": "gated"}, "lossless_rule"),
        ({"alpha_convention": "paper", "alpha1": 0.5, "alpha2": 0.3}, "alpha_convention"),
        ({"escalate_scope": "row"}, "escalate_scope"),
        ({"audit_action": "stop"}, "audit_action"),
        ({"granularity": "head"}, "granularity"),
        ({"skip_budget_by": "time"}, "skip_budget_by"),
        ({"slim_cache": "both"}, "slim_cache"),
        ({"num_assistant_tokens_schedule": "linear"}, "num_assistant_tokens_schedule"),
        ({"tau_accept": 0.5, "tau_escalate": 0.6}, "tau_"),
        ({"tau_accept": 0.0, "tau_escalate": 0.0}, "tau_"),
        ({"tau_accept": 1.2}, "tau_"),
        ({"tau_accept": float("nan")}, "tau_"),
        ({"tau_escalate": -0.1}, "tau_"),
        ({"alpha1": 0.3, "alpha2": 0.5, "alpha_convention": "direct"}, "tau_"),
        ({"alpha1": 0.5}, "alpha"),
        ({"alpha1": 0.5, "alpha2": 1.0}, "alpha2"),
        ({"alpha1": -0.1, "alpha2": 0.3}, "alpha1"),
        ({"alpha1": 0.5, "alpha2": 0.3, "tau_accept": 0.7}, "tau_"),
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
        ({"skip_ratio": 0.05}, "skip_ratio"),
        ({"skip_ratio": 0.8}, "skip_ratio"),
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
def test_masks_hold_bools(mask):
    with pytest.raises(TypeError, match="keep_mask"):
        ViaSDConfig(keep_mask=mask)


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
def test_masks_that_do_not_fit_are_refused(pair, prompt, mode):
    settings = {"mode": mode, "force": True}
    for mask in (kept(units=5), kept(units=2 * LAYERS), []):
        refused(pair, prompt, ViaSDConfig(keep_mask=mask, **settings), "entries")
    refused(pair, prompt, ViaSDConfig(keep_mask=kept(), granularity="sublayer", **settings), "entries")
    for unit in (0, LAYERS - 1):
        refused(pair, prompt, ViaSDConfig(keep_mask=kept((unit,)), **settings), "protected")
    for unit in (0, 2 * LAYERS - 2, 2 * LAYERS - 1):
        mask = kept((unit,), 2 * LAYERS)
        refused(pair, prompt, ViaSDConfig(keep_mask=mask, granularity="sublayer", **settings), "protected")


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


def test_the_thresholds_of_the_paper(pair, prompt, caplog):
    logger = transformers.utils.logging.get_logger("hf_specdec")
    logger.addHandler(caplog.handler)
    try:
        both = {"alpha1": 0.5, "alpha2": 0.3}
        for a in (both, {"alpha1": 0.3, "alpha2": 0.5}):
            assert lossy(**a, **BARE).thresholds == pytest.approx((0.7, 0.5))
        assert lossy(**both, **BARE, alpha_convention="direct").thresholds == pytest.approx((0.5, 0.3))
        caplog.clear()
        literal = lossy(**both, **BARE, alpha_convention="literal")
        assert "literal" in caplog.text and literal.thresholds == pytest.approx((0.7, 0.7))
    finally:
        logger.removeHandler(caplog.handler)
    assert ViaSDConfig().thresholds == (0.7, 0.5)
    counts = {
        name: measured(pair, prompt, lossy(**both, **BARE, alpha_convention=name), max_new_tokens=100)[1].method[
            "tiers"
        ]
        for name in ("sorted", "direct", "literal")
    }
    assert counts["literal"]["B"] == 0 < min(counts["sorted"]["B"], counts["direct"]["B"])


def test_the_presets_are_the_specified_ones():
    from hf_specdec.registry import preset

    paper = preset("via_sd:paper")
    assert paper.mode == "lossy" and paper.thresholds == pytest.approx((0.7, 0.5)) and paper.lossy_level == 1.0
    assert (paper.regen_min_conf, paper.bonus_min_conf, paper.max_pending, paper.eos_guard) == (0, 1.01, None, False)
    assert (paper.skip_ratio, paper.granularity, paper.skip_budget_by) == (0.45, "layer", "count")
    safe, usual = preset("via_sd:safe"), preset("via_sd")
    assert safe == usual.override(mode="lossy") and usual == ViaSDConfig() and usual.lossless and not safe.lossless
    assert (usual.lossless_rule, usual.stage_len, usual.stage_stop_conf, usual.max_pending) == ("exact", 8, 0.4, 32)
    assert (usual.regen_min_conf, usual.bonus_min_conf, usual.min_slim_agreement) == (0.8, 0.8, 0.85)


def test_lossy_decoding_needs_a_measured_mask(pair, prompt, tmp_path):
    config = ViaSDConfig(mode="lossy", keep_mask=kept())
    refused(pair, prompt, config, "measured|calibrat", ViaSDQualityError)
    units = Units(pair[0], "layer")
    for agreement in (0.84, 0.86):
        folder = tmp_path / str(agreement)
        save_slim(folder, ViaSDConfig(), pair[0], units, kept(), {"agreement": agreement})
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
    for config in (lossless(keep_mask=kept((1,), 4)), lossy(keep_mask=kept((1,), 4))):
        with pytest.raises(ValueError):
            generate((t5, t5), prompt, config, max_new_tokens=4)


def test_settings_survive_a_file(tmp_path):
    config = lossy(**MIXED, slim_cache="own", lossy_level=0.3, drafter="prompt_lookup")
    config.save_pretrained(tmp_path)
    assert SpeculationConfig.from_pretrained(tmp_path) == config


def test_what_belongs_to_a_saved_mask_is_not_overridden_in_silence(tmp_path):
    """Its units, and the cache mode that its figures were measured in."""
    model = families.build("Llama", num_hidden_layers=4)
    units = Units(model, "layer")
    save_slim(
        tmp_path, ViaSDConfig(), model, units, [True, False, True, True], {"agreement": 0.5, "slim_cache": "own"}
    )
    options = {"max_new_tokens": 8, "do_sample": False, "assistant_model": model, "return_dict_in_generate": True}
    ids = families.prompts()[0][:1]
    config = ViaSDConfig(adapter=str(tmp_path))
    for chosen, mode in ((config, "own"), (config.override(slim_cache="shared"), "shared")):
        out = model.generate(ids, assistant_strategy=chosen, **options)
        assert out.speculation.method["slim_cache"] == mode
    with pytest.raises(ValueError, match="granularity='sublayer'.*which is 'layer'"):
        model.generate(ids, assistant_strategy=config.override(granularity="sublayer"), **options)


def test_draft_stop_needs_an_assistant():
    model = families.build("Llama", num_hidden_layers=4)
    with pytest.raises(ValueError, match="draft_stop=0.5.*drafter='slim'"):
        ViaSDConfig(drafter="slim", draft_stop=0.5)
    with pytest.raises(ValueError, match="draft_stop=0.5.*'prompt_lookup'"):
        model.generate(
            families.prompts()[0][:1], assistant_strategy=ViaSDConfig(drafter="prompt_lookup", draft_stop=0.5)
        )
