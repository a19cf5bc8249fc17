"""What the tests of Vegas share."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_specdec import VegasConfig
from hf_specdec.generation.runner import ModelRunner
from hf_specdec.kernels.request import TOKENS_ONLY


VOCAB = 60
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # so that attention is not flat and greedy text does not settle on one token
}


def build(config_class=LlamaConfig, model_class=LlamaForCausalLM, seed=0, **changes):
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SHAPE, **changes})).double().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompts(*lengths, seed=1):
    """Left-padded ids and mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(2, VOCAB, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def vegas(**settings) -> VegasConfig:
    return VegasConfig(**{"min_context": 0, "min_tokens": 1, "kv_ratio": 0.3, **settings})


def generate(model, inputs, new=24, **options):
    options = {"do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, max_new_tokens=new, **options)


def plain(model, inputs, new=24, **options):
    return generate(model, inputs, new, **options).sequences


@contextmanager
def wrapped(owner, name, around):
    """Replace a method by `around(original, *args, **kwargs)` for a while."""
    original = getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))
        yield


@contextmanager
def recorded_drafts():
    """Collect the logits of every draft forward."""
    found = []

    def forward(original, runner, tokens, starts, request=TOKENS_ONLY):
        result = original(runner, tokens, starts, request)
        if request.view is not None:
            found.append(result.logits.clone())
        return result

    with wrapped(ModelRunner, "forward", forward):
        yield found
