"""The acceptance rules, enumerated exactly: every draft and every outcome of every coin, by its probability."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats as distributions

from hf_specdec.generation import acceptance


ALARM = 1e-3
TOLERANCE = 2e-6  # the rules work in float32


class Distributions:
    """Distributions of the next token after every prefix of up to `k` tokens: the target's `p`, the drafter's `q`."""

    def __init__(self, vocab: int, k: int, kind: str, seed: int = 0) -> None:
        self.vocab, self.k, self.kind = vocab, k, kind
        generator = torch.Generator().manual_seed(seed)
        self.p: dict[tuple[int, ...], torch.Tensor] = {}
        self.q: dict[tuple[int, ...], torch.Tensor] = {}
        for length in range(k + 1):
            for prefix in itertools.product(range(vocab), repeat=length):
                p, q = (torch.softmax(2 * torch.randn(vocab, generator=generator), dim=0) for _ in range(2))
                if kind == "equal":
                    q = p.clone()
                elif kind == "point":
                    q = torch.nn.functional.one_hot(q.argmax(), vocab).float()
                elif kind == "point_on_zero":
                    choice = int(q.argmax())
                    p[choice] = 0
                    p, q = p / p.sum(), torch.nn.functional.one_hot(torch.tensor(choice), vocab).float()
                elif kind == "disjoint":
                    half = torch.arange(vocab) < vocab // 2
                    p, q = p * half / (p * half).sum(), q * ~half / (q * ~half).sum()
                elif kind == "zeros":  # supports that overlap in part
                    p[0], q[-1] = 0, 0
                    p, q = p / p.sum(), q / q.sum()
                elif kind == "sub":
                    q = q * torch.rand(1, generator=generator) if length < k else torch.zeros(vocab)
                elif kind == "sub_below":  # q under p everywhere: what is proposed always stays
                    q = p * torch.rand(vocab, generator=generator) if length < k else torch.zeros(vocab)
                self.p[prefix], self.q[prefix] = p, q


def drafts_of(distributions: Distributions, sub: bool) -> list[tuple[tuple[int, ...], float]]:
    """Every draft that the distributions can propose, and its probability; with `sub`, a draft may end early."""
    found = []
    for length in range(distributions.k + 1) if sub else (distributions.k,):
        for draft in itertools.product(range(distributions.vocab), repeat=length):
            chance = 1.0
            for place in range(length):
                chance *= float(distributions.q[draft[:place]][draft[place]])
            if sub and length < distributions.k:
                chance *= 1 - float(distributions.q[draft].double().sum())
            if chance > 0:
                found.append((draft, chance))
    return found


def outcomes(monkeypatch, drafts, counts, target, draft, weight=None):
    """Run `speculative_sample` for every number of accepted drafts.

    Yields, for each row and number j of accepted drafts, (row, j, probability, distribution of the next token).
    """
    k, seen = drafts.shape[1], {}
    rule = acceptance.acceptance_probability

    def probability(*args):
        seen["chance"] = rule(*args)
        return seen["chance"]

    def multinomial(distribution, number):
        seen["distribution"] = distribution
        return torch.zeros(distribution.shape[0], number, dtype=torch.int64)

    for j in range(k + 1):
        coins = torch.full((drafts.shape[0], k), -1.0, dtype=torch.float64)
        coins[:, j:] = 2.0
        with monkeypatch.context() as patch:
            patch.setattr(acceptance, "acceptance_probability", probability)
            patch.setattr(torch, "multinomial", multinomial)
            patch.setattr(torch, "rand", lambda *args, coins=coins, **kwargs: coins)
            verdict = acceptance.speculative_sample(drafts, counts, target, draft, weight)
        for row, count in enumerate(counts.tolist()):
            if j > count:
                continue
            assert verdict.accepted[row] == j
            assert verdict.tokens[row, :j].tolist() == drafts[row, :j].tolist()
            chances = seen["chance"][row].double()
            weight_of = float(chances[:j].prod()) * (float(1 - chances[j]) if j < count else 1.0)
            yield row, j, weight_of, seen["distribution"][row].double()


def joint_distribution(
    monkeypatch, distributions: Distributions, counts=None, weight: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first k + 1 tokens' distribution (short rounds are completed by the declared one), and the declared one."""
    vocab, k, sub = distributions.vocab, distributions.k, distributions.kind.startswith("sub")
    proposals = drafts_of(distributions, sub)
    padded = torch.tensor([list(draft) + [0] * (k - len(draft)) for draft, _ in proposals]).view(-1, k)
    real = torch.tensor([len(draft) for draft, _ in proposals])
    if counts is not None:
        real = torch.minimum(real, torch.tensor(counts))
    prefixes = [[tuple(row[:length]) for length in range(k + 1)] for row in padded.tolist()]
    target = torch.stack([torch.stack([distributions.p[prefix] for prefix in row]) for row in prefixes])
    width = k + 1 if sub else k
    draft = torch.stack([torch.stack([distributions.q[prefix] for prefix in row]) for row in prefixes])[:, :width]
    weights = None if weight is None else torch.full((len(proposals), k), weight)
    drafter = None if distributions.kind.startswith("point") else draft

    def declared(prefix: tuple[int, ...]) -> torch.Tensor:
        p = distributions.p[prefix].double()
        drafted = k if counts is None else counts
        if weight is None or len(prefix) >= drafted:
            return p / p.sum()
        return weight * p + (1 - weight) * distributions.q[prefix].double()

    def complete(prefix: tuple[int, ...], mass: torch.Tensor | float) -> None:
        if len(prefix) == k + 1:
            emitted[prefix] += mass
            return
        for token, chance in enumerate(declared(prefix).tolist()):
            complete((*prefix, token), mass * chance)

    emitted = torch.zeros([vocab] * (k + 1), dtype=torch.float64)
    for row, j, chance, distribution in outcomes(monkeypatch, padded, real, target, drafter, weights):
        for token, mass in enumerate((distribution / distribution.sum()).tolist()):
            if mass and chance:
                complete((*padded[row, :j].tolist(), token), proposals[row][1] * chance * mass)
    wanted = torch.zeros_like(emitted)
    for sequence in itertools.product(range(vocab), repeat=k + 1):
        chance = 1.0
        for place in range(k + 1):
            chance *= float(declared(sequence[:place])[sequence[place]])
        wanted[sequence] = chance
    return emitted, wanted


