"""SpecBound's settings: what is refused before anything has run, and what a folder keeps."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from specbound_cases import ALL, LAYERS, bounded, everywhere, ours, refused, rounds, scripted, tower, truth
from transformers import GenerationConfig

from hf_specdec import SpecBoundConfig, SpeculationConfig
from hf_specdec.configuration import CONFIG_NAME


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"exit_layers": [2, LAYERS], "max_depth": LAYERS}, "exit_layers"),
        ({"exit_layers": [2, LAYERS + 1], "max_depth": LAYERS}, "exit_layers"),
        ({"exit_layers": [2, 4], "max_depth": 3}, "exit_layers"),
        ({"exit_layers": [2, 6]}, "exit_layers"),
        ({"exit_layers": []}, "exit_layers"),
        ({"exit_layers": [0, 2]}, "exit_layers"),
        ({"exit_layers": [-1]}, "exit_layers"),
        ({"exit_layers": [3, 2]}, "exit_layers"),
        ({"exit_layers": (2, 2)}, "exit_layers"),
        ({"max_depth": LAYERS + 1}, "max_depth"),
    ],
    ids=str,
)
def test_depths_that_do_not_fit_the_model(llama, settings, name):
    refused(llama.model, SpecBoundConfig(**settings), names=[name])


@pytest.mark.parametrize(
    "settings, error",
    [
        *(({"tau": value}, ValueError) for value in (0, 1, -0.1, 1.5, float("nan"))),
        *(({"alpha": value}, ValueError) for value in (-0.1, float("inf"), float("nan"))),
        *(({"max_depth": value}, ValueError) for value in (0, -1)),
        ({"num_assistant_tokens": 0}, ValueError),
        ({"exit_layers": "some"}, ValueError),
        ({"sampling_draft": "greedy"}, ValueError),
        *(({"tau": value}, TypeError) for value in ("0.5", None, True)),
        ({"alpha": "0"}, TypeError),
        *(({"max_depth": value}, TypeError) for value in (2.5, True, "4")),
        *(({"exit_layers": value}, TypeError) for value in (3, {2, 3}, True, 2.5)),
        *(({"exit_layers": value}, (TypeError, ValueError)) for value in ([2.5], ["2"], [None], [True], [[2]])),
        ({"adapter": 3}, TypeError),
        ({"lag": 1}, TypeError),
        ({"sampling_draft": None}, TypeError),
        ({"width": 3}, TypeError),
    ],
    ids=str,
)
def test_bad_settings(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        SpecBoundConfig(**settings)


def test_exits_that_no_head_was_trained_for(llama, adapter):
    folder = adapter(llama.model, "adapter", (4, 6))
    refused(llama.model, SpecBoundConfig(adapter=folder, exit_layers=[3, 4]), names=["exit_layers", "[4, 6]"])
    refused(llama.model, SpecBoundConfig(adapter=folder, max_depth=3), names=["max_depth", "[4, 6]"])
    out = ours(llama, bounded(adapter=folder), max_new_tokens=6)
    assert list(out.speculation.method["exits"]) == ["4"]  # of the trained ones, those up to the bound
    out = ours(llama, bounded(adapter=folder, max_depth=7, exit_layers="all"), max_new_tokens=6)
    assert list(out.speculation.method["exits"]) == ["4", "6"]


def test_models_that_have_no_single_stack_of_layers(llama):
    import transformers

    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    calls = []
    handle = model.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="encoder-decoder"):
        model.generate(torch.arange(3, 15)[None], assistant_strategy="specbound", max_new_tokens=3)
    handle.remove()
    assert not calls
    refused(llama.model, SpecBoundConfig(), names=["assistant_model"], assistant_model=llama.model)


def test_a_missing_folder_or_file(llama, tmp_path):
    refused(llama.model, SpecBoundConfig(adapter="no such folder"), error=FileNotFoundError, names=["no such folder"])
    refused(llama.model, SpecBoundConfig(adapter=str(tmp_path)), error=FileNotFoundError, names=[CONFIG_NAME])


def test_a_model_that_does_more_after_its_layers_is_refused(llama):
    """The check of a model's first call compares logits, so that nothing wrong is ever emitted."""
    model = copy.deepcopy(llama.model)

    def doubled(_, __, output):
        output.last_hidden_state = output.last_hidden_state.flip(-1)
        return output

    model.model.register_forward_hook(doubled)
    with pytest.raises(ValueError, match="LlamaForCausalLM can't be run by layers"):
        model.generate(**llama.one, assistant_strategy=bounded(), max_new_tokens=5, do_sample=False)


