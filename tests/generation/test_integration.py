"""The wrapper of `generate()`: install and removal, inertness, precedence, saved strategies, the official hook."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import families
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    QuantizedCache,
    StaticCache,
)

import hf_specdec
from hf_specdec import AssistedConfig, PlainConfig, SpeculationConfig, VegasConfig


SMALL = {"min_context": 0, "min_tokens": 2, "kv_ratio": 0.3, "num_assistant_tokens": 3}
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture
def model(llama):
    """A copy whose generation config a test may change."""
    return copy.deepcopy(llama.model)


@pytest.fixture
def warnings(monkeypatch):
    """Collect what the package warns about, also what was warned about before."""
    from hf_specdec import integration
    from hf_specdec.generation import admission

    seen = []
    for module in (integration, admission):
        monkeypatch.setattr(module.logger, "warning_once", lambda text, *args: seen.append(text), raising=False)
    return seen


def speculation(model, *args, **kwargs):
    """Return the statistics of a call, `None` where stock ran."""
    found = []
    with hf_specdec.on_speculation(found.append):
        out = model.generate(*args, **{**GREEDY, "return_dict_in_generate": True, **kwargs})
    assert hasattr(out, "speculation") == bool(found)
    return found[0] if found else None


def run_python(code, **environment):
    """Run code in a fresh interpreter and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def uninstalled():
    hf_specdec.uninstall()
    yield
    hf_specdec.install()


# install, uninstall


def test_install_and_uninstall_are_idempotent():
    wrapped = GenerationMixin.generate
    hf_specdec.install()
    assert GenerationMixin.generate is wrapped
    original = wrapped.__wrapped__
    try:
        hf_specdec.uninstall()
        assert GenerationMixin.generate is original
        hf_specdec.uninstall()
        assert GenerationMixin.generate is original
        assert not hasattr(GenerationConfig, "assistant_strategy")
        assert not hasattr(GenerationConfig, "assistant_strategy_config")
    finally:
        hf_specdec.install()
    assert GenerationMixin.generate is not original
    assert GenerationMixin.generate.__wrapped__ is original


def test_the_wrapper_keeps_signature_and_docstring():
    import inspect

    wrapped, original = GenerationMixin.generate, GenerationMixin.generate.__wrapped__
    assert inspect.signature(wrapped) == inspect.signature(original)
    assert wrapped.__doc__ == original.__doc__
    assert wrapped.__name__ == "generate"


def test_uninstalled_generate_rejects_the_keyword(uninstalled, llama):
    with pytest.raises(ValueError, match="assistant_strategy"):
        llama.model.generate(**llama.one, assistant_strategy="plain")


def test_stock_calls_are_untouched(llama):
    """Results, random numbers and errors are those of the original."""
    calls = [
        {"max_new_tokens": 9},
        {"max_new_tokens": 9, "do_sample": True, "temperature": 1.3},
        {"max_new_tokens": 9, "num_beams": 2},
        {"max_new_tokens": 9, "num_return_sequences": 2, "do_sample": True},
        {"max_new_tokens": 9, "assistant_model": llama.assistant},
        {"max_new_tokens": 9, "prompt_lookup_num_tokens": 2},
        {"max_new_tokens": 9, "assistant_strategy": None},
        {"max_new_tokens": 9, "generation_config": GenerationConfig(do_sample=True, top_k=5, pad_token_id=0)},
    ]
    for kwargs in calls:
        states = []
        for function in (GenerationMixin.generate.__wrapped__, GenerationMixin.generate):
            torch.manual_seed(4)
            given = copy.copy(kwargs)
            if function is not GenerationMixin.generate:
                given.pop("assistant_strategy", None)
            out = function(llama.model, llama.ids[:1], **given)
            states.append((out, torch.get_rng_state()))
        assert torch.equal(states[0][0], states[1][0]), kwargs
        assert torch.equal(states[0][1], states[1][1]), kwargs


