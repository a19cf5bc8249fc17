"""What can't be decoded is refused before any forward, by a message that names the argument, and changes nothing."""

from __future__ import annotations

import copy
import logging

import families
import pytest
import torch
import transformers
from families import SHAPE, build
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    StaticCache,
)
from transformers.generation.streamers import BaseStreamer

from hf_specdec import AssistedConfig, PlainConfig, SpeculationConfig, VegasConfig
from hf_specdec.registry import STRATEGIES, presets


IDS = torch.arange(3, 15)[None]


@pytest.fixture
def model(llama):
    """A copy that a test may change."""
    return copy.deepcopy(llama.model)


class Streamer(BaseStreamer):
    def __init__(self):
        self.parts = []

    def put(self, value):
        self.parts.append(value)

    def end(self):
        pass


def refused(model, *args, error=ValueError, names=(), **kwargs):
    """Check that a call raises `error` with every one of `names` in its message, runs nothing and changes nothing."""
    kwargs = {"assistant_strategy": "plain", "max_new_tokens": 5, "do_sample": False, **kwargs}
    forwards = []
    watched = [m for m in (model, kwargs.get("assistant_model")) if isinstance(m, torch.nn.Module)]
    handles = [m.register_forward_pre_hook(lambda *_: forwards.append(1)) for m in watched]
    before = state_of(model)
    try:
        with pytest.raises(error) as caught:
            model.generate(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    assert not forwards
    assert state_of(model) == before
    message = str(caught.value)
    for name in names:
        assert name in message, message
    return message


def state_of(model):
    return (
        model.config.to_dict(),
        model.generation_config.to_dict(),
        model.config._attn_implementation,
        type(model.config._attn_implementation),
        sorted(vars(model)),
        sorted(vars(model.config)),
    )


# strategies and their settings


@pytest.mark.parametrize("name", ["no_such_method", "vegas:no_such_preset", "Vegas", ""])
def test_unknown_strategy_lists_the_known_ones(name, model):
    message = refused(model, IDS, assistant_strategy=name)
    known = STRATEGIES if ":" not in name else [p.partition(":")[2] for p in presets() if p.startswith("vegas:")]
    assert all(other in message for other in known)


def test_a_repository_that_does_not_exist(model):
    name = "nobody/no-such-repository"
    message = refused(model, IDS, assistant_strategy=name, error=OSError, names=[name])
    assert all(name in message for name in STRATEGIES)


def test_a_folder_without_a_config(model, tmp_path):
    refused(
        model, IDS, assistant_strategy=str(tmp_path), error=(ValueError, FileNotFoundError), names=["specdec_config"]
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"strategy": "nothing"}', '{"strategy": "vegas", "gamma": 3}'])
def test_a_folder_with_a_wrong_config(model, tmp_path, text):
    (tmp_path / "specdec_config.json").write_text(text)
    refused(model, IDS, assistant_strategy=str(tmp_path))


@pytest.mark.parametrize("value", [3, True, ["vegas"], {"strategy": "vegas"}, VegasConfig], ids=repr)
def test_strategy_of_a_wrong_type(model, value):
    refused(model, IDS, assistant_strategy=value, error=TypeError, names=["assistant_strategy"])


def test_strategy_settings_of_a_wrong_type(model):
    refused(model, IDS, assistant_strategy_config=[1], error=TypeError, names=["assistant_strategy_config"])


def test_strategy_settings_without_a_strategy(model):
    refused(model, IDS, assistant_strategy=None, assistant_strategy_config={"kv_ratio": 0.1}, names=["without"])


@pytest.mark.parametrize(
    "settings, error, name",
    [
        ({"gamma": 3}, ValueError, "gamma"),
        ({"kv_ratio": 0.0}, ValueError, "kv_ratio"),
        ({"kv_ratio": 1.5}, ValueError, "kv_ratio"),
        ({"kv_ratio": float("nan")}, ValueError, "kv_ratio"),
        ({"kv_ratio": "much"}, TypeError, "kv_ratio"),
        ({"min_tokens": 0}, ValueError, "min_tokens"),
        ({"min_tokens": 2.5}, TypeError, "min_tokens"),
        ({"max_tokens": 3, "min_tokens": 4}, ValueError, "max_tokens"),
        ({"min_context": -1}, ValueError, "min_context"),
        ({"num_recent": -1}, ValueError, "num_recent"),
        ({"num_sink": -1}, ValueError, "num_sink"),
        ({"selection": "best"}, ValueError, "selection"),
        ({"metric": "norm"}, ValueError, "metric"),
        ({"queries": "first"}, ValueError, "queries"),
        ({"per_key_head": 1}, TypeError, "per_key_head"),
        ({"num_assistant_tokens": 0}, ValueError, "num_assistant_tokens"),
        ({"num_assistant_tokens": True}, TypeError, "num_assistant_tokens"),
        ({"num_assistant_tokens": None}, TypeError, "num_assistant_tokens"),
    ],
    ids=str,
)
def test_wrong_settings(model, settings, error, name):
    refused(model, IDS, assistant_strategy="vegas", assistant_strategy_config=settings, error=error, names=[name])
    with pytest.raises((error, TypeError), match=name):
        VegasConfig(**settings)


def test_settings_of_another_strategy():
    with pytest.raises(ValueError, match="vegas"):
        PlainConfig.from_dict(VegasConfig().to_dict())
    with pytest.raises(ValueError, match="known"):
        SpeculationConfig.from_dict({"strategy": "nothing"})


def test_a_newer_release_may_have_more_fields(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_specdec"):
        values = {**VegasConfig().to_dict(), "hf_specdec_version": "99.0.0", "novelty": 1}
        assert VegasConfig.from_dict(values) == VegasConfig()


@pytest.mark.parametrize("value", [0, -2, 2.5, "many"])
def test_num_assistant_tokens_in_the_call(model, value, llama):
    refused(
        model, IDS, assistant_strategy="assisted", assistant_model=llama.assistant, num_assistant_tokens=value,
        error=(ValueError, TypeError), names=["num_assistant_tokens"],
    )  # fmt: skip


@pytest.mark.parametrize(
    "field, value", [("num_assistant_tokens_schedule", "heuristic"), ("assistant_confidence_threshold", 0.4)]
)
def test_fields_of_stock_assistants_are_not_ignored(model, field, value, llama):
    refused(
        model, IDS, assistant_strategy="assisted", assistant_model=llama.assistant, **{field: value}, names=[field]
    )


# the call


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 2},
        {"num_beams": 2, "do_sample": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 3},
        {"dola_layers": "low"},
        {"force_words_ids": [[5]], "num_beams": 2},
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized"},
        {"cache_implementation": "offloaded"},
        {"use_cache": False},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"synced_gpus": True},
        {"max_new_tokens": 0},
        {"guidance_scale": 2.0},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
