"""`ProcessorChain` against stock processors called step by step on each prefix."""

from __future__ import annotations

import math

import families
import pytest
import torch
from families import tiny_llama
from transformers.generation import logits_process as stock
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from hf_specdec import VegasConfig
from hf_specdec.generation.models.vocabulary import OUTSIDE
from hf_specdec.generation.processors import ProcessorChain
from hf_specdec.generation.state import DecodingState
from hf_specdec.generation.strategy import SpeculationStrategy
from hf_specdec.registry import presets


BASES = [name for name in presets() if ":" not in name]
VOCAB, EOS, PROMPT, MAX_LENGTH = 20, 2, 8, 15


def allowed(row: int, ids: torch.Tensor) -> list[int]:
    return [int(ids[-1] + row + step) % VOCAB for step in (1, 2, 5)]


class Tilt(LogitsProcessor):
    """A custom processor that depends on the whole prefix, and on the row by its place in the matrix."""

    def __call__(self, input_ids, scores):
        rows = torch.arange(len(input_ids))[:, None]
        weights = torch.arange(1, input_ids.shape[1] + 1)
        tilt = ((input_ids * weights).sum(1, keepdim=True) + 3 * rows + torch.arange(VOCAB)) % 7
        return scores + 0.1 * tilt


class SubclassThatReads(stock.TemperatureLogitsWarper):
    """A subclass of a stock warper may read what its parent ignores."""

    def __call__(self, input_ids, scores):
        return super().__call__(input_ids, scores) + input_ids[:, -1:]


PREFIX_DEPENDENT = {
    "min length": lambda: stock.MinLengthLogitsProcessor(11, EOS),
    "min new tokens": lambda: stock.MinNewTokensLengthLogitsProcessor(PROMPT, 3, EOS),
    "repetition penalty": lambda: stock.RepetitionPenaltyLogitsProcessor(1.5),
    "encoder repetition": lambda: stock.EncoderRepetitionPenaltyLogitsProcessor(1.5, torch.tensor([[3, 4, 5]] * 4)),
    "no repeat ngram": lambda: stock.NoRepeatNGramLogitsProcessor(2),
    "no repeat unigram": lambda: stock.NoRepeatNGramLogitsProcessor(1),
    "encoder no repeat": lambda: stock.EncoderNoRepeatNGramLogitsProcessor(2, torch.arange(1, VOCAB).expand(4, -1)),
    "sequence bias": lambda: stock.SequenceBiasLogitsProcessor({(3,): 1.5, (4, 5): -2.0, (6, 7, 8): 4.0}),
    "bad words": lambda: stock.NoBadWordsLogitsProcessor([[5], [6, 7], [3, 3]], EOS),
    "allowed tokens": lambda: stock.PrefixConstrainedLogitsProcessor(allowed, 1),
    "forced bos": lambda: stock.ForcedBOSTokenLogitsProcessor(4),
    "forced eos": lambda: stock.ForcedEOSTokenLogitsProcessor(MAX_LENGTH, EOS),
    "decay": lambda: stock.ExponentialDecayLengthPenalty((1, 1.3), EOS, PROMPT),
    "suppress at begin": lambda: stock.SuppressTokensAtBeginLogitsProcessor([3, 9], PROMPT + 1),
    "watermark": lambda: stock.WatermarkLogitsProcessor(VOCAB, "cpu", seeding_scheme="lefthash"),
    "custom": Tilt,
    "subclass": lambda: SubclassThatReads(0.7),
}
PREFIX_FREE = {
    "temperature": lambda: stock.TemperatureLogitsWarper(0.6),
    "top k": lambda: stock.TopKLogitsWarper(5),
    "top p": lambda: stock.TopPLogitsWarper(0.8),
    "min p": lambda: stock.MinPLogitsWarper(0.1),
    "top h": lambda: stock.TopHLogitsWarper(0.5),
    "typical": lambda: stock.TypicalLogitsWarper(0.7),
    "epsilon": lambda: stock.EpsilonLogitsWarper(0.02),
    "eta": lambda: stock.EtaLogitsWarper(0.05),
    "normalization": stock.LogitNormalization,
    "nan removal": stock.InfNanRemoveLogitsProcessor,
    "suppress": lambda: stock.SuppressTokensLogitsProcessor([3, 9]),
}
CHAINS = {name: [make] for name, make in {**PREFIX_DEPENDENT, **PREFIX_FREE}.items()}
CHAINS["sampling"] = [
    PREFIX_DEPENDENT["repetition penalty"],
    PREFIX_DEPENDENT["no repeat ngram"],
    PREFIX_FREE["temperature"],
    PREFIX_FREE["top k"],
    PREFIX_DEPENDENT["custom"],
    PREFIX_FREE["top p"],
    PREFIX_FREE["normalization"],
]
CHAINS["all by prefix"] = [
    make for name, make in PREFIX_DEPENDENT.items() if name.split()[0] not in ("forced", "encoder")
]
CHAINS["none"] = []
PLACES = {
    "one row": ([0], [PROMPT], 1),
    "one row, drafts": ([0], [PROMPT + 1], 5),
    "ragged": ([0, 1, 2, 3], [8, 11, 9, 8], 4),
    "finished rows, other order": ([3, 1], [9, 10], 4),
    "up to the last column": ([2, 0, 3], [11, 8, 10], 5),
}