@pytest.mark.parametrize(
    "kwargs",
    [{"no_such_argument": 1}, {"max_new_tokens": 0}, {"max_new_tokens": 3, "num_beams": 0}, {"stop_strings": "a"}],
    ids=str,
)
def test_stock_errors_are_untouched(llama, kwargs):
    errors = []
    for function in (GenerationMixin.generate.__wrapped__, GenerationMixin.generate):
        with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - whatever stock raises
            function(llama.model, llama.ids[:1], **kwargs)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_wrong_keywords_are_still_refused_under_a_strategy(llama):
    with pytest.raises(ValueError, match="no_such_argument"):
        llama.model.generate(**llama.one, assistant_strategy="plain", no_such_argument=1)


def test_a_greedy_call_uses_no_random_numbers(llama):
    for strategy in ("plain", "assisted", "vegas"):
        before = torch.get_rng_state()
        llama.ours(strategy, **llama.batch, max_new_tokens=9)
        assert torch.equal(torch.get_rng_state(), before)


# precedence


def test_keyword_over_passed_config_over_the_models(model):
    model.generation_config.assistant_strategy = "plain"
    ids = torch.arange(3, 20)[None]
    passed = GenerationConfig(pad_token_id=0, do_sample=False, max_new_tokens=12)
    assert speculation(model, ids).strategy == "plain"
    assert speculation(model, ids, generation_config=passed).strategy == "plain"
    passed.assistant_strategy, passed.assistant_strategy_config = "vegas", SMALL
    assert speculation(model, ids, generation_config=passed).strategy == "vegas"
    assert speculation(model, ids, generation_config=passed, assistant_strategy="plain").strategy == "plain"
    config = VegasConfig(**SMALL)
    assert speculation(model, ids, assistant_strategy=config).strategy == "vegas"
    # a call leaves the configs as they were
    assert model.generation_config.assistant_strategy == "plain"
    assert passed.assistant_strategy == "vegas"
    assert passed.assistant_strategy_config == SMALL


def test_off_gives_stock(model, llama):
    model.generation_config.assistant_strategy = "vegas"
    expected = llama.stock(**llama.one, max_new_tokens=12)
    out = model.generate(**llama.one, **GREEDY, assistant_strategy="off", return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert not hasattr(out, "speculation")
    off = GenerationConfig(pad_token_id=0, assistant_strategy="off", **GREEDY)
    assert speculation(model, **llama.one, generation_config=off) is None
    beams = {"num_beams": 2, "assistant_strategy": "off", "max_new_tokens": 5}
    assert model.generate(**llama.one, **beams).shape[1] == llama.ids.shape[1] + 5


@pytest.mark.parametrize("mode", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=lambda m: next(iter(m)))
def test_a_saved_strategy_yields_to_an_explicit_stock_mode(model, llama, warnings, mode):
    expected = llama.stock(**llama.one, max_new_tokens=12, **mode)
    model.generation_config.assistant_strategy = "plain"
    out = model.generate(**llama.one, **GREEDY, **mode, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert getattr(out, "speculation", None) is None
    assert len(warnings) == 1
    assert "plain" in warnings[0] and next(iter(mode)) in warnings[0]


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"custom_generate": print},
    ],
    ids=lambda mode: next(iter(mode)),
)
def test_an_explicit_conflict_raises(model, llama, mode):
    with pytest.raises(ValueError, match=next(iter(mode))):
        model.generate(**llama.one, **GREEDY, **mode, assistant_strategy="plain")
    passed = GenerationConfig(pad_token_id=0, assistant_strategy="plain", **GREEDY)
    with pytest.raises(ValueError, match=next(iter(mode))):
        model.generate(**llama.one, generation_config=passed, **mode)


def test_a_saved_strategy_yields_to_an_assistant_that_it_does_not_use(model, llama, warnings):
    model.generation_config.assistant_strategy = "plain"
    assert speculation(model, **llama.one, assistant_model=llama.assistant) is None
    assert len(warnings) == 1 and "'plain'" in warnings[0] and "assistant_model" in warnings[0]
    with pytest.raises(ValueError, match=r"assistant_model.*\"off\""):
        model.generate(**llama.one, **GREEDY, assistant_model=llama.assistant, assistant_strategy="plain")
    model.generation_config.assistant_strategy = "assisted"
    assert speculation(model, **llama.one, assistant_model=llama.assistant).num_draft_tokens


