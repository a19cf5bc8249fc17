"""Settings of earlier releases: what they hold still loads, and fields that went are read with a warning."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers

import hf_specdec
from hf_specdec import PlainConfig, SpeculationConfig, VegasConfig, decoding_loop
from hf_specdec.artefacts import AdapterReference
from hf_specdec.generation import admission
from hf_specdec.generation.models.adapters import read_adapter
from hf_specdec.registry import STRATEGIES, config_class, preset


ROOT = Path(__file__).parents[2]

# what 0.1.0.dev0 exported, and what its configs wrote: presets, settings with values, and nested ones
NAMES = [
    "AssistedConfig", "DecodingLoop", "DiversedConfig", "DiversedHead", "PipelineRankError", "PlainConfig",
    "PromptLookupConfig", "SPDConfig", "SpecBoundConfig", "SpeculationConfig", "SpeculationOutput",
    "SpeculationStats", "VegasConfig", "ViaSDConfig", "ViaSDQualityError", "decoding_loop", "install",
    "load_draft", "load_stage", "on_speculation", "register_strategy", "save_strategy", "uninstall", "unload",
]  # fmt: skip
SAVED = json.loads((Path(__file__).parent / "saved_settings.json").read_text(encoding="utf-8"))
ADAPTERS = {
    "diversed": "diversed_head", "draft": "draft", "spd/n2": "draft_module", "spd/n5": "draft_module",
    "specbound": "exit_heads", "via_sd": "slim",
}  # fmt: skip

GONE = [(name, field) for name in STRATEGIES for field in config_class(name)._replaced]


@pytest.fixture()
def warnings(caplog):
    transformers.logging.get_logger("hf_specdec").addHandler(caplog.handler)
    transformers.utils.logging.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers.logging.get_logger("hf_specdec").removeHandler(caplog.handler)


@pytest.mark.parametrize("name, field", GONE)
def test_a_field_that_went_is_read_with_a_warning_and_refused_in_a_call(name, field, warnings):
    cls = config_class(name)
    assert not cls.has_field(field)
    config = SpeculationConfig.from_dict({**cls().to_dict(), field: 1})
    assert config == cls()
    assert f"`{field}=1`" in warnings.text and cls._replaced[field] in warnings.text
    with pytest.raises(TypeError, match=field):
        cls(**{field: 1})


def test_the_first_positional_argument_is_the_number_of_drafts():
    assert VegasConfig(5) == VegasConfig(num_assistant_tokens=5)
    with pytest.raises(TypeError):
        PlainConfig(5)


@pytest.mark.parametrize("taker", ["diversed", "via_sd"])
@pytest.mark.parametrize("drafter", ["prompt_lookup", "vegas", "vegas:window"])
def test_a_drafter_is_named_like_a_strategy(taker, drafter, llama):
    settings = {"weight": 1.0} if taker == "diversed" else {}
    found = []
    for chosen in (drafter, preset(drafter)):
        config = preset(taker).override(drafter=chosen, **settings)
        again = SpeculationConfig.from_dict(config.to_dict())
        assert again == config
        found.append(llama.model.generate(**llama.one, assistant_strategy=again, do_sample=False, max_new_tokens=12))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], llama.stock(**llama.one, max_new_tokens=12))
    loop = decoding_loop(preset(taker).override(drafter=drafter, **settings))
    inner = loop.make_strategy().drafter
    inner = getattr(inner, "inner", inner)
    assert type(inner) is type(decoding_loop(drafter).make_strategy().drafter)


def test_a_call_is_admitted_once(llama, monkeypatch):
    seen = []
    admit = admission.admit
    monkeypatch.setattr(admission, "admit", lambda *a: seen.append(1) or admit(*a))
    options = {**llama.one, "do_sample": False, "max_new_tokens": 2}
    llama.model.generate(assistant_strategy="plain", **options)
    assert len(seen) == 1
    llama.model.generate(custom_generate=decoding_loop("plain"), **options)
    assert len(seen) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_still_there(name):
    assert name in hf_specdec.__all__ and getattr(hf_specdec, name) is not None


def kept(values):
    """Return how settings of 0.1.0.dev0 have to read today, after the checks that each field is accounted for."""
    cls = config_class(values["strategy"])
    own = {name: v for name, v in values.items() if name not in ("strategy", "hf_specdec_version")}
    for name in own:
        assert cls.has_field(name) != (name in cls._replaced), name
    upgraded = cls._upgraded(own)
    return {name: kept(v) if isinstance(v, dict) else v for name, v in upgraded.items() if name not in cls._replaced}


def test_the_saved_settings_are_of_all_strategies_of_that_release():
    saved = {values["strategy"] for values in SAVED}
    assert len(saved) == 8 and saved <= set(STRATEGIES)


@pytest.mark.parametrize("values", SAVED, ids=lambda values: values["strategy"])
def test_settings_that_were_saved_are_read(values, tmp_path):
    found = SpeculationConfig.from_dict(values)
    expected = kept(values)
    assert json.loads(json.dumps(found.to_dict()))["strategy"] == values["strategy"]

    def compare(config, wanted):
        for name, value in wanted.items():
            if isinstance(value, dict):
                compare(getattr(config, name), value)
            else:
                assert getattr(config, name) == value, name

    compare(found, expected)
    (tmp_path / "specdec_config.json").write_text(json.dumps(values))
    assert SpeculationConfig.from_pretrained(tmp_path) == found
    assert type(found).from_pretrained(tmp_path) == found
    assert SpeculationConfig.from_dict(found.to_dict()) == found


@pytest.mark.parametrize("folder", ADAPTERS)
def test_a_committed_adapter_is_read(folder, tmp_path):
    path = ROOT / "examples" / "adapters" / folder
    config = SpeculationConfig.from_pretrained(path)
    assert config.adapter == str(path)
    values = json.loads((path / "specdec_config.json").read_text())
    expected = kept({name: value for name, value in values.items() if name != "adapter"})
    assert {name: value for name, value in config.to_dict().items() if name in expected} == expected
    adapter = read_adapter(str(path), ADAPTERS[folder])
    assert adapter.record == values["adapter"]
    assert adapter.tensors or folder == "via_sd"
    config.save_pretrained(tmp_path)
    assert AdapterReference.find(tmp_path).record == values["adapter"]
    assert SpeculationConfig.from_pretrained(tmp_path) == config.override(adapter=str(tmp_path))