def text_of(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, VOCAB, (batch, MAX_LENGTH), generator=generator)
    for row in range(batch):
        ids[row, :row] = 0  # left padding
    ids[:, 3::4] = ids[:, 2::4][:, : ids[:, 3::4].shape[1]]  # some repetitions
    return ids


def by_steps(processors, logits, ids, row, columns, drafts):
    """Plain decoding of one row: the stock list, called on each prefix in turn, in a batch of like rows."""
    found = []
    for j in range(logits.shape[0]):
        prefix = torch.cat([ids[row, :columns], drafts[:j]])
        found.append(processors(prefix.expand(len(ids), -1), logits[j].float().expand(len(ids), -1).clone())[row])
    return torch.stack(found)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("place", PLACES)
def test_each_position_sees_the_prefix_of_plain_decoding(chain, place):
    rows, columns, m = PLACES[place]
    batch = 1 if place.startswith("one") else 4
    if chain.startswith("encoder"):
        batch = 4  # as many as their encoder texts
    generator = torch.Generator().manual_seed(3)
    ids = text_of(batch)
    logits = 3 * torch.randn(len(rows), m, VOCAB, generator=generator)
    drafts = torch.randint(1, VOCAB, (len(rows), m - 1), generator=generator)
    drafts[:, 1:2] = drafts[:, :1]
    if "nan" in chain:
        logits[0, 0, 3], logits[0, 0, 4] = torch.nan, torch.inf
    before = logits.clone(), ids.clone(), drafts.clone()
    processors = LogitsProcessorList([make() for make in CHAINS[chain]])
    found = ProcessorChain(processors)(logits, ids, rows, columns, drafts, stops=False)
    assert found.shape == logits.shape and found.dtype == torch.float32
    for i, row in enumerate(rows):
        wanted = by_steps(processors, before[0][i], before[1], row, columns[i], before[2][i])
        torch.testing.assert_close(found[i], wanted, atol=1e-6, rtol=0)
    for now, then in zip((logits, ids, drafts), before, strict=True):
        torch.testing.assert_close(now, then, atol=0, rtol=0, equal_nan=True)


def test_the_chains_change_something():
    """The comparison above would be empty for a processor that does nothing on these inputs."""
    rows, columns, m = [0, 1, 2, 3], [8, 8, 8, 8], 7
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(4, m, VOCAB, generator=generator)
    drafts = torch.randint(1, VOCAB, (4, m - 1), generator=generator)
    drafts[:, 1], drafts[:, 3] = drafts[:, 0], drafts[:, 2]
    for name, makers in CHAINS.items():
        found = ProcessorChain(LogitsProcessorList([make() for make in makers]))(
            logits, text_of(4), rows, columns, drafts
        )
        if name not in ("none", "nan removal", "forced bos"):
            assert not torch.equal(found, logits), name