def test_token_healing_is_stocks(model, llama, warnings):
    """Stock heals inside of `generate()`, with a tokenizer that no decoding loop has there."""
    with pytest.raises(ValueError, match=r"assistant_strategy.*token_healing=True.*\"off\".*heal_tokens"):
        model.generate(**llama.one, **GREEDY, token_healing=True, assistant_strategy="plain")
    model.generation_config.assistant_strategy = "plain"
    with pytest.raises(ValueError, match="must pass the model's tokenizer"):
        model.generate(**llama.one, **GREEDY, token_healing=True)
    assert len(warnings) == 1


SAVED = [
    ("cache_implementation", "hybrid"),
    ("cache_implementation", "dynamic"),
    ("cache_implementation", "static"),
    ("cache_implementation", "offloaded"),
    ("cache_implementation", "quantized"),
    ("use_cache", False),
    ("output_attentions", True),
    ("output_hidden_states", True),
    ("num_assistant_tokens_schedule", "heuristic"),
    ("assistant_confidence_threshold", 0.3),
]


@pytest.mark.parametrize("name, value", SAVED)
def test_settings_that_are_only_saved_give_way(model, llama, warnings, monkeypatch, name, value):
    """No cache of stock's is made for them, with an earlier turn's or without; what the call asks for is refused."""
    expected = llama.stock(**llama.one, max_new_tokens=12, return_dict_in_generate=True)
    for cache in (StaticCache, QuantizedCache):
        monkeypatch.setattr(cache, "__init__", lambda *_, **__: pytest.fail("a cache was made that is never used"))
    setattr(model.generation_config, name, value)
    passed = copy.deepcopy(model.generation_config)
    passed.update(**GREEDY)
    strategy = {"assistant_strategy": "plain", "return_dict_in_generate": True}
    for options in (GREEDY, {"generation_config": passed}):
        out = model.generate(**llama.one, **options, **strategy)
        assert torch.equal(out.sequences, expected.sequences)
        text = torch.cat([out.sequences, llama.ids[:1, :5]], dim=1)
        again = model.generate(text, past_key_values=out.past_key_values, **options, **strategy)
        assert torch.equal(again.sequences, llama.stock(text, max_new_tokens=12))
    assert len(set(warnings)) == (value not in ("hybrid", "dynamic")) and all(name in text for text in warnings)
    assert getattr(passed, name) == value
    if value in ("hybrid", "dynamic"):
        return
    with pytest.raises(ValueError, match=f"`{name}={value!r}`.*allowed"):
        model.generate(**llama.one, **GREEDY, **strategy, **{name: value})


@pytest.mark.parametrize("name, value", SAVED[:3] + SAVED[5:8])
def test_saved_settings_give_way_on_the_official_hook(model, llama, name, value):
    setattr(model.generation_config, name, value)
    loop = hf_specdec.decoding_loop("plain")
    out = model.generate(**llama.one, **GREEDY, custom_generate=loop, return_dict_in_generate=True)
    assert torch.equal(out.sequences, llama.stock(**llama.one, max_new_tokens=12))
    assert type(out.past_key_values) is DynamicCache and out.past_key_values.get_seq_length()


def test_none_in_the_call_unsets_what_is_saved(model, llama):
    model.generation_config.cache_implementation = "static"
    model.generation_config.stop_strings = ["a"]
    none = {"cache_implementation": None, "stop_strings": None}
    out = model.generate(**llama.one, **GREEDY, assistant_strategy="plain", **none)
    assert torch.equal(out, llama.stock(**llama.one, max_new_tokens=12))


def test_an_explicit_strategy_conflicts_with_a_mode_on_the_model(model, llama):
    model.generation_config.num_beams = 2
    with pytest.raises(ValueError, match=r"num_beams=2; pass `num_beams=1` in the call, or .*\"off\""):
        model.generate(**llama.one, **GREEDY, assistant_strategy="plain")
    assert speculation(model, **llama.one, assistant_strategy="plain", num_beams=1) is not None


def test_assistant_strategy_config_is_merged_over_the_strategy(model, llama):
    model.generation_config.assistant_strategy = "vegas"
    model.generation_config.assistant_strategy_config = SMALL
    assert speculation(model, **llama.one).num_draft_tokens > 0
    stats = speculation(model, **llama.one, assistant_strategy_config={"min_context": 10_000})
    assert stats.num_draft_tokens == 0
    # the same name in the call keeps what was saved for it; another one does not
    assert speculation(model, **llama.one, assistant_strategy="vegas").num_draft_tokens > 0
    assert speculation(model, **llama.one, assistant_strategy="vegas:window").num_draft_tokens == 0
    assert model.generation_config.assistant_strategy_config == SMALL


