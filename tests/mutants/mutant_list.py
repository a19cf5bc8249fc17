"""Mistakes that the tests must find: each changes one place of the package.

A mutant names the tests of its module, and the strategies with which `run.py` then runs the contract on one family.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One mistake.

    Attributes:
        name (`str`): what goes wrong.
        file (`str`): where, below `hf_specdec/`.
        old (`str`): the right text, which the file has exactly once.
        new (`str`): the wrong one.
        tests (`tuple[str, ...]`): the tests of the module, below `tests/`.
        strategies (`tuple[str, ...]`): whom the contract is asked about after that.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    strategies: tuple[str, ...]


_TIERS = "generation/methods/via_sd/tiers.py"
_LAWS = "generation/methods/via_sd/laws.py"
_SLIM = "generation/methods/via_sd/slim_drafter.py"
_LOOP = ("generation/test_rows_in_turn.py", "generation/test_stats.py", "generation/test_text.py")
_VIA_SD = ("methods/via_sd",)
_SPD = ("methods/spd/test_spd_schedule.py", "methods/spd/test_spd_text.py", "methods/spd/test_spd_distribution.py")
_SPECBOUND = (
    "methods/specbound/test_specbound_exits.py",
    "methods/specbound/test_specbound_rounds.py",
    "methods/specbound/test_specbound_sampling.py",
    "methods/specbound/test_specbound_stops.py",
)

_MEMORY = (
    "generation/test_purity.py",
    "generation/test_processor_memory.py",
    "generation/test_processor_distribution.py",
)

MUTANTS = [
    # the loop
    Mutant(
        "rows come back in the order of the cache",
        "generation/loop.py",
        "return state.target, retired[::-1]",
        "return state.target, sorted(retired)",
        _LOOP,
        ("assisted", "plain"),
    ),
    Mutant(
        "a finished row is completed one token short",
        "generation/loop.py",
        "count - 1 - start + pads",
        "count - 1 - start + max(0, pads - 1)",
        _LOOP,
        ("assisted", "plain"),
    ),
    Mutant(
        "tokens behind an EOS are emitted",
        "generation/output.py",
        "new, self.done[row] = new[: place + 1], True",
        "self.done[row] = True",
        _LOOP,
        ("assisted", "vegas"),
    ),
    Mutant(
        "what a criterion cut stays in the text",
        "generation/output.py",
        "self.state.text.cut(row, self.clock)",
        "pass",
        _LOOP,
        ("assisted", "vegas"),
    ),
    Mutant(
        "a streamer gets columns that some row lacks",
        "generation/output.py",
        "self.clock >= min((columns[row] for row in unfinished)",
        "self.clock >= max((columns[row] for row in unfinished)",
        _LOOP,
        ("assisted", "plain"),
    ),
    Mutant(
        "caches keep the row that has finished",
        "generation/state.py",
        "follower.swap(slot, last)",
        "pass",
        ("cache", *_LOOP),
        ("assisted", "vegas"),
    ),
    Mutant(
        "the prompt's last token is read twice",
        "generation/state.py",
        "ends = [length - 1 for length in lengths]",
        "ends = list(lengths)",
        _LOOP,
        ("plain",),
    ),
    # the cache
    Mutant(
        "keys are off by a thousandth",
        "cache/speculative.py",
        "keys[:, :, address.low : address.high] = key_states",
        "keys[:, :, address.low : address.high] = key_states * 1.001",
        ("cache",),
        ("plain", "assisted"),
    ),
    Mutant(
        "ragged rows write one slot late",
        "cache/speculative.py",
        "keys[rows, :, slots] = key_states.transpose(1, 2)",
        "keys[rows, :, slots.clamp(max=self.capacity - 2) + 1] = key_states.transpose(1, 2)",
        ("cache",),
        ("assisted",),
    ),
    Mutant(
        "growing storage forgets its last slot",
        "cache/speculative.py",
        "new[:, :, : old.shape[2]] = old",
        "new[:, :, : old.shape[2] - 1] = old[:, :, :-1]",
        ("cache",),
        ("plain",),
    ),
    Mutant(
        "captured forwards write into the text of rows that have finished",
        "generation/programs.py",
        "self.cache.spare = self.widths[-1]",
        "self.cache.spare = 0",
        ("kernels/test_compiled.py",),
        ("assisted",),
    ),
    Mutant(
        "a sliding layer's cache is read as if it began with the text",
        "cache/speculative.py",
        "first = width - old.keys.shape[2]",
        "first = 0",
        ("cache",),
        ("plain",),
    ),
    Mutant(
        "a roll-back is forgotten",
        "generation/strategy.py",
        "state.target.cache.set_lengths([count - 1 for count in state.committed])",
        "pass",
        ("cache", *_LOOP, "methods/assisted"),
        ("assisted", "vegas"),
    ),
    # acceptance
    Mutant(
        "q is ignored",
        "generation/acceptance.py",
        "ratio = torch.where(q > 0, p / q, torch.zeros_like(p))",
        "ratio = torch.where(q > 0, p, torch.zeros_like(p))",
        ("generation/test_acceptance.py",),
        ("assisted",),
    ),
    Mutant(
        "the residual is the target",
        "generation/acceptance.py",
        "rest = (target - draft).clamp(min=0)",
        "rest = target.clone()",
        ("generation/test_acceptance.py",),
        ("assisted",),
    ),
    Mutant(
        "a draft behind a refusal is accepted",
        "generation/acceptance.py",
        "return torch.minimum(keep.long().cumprod(dim=1).sum(dim=1), counts)",
        "return torch.minimum(keep.long().sum(dim=1), counts)",
        ("generation/test_acceptance.py",),
        ("assisted",),
    ),
    Mutant(
        "the bonus token comes from the residual",
        "generation/acceptance.py",
        "refused = accepted < counts",
        "refused = accepted <= counts",
        ("generation/test_acceptance.py",),
        ("assisted",),
    ),
    Mutant(
        "the weight leaves out what it should keep",
        "generation/acceptance.py",
        "ratio = 1 - weight + weight * ratio",
        "ratio = weight * ratio",
        ("generation/test_acceptance.py", "methods/diversed/test_diversed_acceptance.py"),
        ("diversed",),
    ),
    # processors
    Mutant(
        "a processor sees one token less",
        "generation/processors.py",
        "(text[:, :t], given)[owners]",
        "(text[:, : t - 1], given)[owners]",
        ("generation/test_processors.py",),
        ("assisted",),
    ),
    Mutant(
        "a processor sees the drafts of another position",
        "generation/prefixes.py",
        "= self.drafts[:, : self.m - 1]",
        "= self.drafts[:, : self.m - 1].flip(1)",
        ("generation/test_processors.py",),
        ("assisted",),
    ),
    Mutant(
        "a grammar is asked about rows that have no such text",
        "generation/processors.py",
        "_compat.for_rows(processor, set(owners))(",
        "processor(",
        ("generation/test_processors.py",),
        ("assisted",),
    ),
    Mutant(
        "a subclass of a warper is taken for one that ignores the text",
        "generation/processors.py",
        "if type(processor) in _IGNORES_IDS:",
        "if isinstance(processor, tuple(_IGNORES_IDS)):",
        ("generation/test_processors.py",),
        ("assisted",),
    ),
    Mutant(
        "a text that breaks the grammar is shown to it",
        "generation/processors.py",
        "if ban:",
        "if ban and i < 0:",
        ("generation/test_processors.py",),
        ("vegas",),
    ),
    Mutant(
        "banned look-ups are verified",
        "generation/methods/prompt_lookup.py",
        "counts = state.possible_drafts(tokens, counts)",
        "counts = list(counts)",
        ("generation/test_processors.py",),
        ("prompt_lookup",),
    ),
    Mutant(
        "an n-gram that begins one place too late bans",
        "generation/prefixes.py",
        "<= prefixes.ends[..., None]",
        "<= prefixes.ends[..., None] + 1",
        ("generation/test_processors.py",),
        ("assisted",),
    ),
    Mutant(
        "an attribute that is stored is no memory",
        "generation/purity.py",
        '_STORES = {"STORE_ATTR", "DELETE_ATTR", ',
        '_STORES = {"DELETE_ATTR", ',
        _MEMORY,
        ("vegas",),
    ),
    Mutant(
        "what drafts left in a processor stays",
        "generation/call_path.py",
        "        self._restore(self.saved[calls])\n",
        "",
        _MEMORY,
        ("vegas",),
    ),
    Mutant(
        "a call on other drafts stands",
        "generation/call_path.py",
        "calls = min(len(self.saved) - 1, same + 1, column - first)",
        "calls = min(len(self.saved) - 1, same + 2, column - first)",
        _MEMORY,
        ("vegas",),
    ),
    Mutant(
        "a row's own drawn token is cut with the drafts of the others",
        "generation/output.py",
        "width = min(ends)",
        "width = max(1, min(ends) - 1)",
        _MEMORY,
        ("assisted",),
    ),
    Mutant(
        "rows go on past the end of another one",
        "generation/output.py",
        "if token in self.eos), len(new)))",
        "if token in self.eos and slot < 0), len(new)))",
        _MEMORY,
        ("assisted",),
    ),
    Mutant(
        "a processor that can't go back sees what follows a refusal",
        "generation/strategy.py",
        "if not all(stays.tolist()) or",
        "if not any(stays.tolist()) or",
        _MEMORY,
        ("assisted",),
    ),
    Mutant(
        "in order, a refused draft may be drawn again",
        "generation/acceptance.py",
        "drawn = draw_next(open_, real, torch.zeros_like(real), p, q)",
        "drawn = draw_next(open_, torch.zeros_like(real), torch.zeros_like(real), p, q)",
        ("generation/test_acceptance.py", *_MEMORY),
        ("assisted",),
    ),
    # selection
    Mutant(
        "the assistant is taken to have read its last draft",
        "generation/drafting.py",
        "reader.known = starts\n",
        "reader.known = [start + 1 for start in starts]\n",
        ("methods/assisted", "methods/diversed/test_diversed_rounds.py"),
        ("assisted",),
    ),
    Mutant(
        "the least important tokens are chosen",
        "cache/selection.py",
        "return metric.topk(self.selected, dim=-1, sorted=ragged).indices",
        "return metric.topk(self.selected, dim=-1, sorted=ragged, largest=False).indices",
        ("cache", "methods/vegas"),
        ("vegas",),
    ),
    Mutant(
        "a rejected draft may be chosen",
        "cache/selection.py",
        "return positions >= valid, ",
        "return positions > valid, ",
        ("cache", "methods/vegas"),
        ("vegas",),
    ),
    Mutant(
        "recents are gathered one token early",
        "cache/sparse.py",
        "recent = address.positions_on(chosen.device)[:, 1 : 1 + fed]",
        "recent = address.positions_on(chosen.device)[:, :fed]",
        ("cache", "methods/vegas"),
        ("vegas",),
    ),
    Mutant(
        "a finished row leaves its selection to another",
        "cache/selection.py",
        "values[i], values[j] = values[j], values[i]",
        "pass",
        ("cache", "methods/vegas"),
        ("vegas",),
    ),
    Mutant(
        "the budget leaves the drafts out",
        "cache/selection.py",
        "self.budget(start + newest + 1, start + 1)",
        "self.budget(start + 1, start + 1)",
        ("cache", "methods/vegas"),
        ("vegas",),
    ),
    # tiers
    Mutant(
        "a draft below the threshold is accepted",
        _LAWS,
        "below = torch.where((log_ratio >= escalate) & sure, REGENERATE, ESCALATE)",
        "below = torch.where((log_ratio >= escalate) | sure, REGENERATE, ESCALATE)",
        _VIA_SD,
        ("via_sd",),
    ),
    Mutant(
        "the gate forgets what it redrew",
        _LAWS,
        "return draft * ~redrawn + (draft * redrawn).sum(dim=-1, keepdim=True) * slim",
        "return draft * ~redrawn + (draft * redrawn)",
        _VIA_SD,
        ("via_sd:gate",),
    ),
    Mutant(
        "drafts behind a redrawn token stay",
        _TIERS,
        "if own[j] != drafted[j]:",
        "if own[j] != drafted[j] and j > 0:",
        _VIA_SD,
        ("via_sd:safe", "via_sd:paper"),
    ),
    Mutant(
        "the model decides with the text before it",
        _TIERS,
        "state.process(logits, block[:, 1:], back, counts",
        "state.process(logits, block[:, 1:], [max(0, unread - 1) for unread in back], counts",
        _VIA_SD,
        ("via_sd:safe", "via_sd:paper"),
    ),
    Mutant(
        "the model is taken to have read what it has not",
        _TIERS,
        "self.audit.unread[row] += decision.emitted[:count]",
        "self.read[row] = committed - 1",
        _VIA_SD,
        ("via_sd:safe", "via_sd:paper"),
    ),
    Mutant(
        "candidates stay in the text",
        _SLIM,
        "speculation.enter_context(state.text.speculated(new))",
        "state.text.write(new)",
        _VIA_SD,
        ("via_sd",),
    ),
    # stages
    Mutant(
        "a rejected token stays in the stages",
        "generation/methods/spd/method.py",
        "self.pipeline.rewind(oldest.position + 1)",
        "self.pipeline.rewind(oldest.position + 2)",
        _SPD,
        ("spd",),
    ),
    Mutant(
        "only a stage's first layer is rolled back",
        "cache/stage.py",
        "for layer in self.own:\n            layer.lengths",
        "for layer in self.own[:1]:\n            layer.lengths",
        ("cache", *_SPD),
        ("spd",),
    ),
    Mutant(
        "tokens behind a rejected one stay under way",
        "generation/methods/spd/pipeline.py",
        "self.waiting = [None] * len(self.stages)",
        "self.waiting = self.waiting or [None] * len(self.stages)",
        _SPD,
        ("spd",),
    ),
    Mutant(
        "a refused guess is replaced without the residual",
        "generation/methods/spd/method.py",
        "return acceptance.draw_next(token, one, accepted, distribution, proposed).tokens[:, :1], 0",
        "return torch.multinomial(distribution[:, 0], 1), 0",
        _SPD,
        ("spd",),
    ),
    Mutant(
        "the module reads features of the tick before",
        "generation/methods/spd/method.py",
        "entry.features.update(tick.features[entry.depth])\n            entry.depth += 1",
        "entry.depth += 1",
        _SPD,
        ("spd",),
    ),
    # SpecBound
    Mutant(
        "the test asks for more than the bound",
        "generation/methods/specbound/method.py",
        "passed = bool(confidence >= self.config.tau)",
        "passed = bool(confidence > self.config.tau)",
        _SPECBOUND,
        ("specbound",),
    ),
    Mutant(
        "rows are not carried through the last layer",
        "generation/methods/specbound/method.py",
        "while self.staircase.depths[-1] < self.depth:",
        "while self.staircase.depths[-1] < self.depth - 1:",
        _SPECBOUND,
        ("specbound",),
    ),
    Mutant(
        "drafts of a row are processed without the drafts before them",
        "generation/state.py",
        "ids[row, columns[slot] - width : columns[slot]] = drafts[slot]",
        "pass",
        (*_SPECBOUND, "generation/test_processors.py"),
        ("assisted", "specbound"),
    ),
    # copies of the model
    Mutant(
        "the model itself is switched to our attention",
        "kernels/twin.py",
        "copied = made[id(config)] = copy.copy(config)",
        "copied = made[id(config)] = config",
        ("kernels/test_twin.py",),
        ("plain",),
    ),
    Mutant(
        "what hangs on an instance runs the original",
        "kernels/twin.py",
        "_rebind(made, original, self.made)",
        "pass",
        ("kernels/test_twin.py",),
        ("plain",),
    ),
    Mutant(
        "adapters stay with the rows that have finished",
        "generation/state.py",
        "self.feed(self.active)",
        "pass",
        ("generation/test_loaded_models.py",),
        ("assisted",),
    ),
    # statistics
    Mutant(
        "drafts that were cut count as accepted",
        "generation/stats.py",
        "accepted = min(accepted, emitted)",
        "pass",
        ("generation/test_stats.py",),
        ("assisted",),
    ),
    Mutant(
        "what a criterion cut stays in the counts by place",
        "generation/stats.py",
        "self.num_accepted_tokens_per_pos[place] -= 1",
        "pass",
        ("generation/test_stats.py",),
        ("assisted",),
    ),
    Mutant(
        "the bonus token is left out of the mean",
        "generation/stats.py",
        "return sum(map(sum, self.accept_lengths)) / steps if steps else 0.0",
        "return self.num_accepted_tokens / steps if steps else 0.0",
        ("generation/test_stats.py",),
        ("assisted",),
    ),
]
