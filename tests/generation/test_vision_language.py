"""Models that read images, asked with text: as stock decodes it. What is no text is refused before it is encoded."""

from __future__ import annotations

import functools

import families
import pytest
import torch
import transformers
from families import ROPE, SHAPE

import hf_specdec


STRATEGIES = ["plain", "prompt_lookup", "vegas", "assisted", "specbound", "via_sd"]
GREEDY = {"do_sample": False, "max_new_tokens": 14}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32}
QWEN_IDS = {"image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}
MROPE = {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
SIZED = {"head_dim": 8}
MODELS = {
    "gemma3": (
        "Gemma3",
        {"text_config": {**SHAPE, **families.HYBRID, **SIZED, "query_pre_attn_scalar": 8}, "mm_tokens_per_image": 4},
        VISION,
    ),
    "qwen2_vl": ("Qwen2VL", {"text_config": {**SHAPE, **MROPE}, **QWEN_IDS}, {"depth": 1, "embed_dim": 16}),
    "qwen2_5_vl": ("Qwen2_5_VL", {"text_config": {**SHAPE, **MROPE}, **QWEN_IDS}, QWEN_VISION),
    "qwen3_vl": ("Qwen3VL", {"text_config": {**SHAPE, **SIZED, **MROPE}, **QWEN_IDS}, QWEN_VISION),
    "llava": (
        "Llava",
        {"text_config": {**SHAPE, "model_type": "llama"}},
        {**VISION, "model_type": "clip_vision_model"},
    ),
    "mistral3": (
        "Mistral3",
        {"text_config": {**SHAPE, **SIZED, "model_type": "mistral", "sliding_window": None}},
        {**VISION, "model_type": "pixtral", "head_dim": 8},
    ),
    "paligemma": (
        "PaliGemma",
        {"text_config": {**SHAPE, **SIZED, "model_type": "gemma"}, "projection_dim": 32},
        {**VISION, "model_type": "siglip_vision_model", "projection_dim": 32},
    ),
    "smolvlm": ("SmolVLM", {"text_config": {**SHAPE, "model_type": "llama"}, "scale_factor": 2}, VISION),
    "idefics3": ("Idefics3", {"text_config": {**SHAPE, "model_type": "llama"}, "scale_factor": 2}, VISION),
    "internvl": ("InternVL", {"text_config": {**SHAPE, "model_type": "qwen2"}}, {**VISION, "image_size": [28, 28]}),
}
TYPES = {"gemma3": "token_type_ids", "qwen2_vl": "mm_token_type_ids", "qwen2_5_vl": "mm_token_type_ids"}


@functools.cache
def model_of(name):
    """Return a random model and a noisy copy."""
    prefix, changes, vision = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")
    changes = {"image_token_id": 63, "pad_token_id": 0, "tie_word_embeddings": False, **changes}
    changes["vision_config"] = vision
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config(**changes)).double().eval()
    families.randomize(model)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model, families.perturbed(model)


@functools.cache
def prompts():
    ids, mask = families.prompts((19, 7))
    return ids.clamp(max=50), mask


def ours(model, assistant, strategy, *args, **kwargs):
    return families.generate(model, strategy, *args, assistant=assistant, **{**GREEDY, **kwargs})


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "paligemma"])
def test_text_is_decoded_as_by_stock(name, strategy):
    """A left-padded batch with token types as processors give them, and a second turn from the returned cache."""
    (model, assistant), (ids, mask) = model_of(name), prompts()
    types = {TYPES[name]: torch.zeros_like(ids)} if name in TYPES else {}
    expected = model.generate(ids, attention_mask=mask, **types, **GREEDY)
    assert len(expected[:, ids.shape[1] :].unique()) > 6
    options = {"attention_mask": mask, "return_dict_in_generate": True}
    out = ours(model, assistant, strategy, ids, **options, **types)
    assert torch.equal(out.sequences, expected)
    more = torch.cat([expected, ids[:, -5:].flip(1).clamp(min=3)], dim=1)
    wide = torch.cat([mask, mask.new_ones(2, more.shape[1] - mask.shape[1])], dim=1)
    again = {"attention_mask": wide, "past_key_values": out.past_key_values}
    expected = model.generate(more, attention_mask=wide, **GREEDY)
    assert torch.equal(ours(model, assistant, strategy, more, **again), expected)


@pytest.fixture
def untouched():
    """Return a function that gives a model of which no module may run."""
    handles = []

    def watch(name):
        model, _ = model_of(name)
        handles.extend(m.register_forward_pre_hook(lambda *_: pytest.fail("a module ran")) for m in model.modules())
        return model

    yield watch
    for handle in handles:
        handle.remove()


IMAGES = {
    "pixel_values": torch.zeros(1, 3, 28, 28), "pixel_values_videos": torch.zeros(1, 3, 28, 28),
    "image_grid_thw": torch.ones(1, 3), "mm_token_type_ids": torch.ones(1, 6), "mm_encoder_outputs": {"image": 1},
}  # fmt: skip


@pytest.mark.parametrize("argument", IMAGES)
def test_what_is_no_text_is_refused_before_it_is_encoded(untouched, argument):
    model = untouched("qwen2_5_vl")
    with pytest.raises(ValueError, match=f'`{argument}`.*text only.*assistant_strategy="off"'):
        model.generate(prompts()[0][:1, :6], assistant_strategy="plain", **GREEDY, **{argument: IMAGES[argument]})


def test_the_official_hook_names_the_images_that_stock_has_encoded():
    model, _ = model_of("llava")
    ids = torch.tensor([[5, 6, *[63] * 4, 7]])
    loop = hf_specdec.decoding_loop("plain")
    with pytest.raises(ValueError, match="`pixel_values`.*text only"):
        model.generate(ids, pixel_values=IMAGES["pixel_values"].double(), custom_generate=loop, **GREEDY)
    types = torch.tensor([[0, 0, 1, 1, 0]])
    with pytest.raises(ValueError, match="`mm_token_type_ids`.*text only"):
        model_of("qwen2_vl")[0].generate(ids[:, :5], mm_token_type_ids=types, custom_generate=loop, **GREEDY)


def test_positions_that_differ_by_axis_are_refused(untouched):
    positions = torch.arange(6).repeat(4, 1, 1)
    positions[3, 0, 2] = 1
    with pytest.raises(ValueError, match="position_ids"):
        untouched("qwen2_5_vl").generate(
            prompts()[0][:1, :6], assistant_strategy="plain", position_ids=positions, **GREEDY
        )


def test_prefixes_that_are_read_in_both_directions_are_refused(untouched):
    with pytest.raises(ValueError, match="`model` PaliGemma.*not causal"):
        untouched("paligemma").generate(prompts()[0][:1, :6], assistant_strategy="plain", **GREEDY)


def test_zeros_are_embedded_by_models_that_read_text_only():
    model = families.family("gpt2").model
    with pytest.raises(ValueError, match="`token_type_ids`"):
        model.generate(torch.tensor([[5, 6]]), token_type_ids=torch.zeros(1, 2), assistant_strategy="plain")
