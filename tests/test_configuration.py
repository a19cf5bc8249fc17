"""Settings of earlier releases: what they hold still loads, and fields that went are read with a warning."""

from __future__ import annotations

import logging

import pytest
import transformers

from hf_specdec import PlainConfig, SpeculationConfig, VegasConfig
from hf_specdec.registry import STRATEGIES, config_class


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
