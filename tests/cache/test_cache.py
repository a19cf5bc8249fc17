"""`SpeculativeCache` against lists of tokens, stock caches in and out, and the bookkeeping of `SparseView`."""

from __future__ import annotations

import copy
import math
import weakref

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, MistralConfig

from hf_specdec.cache import speculative
from hf_specdec.cache.selection import Selector
from hf_specdec.cache.side import flat_index, gather_slots
from hf_specdec.cache.sparse import SparseView
from hf_specdec.cache.speculative import SpeculativeCache, SpeculativeLayer
from hf_specdec.cache.stage import StageCache
from hf_specdec.kernels.address import Address
from hf_specdec.kernels.explicit import GRAIN
from hf_specdec.kernels.request import ForwardRequest, ScoreRequest


CPU = torch.device("cpu")
HEADS, SIZE = 2, 3


def states(tags: torch.Tensor, size: int = SIZE, offset: float = 0.0) -> torch.Tensor:
    """Keys or values `[n, HEADS, m, size]` that tell the tag `[n, m]`, the head and the feature of each entry."""
    head = torch.arange(HEADS, dtype=torch.float64)[None, :, None, None] / 10
    feature = torch.arange(size, dtype=torch.float64) / 100
    return tags[:, None, :, None].double() + head + feature + offset


def feed(cache, starts, tags, size=SIZE, **options):
    """One forward of `tags` `[n, m]` at `starts` through every layer; returns what the last layer reads."""
    cache.begin(Address(starts, tags.shape[1]), **options)
    for index in range(len(cache.layers)):
        found = cache.update(states(tags), states(tags, size, offset=0.5), index)
    return found


class Model:
    """The naive model: per slot a list of the tags that stand at its positions."""

    def __init__(self, rows: int) -> None:
        self.slots: list[list[int]] = [[] for _ in range(rows)]

    def write(self, slot: int, start: int, tags: list[int]) -> None:
        self.slots[slot][start:] = tags


@st.composite
def schedules(draw):
    rows = draw(st.integers(1, 4))
    actions = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["write", "ragged", "rollback", "swap", "retire"]),
                st.integers(1, 6),
                st.lists(st.integers(0, 7), min_size=4, max_size=4),
            ),
            min_size=1,
            max_size=12,
        )
    )
    return rows, draw(st.integers(1, 5)), actions


@settings(max_examples=60, deadline=None, derandomize=True)
@given(schedules())
def test_any_schedule_of_writes_rollbacks_and_swaps(schedule):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculative, "GRAIN", 2)  # so that storage grows
        check_schedule(*schedule)


def check_schedule(rows, limit, actions):
    cache, model, tag = SpeculativeCache([None, 4], rows, limit), Model(rows), 1
    active = rows
    for action, width, numbers in actions:
        lengths = [len(slot) for slot in model.slots[:active]]
        if action in ("write", "ragged"):
            # "ragged" rows write again over their newest tokens, as a verification does over drafts
            back = numbers[:active] if action == "ragged" else [0] * active
            starts = [max(0, length - less) for length, less in zip(lengths, back, strict=True)]
            tags = torch.arange(tag, tag + active * width).view(active, width)
            tag += active * width
            feed(cache, starts, tags)
            for slot, start in enumerate(starts):
                model.write(slot, start, tags[slot].tolist())
        elif action == "rollback":
            kept = [max(0, length - less) for length, less in zip(lengths, numbers, strict=False)]
            cache.set_lengths(kept)
            for slot, length in enumerate(kept):
                del model.slots[slot][length:]
        elif action == "swap" and active > 1:
            i, j = numbers[0] % active, numbers[1] % active
            cache.swap(i, j)
            model.slots[i], model.slots[j] = model.slots[j], model.slots[i]
            cache.set_lengths([len(slot) for slot in model.slots[:active]])
        elif action == "retire" and active > 1:
            slot, active = numbers[0] % active, active - 1
            cache.swap(slot, active)
            model.slots[slot], model.slots[active] = model.slots[active], model.slots[slot]
            cache.set_lengths([len(slot) for slot in model.slots[:active]])
        for layer in cache.layers:
            if not layer.is_initialized:
                continue
            assert layer.lengths.tolist() == [len(slot) for slot in model.slots[:active]]
            for slot, tags in enumerate(model.slots):  # retired rows keep theirs
                wanted = torch.tensor([tags])
                assert torch.equal(layer.keys[slot : slot + 1, :, : len(tags)], states(wanted))
                assert torch.equal(layer.values[slot : slot + 1, :, : len(tags)], states(wanted, offset=0.5))
            assert layer.keys.isfinite().all() and layer.values.isfinite().all()