def test_without_heads_a_call_warns_and_runs(llama, adapter, monkeypatch):
    said = []
    monkeypatch.setattr("hf_specdec.generation.methods.specbound.method.logger.warning_once", said.append)
    out = ours(llama, "specbound", max_new_tokens=12)
    assert torch.equal(out.sequences, truth()[:, : llama.ids.shape[1] + 12])
    (message,) = said
    assert "adapter" in message and "specbound" in message
    ours(llama, bounded(adapter=adapter(llama.model, "adapter")), max_new_tokens=2)
    assert len(said) == 1


def test_nothing_is_said_of_padding_that_is_not_there(monkeypatch):
    """Taking a model apart feeds it no token of the caller's, and the caller hears nothing of it."""
    case, said = tower("gpt2", 6), []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning_once", lambda text, *_: said.append(text))
    ours(case, bounded(max_depth=4), max_new_tokens=4, attention_mask=torch.ones_like(case.ids[:1]))
    assert not said


# settings


def test_default_settings():
    config = SpecBoundConfig()
    assert (config.num_assistant_tokens, config.tau, config.sampling_draft) == (6, 0.8, "sample")
    assert [config.depth_bound(layers) for layers in (1, 2, 6, 8, 24, 32)] == [1, 1, 3, 4, 12, 16]
    assert config.lossless
    for layers in (6, 12, 24, 32):
        found = config.exits(layers, None)
        assert found == sorted(set(found)) and 1 < len(found) <= 4
        assert max(2, layers // 8) == found[0] and found[-1] == layers // 2
        gaps = [b - a for a, b in itertools.pairwise(found)]
        assert max(gaps) - min(gaps) <= 1
        assert config.exits(layers, [1, 3, layers - 1]) == [1, 3]
        assert config.override(exit_layers="all").exits(layers, None) == list(range(1, layers // 2 + 1))


def test_the_width_follows_num_assistant_tokens_of_the_call(warm):
    text = truth()
    for kwargs in ({"num_assistant_tokens": 2}, {"generation_config": GenerationConfig(num_assistant_tokens=2)}):
        with rounds(warm.model) as seen, scripted(everywhere(2, text)):
            ours(warm, bounded(**ALL), max_new_tokens=10, **kwargs)
        assert [one.drafted for one in seen.rounds] == [2, 2, 2]


@pytest.mark.parametrize("layers", [[2, 4], (2, 4), "all", None], ids=repr)
def test_settings_survive_a_folder(layers, tmp_path, llama):
    config = SpecBoundConfig(
        num_assistant_tokens=3, alpha=0.2, tau=0.3, max_depth=5, exit_layers=layers, sampling_draft="match", lag=False
    )
    config.save_pretrained(tmp_path)
    back = SpeculationConfig.from_pretrained(tmp_path)
    assert type(back) is SpecBoundConfig
    assert back.exits(LAYERS, None) == config.exits(LAYERS, None)
    assert back.to_dict() == json.loads(json.dumps(config.to_dict()))
    assert back.override(exit_layers=None) == config.override(exit_layers=None)
    assert SpeculationConfig.from_dict(config.to_dict()) == config
    out = ours(llama, str(tmp_path), max_new_tokens=6)
    assert torch.equal(out.sequences, truth()[:, : llama.ids.shape[1] + 6])
