"""Strategies of one's own: registered by class, found by name, and refused where the name is taken."""

from __future__ import annotations

from dataclasses import dataclass

import families
import pytest
import torch

import hf_specdec
from hf_specdec import SpeculationConfig
from hf_specdec.generation.state import DecodingState
from hf_specdec.generation.strategy import Draft, Drafter, SpeculationStrategy
from hf_specdec.registry import STRATEGIES, config_class, preset, presets, strategy_class


@dataclass(frozen=True)
class EchoConfig(SpeculationConfig):
    """Settings of a method that drafts the last token over and over."""

    strategy = "echo"


class EchoDrafter(Drafter):
    """Drafts the pending token again."""

    def __init__(self, config: EchoConfig) -> None:
        self.config = config

    def propose(self, state: DecodingState) -> Draft:
        """Return the pending token of each row, as often as it may draft."""
        counts = state.draft_room(self.config.num_assistant_tokens)
        return Draft(state.pending.expand(-1, max(counts)), counts) if max(counts) else Draft.empty(state)


class EchoStrategy(SpeculationStrategy):
    """Draft the last token again."""

    config_class = EchoConfig
    presets = {"": {}, "short": {"num_assistant_tokens": 1}}

    def make_drafter(self) -> Drafter:
        """Return the drafter."""
        return EchoDrafter(self.config)


@pytest.fixture
def echo():
    yield hf_specdec.register_strategy(EchoStrategy)
    STRATEGIES.pop("echo", None)


def test_a_registered_class_is_a_strategy_like_any_other(echo, llama, tmp_path):
    assert echo is EchoStrategy is strategy_class("echo")
    assert config_class("echo") is EchoConfig
    assert preset("echo:short") == EchoConfig(num_assistant_tokens=1)
    assert {"echo", "echo:short"} <= set(presets())
    inputs = llama.inputs(3)
    out = llama.model.generate(
        **inputs, assistant_strategy="echo", max_new_tokens=8, do_sample=False, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, llama.model.generate(**inputs, max_new_tokens=8, do_sample=False))
    assert out.speculation.num_draft_tokens > 0
    EchoConfig(num_assistant_tokens=2).save_pretrained(tmp_path)
    assert SpeculationConfig.from_pretrained(tmp_path) == EchoConfig(num_assistant_tokens=2)


def test_the_same_class_may_be_registered_again(echo):
    assert hf_specdec.register_strategy(EchoStrategy) is EchoStrategy


def test_names_that_are_taken_or_no_names(echo):
    class Other(EchoStrategy):
        """Has the same name."""

    with pytest.raises(ValueError, match="'echo' is registered already"):
        hf_specdec.register_strategy(Other)

    class Vegas(EchoStrategy):
        """Has the name of one of the package's methods."""

        config_class = families.configured("vegas").__class__

    with pytest.raises(ValueError, match="'vegas' is registered already"):
        hf_specdec.register_strategy(Vegas)

    class Nameless(EchoStrategy):
        """Has no name."""

        config_class = SpeculationConfig

    with pytest.raises(ValueError, match=r"SpeculationConfig\.strategy` must be a name like 'vegas', got ''"):
        hf_specdec.register_strategy(Nameless)
    assert strategy_class("echo") is EchoStrategy
