"""Random tiny models of many families, in float64, each with a perturbed copy of itself as its assistant.

Random weights are useless for acceptance statistics but test exactness as well as any. The copy's noise is chosen so
that drafts are accepted 0 to k times, and the EOS token so that some rows of the batch end inside a generation.
"""

from __future__ import annotations

import copy
import functools
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_specdec import SpeculationConfig
from hf_specdec.generation.methods.spd import method as spd
from hf_specdec.generation.methods.spd.depth_map import DepthMap
from hf_specdec.generation.methods.spd.draft_module import PipelineDraftModule, load_draft_module
from hf_specdec.generation.methods.via_sd import slim_drafter
from hf_specdec.generation.methods.via_sd.slim_model import Slim, load_slim, save_slim
from hf_specdec.registry import preset, strategy_class


ROOT = Path(__file__).resolve().parents[1]
"""The repository."""
TINY = ROOT / "tests" / "tiny"
"""A small trained target, its draft and their tokenizer."""
ORACLE = "oracle"
VOCAB = 64
WINDOW = 8
LENGTHS = (19, 3, 12, 7)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough that attention is not flat and greedy text does not settle on one token
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,  # tied random weights repeat the last token for ever
}
HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": WINDOW, "head_dim": 8}),
    "gemma2": ("Gemma2", {**HYBRID, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", {**HYBRID, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gpt_neox": ("GPTNeoX", {"initializer_range": 0.4}),
    "gpt2": ("GPT2", {}),
    "phi3": ("Phi3", {}),
    "gpt_oss": (
        "GptOss",
        {**HYBRID, **MOE, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
}
NAMES = list(FAMILIES)
# stock's eager attention turns fully masked rows into NaN in float64, and Gemma-2's soft-cap exists in eager only
SINGLE = ("gemma2",)
SEEDS = {"gemma2": 5, "gpt_neox": 6}  # others fall into a loop at once
SLIDING = ("mistral", "gemma2", "gemma3", "gpt_oss")


@dataclass
class Family:
    """A model, its assistant and a ragged, left-padded batch.

    Args:
        name (`str`): key of `FAMILIES`.
        model (`PreTrainedModel`): the target; its generation config has no EOS.
        assistant (`PreTrainedModel`): a noisy copy.
        ids (`torch.Tensor` of shape `[4, 19]`): prompts.
        mask (`torch.Tensor` of shape `[4, 19]`): their attention mask.
        eos (`int`): a token that ends some row of a greedy generation of 50 tokens before others.
    """

    name: str
    model: PreTrainedModel
    assistant: PreTrainedModel
    ids: torch.Tensor
    mask: torch.Tensor
    eos: int

    @property
    def tolerance(self) -> float:
        """How far two exact computations of one state may be apart."""
        return 2e-5 if self.name in SINGLE else 1e-10

    @property
    def one(self) -> dict[str, torch.Tensor]:
        """A single unpadded prompt."""
        return {"input_ids": self.ids[:1]}

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        """All four prompts."""
        return {"input_ids": self.ids, "attention_mask": self.mask}

    def inputs(self, rows: int) -> dict[str, torch.Tensor]:
        """Return `one` or `batch`."""
        return self.one if rows == 1 else self.batch

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with stock decoding; greedy unless said otherwise."""
        return self.model.generate(*args, **{"do_sample": False, **kwargs})

    def ours(self, strategy: str, *args: Any, tokens: int = 3, **kwargs: Any) -> Any:
        """Generate with a registered strategy or preset under test settings; greedy unless said otherwise."""
        return generate(self.model, strategy, *args, assistant=self.assistant, tokens=tokens, **kwargs)


def configured(strategy: str, tokens: int = 3) -> SpeculationConfig:
    """Return a preset's config with settings that make it speculate on short texts.

    A lossy preset gets the settings under which the distribution that it declares is the model's own: what does not
    depend on the distribution is compared with stock here, the distribution itself is tested in the method's own file.
    """
    config = preset(strategy)
    if config.strategy == "spd":
        return config.override(adapter=ORACLE)
    changes: dict[str, Any] = {"num_assistant_tokens": tokens} if config.has_field("num_assistant_tokens") else {}
    if config.strategy == "vegas":
        changes |= {"min_context": 0, "min_tokens": 2, "kv_ratio": 0.3}
    if config.strategy == "diversed":
        changes |= {"weight": 1.0}
    if config.strategy == "specbound":
        changes |= {"max_depth": 1, "tau": 0.1}
    if config.strategy == "via_sd":
        # of two layers, the first one's MLP may be left out; flat random distributions must not end every stage at
        # once
        changes |= {"adapter": mask([True, False, True, True], "sublayer"), "stage_stop_conf": 0.0}
        changes |= {"stage_len": 5, "regen_min_conf": 0.0, "tau_accept": 0.5, "tau_escalate": 0.2}
    if strategy == "via_sd:prefilter":
        changes |= {"tau_accept": 0.1, "tau_escalate": 0.0}  # lets wrong drafts pass too
    if strategy in ("via_sd:safe", "via_sd:paper"):
        escalated = {"tau_accept": None, "tau_escalate": None, "bonus_min_conf": None}  # every draft
        changes |= {"force": True, "lossy_level": 0.8, **escalated}
    return config.override(**changes)


class Oracle(PipelineDraftModule):
    """A draft module for tests: guesses by a noisy copy of the model, and learns the text from its embeddings."""

    def __init__(self, model: PreTrainedModel, stages: int = 2, noise: float = 0.04) -> None:
        layers = model.config.get_text_config().num_hidden_layers
        super().__init__(model, DepthMap(layers, stages), [layers - 1])
        self.__dict__["other"] = perturbed(model, noise)
        self.other.requires_grad_(False)

    def reader(self, model: PreTrainedModel, capacity: int) -> Any:
        return OracleReader(self)


class OracleReader:
    """What an `Oracle` has read of one text, from the first token that the call ran."""

    def __init__(self, module: Oracle) -> None:
        self.module = module

    def start(self, features: dict[int, torch.Tensor], first: int) -> None:
        self.seen, self.first = features[0], first

    def draft(self, finished: Any, flying: Any) -> torch.Tensor:
        self.seen = torch.cat([self.seen, *(features[0] for features in finished)], dim=1)
        rows = torch.cat([self.seen, *(features[0] for _, features in flying)], dim=1)
        places = torch.arange(self.first, self.first + rows.shape[1])[None]
        other = self.module.other
        hidden = other.base_model(inputs_embeds=rows, position_ids=places, use_cache=False).last_hidden_state
        return other.get_output_embeddings()(hidden[:, -1])


_oracles: WeakKeyDictionary[PreTrainedModel, PipelineDraftModule] = WeakKeyDictionary()


def load_oracle(model: PreTrainedModel, name: str) -> PipelineDraftModule:
    """Stand in for `load_draft_module`; any name but `ORACLE` goes to it."""
    if name != ORACLE:
        return load_draft_module(model, name)
    if model not in _oracles:
        with torch.random.fork_rng([]):  # whoever is the first to need it draws no other text for that
            _oracles[model] = Oracle(model)
    return _oracles[model]


MASK = "mask"


def mask(keep: Sequence[bool], granularity: str = "layer") -> str:
    """Return the name of an adapter that is a mask of any model, which nobody has measured."""
    return f"{MASK} {granularity} {''.join('01'[kept] for kept in keep)}"


def load_mask(model: PreTrainedModel, name: str) -> Slim:
    """Stand in for `load_slim`; any name but those of `mask` goes to it."""
    if not name.startswith(MASK + " "):
        return load_slim(model, name)
    _, granularity, keep = name.split(" ")
    return Slim(granularity, [kept == "1" for kept in keep], {})


STAND_INS = [(spd, "load_draft_module", load_oracle), (slim_drafter, "load_slim", load_mask)]
"""Module, name and function: what reads adapters that are no files; `conftest.py` puts it there, and ranks have to."""


def with_files(config: SpeculationConfig, model: PreTrainedModel, folder: Path) -> SpeculationConfig:
    """Return the settings with their mask, if they have one, in a folder."""
    name = getattr(config, "adapter", None) or ""
    if not name.startswith(MASK + " "):
        return config
    slim = load_mask(model, name)
    save_slim(folder, model, slim.keep, slim.granularity)
    return config.override(adapter=str(folder))


def extras(strategy: str, assistant: PreTrainedModel) -> dict[str, Any]:
    """Return the keywords that a strategy needs beside its config."""
    needs = strategy_class(strategy.partition(":")[0]).needs_assistant and not preset(strategy).brings_drafter
    return {"assistant_model": assistant} if needs else {}


def generate(model: Any, strategy: str, *args: Any, assistant: Any = None, tokens: int = 3, **kwargs: Any) -> Any:
    """Generate with `model` under a strategy's test settings."""
    kwargs = {"do_sample": False, **extras(strategy, assistant), **kwargs}
    return model.generate(*args, assistant_strategy=configured(strategy, tokens), **kwargs)


def build(prefix: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a random model of the classes `{prefix}Config` and `{prefix}ForCausalLM`."""
    torch.manual_seed(seed)
    config_name = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    config = getattr(transformers, config_name)(**{**SHAPE, **changes})
    model_class = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    model = getattr(transformers, model_class)(config).double().eval()
    randomize(model)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def tiny_llama(**changes: Any) -> PreTrainedModel:
    """Build a random Llama of two layers in float64, always the same for the same changes of its config."""
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **heads, **changes})).double().eval()


def randomize(model: PreTrainedModel) -> None:
    """Give sinks and biases, which some families initialise to zero, values that matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any() or "sinks" in name:
                parameter.normal_(0, 0.2)


def perturbed(model: PreTrainedModel, noise: float = 0.04, seed: int = 1) -> PreTrainedModel:
    """Return a copy of `model` with noise on every weight matrix, as a share of the matrix's own spread."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                fresh = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += noise * parameter.std() * fresh
    return other


def prompts(
    lengths: tuple[int, ...] = LENGTHS, vocab: int = VOCAB, seed: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a left-padded batch of random ids and its mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()


@functools.cache
def family(name: str) -> Family:
    """Return a family's models; they are shared by all tests, which must leave them as they are."""
    prefix, changes = FAMILIES[name]
    model = build(prefix, seed=SEEDS.get(name, 0), **changes)
    if name in SINGLE:
        model.float().set_attn_implementation("eager")  # SDPA, 5.17's default here, leaves the soft-cap out
    ids, mask = prompts()
    text = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)[:, ids.shape[1] :]
    return Family(name, model, perturbed(model), ids, mask, choose_eos(text))


def choose_eos(text: torch.Tensor) -> int:
    """Return a token that ends some row of `text` neither at its start nor with all others."""
    best, chosen = -1, int(text[0, 10])
    for token in text.unique().tolist():
        first = [row.index(token) if token in row else 99 for row in text.tolist()]
        score = sum(4 <= place < 30 for place in first) - 2 * sum(place < 4 for place in first)
        if score < len(first) and score > best:
            best, chosen = score, token
    return chosen


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters (see `letter`); ids 0 to 2 are special."""
    from tokenizers import Tokenizer, decoders, models

    words = {"[PAD]": 0, "[BOS]": 1, "[UNK]": 2} | {letter(i): i for i in range(3, VOCAB)}
    inner = Tokenizer(models.BPE(words, [], unk_token="[UNK]"))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", bos_token="[BOS]", unk_token="[UNK]", padding_side="left"
    )


def letter(token: int) -> str:
    """Return the character of a token of `tokenizer()`."""
    return (string.ascii_letters + string.digits)[token - 3] if token > 2 else ""