def test_num_assistant_tokens(model, llama):
    """Keyword over the passed config over the model's over the strategy's own."""

    def longest(**kwargs):
        stats = speculation(model, **llama.one, assistant_model=llama.assistant, max_new_tokens=30, **kwargs)
        return len(stats.num_accepted_tokens_per_pos)

    config = AssistedConfig(num_assistant_tokens=4)
    assert longest(assistant_strategy="assisted") == AssistedConfig().num_assistant_tokens
    assert longest(assistant_strategy=config) == 4
    model.generation_config.num_assistant_tokens = 3
    assert longest(assistant_strategy=config) == 3
    passed = GenerationConfig(pad_token_id=0, num_assistant_tokens=2, **{**GREEDY, "max_new_tokens": 30})
    assert longest(assistant_strategy=config, generation_config=passed) == 2
    assert longest(assistant_strategy=config, generation_config=passed, num_assistant_tokens=6) == 6


def test_an_unused_assistant_raises(llama):
    with pytest.raises(ValueError, match="assistant_model"):
        llama.model.generate(**llama.one, assistant_strategy="vegas", assistant_model=llama.assistant)


def test_a_missing_assistant_raises(llama):
    with pytest.raises(ValueError, match="assistant_model"):
        llama.model.generate(**llama.one, assistant_strategy="assisted")


# names, folders, configs


def test_a_folder_is_a_strategy(tmp_path, llama):
    VegasConfig(**SMALL).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "specdec_config.json").read_text())["strategy"] == "vegas"
    assert SpeculationConfig.from_pretrained(tmp_path) == VegasConfig(**SMALL)
    stats = speculation(llama.model, **llama.one, assistant_strategy=str(tmp_path))
    assert stats.strategy == "vegas"
    assert stats.num_draft_tokens > 0


def test_a_registered_name_beats_a_folder(tmp_path, monkeypatch, llama):
    VegasConfig(**SMALL).save_pretrained(tmp_path / "plain")
    monkeypatch.chdir(tmp_path)
    assert speculation(llama.model, **llama.one, assistant_strategy="plain").strategy == "plain"


def test_configs_round_trip():
    for config in (VegasConfig(**SMALL), AssistedConfig(num_assistant_tokens=7), PlainConfig()):
        assert SpeculationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert type(config).from_dict(config.to_dict()) == config


# generation configs


def test_generation_config_keeps_the_attributes_over_save_and_load(tmp_path):
    config = GenerationConfig(assistant_strategy="vegas", assistant_strategy_config=SMALL, max_new_tokens=5)
    config.save_pretrained(tmp_path)
    loaded = GenerationConfig.from_pretrained(tmp_path)
    assert loaded.assistant_strategy == "vegas"
    assert loaded.assistant_strategy_config == SMALL
    assert GenerationConfig().assistant_strategy is None
    assert "assistant_strategy" not in GenerationConfig().to_diff_dict()
    assert copy.deepcopy(loaded).assistant_strategy == "vegas"


def test_save_strategy_survives_a_config_derived_from_the_model(tmp_path, llama):
    """Stock drops unknown entries of a generation config that came from the model's own config."""
    fresh = LlamaForCausalLM(llama.model.config)
    fresh.load_state_dict(llama.model.state_dict())
    assert fresh.generation_config._from_model_config
    fresh.generation_config.assistant_strategy = "vegas"
    fresh.generation_config.assistant_strategy_config = SMALL
    fresh.save_pretrained(tmp_path)
    hf_specdec.save_strategy(fresh, tmp_path)
    assert fresh.generation_config._from_model_config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.generation_config.assistant_strategy == "vegas"
    stats = speculation(loaded, **llama.one)
    assert stats.strategy == "vegas"
    assert stats.num_draft_tokens > 0


def test_save_strategy_refuses_what_can_not_be_loaded(tmp_path, model):
    with pytest.raises(ValueError, match="assistant_strategy"):
        hf_specdec.save_strategy(model, tmp_path)
    model.generation_config.assistant_strategy = "no_such_method"
    with pytest.raises(ValueError, match="no_such_method"):
        hf_specdec.save_strategy(model, tmp_path)
    assert not list(tmp_path.iterdir())