@pytest.mark.parametrize("coarse", [False, True])
def test_storage_grows_with_the_text(coarse, monkeypatch):
    """It has at most twice what is in use, never more than the limit needs, and keeps its content."""
    monkeypatch.setattr(speculative, "_COARSE", 128)
    cache = SpeculativeCache([None, 5], 2, 1000)
    cache.coarse = coarse
    capacities, tags = [], torch.arange(2 * 1010).view(2, 1010)
    for place in range(0, 1010, 10):
        keys, _ = feed(cache, [place] * 2, tags[:, place : place + 10])
        capacity, used = keys.shape[2], place + 10
        assert used <= capacity <= max(128 if coarse else GRAIN, 2 * used - 1) and capacity % GRAIN == 0
        assert capacity <= 1024
        assert torch.equal(keys[:, :, :used], states(tags[:, :used]))
        assert not keys[:, :, used:].any()
        capacities += [capacity] if capacity not in capacities else []
    wanted = [128, 256, 512, 1024] if coarse else [*range(64, 1025, 64)]
    assert capacities == wanted


def test_storage_for_a_prompt_is_made_once(monkeypatch):
    made = []
    grow = SpeculativeLayer.grow
    monkeypatch.setattr(SpeculativeLayer, "grow", lambda self, slots: (made.append(slots), grow(self, slots)))
    family = families.family("llama")
    kwargs = {"max_new_tokens": 20, "prefill_chunk_size": 2, "max_length": None}
    family.ours("plain", input_ids=family.ids[:1].repeat(1, 20), **kwargs)
    assert made == [448] * family.model.config.num_hidden_layers


def test_a_large_budget_costs_nothing(monkeypatch):
    """No cache of a call, target's or assistant's, is larger than its text needs; the text is the same."""
    caches, begin = set(), SpeculativeCache.begin
    monkeypatch.setattr(SpeculativeCache, "begin", lambda self, *args: (caches.add(self), begin(self, *args))[1])
    for strategy in ("plain", "assisted", "vegas", "specbound", "via_sd", "spd"):
        family = families.family("llama")
        model = copy.deepcopy(family.model)
        model.config.max_position_embeddings = 32768
        end = {"stopping_criteria": [lambda ids, _: torch.tensor([ids.shape[1] > 60])]}
        found = families.generate(
            model, strategy, family.ids[:1], assistant=family.assistant, max_new_tokens=32000, **end
        )
        assert torch.equal(found, family.stock(family.ids[:1], max_new_tokens=42))
        assert len(caches) > (strategy == "assisted")
        assert all(layer.keys.shape[2] <= 2 * GRAIN for cache in caches for layer in cache.layers)
        caches.clear()


def test_one_layer_at_a_time_is_there_twice(monkeypatch):
    """While storage grows, the old keys or values of one layer are all that is kept beside the new storage."""
    cache = SpeculativeCache([None] * 3, 1, 1000)
    feed(cache, [0], torch.arange(60)[None])
    old = [weakref.ref(states) for layer in cache.layers for states in (layer.keys, layer.values)]
    alive, made = [], torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        alive.append(sum(reference() is not None for reference in old))
        return made(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    cache.reserve(200)
    assert alive == [6, 5, 4, 3, 2, 1]


def test_key_and_value_sizes_may_differ():
    cache = SpeculativeCache([None], 2, 2)
    tags = torch.arange(8).view(2, 4)
    feed(cache, [0, 0], tags[:, :2], size=5)
    keys, values = feed(cache, [2, 1], tags[:, 2:], size=5)
    assert keys.shape[-1] == SIZE and values.shape[-1] == 5
    wanted = torch.tensor([4, 6, 7])
    assert torch.equal(values[1:, :, :3], states(wanted[None], 5, offset=0.5))
    cache.swap(0, 1)
    assert torch.equal(cache.layers[0].values[:1, :, :3], states(wanted[None], 5, offset=0.5))


def test_a_forward_returns_storage_or_exact_slices():
    cache = SpeculativeCache([None], 3, 16)
    assert feed(cache, [0, 0], torch.zeros(2, 5))[0].shape == (2, HEADS, GRAIN, SIZE)
    cache.exact_slices = True
    assert feed(cache, [5, 5], torch.zeros(2, 2))[1].shape == (2, HEADS, 7, SIZE)


def test_a_write_needs_a_step():
    with pytest.raises(RuntimeError, match="decoding loop"):
        SpeculativeCache([None], 1, 4).update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)


