"""The contract on the model: as before after success and after an exception, threads, copies, adapters, pipelines."""

from __future__ import annotations

import copy
import functools
import pickle
import threading

import families
import pytest
import torch
from contract_cases import alternating, every_base, every_preset_and_some_families, stock_tokens
from families import extras, family, generate, tokenizer
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from hf_specdec.generation.models.surgery import decoder_layers
from hf_specdec.registry import strategy_class


PARTS = ["processor", "criterion", "streamer", "forward", "assistant", "commit"]


class Fails:
    """Raises at its n-th call, as processor, criterion, streamer or hook; before that it changes nothing."""

    def __init__(self, at):
        self.left = at

    def tick(self):
        self.left -= 1
        if self.left < 0:
            raise KeyError("raised on purpose")


class FailingProcessor(Fails, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self.tick()
        return scores


class FailingCriterion(Fails, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        self.tick()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class FailingStreamer(Fails, BaseStreamer):
    def put(self, value):
        self.tick()

    def end(self):
        pass


# the model afterwards


def snapshot(model):
    """Return everything of `model` that a call must leave as it was."""
    probe = torch.arange(2, 12)[None]
    modules = {}
    for path, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key[0] != "_"}
        hooks = [
            len(getattr(module, key)) for key in ("_forward_hooks", "_forward_pre_hooks", "_buffers", "_parameters")
        ]
        modules[path] = (sorted(vars(module)), repr(own.get("config")), own.get("forward"), hooks, module.training)
    return {
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "attention type": type(model.config._attn_implementation),
        "generation config": model.generation_config.to_dict(),
        "config keys": sorted(vars(model.config)),
        "modules": modules,
        "logits": model(probe).logits.tolist(),
    }


@functools.cache
def first_snapshots(name):
    """Return what `family(name)` was before the first test that asked."""
    return snapshot(family(name).model), snapshot(family(name).assistant)


def check_as_before(name):
    before, assistant = first_snapshots(name)
    assert snapshot(family(name).model) == before
    assert snapshot(family(name).assistant) == assistant


@every_preset_and_some_families
def test_the_model_is_as_before_after_success(strategy, name):
    first_snapshots(name)
    model = family(name)
    model.ours(strategy, **model.batch, max_new_tokens=12)
    model.ours(strategy, **model.one, max_new_tokens=12, do_sample=True)
    check_as_before(name)


def failing_call(what, at, cls, llama, patch):
    """Let a part of the next call raise at its n-th use, and return the keywords that the call needs for it."""
    fails = Fails(at)
    if what == "processor":
        return {"logits_processor": LogitsProcessorList([FailingProcessor(at)])}
    if what == "criterion":
        return {"stopping_criteria": StoppingCriteriaList([FailingCriterion(at)])}
    if what == "streamer":
        return {"streamer": FailingStreamer(at)}
    if what == "commit":
        original = cls.commit

        def commit(self, state, kept):
            fails.tick()
            original(self, state, kept)

        patch.setattr(cls, "commit", commit)
    else:
        layer = decoder_layers(llama.model if what == "forward" else llama.assistant)[-1]
        original = layer.forward

        def forward(*args, **kwargs):
            fails.tick()
            return original(*args, **kwargs)

        patch.setattr(layer, "forward", forward)
    return {}


@alternating("what", [(what,) for what in PARTS], variants=[("commit",)])
def test_the_model_is_as_before_after_an_exception(strategy, what, llama):
    if what == "assistant" and not extras(strategy, llama.assistant):
        pytest.skip("has no assistant")
    first_snapshots("llama")
    expected = stock_tokens("llama", 1, 12)
    for at in (0, 1, 2, 5):
        with pytest.MonkeyPatch.context() as patch:
            kwargs = failing_call(what, at, strategy_class(strategy.partition(":")[0]), llama, patch)
            with pytest.raises(KeyError, match="on purpose"):
                llama.ours(strategy, **llama.one, max_new_tokens=30, **kwargs)
        check_as_before("llama")
        ours = llama.ours(strategy, **llama.one, max_new_tokens=12, eos_token_id=llama.eos)
        assert torch.equal(ours, expected), f"after an exception at {at}"


# several at once, copies, adapters, pipelines


def in_threads(*calls):
    """Run the calls at the same time, several times each, and return their last results."""
    results, errors = [None] * len(calls), []
    barrier = threading.Barrier(len(calls))

    def run(index, call):
        try:
            barrier.wait()
            for _ in range(3):
                results[index] = call()
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@every_base
def test_two_threads_with_two_models(strategy, llama):
    other = family("gemma3")
    results = in_threads(
        lambda: llama.ours(strategy, **llama.batch, max_new_tokens=12),
        lambda: other.ours(strategy, **other.batch, max_new_tokens=12),
    )
    for model, out in zip((llama, other), results, strict=True):
        assert torch.equal(out, model.stock(**model.batch, max_new_tokens=12))


@every_base
def test_stock_calls_beside_strategies_on_one_model(strategy, llama):
    """A server with a thread per request: whoever calls sees the model as it is."""
    ids = families.prompts((9, 9))[0]
    kinds = [{}, {"assistant_strategy": families.configured(strategy), **extras(strategy, llama.assistant)}]
    texts = [(ids[:1], 10), (ids, 7), (llama.ids[:1], 12)]
    expected = [llama.stock(text, max_new_tokens=count) for text, count in texts]

    def calls(kind):
        return [llama.stock(text, max_new_tokens=count, **kinds[kind]) for text, count in texts]

    for found in in_threads(*(functools.partial(calls, kind) for kind in (0, 1, 0, 1))):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@alternating("attention", [("sdpa",)], [("eager",)])
def test_two_threads_with_models_that_share_a_config(strategy, attention, llama):
    """One generates under the strategy while the other decodes stock, and while it does so too."""
    model = copy.deepcopy(llama.model)
    model.set_attn_implementation(attention)
    other = type(model)(model.config).double().eval()
    other.generation_config = copy.deepcopy(model.generation_config)
    assert other.config is model.config
    # float64 and left padding make eager attention NaN in stock, so the prompts are even
    ids = families.prompts((9, 9))[0]
    kwargs = {"max_new_tokens": 12, "do_sample": False}
    expected = [m.generate(ids, **kwargs) for m in (model, other)]
    before = model.config._attn_implementation
    for second in (
        lambda: other.generate(ids, **kwargs),
        lambda: generate(other, strategy, ids, assistant=llama.assistant, max_new_tokens=12),
    ):
        results = in_threads(
            lambda: generate(model, strategy, ids, assistant=llama.assistant, max_new_tokens=12), second
        )
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert model.config._attn_implementation == before
    assert type(model.config._attn_implementation) is str


@every_base
def test_deepcopy_and_pickle_after_a_call(strategy, llama):
    model = copy.deepcopy(llama.model)
    generate(model, strategy, **llama.one, assistant=llama.assistant, max_new_tokens=6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
        expected = other.generate(**llama.one, max_new_tokens=15, do_sample=False)
        out = generate(other, strategy, **llama.one, assistant=llama.assistant, max_new_tokens=15)
        assert torch.equal(out, expected)
        assert not torch.equal(out, llama.stock(**llama.one, max_new_tokens=15))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@every_base
def test_peft_lora_model(strategy, llama):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(5)
    model = peft.get_peft_model(copy.deepcopy(llama.model), config).eval()
    expected = model.generate(**llama.batch, max_new_tokens=20, do_sample=False)
    assert not torch.equal(expected, llama.stock(**llama.batch, max_new_tokens=20))
    out = generate(model, strategy, **llama.batch, assistant=llama.assistant, max_new_tokens=20)
    assert torch.equal(out, expected)


@every_base
def test_pipeline(strategy, llama):
    pipe = pipeline("text-generation", model=llama.model, tokenizer=tokenizer(), device="cpu")
    texts = ["Hello", "you"]
    kwargs = {"max_new_tokens": 12, "do_sample": False, "batch_size": 2}
    ours = {"assistant_strategy": families.configured(strategy), **families.extras(strategy, llama.assistant)}
    assert pipe(texts, **kwargs, **ours) == pipe(texts, **kwargs)