class Counter(LogitsProcessor):
    """Counts its calls; adds, so that a second application shows. What it counts does not change what it gives."""

    stateless = True

    def __init__(self):
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, input_ids, scores):
        self.shapes.append((tuple(input_ids.shape), tuple(scores.shape)))
        return scores + 1


def test_one_call_per_column_with_the_whole_batch():
    counter = Counter()
    logits = torch.zeros(3, 4, VOCAB)
    found = ProcessorChain(LogitsProcessorList([counter]))(
        logits, text_of(4), [3, 0, 1], [8, 10, 8], torch.ones(3, 3, dtype=torch.int64)
    )
    assert sorted(counter.shapes) == [((4, t), (4, VOCAB)) for t in range(8, 14)]
    assert torch.equal(found, torch.ones_like(logits))


def test_warpers_that_ignore_the_text_run_once(monkeypatch):
    calls, original = [], stock.TopKLogitsWarper.__call__
    monkeypatch.setattr(
        stock.TopKLogitsWarper, "__call__", lambda *args: calls.append(args[2].shape) or original(*args)
    )
    ProcessorChain(LogitsProcessorList([stock.TopKLogitsWarper(3)]))(
        torch.randn(3, 4, VOCAB), text_of(4), [3, 0, 1], [8, 10, 8], torch.ones(3, 3, dtype=torch.int64)
    )
    assert calls == [(12, VOCAB)]


def test_what_keeps_a_cache_is_refused():
    class UnbatchedClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
        pass

    bad = UnbatchedClassifierFreeGuidanceLogitsProcessor
    with pytest.raises(ValueError, match=bad.__name__):
        ProcessorChain(LogitsProcessorList([stock.TopKLogitsWarper(3), bad()]))


def test_low_precision_logits_are_processed_in_float32():
    logits = torch.randn(1, 2, VOCAB).bfloat16()
    found = ProcessorChain(LogitsProcessorList([stock.TemperatureLogitsWarper(0.7)]))(
        logits, text_of(1), [0], [8], torch.ones(1, 1, dtype=torch.int64)
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits.float() / 0.7)


# in a whole call


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=VOCAB, initializer_range=0.3, eos_token_id=None, pad_token_id=0)


@pytest.fixture
def inputs():
    ids = text_of(3)[:, :PROMPT]
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


OPTIONS = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 16}
VEGAS = VegasConfig(min_context=0, min_tokens=1, kv_ratio=0.2, num_assistant_tokens=4)