def test_what_stock_code_asks():
    cache = SpeculativeCache([None, 3], 2, 8)
    assert cache.get_seq_length() == 0
    feed(cache, [0, 2], torch.zeros(2, 3))
    assert cache.get_seq_length() == 5
    assert cache.layers[0].get_mask_sizes(2) == (7, 0)
    assert cache.layers[1].is_sliding and not cache.layers[0].is_sliding
    assert cache.layers[0].get_max_length() == -1
    layer = SpeculativeLayer(2, 4, None)
    layer.lengths = torch.tensor([1, 4])
    layer.crop(-2)
    assert layer.lengths.tolist() == [0, 2]


# stock caches


def stock_cache(width: int, rows: int, sliding: bool) -> DynamicCache:
    """A stock cache that has seen `width` columns; entry (row, column) has the tag 100 * row + column."""
    window = 6 if sliding else None
    config = MistralConfig(num_hidden_layers=2, sliding_window=window, num_attention_heads=2, hidden_size=8)
    cache = DynamicCache(config=config)
    tags = 100 * torch.arange(rows)[:, None] + torch.arange(width)
    for column in range(width):
        for index in range(2):
            part = tags[:, column : column + 1]
            cache.update(states(part), states(part, offset=0.5), index)
    return cache


def layout(mask: torch.Tensor) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Source columns by position, tokens per row, and slots by column of a mask `[b, width]`."""
    columns = torch.argsort((~mask).int(), dim=1, stable=True)
    counts = mask.sum(1).tolist()
    slots = torch.where(mask, mask.cumsum(1) - 1, -1)
    return columns[:, : max(counts)], counts, slots


MASKS = {
    "none": ["1111111111", "1111111111", "1111111111"],
    "left padding": ["1111111111", "0001111111", "0000000011"],
    "interior": ["1101101111", "0011100111", "1111110001"],
}


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1]], ids=str)
def test_load_takes_tokens_out_of_the_padding(masked, sliding, order):
    mask = torch.tensor([[c == "1" for c in row] for row in MASKS[masked]])
    source = stock_cache(10, 3, sliding)
    columns, counts, _ = layout(mask[order])
    cache = SpeculativeCache([6 if sliding else None] * 2, len(order), 2)
    cache.load(source, columns, counts, 10, order)
    dropped = 10 - source.layers[0].keys.shape[2]
    assert (dropped > 0) is sliding
    for layer in cache.layers:
        assert layer.lengths.tolist() == counts
        for slot, row in enumerate(order):
            for position in range(counts[slot]):
                column = int(columns[slot, position])
                if column >= dropped:  # older ones are out of every later query's window
                    wanted = states(torch.tensor([[100 * row + column]]))[0, :, 0]
                    assert torch.equal(layer.keys[slot, :, position], wanted)
                    assert torch.equal(layer.values[slot, :, position], wanted + 0.5)


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_load_and_store_make_a_round_trip(masked, sliding):
    """Stock to ours and back: unmasked columns return bit for bit, padding returns as zeros, sizes are stock's."""
    mask = torch.tensor([[c == "1" for c in row] for row in MASKS[masked]])
    source = stock_cache(10, 3, sliding)
    columns, counts, slots = layout(mask)
    cache = SpeculativeCache([6 if sliding else None] * 2, 3, 4)
    cache.load(source, columns, counts, 10, [0, 1, 2])
    cache.swap(0, 2)  # storage order need not be the caller's
    target = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=6 if sliding else None))
    cache.store(target, slots, [2, 1, 0])
    for new, old in zip(target.layers, source.layers, strict=True):
        assert type(new) is type(old) and new.keys.shape == old.keys.shape
        assert new.get_seq_length() == old.get_seq_length() == 10
        real = mask[:, -old.keys.shape[2] :][:, None, :, None]
        for name in ("keys", "values"):
            assert torch.equal(getattr(new, name), getattr(old, name) * real)


