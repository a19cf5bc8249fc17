"""DIVERSED's settings, drafters and assistants: what is refused."""

from __future__ import annotations

import math

import pytest
from diversed_cases import generate, pair, prompt, settings

import hf_specdec
from hf_specdec import DiversedConfig, VegasConfig
from hf_specdec.generation.methods.diversed.method import DiversedStrategy


def test_the_drafters_number_of_tokens_gives_way():
    strategy = DiversedStrategy(settings(2, drafter=VegasConfig(num_assistant_tokens=9)))
    assert strategy.drafter.config.num_assistant_tokens == 2


# bad input


@pytest.mark.parametrize(
    "changes, error, name",
    [
        ({"weight": -0.1}, ValueError, "weight"),
        ({"weight": 1.1}, ValueError, "weight"),
        ({"weight": math.nan}, ValueError, "weight"),
        ({"weight": "half"}, TypeError, "weight"),
        ({"weight": True}, TypeError, "weight"),
        ({"weight": 0.5, "adapter": "head"}, ValueError, "exclude"),
        ({"mix_space": "probability"}, ValueError, "mix_space.*prob, logit"),
        ({"bonus": "draft"}, ValueError, "bonus.*target, mixture"),
        ({"w_min": 0.6, "w_max": 0.5}, ValueError, "w_min"),
        ({"w_min": -0.1}, ValueError, "w_min"),
        ({"w_max": 1.1}, ValueError, "w_max"),
        ({"w_min": math.nan}, ValueError, "w_min"),
        ({"weight_offset": 0.5}, ValueError, "weight_offset"),
        ({"weight": 0.5, "weight_offset": 0.5}, ValueError, "weight_offset"),
        ({"adapter": "head", "weight_offset": math.nan}, ValueError, "weight_offset"),
        ({"greedy_temperature": 0.0}, ValueError, "greedy_temperature"),
        ({"greedy_temperature": -1.0}, ValueError, "greedy_temperature"),
        ({"greedy_temperature": math.nan}, ValueError, "greedy_temperature"),
        ({"num_assistant_tokens": 0}, ValueError, "num_assistant_tokens"),
        ({"drafter": 5}, TypeError, "drafter"),
        ({"restrict_to_target_support": 1}, TypeError, "restrict_to_target_support"),
    ],
    ids=str,
)
def test_wrong_settings(changes, error, name):
    with pytest.raises(error, match=name):
        DiversedConfig(**changes)
    with pytest.raises(error, match=name):
        pair(3)[0].generate(
            prompt(3), assistant_model=pair(3)[1], assistant_strategy="diversed", assistant_strategy_config=changes,
            max_new_tokens=4,
        )  # fmt: skip


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"adapter": "head", "drafter": VegasConfig()}, "hidden states"),
        ({"drafter": hf_specdec.PlainConfig()}, "must be a strategy that drafts"),
        ({"bonus": "mixture", "drafter": VegasConfig()}, "bonus='mixture'"),
        ({"drafter": "plain"}, "must be a strategy that drafts"),
        ({"drafter": "eagle"}, "`drafter='eagle'`.*the known ones are .*prompt_lookup"),
        ({"drafter": "vegas:wide"}, "`drafter='vegas:wide'`.*its presets: .*window"),
    ],
    ids=["head and vegas", "plain", "mixture and vegas", "plain by name", "no strategy", "no preset"],
)
def test_wrong_drafters(changes, name):
    with pytest.raises(ValueError, match=name):
        pair(3)[0].generate(prompt(3), assistant_strategy=settings(**changes), max_new_tokens=4)


def test_no_assistant_at_all():
    with pytest.raises(ValueError, match="assistant_model"):
        pair(3)[0].generate(prompt(3), assistant_strategy="diversed", max_new_tokens=4)


def test_an_assistant_that_would_not_be_used():
    with pytest.raises(ValueError, match="assistant_model"):
        generate(pair(3), prompt(3), settings(weight=0.5, drafter=VegasConfig()), max_new_tokens=4)


def test_stocks_own_ensemble_and_ours_at_once():
    with pytest.raises(ValueError, match="assistant_ensemble_weight"):
        generate(pair(3), prompt(3), settings(), max_new_tokens=4, assistant_ensemble_weight=0.5)