@pytest.mark.parametrize("strategy", ["plain", VEGAS], ids=["plain", "vegas"])
def test_scores_are_processed_once(model, inputs, strategy):
    """The returned scores are stock's, so nothing was applied twice or to the wrong prefix."""
    processors = [Counter(), Tilt()]
    wanted = model.generate(**inputs, **OPTIONS, logits_processor=processors)
    found = model.generate(**inputs, **OPTIONS, logits_processor=processors, assistant_strategy=strategy)
    assert torch.equal(found.sequences, wanted.sequences)
    for ours, theirs in zip(found.scores, wanted.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_plain_decoding_calls_a_processor_once_per_column(model, inputs):
    counter = Counter()
    model.generate(**inputs, **OPTIONS, logits_processor=[counter], assistant_strategy="plain")
    assert counter.shapes == [((3, PROMPT + step), (3, VOCAB)) for step in range(16)]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("strategy", [*BASES, "via_sd:slim", "via_sd:gate", "via_sd:safe", "diversed:mixture"])
def test_allowed_tokens_are_asked_for_real_prefixes_only(strategy, own):
    """A function that knows legal prefixes only, as a trie does, is never asked about a text that can't arise.

    So is a processor of the caller's own, with another one behind it that bans what it allows.
    """
    family = families.family("llama")
    width = family.ids.shape[1]

    def successors(token: int) -> list[int]:
        return [(3 * token + step) % 63 + 1 for step in (1, 4, 9, 16)]

    def legal(row: int, ids: torch.Tensor) -> list[int]:
        text = ids[width - 1 :].tolist()
        if not all(new in successors(old) for old, new in zip(text, text[1:], strict=False)):
            raise KeyError(text)
        return successors(text[-1])

    class Trie(LogitsProcessor):
        def __call__(self, input_ids, scores):
            allowed = torch.tensor([legal(row, ids) for row, ids in enumerate(input_ids)])
            return scores + torch.full_like(scores, -torch.inf).scatter(1, allowed, 0.0)

    given = {"logits_processor": [Trie()]} if own else {"prefix_allowed_tokens_fn": legal}
    # the trie's words repeat, so that look-ups find drafts, of which some are banned
    options = {"max_new_tokens": 24, "bad_words_ids": [[7], [9, 28]], **given}
    for rows in (1,) if own else (1, 4):  # a processor of the caller's sees rows of other lengths, too
        wanted = family.stock(**family.inputs(rows), **options)
        assert torch.equal(family.ours(strategy, **family.inputs(rows), **options), wanted)


def test_what_a_later_processor_allows_again_is_processed():
    """A ban ends what an earlier processor is asked about only while nobody lifts it."""

    class Ban(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, input_ids[0, -1] + torch.arange(3), -torch.inf)

    class Lift(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, torch.tensor([5]), 0.0)

    chain = ProcessorChain(LogitsProcessorList([Ban(), Lift()]))
    ids, drafts = torch.tensor([[9, 4]]), torch.tensor([[5, 6, 1]])
    found = chain(torch.ones(1, 4, VOCAB), ids, [0], [2], drafts)[0]
    wanted = by_steps(LogitsProcessorList([Ban(), Lift()]), torch.ones(4, VOCAB), ids, 0, 2, drafts[0])
    assert torch.equal(found[:3], wanted[:3])
    # 6 is banned after 5 and stays banned, so nobody is asked about what would follow it
    assert found[1, 6] == -torch.inf and torch.equal(found[2], wanted[2])


def test_entries_behind_a_ban_or_the_real_drafts_are_left_alone():
    seen = []

    class Ban(LogitsProcessor):
        stateless = True

        def __call__(self, input_ids, scores):
            seen.append(input_ids.shape[1])
            return scores.index_fill(1, torch.tensor([3]), -torch.inf) + 1.0

    chain = ProcessorChain(LogitsProcessorList([Ban()]))
    drafts = torch.tensor([[5, 3, 6, 7], [5, 6, 7, 8]])
    found = chain(torch.zeros(2, 5, VOCAB), text_of(2), [0, 1], [8, 8], drafts, [4, 3])
    assert (found[:, :, 0] == torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])).all()
    assert seen == [8, 9, 10, 11]


def test_banned_look_ups_are_not_verified(monkeypatch):
    """An n-gram ban forbids by construction what a look-up proposes."""
    verified, verify = [], SpeculationStrategy.verify

    def noted(self, state, draft):
        for row, tokens, count in zip(state.active, draft.tokens, draft.counts, strict=True):
            text = state.text.by_column(state.text.columns[row])[row]
            verified.extend(torch.cat([text, tokens[: made + 1]]) for made in range(count))
        return verify(self, state, draft)

    monkeypatch.setattr(SpeculationStrategy, "verify", noted)
    family = families.family("llama")
    ids = torch.cat([family.ids, family.ids], dim=1)
    options = {"max_new_tokens": 24, "no_repeat_ngram_size": 3, "attention_mask": family.mask.repeat(1, 2)}
    assert torch.equal(family.ours("prompt_lookup", ids, **options), family.stock(ids, **options))
    assert verified
    ban = stock.NoRepeatNGramLogitsProcessor(3)
    for text in verified:
        assert ban(text[None, :-1], torch.zeros(1, families.VOCAB))[0, text[-1]] == 0