@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_an_exported_cache_goes_on_as_stock_would(sliding):
    """A further stock update of the exported cache returns what it would after stock decoding."""
    columns, counts, slots = layout(torch.ones(2, 10, dtype=torch.bool))
    source = stock_cache(10, 2, sliding)
    cache = SpeculativeCache([6 if sliding else None] * 2, 2, 4)
    cache.load(source, columns, counts, 10, [0, 1])
    target = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=6 if sliding else None))
    cache.store(target, slots, [0, 1])
    new = states(torch.tensor([[7, 8], [9, 10]]))
    for found, wanted in zip(target.update(new, new, 0), source.update(new, new, 0), strict=True):
        assert torch.equal(found, wanted)


def test_loading_nothing_leaves_the_cache_empty():
    source = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=None))
    cache = SpeculativeCache([None, None], 2, 4)
    cache.load(source, torch.zeros(2, 0, dtype=torch.int64), [0, 0], 0, [0, 1])
    assert cache.get_seq_length() == 0 and not cache.layers[0].is_initialized


# the draft view


def budget(keys: int, valid: int) -> int:
    return min(max(math.ceil(0.25 * keys), 2), valid)


def view_of(rows: int, gamma: int, windows=(None, None), **options) -> tuple[SpeculativeCache, SparseView]:
    cache = SpeculativeCache(windows, rows, 64)
    selector = Selector(rows, options.pop("budget", budget), options.pop("request", ScoreRequest()), **options)
    return cache, SparseView(cache, selector, 2 * gamma + 1)


def target_forward(cache, view, starts, tags, last=None, generator=None):
    """One scoring forward with random scores; returns the scores by layer."""
    address = cache.begin(Address(starts, tags.shape[1], last), ForwardRequest(view)).address
    view.begin(address.starts, address.last)
    metrics = {}
    for index in range(len(cache.layers)):
        keys, values = cache.update(states(tags), states(tags, offset=0.5), index)
        if view.wants(index):
            shape = (len(starts), HEADS, address.high) if view.request.per_head else (len(starts), address.high)
            metrics[index] = torch.rand(shape, generator=generator)
            view.take(index, metrics[index], address, keys, values)
    view.finish(address)
    return metrics


