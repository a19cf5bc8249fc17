"""Settings of earlier releases: what they hold still loads, and fields that went are read with a warning."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers

from hf_specdec import PlainConfig, SpeculationConfig, VegasConfig, decoding_loop
from hf_specdec.generation import admission
from hf_specdec.registry import STRATEGIES, config_class, preset


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