@pytest.mark.parametrize("strategy", ["assisted", "vegas", "specbound", "via_sd", "spd"])
@pytest.mark.parametrize("sample", [False, True])
def test_a_drafter_whose_words_are_all_banned_stops(monkeypatch, strategy, sample):
    """Nothing is drawn from nothing, and no word is proposed that the drafter can't know."""
    original = DecodingState.draft_next

    def knowing_little(state, logits, drafts, counts):
        return original(state, torch.where(torch.arange(families.VOCAB) < 20, logits, OUTSIDE), drafts, counts)

    monkeypatch.setattr(DecodingState, "draft_next", knowing_little)
    family = families.family("llama")
    options = {**family.batch, "max_new_tokens": 12, "suppress_tokens": list(range(20)), "do_sample": sample}
    out = family.ours(strategy, **options, return_dict_in_generate=True)
    # VIA-SD's slim verifier knows all words, and goes on without its drafter
    assert out.speculation.method["drafter_tokens"] == 0 if strategy == "via_sd" else out.speculation is None
    if not sample:
        assert torch.equal(out.sequences, family.stock(**options))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_repeated_ngrams_are_found_as_in_stock(size):
    generator = torch.Generator().manual_seed(size)
    for width in (1, 2, 4, 30, 200):
        ids = torch.randint(0, 4, (3, width), generator=generator)
        drafts = torch.randint(0, 4, (3, 6), generator=generator)
        logits = torch.randn(3, 7, 6, generator=generator)
        processors = LogitsProcessorList([stock.NoRepeatNGramLogitsProcessor(size)])
        found = ProcessorChain(processors)(logits, ids, [0, 1, 2], [width, max(1, width - 1), width], drafts)
        for row in range(3):
            columns = max(1, width - 1) if row == 1 else width
            wanted = by_steps(processors, logits[row], ids, row, columns, drafts[row])
            assert torch.equal(found[row], wanted)


def test_min_length_and_eos_in_a_ragged_batch(model, inputs):
    """Rows that ended are shown to processors as in stock, and their scores stay stock's."""
    eos = int(model.generate(**inputs, **OPTIONS).sequences[0, PROMPT + 5])
    options = {**OPTIONS, "eos_token_id": eos, "min_new_tokens": 4, "repetition_penalty": 1.2, "pad_token_id": 0}
    wanted = model.generate(**inputs, **options)
    found = model.generate(**inputs, **options, assistant_strategy=VEGAS)
    assert torch.equal(found.sequences, wanted.sequences)
    ended = wanted.sequences[:, PROMPT:] == eos
    for place, (ours, theirs) in enumerate(zip(found.scores, wanted.scores, strict=True)):
        live = ~ended[:, :place].any(1)
        finite = theirs[live].isfinite()
        assert torch.equal(finite, ours[live].isfinite())
        torch.testing.assert_close(ours[live][finite], theirs[live][finite], atol=1e-5, rtol=0)
    assert math.prod(found.sequences.shape) > 0


class Contrasts(LogitsProcessor):
    """Context-aware decoding: one half of the rows against the other."""

    def __call__(self, input_ids, scores):
        return scores - 0.9 * scores.flip(0)


class Diverse(LogitsProcessor):
    """Bans what another row has just written."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, input_ids[:, -1], -torch.inf)


@pytest.mark.parametrize("strategy", BASES)
@pytest.mark.parametrize("processor", [Contrasts(), Diverse()], ids=["scores", "text"])
def test_rows_that_are_mixed_stay_level(strategy, processor, llama):
    inputs = {**llama.batch, "max_new_tokens": 16, "logits_processor": LogitsProcessorList([processor])}
    expected = llama.stock(**inputs)
    assert not torch.equal(expected, llama.stock(**{**inputs, "logits_processor": None}))
    assert torch.equal(llama.ours(strategy, **inputs), expected)


def test_rows_that_end_apart_cannot_be_mixed(llama):
    inputs = {**llama.batch, "max_new_tokens": 16, "eos_token_id": llama.eos}
    calls = []
    handle = llama.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match="`logits_processor` Contrasts mixes the scores of the rows"):
            llama.ours("prompt_lookup", **inputs, logits_processor=LogitsProcessorList([Contrasts()]))
    finally:
        handle.remove()
    assert not calls
    # what looks at the other rows' text only is served: the padding of a row that has ended is stock's
    processors = LogitsProcessorList([Diverse()])
    found = llama.ours("prompt_lookup", **inputs, logits_processor=processors)
    assert torch.equal(found, llama.stock(**inputs, logits_processor=processors))