def draft_forward(cache, view, positions, tags):
    """One draft forward; returns per covered layer and row the tags that are read."""
    view.place(positions)
    step = cache.begin(Address(positions, 1), ForwardRequest(view=view))
    read = {}
    for index in range(len(cache.layers)):
        keys, values = cache.update(states(tags), states(tags, offset=0.5), index)
        if not view.covers(index):
            continue
        bias = step.side_bias(view, keys.shape[2], CPU, torch.float64)
        shown = torch.ones(len(positions), keys.shape[2], dtype=torch.bool) if bias is None else bias[:, 0, 0] == 0
        assert keys.isfinite().all() and values.isfinite().all()
        assert torch.equal(values.transpose(1, 2)[shown], keys.transpose(1, 2)[shown] + 0.5)
        read[index] = [sorted(keys[row, 0, shown[row], 0].tolist()) for row in range(len(positions))]
    return read


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_row_6_attended_sets_equal_the_definition(data):
    """sel U [valid, p + j) at step j of every burst, for random gamma, draft counts and accepted counts per row."""
    gamma, rows = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    cache, view = view_of(rows, gamma)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    prompt = [data.draw(st.integers(1, 9)) for _ in range(rows)]
    # a token's tag says its row, its position and how it was made: 0.0 by the target, more by a draft of some round
    text = torch.arange(64)[None] + 1000 * torch.arange(1, rows + 1)[:, None]
    feed(cache, [0] * rows, text[:, : max(prompt)])
    cache.set_lengths([n - 1 for n in prompt])
    last_token = text.gather(1, torch.tensor(prompt)[:, None] - 1)
    metrics = target_forward(cache, view, [n - 1 for n in prompt], last_token, generator=generator)
    pending, valid, keys, taken = list(prompt), list(prompt), list(prompt), 1
    for _ in range(data.draw(st.integers(1, 4))):
        counts = [data.draw(st.integers(0, gamma)) for _ in range(rows)]
        k = max(counts)
        assert view.valid == valid
        assert view.counts == [budget(*pair) for pair in zip(keys, valid, strict=True)]
        assert view.selections == taken * 2
        chosen = {
            index: [set(metric[row, : valid[row]].topk(view.counts[row]).indices.tolist()) for row in range(rows)]
            for index, metric in metrics.items()
        }
        for index, sets in chosen.items():
            for row in range(rows):
                assert set(view.chosen[index][row, : view.counts[row]].tolist()) == sets[row]
        assert all(view.fresh(row, pending[row]) for row in range(rows))
        for j in range(k):
            positions = [p + min(j, max(n - 1, 0)) for p, n in zip(pending, counts, strict=True)]
            tags = text.gather(1, torch.tensor(positions)[:, None]) + (0 if j == 0 else 0.25)
            read = draft_forward(cache, view, positions, tags)
            for index, found in read.items():
                for row in range(rows):
                    if j >= counts[row]:
                        continue
                    base = 1000 * (row + 1)
                    old = [base + t for t in chosen[index][row]]
                    accepted = [base + t for t in range(valid[row], pending[row])]
                    own = [base + pending[row]] + [base + pending[row] + i + 0.25 for i in range(1, j + 1)]
                    assert found[row] == sorted(old + accepted + own)
        # the main cache has seen nothing of the drafts
        assert torch.equal(cache.layers[0].keys.frac(), cache.layers[0].keys.frac().clamp(max=0.2))
        index = torch.tensor(pending)[:, None] + torch.arange(k + 1)
        metrics = target_forward(cache, view, pending, text.gather(1, index), counts, generator)
        valid = [p + 1 for p in pending]
        keys = [p + n + 1 for p, n in zip(pending, counts, strict=True)]
        pending = [p + 1 + data.draw(st.integers(0, n)) for p, n in zip(pending, counts, strict=True)]
        cache.set_lengths(pending)
        taken += 1


def test_the_view_never_touches_uncovered_layers():
    cache, view = view_of(1, 2, windows=(None, 4, None))
    target_forward(cache, view, [0], torch.arange(6)[None], last=[0])
    assert sorted(view.chosen) == sorted(view.keys) == [0, 2]
    assert not view.wants(1) and not view.covers(1)
    assert view.selections == 2
    draft_forward(cache, view, [6], torch.tensor([[6]]))
    assert cache.layers[1].lengths.tolist() == [7] and cache.layers[0].lengths.tolist() == [6]


def test_swap_moves_a_rows_choice():
    cache, view = view_of(3, 2)
    tags = torch.arange(12).view(1, 12) + 1000 * torch.arange(1, 4)[:, None]
    feed(cache, [0, 0, 0], tags)
    starts = [11, 5, 8]
    last = tags.gather(1, torch.tensor(starts)[:, None])
    target_forward(cache, view, starts, last)
    before = draft_forward(cache, view, [12, 6, 9], torch.tensor([[1012], [2006], [3009]]))
    state = [list(zip(view.valid, view.counts, strict=True))[slot] for slot in range(3)]
    cache.swap(0, 2)
    view.swap(0, 2)
    assert list(zip(view.valid, view.counts, strict=True)) == [state[2], state[1], state[0]]
    after = draft_forward(cache, view, [9, 6], torch.tensor([[3009], [2006]]))  # the third row is finished
    for index in after:
        assert after[index] == [before[index][2], before[index][1]]


@pytest.mark.parametrize(
    "options", [{"budget": lambda keys, valid: valid}, {"by_position": True}], ids=["all", "window"]
)
def test_swap_of_a_list_that_all_key_heads_share(options):
    cache, view = view_of(2, 2, request=ScoreRequest(per_head=True), **options)
    feed(cache, [0, 0], torch.zeros(2, 20))
    target_forward(cache, view, [19, 19], torch.zeros(2, 1))
    chosen = {index: lists.clone() for index, lists in view.chosen.items()}
    view.swap(0, 1)
    for index, lists in view.chosen.items():
        assert torch.equal(lists, chosen[index][[1, 0]])