@pytest.mark.parametrize("place", ["keyword", "generation_config"])
def test_unsupported_options(model, kwargs, place):
    name = "logits_processor" if "guidance_scale" in kwargs else next(iter(kwargs))
    if place == "keyword":
        refused(model, IDS, **kwargs, return_dict_in_generate=True, names=[name])
        return
    if name in ("synced_gpus", "max_new_tokens"):
        pytest.skip("no generation config can hold it")
    options = {"pad_token_id": 0, "do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True, **kwargs}
    passed = GenerationConfig(**options)
    before = passed.to_dict()
    refused_config = {"generation_config": passed, "max_new_tokens": kwargs.get("max_new_tokens", 5)}
    refused(model, IDS, **refused_config, do_sample=kwargs.get("do_sample", False), names=[name])
    assert passed.to_dict() == before


def test_max_length_that_leaves_no_room(model):
    refused(model, IDS, max_new_tokens=None, max_length=IDS.shape[1], names=["max_length"])
    refused(model, IDS, max_new_tokens=None, max_length=IDS.shape[1] - 3, names=["max_length"])


def test_inputs_embeds(model):
    embeds = model.get_input_embeddings()(IDS)
    refused(model, inputs_embeds=embeds, names=["inputs_embeds"])
    refused(model, IDS, inputs_embeds=embeds, names=["inputs_embeds"])


def test_right_padded_prompts(model):
    ids = torch.cat([IDS, IDS])
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    refused(model, ids, attention_mask=mask, names=["right-padded", "padding_side"])


def test_a_row_of_padding_only(model):
    ids = torch.cat([IDS, IDS])
    mask = torch.ones_like(ids)
    mask[1] = 0
    refused(model, ids, attention_mask=mask, names=["attention_mask"])


def test_a_mask_of_another_width(model):
    for width in (IDS.shape[1] - 2, IDS.shape[1] + 2):
        refused(model, IDS, attention_mask=torch.ones(1, width, dtype=torch.long), names=["attention_mask"])


def test_empty_prompt(model):
    refused(model, torch.zeros(1, 0, dtype=torch.long), names=["input_ids"])


def test_stop_strings_without_a_tokenizer(model):
    refused(model, IDS, stop_strings=["a"], names=["stop_strings", "tokenizer"])


def test_position_ids(model):
    refused(model, IDS, position_ids=torch.arange(5, 5 + IDS.shape[1])[None], names=["position_ids"])
    own = torch.arange(IDS.shape[1])[None]
    kwargs = {"max_new_tokens": 5, "do_sample": False}
    out = model.generate(IDS, position_ids=own, assistant_strategy="plain", **kwargs)
    assert torch.equal(out, model.generate(IDS, **kwargs))


def test_token_type_ids_and_other_model_arguments(model):
    refused(model, IDS, no_such_argument=1, names=["no_such_argument"])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_prompt_learning_adapters(llama):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(copy.deepcopy(llama.model), config)
    forwards = []
    handle = wrapped.base_model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError, match="PEFT|virtual tokens|prompt learning"):
        wrapped.generate(input_ids=IDS, assistant_strategy="plain", max_new_tokens=5, do_sample=False)
    handle.remove()
    assert not forwards