# the official hook


@pytest.mark.parametrize("strategy", ["plain", "assisted", "vegas"])
def test_custom_generate_equals_the_keyword(strategy, llama, uninstalled):
    extras = families.extras(strategy, llama.assistant)
    loop = hf_specdec.decoding_loop(families.configured(strategy), **extras)
    kwargs = {**llama.batch, **GREEDY, "max_new_tokens": 30, "eos_token_id": llama.eos}
    expected = llama.model.generate(**kwargs)
    assert torch.equal(llama.model.generate(**kwargs, custom_generate=loop), expected)
    # the same object serves any number of calls
    out = llama.model.generate(**kwargs, custom_generate=loop, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert strategy == "plain" if out.speculation is None else out.speculation.strategy == strategy


def test_decoding_loop_streams_to_its_own_streamer(llama):
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], 0

        def put(self, value):
            self.tokens += value.reshape(-1).tolist()

        def end(self):
            self.ended += 1

    streamer = Streamer()
    loop = hf_specdec.decoding_loop("plain", streamer=streamer)
    out = llama.model.generate(**llama.one, **GREEDY, custom_generate=loop)
    assert streamer.tokens == out[0, llama.ids.shape[1] :].tolist()
    assert streamer.ended == 1


def test_decoding_loop_checks_tokenizers():
    one, other = families.tokenizer(), copy.deepcopy(families.tokenizer())
    other.add_tokens(["more"])
    hf_specdec.decoding_loop("plain", tokenizer=one, assistant_tokenizer=one)
    with pytest.raises(ValueError, match="assistant_tokenizer"):
        hf_specdec.decoding_loop("plain", tokenizer=one, assistant_tokenizer=other)


# statistics for callers that get ids only


def test_on_speculation(llama):
    seen, inner = [], []
    with hf_specdec.on_speculation(seen.append):
        llama.ours("assisted", **llama.one, max_new_tokens=9)
        with hf_specdec.on_speculation(inner.append, timings=True):
            llama.ours("vegas", **llama.batch, max_new_tokens=9)
        llama.stock(**llama.one, max_new_tokens=9)
    llama.ours("assisted", **llama.one, max_new_tokens=9)
    assert [stats.strategy for stats in seen] == ["assisted", "vegas"]
    assert [stats.strategy for stats in inner] == ["vegas"]
    assert not seen[0].to_dict()["seconds"]
    assert all(value >= 0 for value in inner[0].to_dict()["seconds"].values())
    assert {"prefill", "draft", "verify"} <= set(inner[0].seconds)
    json.dumps([stats.to_dict() for stats in seen])


def test_on_speculation_forgets_its_callback_after_an_error(llama):
    seen = []
    with pytest.raises(RuntimeError), hf_specdec.on_speculation(seen.append):
        raise RuntimeError
    llama.ours("plain", **llama.one, max_new_tokens=3)
    assert not seen


# import


def test_import_is_lazy():
    code = """
import sys, hf_specdec
print(sorted(m for m in sys.modules if m.partition(".")[0] in ("triton", "peft", "typer", "rich", "scipy")
      or m.startswith("hf_specdec.generation.") or m.startswith("hf_specdec.kernels.")
      or m.startswith("hf_specdec.cache.")))
"""
    before = run_python(
        "import sys; from transformers import GenerationMixin\n"
        "print(sorted(m for m in sys.modules if m.partition('.')[0] in ('triton', 'peft', 'typer', 'rich', 'scipy')))"
    )
    assert run_python(code) == before


def test_import_can_leave_generate_alone():
    code = """
from transformers import GenerationMixin
original = GenerationMixin.generate
import hf_specdec
assert GenerationMixin.generate is original
hf_specdec.install()
assert GenerationMixin.generate is not original
"""
    run_python(code, HF_SPECDEC_NO_INSTALL="1")


def test_every_public_name_exists():
    assert sorted(hf_specdec.__all__) == hf_specdec.__all__
    for name in hf_specdec.__all__:
        assert getattr(hf_specdec, name).__doc__, name
        assert name in dir(hf_specdec)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hf_specdec.no_such_name