def test_shrink_forgets_rows_that_have_finished():
    cache, view = view_of(3, 2)
    tags = torch.arange(12).view(1, 12) + 1000 * torch.arange(1, 4)[:, None]
    feed(cache, [0, 0, 0], tags)
    starts = [11, 5, 8]
    target_forward(cache, view, starts, tags.gather(1, torch.tensor(starts)[:, None]))
    before = draft_forward(cache, view, [12, 6, 9], torch.tensor([[1012], [2006], [3009]]))
    for follower in (cache, view):
        follower.swap(0, 2)
        follower.shrink(2)
    assert view.valid == [9, 6] and len(view.counts) == 2
    assert {len(chosen) for chosen in view.chosen.values()} == {2}
    after = draft_forward(cache, view, [9, 6], torch.tensor([[3009], [2006]]))
    for index in after:
        assert after[index] == [before[index][2], before[index][1]]
    target_forward(cache, view, [9, 6], torch.tensor([[3009], [2006]]))  # the next round needs no other rows
    assert view.valid == [10, 7]
    for follower in (cache, view):
        follower.shrink(0)
    assert not view.valid


def test_buffers_grow_with_the_budget():
    """A selection that outgrows the buffers gets larger ones; content is right before and after."""
    sizes = []
    cache, view = view_of(2, 1, budget=lambda keys, valid: min(valid, keys - 2))
    tags = torch.arange(64)[None] + 1000 * torch.arange(1, 3)[:, None]
    feed(cache, [0, 0], tags[:, :4])
    for position in range(4, 60, 7):
        feed(cache, [0, 0], tags[:, :position])
        target_forward(cache, view, [position] * 2, tags[:, position : position + 1])
        read = draft_forward(cache, view, [position + 1] * 2, tags[:, position + 1 : position + 2])
        sizes.append(view.keys[0].shape[2])
        assert view.selected == position - 1
        assert sizes[-1] >= view.selected + view.recents
        for index, rows in read.items():
            for row, found in enumerate(rows):
                chosen = view.chosen[index][row].tolist()
                assert found == sorted([1000 * (row + 1) + t for t in [*chosen, position + 1]])
    assert len(set(sizes)) > 1


def test_a_choice_per_key_head():
    """Each key head reads its own tokens."""
    cache, view = view_of(2, 2, request=ScoreRequest(per_head=True))
    tags = torch.arange(20)[None] + 1000 * torch.arange(1, 3)[:, None]
    feed(cache, [0, 0], tags)
    metrics = target_forward(cache, view, [19, 13], tags.gather(1, torch.tensor([[19], [13]])))
    for index, metric in metrics.items():
        for row, valid in enumerate([20, 14]):
            for head in range(HEADS):
                count = view.counts[row]
                wanted = set(metric[row, head, :valid].topk(count).indices.tolist())
                assert set(view.chosen[index][row, head, :count].tolist()) == wanted
                stored = view.keys[index][row, head, :count, 0] - head / 10
                assert {round(tag) - 1000 * (row + 1) for tag in stored.tolist()} == wanted


@pytest.mark.parametrize(("sinks", "newest"), [(2, 0), (0, 2), (1, 2)])
def test_sinks_and_newest_candidates_are_always_chosen(sinks, newest):
    cache, view = view_of(2, 2, sinks=sinks, newest=newest)
    feed(cache, [0, 0], torch.zeros(2, 20))
    target_forward(cache, view, [19, 14], torch.zeros(2, 1))
    for row, valid in enumerate([20, 15]):
        chosen = set(view.chosen[0][row, : view.counts[row]].tolist())
        assert len(chosen) == view.counts[row] and max(chosen) < valid
        assert chosen >= set(range(sinks)) | set(range(valid - newest, valid))


@pytest.mark.parametrize("per_head", [False, True])
def test_the_window_selection_is_by_position(per_head):
    cache, view = view_of(2, 2, sinks=1, by_position=True, request=ScoreRequest(per_head=per_head))
    feed(cache, [0, 0], torch.zeros(2, 20))
    target_forward(cache, view, [19, 10], torch.zeros(2, 1))
    for row, (valid, count) in enumerate([(20, 5), (11, 3)]):
        wanted = [0, *range(valid - count + 1, valid)]
        chosen = view.chosen[1][row]
        for line in chosen if per_head else [chosen]:
            assert sorted(line[:count].tolist()) == wanted