KINDS = ["dense", "equal", "point", "point_on_zero", "disjoint", "zeros", "sub", "sub_below"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocab", "k"), [(2, 1), (5, 1), (4, 2), (3, 3)])
def test_emitted_tokens_follow_the_target_exactly(monkeypatch, kind, vocab, k):
    emitted, wanted = joint_distribution(monkeypatch, Distributions(vocab, k, kind, seed=vocab + k))
    assert emitted.sum() == pytest.approx(1, abs=TOLERANCE)
    torch.testing.assert_close(emitted, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", ["dense", "point", "zeros", "disjoint"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_rows_with_fewer_real_drafts(monkeypatch, kind, count):
    """A row whose count is below k judges its real drafts only; the token after them is the target's."""
    emitted, wanted = joint_distribution(monkeypatch, Distributions(3, 3, kind, seed=7), counts=count)
    torch.testing.assert_close(emitted, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["dense", "equal", "disjoint", "zeros"])
@pytest.mark.parametrize("k", [1, 2])
def test_a_weight_mixes_the_two_distributions(monkeypatch, weight, kind, k):
    """The declared distribution of a weighted position is w p + (1 - w) q; the bonus token follows p."""
    emitted, wanted = joint_distribution(monkeypatch, Distributions(4, k, kind, seed=3), weight=weight)
    torch.testing.assert_close(emitted, wanted, atol=TOLERANCE, rtol=0)


def mutant_accepts_a_match(drafts, target, draft, weight=None):
    return (target[:, : drafts.shape[1]].argmax(-1) == drafts).float()


def mutant_ignores_q(drafts, target, draft, weight=None):
    return target[:, : drafts.shape[1]].gather(2, drafts[..., None])[..., 0]


def mutant_always_accepts(drafts, target, draft, weight=None):
    return torch.ones(drafts.shape)


def mutant_shifts_p(drafts, target, draft, weight=None):
    return ORIGINAL(drafts, target[:, 1:], draft, weight)


ORIGINAL = acceptance.acceptance_probability


@pytest.mark.parametrize(
    "mutant",
    [mutant_accepts_a_match, mutant_ignores_q, mutant_always_accepts, mutant_shifts_p],
    ids=lambda f: f.__name__,
)
def test_mutants_of_the_rule_are_caught(monkeypatch, mutant):
    monkeypatch.setattr(acceptance, "acceptance_probability", mutant)
    emitted, wanted = joint_distribution(monkeypatch, Distributions(4, 2, "dense"))
    assert (emitted - wanted).abs().max() > 1e-3


@pytest.mark.parametrize(
    "mutant", [lambda p, q: p, lambda p, q: (p - q).abs() / (p - q).abs().sum(-1, keepdim=True), lambda p, q: q]
)
def test_mutants_of_the_residual_are_caught(monkeypatch, mutant):
    monkeypatch.setattr(acceptance, "residual_distribution", mutant)
    emitted, wanted = joint_distribution(monkeypatch, Distributions(4, 2, "dense"))
    assert (emitted - wanted).abs().max() > 1e-3


def test_sub_probability_needs_the_last_position(monkeypatch):
    """Without position k + 1 of `q` a wrong distribution would follow an early end: the tests above see that."""
    original = acceptance.speculative_sample
    monkeypatch.setattr(
        acceptance, "speculative_sample", lambda x, n, p, q, w=None: original(x, n, p, q[:, : x.shape[1]], w)
    )
    emitted, wanted = joint_distribution(monkeypatch, Distributions(4, 2, "sub"))
    assert (emitted - wanted).abs().max() > 1e-3


def test_residual_without_mass_is_the_target():
    p = torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5]])
    q = torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.3, 0.2]])
    torch.testing.assert_close(
        acceptance.residual_distribution(p, q), torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])
    )