# caches


def test_a_static_cache(model):
    cache = StaticCache(config=model.config, max_cache_len=64)
    refused(model, IDS, past_key_values=cache, error=TypeError, names=["past_key_values", "DynamicCache"])


def test_an_encoder_decoder_cache(model):
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    refused(model, IDS, past_key_values=cache, error=(TypeError, ValueError), names=["past_key_values"])


def test_a_cache_of_another_batch_size(model, llama):
    cache = DynamicCache(config=model.config)
    model.generate(llama.ids[:2], past_key_values=cache, max_new_tokens=3, do_sample=False)
    text = torch.cat([llama.ids[:1], torch.ones(1, 6, dtype=torch.long)], dim=1)
    refused(model, text, past_key_values=cache, names=["past_key_values"])


def test_a_cache_that_is_longer_than_the_text(model, llama):
    cache = DynamicCache(config=model.config)
    model.generate(llama.ids[:1], past_key_values=cache, max_new_tokens=3, do_sample=False)
    mask = torch.ones(1, 5, dtype=torch.long)
    refused(model, llama.ids[:1, :5], attention_mask=mask, past_key_values=cache, error=(ValueError, RuntimeError))


def test_a_cache_with_an_assistant_needs_the_whole_text(model, llama):
    """The assistant has to read the earlier turn again; found before the target runs."""
    cache = DynamicCache(config=model.config)
    out = model.generate(llama.ids[:1], past_key_values=cache, max_new_tokens=3, do_sample=False)
    mask = torch.ones(1, out.shape[1] + 4, dtype=torch.long)
    more = torch.full((1, mask.shape[1] - cache.get_seq_length()), 7)
    refused(
        model, more, attention_mask=mask, past_key_values=cache, assistant_strategy="assisted",
        assistant_model=llama.assistant, names=["input_ids"],
    )  # fmt: skip


# models


def tiny(prefix, model_class=None, **changes):
    config = getattr(transformers, f"{prefix}Config")(**changes)
    torch.manual_seed(0)
    return getattr(transformers, model_class or f"{prefix}ForCausalLM")(config).eval()


