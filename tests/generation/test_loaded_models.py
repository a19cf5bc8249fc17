"""Models as people load and wrap them: offloaded, in training, under Accelerate, with adapters per row, quantised."""

from __future__ import annotations

import copy
import functools

import families
import pytest
import torch
import transformers
from families import build, extras, generate
from tiers import tiered


STRATEGIES = ["plain", "prompt_lookup", "assisted", "vegas", "specbound", "via_sd", "diversed", "spd"]
METHODS = tiered(STRATEGIES, ["prompt_lookup", "specbound", "via_sd"])


def offloaded(model, how, folder):
    accelerate = pytest.importorskip("accelerate")
    cpu = torch.device("cpu")
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device=cpu)
    if how == "disk":
        accelerate.disk_offload(model, offload_dir=folder, execution_device=cpu)
        return model
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"], "cpu")
    places |= {"model.layers.1": "disk", "lm_head": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("how", ["cpu", "disk", "some layers"])
@pytest.mark.parametrize("strategy", METHODS)
def test_offloaded(strategy, how, llama, tmp_path):
    if strategy == "spd":
        pytest.skip("its oracle is a copy of the model, which has no weights then")
    model = offloaded(copy.deepcopy(llama.model), how, tmp_path)
    expected = llama.stock(**llama.batch, max_new_tokens=12)
    assert torch.equal(model.generate(**llama.batch, max_new_tokens=12, do_sample=False), expected)
    assert torch.equal(
        generate(model, strategy, **llama.batch, assistant=llama.assistant, max_new_tokens=12), expected
    )


def test_what_needs_offloaded_weights_says_so(llama, tmp_path):
    model = offloaded(copy.deepcopy(llama.model), "cpu", tmp_path)
    with pytest.raises(ValueError, match="the embedding of LlamaForCausalLM is offloaded"):
        model.generate(
            **llama.one, max_new_tokens=3, assistant_strategy=str(families.ROOT / "examples/adapters/specbound")
        )


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("strategy", METHODS)
def test_in_training_with_gradient_checkpointing(strategy, llama):
    """Stock loses its cache and so the text; here the text is that of the model without checkpointing."""
    model = copy.deepcopy(llama.model).train()
    model.gradient_checkpointing_enable()
    found = generate(model, strategy, **llama.batch, assistant=llama.assistant, max_new_tokens=12)
    assert torch.equal(found, llama.stock(**llama.batch, max_new_tokens=12))
    assert model.training and model.is_gradient_checkpointing


@pytest.fixture
def accelerate():
    """Accelerate without the state that it keeps for a process, which other tests may have set."""
    accelerate = pytest.importorskip("accelerate")
    state = accelerate.state.AcceleratorState
    state._reset_state(reset_partial_state=True)
    yield accelerate
    state._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("strategy", METHODS)
def test_accelerates_mixed_precision(strategy, name, accelerate):
    """It is hung on the model's forward, so layers that are called by themselves have to be told."""
    model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(
        copy.deepcopy(families.family(name).model).float(), evaluation_mode=True
    )
    assistant = copy.deepcopy(families.family(name).assistant).float()
    inputs = {**families.family(name).one, "max_new_tokens": 12}
    dtypes = set()
    layer = model.get_submodule("model.layers.0.mlp.down_proj" if name == "llama" else "transformer.h.0.mlp.c_proj")
    layer.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
    expected = model.generate(**inputs, do_sample=False)
    assert torch.equal(generate(model, strategy, **inputs, assistant=assistant), expected)
    if strategy not in ("via_sd", "spd"):  # which run parts of the model, or a copy of it, outside its forward
        assert dtypes == {torch.bfloat16}


@functools.cache
def mixed():
    """A model with two LoRA adapters, one adapter per row, and what stock writes; a row ends early."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    llama = families.family("llama")
    torch.manual_seed(5)
    model = peft.get_peft_model(copy.deepcopy(llama.model), lora, adapter_name="a")
    model.add_adapter("b", lora)
    model.eval()
    inputs = {**llama.batch, "adapter_names": ["a", "b", "__base__", "a"], "max_new_tokens": 20}
    text = model.generate(**inputs, do_sample=False)[:, llama.ids.shape[1] :]
    inputs["eos_token_id"] = families.choose_eos(text)
    return model, inputs, model.generate(**inputs, do_sample=False, return_dict_in_generate=True, output_scores=True)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("strategy", METHODS)
def test_an_adapter_per_row(strategy, llama):
    if strategy == "spd":
        pytest.skip("its oracle is a copy of the model, with the hooks of four rows")
    model, inputs, expected = mixed()
    ends = (expected.sequences[:, llama.ids.shape[1] :] != 0).sum(dim=1)
    assert len(ends.unique()) > 1
    found = generate(
        model, strategy, **inputs, assistant=llama.assistant, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-6, rtol=0)
    # and the caller's hooks are gone as stock leaves them
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_that_do_not_fit_the_rows_are_refused():
    model, inputs, _ = mixed()
    with pytest.raises(ValueError, match="`adapter_names` has 3 names for 4 rows"):
        model.generate(**{**inputs, "adapter_names": ["a", "b", "a"]}, assistant_strategy="plain")
    with pytest.raises(ValueError, match="`adapter_names` can't be used with `compile='inductor'`"):
        model.generate(**inputs, assistant_strategy=families.configured("vegas").override(compile="inductor"))


def dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
def test_dynamically_quantised_by_torch(llama):
    """One scale serves all tokens of a forward, so it can't be a target; it may draft, though its head is packed."""
    inputs = {"input_ids": llama.ids[:1], "max_new_tokens": 12}
    packed = dynamic(copy.deepcopy(llama.model).float())
    with pytest.raises(ValueError, match="`model` LlamaForCausalLM is not supported .*one scale for all tokens"):
        packed.generate(**inputs, assistant_strategy="plain")
    full = copy.deepcopy(llama.model).float()
    found = generate(full, "assisted", **inputs, assistant=packed)
    assert torch.equal(found, full.generate(**inputs, do_sample=False))


AFMOE: dict[str, object] = {
    "experts_implementation": "eager",
    "sliding_window": 9,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_dense_layers": 1,
    "head_dim": 8,
}
JETMOE = {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize("strategy", tiered([*STRATEGIES, "vegas:per_key_head"], ["prompt_lookup", "vegas"]))
@pytest.mark.parametrize("prefix, changes", [("Afmoe", AFMOE), ("JetMoe", JETMOE)])
def test_attention_that_is_viewed_or_repeated(strategy, prefix, changes):
    """AFMoE views what attention returns as one block; JetMoE repeats what the cache returns before it attends."""
    if strategy == "spd":
        pytest.skip("needs a draft module of the family")
    if not hasattr(transformers, f"{prefix}Config"):
        pytest.skip(f"this release has no {prefix}")
    model = build(prefix, **changes)
    ids, mask = families.prompts()
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 14}
    found = model.generate(
        **inputs,
        do_sample=False,
        assistant_strategy=families.configured(strategy),
        **extras(strategy, families.perturbed(model)),
    )
    assert torch.equal(found, model.generate(**inputs, do_sample=False))