def test_freshness():
    _, view = view_of(1, 3)
    assert not view.fresh(0, 0) and not view.fresh(0, 5)  # nothing was chosen yet
    view.valid[0] = 10
    assert [view.fresh(0, p) for p in (9, 10, 13, 14)] == [False, True, True, False]


def test_a_stale_row_writes_no_other_column():
    """A row that rides along without a fresh choice writes the last column, whatever its position."""
    cache, view = view_of(2, 2)
    feed(cache, [0, 0], torch.zeros(2, 30))
    target_forward(cache, view, [29, 5], torch.zeros(2, 1))
    view.place([30, 25])
    before = view.keys[0].clone()
    view.append(0, *[torch.ones(2, HEADS, 1, SIZE, dtype=torch.float64)] * 2)
    last = view.selected + view.recents - 1
    assert view.keys[0].shape[2] > last
    assert (view.keys[0] != before).nonzero()[:, [0, 2]].unique(dim=0).tolist() == [[0, view.selected], [1, last]]


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_gather_slots(per_head, heads):
    generator = torch.Generator().manual_seed(0)
    storage = torch.randn(2, heads, 11, 4, generator=generator)
    index = torch.randint(0, 11, (2, heads, 5) if per_head else (2, 5), generator=generator)
    out = torch.zeros(2, heads, 9, 4)
    gather_slots(storage, flat_index(index, storage), out[:, :, 2:7])  # a slice: any strides
    for row in range(2):
        for head in range(heads):
            wanted = storage[row, head, index[row, head] if per_head else index[row]]
            assert torch.equal(out[row, head, 2:7], wanted)
    assert not out[:, :, :2].any() and not out[:, :, 7:].any()


def test_gather_slots_from_the_active_rows_of_a_storage():
    storage = torch.randn(4, 2, 9, 3)
    out = torch.zeros(2, 2, 2, 3)
    gather_slots(storage[:2], flat_index(torch.tensor([[1, 8], [0, 3]]), storage[:2]), out)
    assert torch.equal(out[1, 1], storage[1, 1, [0, 3]])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_layers_on_two_devices():
    cache = SpeculativeCache([None, None], 2, 8)
    step = cache.begin(Address([0, 3], 2))
    for index in range(2):
        tags = torch.arange(4, device=f"cuda:{index}").view(2, 2)
        part = tags[:, None, :, None].double().expand(-1, HEADS, -1, SIZE)
        cache.update(part, part, index)
    cache.set_lengths([1, 4])
    assert step.layers_seen == 2
    assert [layer.lengths.device.index for layer in cache.layers] == [0, 1]
    assert torch.equal(cache.layers[0].keys.cpu(), cache.layers[1].keys.cpu())


@pytest.mark.parametrize("strategy", ["plain", "vegas", "prompt_lookup", "specbound"])
def test_a_long_cache_and_only_the_new_tokens(strategy):
    """`max_length` counts the columns that are given, and the row is longer by what the cache holds."""
    llama = families.family("llama")
    model, ids = llama.model, llama.ids[:1]
    caches = []
    for _ in range(2):
        cache = DynamicCache(config=model.config)
        model(ids[:, :15], past_key_values=cache)
        caches.append(cache)
    new = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12}
    expected = llama.stock(ids[:, 15:], past_key_values=caches[0], **new)
    found = llama.ours(strategy, ids[:, 15:], past_key_values=caches[1], **new)
    assert torch.equal(found, expected)
    assert caches[1].get_seq_length() == caches[0].get_seq_length()


# the part of a stage


def test_a_stage_rewinds_its_own_layers_and_no_other():
    whole = SpeculativeCache([None] * 5, 1, 8)
    whole.set_lengths([6])
    stage = StageCache(whole, 1, 4)
    assert stage.length == 6
    stage.rewind(4)
    assert stage.length == 4
    assert [layer.lengths.tolist() for layer in whole.layers] == [[6], [4], [4], [4], [6]]
    assert [layer.longest for layer in whole.layers] == [6, 4, 4, 4, 6]
