"""The model after SpecBound's calls: exceptions, copies, threads and what pieces share."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from specbound_cases import LAYERS, bounded, hidden_after, ours, random_heads, stock_text, tower, truth
from transformers import LogitsProcessor

from hf_specdec import SpecBoundConfig
from hf_specdec.generation.methods.specbound.exit_heads import ExitReader
from hf_specdec.generation.models.layerwise import Layerwise


# afterwards


class Fails:
    def __init__(self, at):
        self.left = at

    def __call__(self, *_, **__):
        self.left -= 1
        if self.left < 0:
            raise KeyError("raised on purpose")


class FailingProcessor(LogitsProcessor):
    def __init__(self, at):
        self.fails = Fails(at)

    def __call__(self, input_ids, scores):
        self.fails()
        return scores


def shape_of(model):
    """Return what must be the same objects afterwards, and the numbers of hooks."""
    return [
        (name, id(module), type(module), sorted(vars(module)), len(module._forward_hooks),
         len(module._forward_pre_hooks), module.training, id(module.forward.__func__))
        for name, module in model.named_modules()
    ], model.config._attn_implementation, model.config.to_dict()  # fmt: skip


@pytest.mark.parametrize("kind", ["final", "block"])
@pytest.mark.parametrize("where", ["layer 2", "layer 4", "layer 8", "head", "processor", "norm"])
@pytest.mark.parametrize("at", [1, 17])
def test_an_exception_leaves_the_model_as_it_was(llama, kind, where, at, adapter, monkeypatch):
    model, fails, handle, kwargs = llama.model, Fails(at), None, {}
    config = bounded(**({"adapter": adapter(model, "block"), "alpha": 0} if kind == "block" else {}))
    ours(llama, config, max_new_tokens=2)
    before = shape_of(model)
    if where.startswith("layer"):
        handle = model.model.layers[int(where[-1]) - 1].register_forward_hook(fails)
    elif where == "norm":
        handle = model.model.norm.register_forward_hook(fails)
    elif where == "head":
        logits = ExitReader.logits
        monkeypatch.setattr(ExitReader, "logits", lambda *args: (fails(), logits(*args))[1])
    else:
        kwargs["logits_processor"] = [FailingProcessor(at)]
    try:
        with pytest.raises(KeyError, match="on purpose"):
            ours(llama, config, max_new_tokens=50, **kwargs)
    finally:
        if handle is not None:
            handle.remove()
    monkeypatch.undo()
    assert shape_of(model) == before
    expected = truth()[:, : llama.ids.shape[1] + 8]
    assert torch.equal(llama.stock(**llama.one, max_new_tokens=8), expected)
    assert torch.equal(ours(llama, config, max_new_tokens=8).sequences, expected)


def test_the_pieces_of_a_model_share_its_modules(llama):
    """A recording, the norm and the tail change nothing in the model and hold no copies of its weights."""
    before = shape_of(llama.model)
    parts = Layerwise(llama.model)
    assert parts.layers is llama.model.model.layers
    assert list(parts.norm) == [llama.model.model.norm]
    hidden, logits = hidden_after("llama", LAYERS)
    calls = []
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in parts.layers]
    with torch.no_grad():
        torch.testing.assert_close(parts.tail()(parts.norm(hidden)), logits)
    for handle in handles:
        handle.remove()
    assert not calls
    assert shape_of(llama.model) == before


@pytest.mark.parametrize("kind", ["adapter", "block"])
def test_copies_of_a_model_and_its_end(llama, kind, tmp_path):
    model = copy.deepcopy(llama.model)
    random_heads(model, [2, 3], kind, torch.arange(2, 60)).save(tmp_path, SpecBoundConfig(), model)
    config = bounded(adapter=str(tmp_path), alpha=0)
    kwargs = {**llama.one, "max_new_tokens": 15, "do_sample": False}
    model.generate(**kwargs, assistant_strategy=config)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
        expected = other.generate(**kwargs)
        assert torch.equal(other.generate(**kwargs, assistant_strategy=config), expected)
        assert not torch.equal(expected, truth()[:, : expected.shape[1]])
    # what is kept per model does not keep the model
    gone = weakref.ref(model)
    del model, other
    gc.collect()
    assert gone() is None


def test_two_threads_with_two_models(adapter):
    cases = [tower("llama", 6), tower("gemma3", 6)]
    configs = [
        bounded(case.name, max_depth=4, alpha=0, adapter=adapter(case.model, kind, (2, 3, 4)))
        for case, kind in zip(cases, ("adapter", "block"), strict=True)
    ]
    results, barrier = [None, None], threading.Barrier(2)

    def run(index):
        barrier.wait()
        for _ in range(3):
            results[index] = ours(cases[index], configs[index], max_new_tokens=20).sequences

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for case, found in zip(cases, results, strict=True):
        assert torch.equal(found, stock_text(case.name, 1, 50)[:, : case.ids.shape[1] + 20])