def test_encoder_decoder():
    model = tiny(
        "T5", "T5ForConditionalGeneration", vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    encoder = []
    handle = model.get_encoder().register_forward_pre_hook(lambda *_: encoder.append(1))
    refused(model, IDS, names=["T5", "encoder-decoder"])
    handle.remove()
    assert not encoder  # stock runs the encoder before it calls a decoding loop


RECURRENT = {
    "mamba": ("Mamba", {"vocab_size": 64, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}),
    "mamba2": (
        "Mamba2",
        {
            "vocab_size": 64, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "num_heads": 4,
            "head_dim": 8, "n_groups": 1,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            **SHAPE, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "num_experts": 2,
            "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "lfm2": ("Lfm2", {**SHAPE, "layer_types": ["conv", "full_attention"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name):
    prefix, changes = RECURRENT[name]
    refused(tiny(prefix, **changes), IDS, names=["`model`", prefix])


def test_chunked_attention():
    config = transformers.Llama4TextConfig(
        **{**SHAPE, "intermediate_size": 16}, head_dim=8, intermediate_size_mlp=16, num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"], attention_chunk_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(config).eval()
    refused(model, IDS, names=["`model`", "chunked"])


def test_attention_that_can_not_be_replaced():
    model = tiny("Bloom", vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    refused(model, IDS, names=["`model`", "Bloom", "attention"])


def test_shared_keys_and_values():
    config = transformers.Gemma3nTextConfig(
        **{**SHAPE, "num_hidden_layers": 4, "intermediate_size": 16}, head_dim=8, num_kv_shared_layers=2,
        vocab_size_per_layer_input=64, hidden_size_per_layer_input=4, laurel_rank=2,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    model = transformers.Gemma3nForCausalLM(config).eval()
    refused(model, IDS, names=["`model`"])


def test_latent_attention():
    model = tiny(
        "DeepseekV3", **SHAPE, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, n_group=1, topk_group=1,
        first_k_dense_replace=1,
    )  # fmt: skip
    refused(model, IDS, names=["`model`", "MLA"])


def test_the_assistant_is_checked_like_the_model(model):
    prefix, changes = RECURRENT["mamba"]
    refused(
        model, IDS, assistant_strategy="assisted", assistant_model=tiny(prefix, **changes), names=["assistant_model"]
    )


def test_an_assistant_with_another_vocabulary(model):
    other = build("Llama", vocab_size=families.VOCAB + 1025)
    refused(
        model,
        IDS,
        assistant_strategy="assisted",
        assistant_model=other,
        names=["assistant_model", "1024", "1089", "64"],
    )


@pytest.mark.parametrize("extra", [-3, 40])
def test_an_assistant_with_another_padding_of_the_vocabulary(model, extra):
    other = build("Llama", vocab_size=families.VOCAB + extra)
    ids = torch.arange(3, 15)[None]
    kwargs = {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": [61, 62, 63]}
    out = model.generate(ids, assistant_strategy="assisted", assistant_model=other, **kwargs)
    assert torch.equal(out, model.generate(ids, **kwargs))


def test_tokenizers_that_differ(model, llama):
    one, other = families.tokenizer(), copy.deepcopy(families.tokenizer())
    other.add_tokens(["more"])
    refused(
        model, IDS, assistant_strategy="assisted", assistant_model=llama.assistant, tokenizer=one,
        assistant_tokenizer=other, names=["assistant_tokenizer"],
    )  # fmt: skip


# rotary embeddings that change with the length


def rope_model(kind, original):
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        parameters["original_max_position_embeddings"] = original
        return build("Phi3", rope_parameters=parameters, original_max_position_embeddings=original)
    return build("Llama", rope_parameters=parameters, max_position_embeddings=original)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_crosses_its_threshold(kind):
    refused(rope_model(kind, 20), IDS, max_new_tokens=12, names=[kind, "20", "max_length"])


@pytest.mark.parametrize("kind, original", [("dynamic", 40), ("longrope", 40), ("longrope", 8)])
def test_rope_on_one_side_of_its_threshold(kind, original):
    model = rope_model(kind, original)
    kwargs = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(IDS, **kwargs)
    assert torch.equal(families.generate(model, "vegas", IDS, **kwargs), expected)


# order of checks


def test_nothing_is_streamed_before_a_refusal(model):
    streamer = Streamer()
    refused(model, IDS, streamer=streamer, assistant_strategy="no_such_method")
    assert not streamer.parts


def test_a_refused_cache_is_left_alone(model, llama):
    cache = DynamicCache(config=model.config)
    out = model.generate(llama.ids[:1], past_key_values=cache, max_new_tokens=3, do_sample=False)
    before = [layer.keys.clone() for layer in cache.layers]
    refused(model, out, past_key_values=cache, output_attentions=True, return_dict_in_generate=True)
    assert all(torch.equal(layer.keys, old) for layer, old in zip(cache.layers, before, strict=True))


def test_a_budget_larger_than_the_context_drafts_densely(llama):
    config = VegasConfig(min_context=0, num_assistant_tokens=3)
    kwargs = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    out = llama.model.generate(llama.ids[:1], assistant_strategy=config, **kwargs)
    stats = out.speculation
    assert stats.num_draft_tokens > 0
    assert stats.acceptance_rate == 1.0
    assert torch.equal(out.sequences, llama.stock(llama.ids[:1], max_new_tokens=20))


def test_the_assisted_config_has_no_fields_of_stock():
    shared = {"strategy", "hf_specdec_version", "num_assistant_tokens", "compile", "kernels"}
    assert set(AssistedConfig().to_dict()) == shared | {"adapter"}