def test_a_token_that_q_excludes_is_refused():
    drafts, p = torch.tensor([[1]]), torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])
    q = torch.tensor([[[1.0, 0.0]]])
    assert acceptance.acceptance_probability(drafts, p, q).item() == 0
    assert acceptance.acceptance_probability(drafts, p, None).item() == 0.5


def test_impossible_tokens_are_never_accepted():
    """p(x) = 0 must refuse even if the uniform draw is exactly 0."""
    drafts, counts = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    p = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *args, **kwargs: torch.zeros(1, 1, dtype=torch.float64))
        verdict = acceptance.speculative_sample(drafts, counts, p, None)
    assert verdict.accepted.tolist() == [0] and verdict.tokens[0, 0] == 1


@pytest.mark.parametrize(
    ("drafts", "count", "choices", "accepted", "following"),
    [
        ([5, 6, 7], 3, [5, 6, 7, 8], 3, 8),
        ([5, 6, 7], 3, [5, 6, 1, 8], 2, 1),
        ([5, 6, 7], 3, [5, 1, 7, 8], 1, 1),
        ([5, 6, 7], 3, [1, 6, 7, 8], 0, 1),
        ([5, 6, 7], 2, [5, 6, 7, 8], 2, 7),
        ([5, 6, 7], 1, [5, 9, 7, 8], 1, 9),
        ([5, 6, 7], 0, [5, 6, 7, 8], 0, 5),
        ([], 0, [4], 0, 4),
    ],
)
def test_greedy_match(drafts, count, choices, accepted, following):
    verdict = acceptance.greedy_match(
        torch.tensor([drafts], dtype=torch.int64).view(1, -1), torch.tensor([count]), torch.tensor([choices])
    )
    assert verdict.accepted.tolist() == [accepted]
    assert verdict.tokens[0, : accepted + 1].tolist() == [*drafts[:accepted], following]


def test_greedy_match_judges_rows_apart():
    drafts = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    choices = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 4], [9, 2, 3, 4]])
    verdict = acceptance.greedy_match(drafts, torch.tensor([3, 1, 3]), choices)
    assert verdict.accepted.tolist() == [3, 1, 0]
    assert [verdict.tokens[row, count].item() for row, count in enumerate([3, 1, 0])] == [4, 2, 9]


@pytest.mark.parametrize("kind", ["dense", "point", "zeros", "equal"])
def test_sampled_tokens_follow_the_target(kind):
    """Chi-square of what `speculative_sample` really draws, counts ragged, first two tokens together."""
    torch.manual_seed(11)
    vocab, k, rows = 3, 3, 40_000
    distributions = Distributions(vocab, k, kind, seed=5)
    counts = torch.arange(rows) % (k + 1)
    drafts = torch.zeros(rows, k, dtype=torch.int64)
    ps, qs = [], []

    def of(table: dict[tuple[int, ...], torch.Tensor], place: int) -> torch.Tensor:
        stacked = torch.stack([table[prefix] for prefix in itertools.product(range(vocab), repeat=place)])
        index = torch.zeros(rows, dtype=torch.int64)
        for column in range(place):
            index = index * vocab + drafts[:, column]
        return stacked[index]

    for place in range(k):
        qs.append(of(distributions.q, place))
        drafts[:, place] = torch.multinomial(qs[-1], 1)[:, 0]
    ps = [of(distributions.p, place) for place in range(k + 1)]
    distribution = None if kind == "point" else torch.stack(qs, dim=1)
    verdict = acceptance.speculative_sample(drafts, counts, torch.stack(ps, dim=1), distribution)
    assert (verdict.accepted <= counts).all()
    for count in range(k + 1):
        mine = counts == count
        first = verdict.tokens[mine, 0]
        check(torch.bincount(first, minlength=vocab), distributions.p[()])
        if not count:
            continue
        both = mine & (verdict.accepted > 0)  # given the first token, the second is a draw from p
        for token in range(vocab):
            second = verdict.tokens[both & (verdict.tokens[:, 0] == token), 1]
            if len(second) > 200:
                check(torch.bincount(second, minlength=vocab), distributions.p[(token,)])


def check(observed: torch.Tensor, distribution: torch.Tensor) -> None:
    possible = distribution > 0
    assert not observed[~possible].any()
    expected = distribution[possible].double() * observed.sum()
    expected *= observed.sum() / expected.sum()
    if possible.sum() > 1:
        result = distributions.chisquare(observed[possible].numpy(), expected.numpy())
        assert result.pvalue > ALARM / 20


def test_no_drafts_at_all():
    """k = 0 draws from the target's distribution."""
    torch.manual_seed(0)
    p = torch.tensor([0.1, 0.2, 0.7]).expand(20_000, 1, 3)
    verdict = acceptance.speculative_sample(
        torch.zeros(20_000, 0, dtype=torch.int64), torch.zeros(20_000).long(), p, None
    )
    assert not verdict.accepted.any() and verdict.tokens.shape == (20_000, 1)
    check(torch.bincount(verdict.tokens[:, 0], minlength=3), p[0, 0])
