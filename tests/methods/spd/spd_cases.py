"""What SPD's tests share: small targets, and draft modules that say what a test wants."""

from __future__ import annotations

import copy
import functools

import families
import torch
from families import build
from torch.nn.functional import one_hot

from hf_specdec import SPDConfig
from hf_specdec.generation.methods.spd.depth_map import DepthMap
from hf_specdec.generation.methods.spd.draft_module import KIND, PipelineDraftModule
from hf_specdec.generation.models.adapters import remember
from hf_specdec.generation.models.surgery import decoder_layers
from hf_specdec.training.data import Text


UNEVEN = (1, 3, 2, 2)


@functools.cache
def target(name="llama", layers=8, dtype="float64", **changes):
    """Return a random model of a family; no test may change it."""
    prefix, own = families.FAMILIES[name]
    own = {"initializer_range": 0.3, **own, "num_hidden_layers": layers}  # for texts that don't settle on one word
    if "layer_types" in own:
        own["layer_types"] = own["layer_types"] * (layers // 2)
    model = families.build(prefix, seed=families.SEEDS.get(name, 1), **{**own, **changes})
    if name in families.SINGLE:
        model.set_attn_implementation("eager")
        dtype = "float32" if dtype == "float64" else dtype
    return model.to(getattr(torch, dtype))


def prompt(length, seed=2, vocab=families.VOCAB):
    return torch.randint(3, vocab, (1, length), generator=torch.Generator().manual_seed(seed))


def spd(model, module, ids, new, *, schedule="serial", **kwargs):
    """Generate greedily, unless said otherwise, with a module that lies in no file."""
    remember(model, KIND, "module", module)
    config = SPDConfig(adapter="module", schedule=schedule)
    kwargs = {"do_sample": False, "return_dict_in_generate": True, **kwargs}
    return model.generate(ids, assistant_strategy=config, max_new_tokens=new, **kwargs)


def stock(model, ids, new, **kwargs):
    return model.generate(ids, max_new_tokens=new, **{"do_sample": False, **kwargs})


@torch.no_grad()
def raw_states(model, ids):
    """Return hidden states 0 to L of a stock forward: the first layer's input, and every layer's raw output."""
    found, layers = [], decoder_layers(model)
    take = [layers[0].register_forward_pre_hook(lambda _, args, kwargs: found.append(args[0]), with_kwargs=True)]
    take += [
        layer.register_forward_hook(
            lambda _, __, output: found.append(output if torch.is_tensor(output) else output[0])
        )
        for layer in layers
    ]
    model(ids, use_cache=False)
    for handle in take:
        handle.remove()
    return found


@functools.cache
def twin(model):
    """Return a copy for looking things up, so that a count of the model's own layer calls stays right."""
    return copy.deepcopy(model)


@functools.cache
def words(model):
    """Return the first layer's input for every word (of families that add no positions to it)."""
    return raw_states(twin(model), torch.arange(model.config.get_text_config().vocab_size)[None])[0][0]


@torch.no_grad()
def following_logits(model, text):
    return twin(model)(torch.tensor([text]), use_cache=False).logits[:, -1]


class Noted:
    """A reader that says which words it has been handed, recovered from their states, and keeps everything."""

    def __init__(self, module, inner):
        self.module, self.inner = module, inner

    def start(self, features, first):
        self.rows, self.first = features[0], first
        self.module.prompts.append(features)
        if self.inner is not None:
            self.inner.start(features, first)

    def draft(self, finished, flying):
        self.rows = torch.cat([self.rows, *(features[0] for features in finished)], dim=1)
        rows = torch.cat([self.rows, *(features[0] for _, features in flying)], dim=1)
        self.module.events.append("draft")
        if self.inner is not None:
            logits = self.inner.draft(finished, flying)
        else:
            guess = self.module.guess(self.first + rows.shape[1], rows)
            logits = guess if torch.is_tensor(guess) else 50.0 * one_hot(torch.tensor([guess]), self.module.width)
        self.module.calls.append((rows, finished, flying, logits))
        return logits


class Module(PipelineDraftModule):
    """A draft module with random weights, or one that guesses what `guess(place, rows)` returns; notes its calls."""

    def __init__(self, model, stages, guess=None, stage_layers=None, features=None, templates=(1, 0), **options):
        layers = model.config.get_text_config().num_hidden_layers
        super().__init__(model, DepthMap(layers, stages, stage_layers, features), templates, **options)
        noise = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64).to(parameter)
        self.requires_grad_(False)
        twin(model)
        self.guess, self.prompts, self.calls, self.events = guess, [], [], []

    def reader(self, model, capacity):
        return Noted(self, None if self.guess else super().reader(model, capacity))


def says(text, wrong=lambda place: False):
    """Return a guess that knows the text, and misses it where `wrong`."""
    return lambda place, rows: (int(text[0, min(place, text.shape[1] - 1)]) + bool(wrong(place))) % families.VOCAB


def ids_of(model, rows):
    return torch.cdist(rows[0], words(model)).argmin(dim=1).tolist()


# the schedule

STAGES = [(2, None), (4, None), (8, None), (4, UNEVEN)]


SMALL = {"num_hidden_layers": 4, "vocab_size": 48, "initializer_range": 0.3}


@functools.cache
def small():
    """Return a model to train for."""
    return build("Llama", seed=3, **SMALL).float()


@functools.cache
def texts():
    found = [Text(stock(small(), prompt(4, seed=seed, vocab=48), 20)[0], 4) for seed in range(3)]
    return [found[0], *found]  # the first one is held out, and trained on


QUICK = {"num_stages": 4, "num_draft_layers": 1, "vocabulary_size": None, "batch_tokens": 60, "learning_rate": 3e-3}
