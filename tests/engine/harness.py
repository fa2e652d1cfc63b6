"""The engine's core over a fake runner, what it was asked and what it said; and strategies for both."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis import strategies as st

from service.engine.core import Core
from service.engine.request import Delta, Logprobs, Request, SamplingParams
from service.engine.scheduler import Scheduler
from service.engine.speculation import Speculation
from tests.engine.fake_grammar import FakeConstraint
from tests.engine.fake_model import END_OF_TEXT, VOCAB_SIZE
from tests.engine.fake_runner import FakeRunner
from tests.engine.oracle import Answer, Ask, answers

CONTEXT_LENGTH = 64


@dataclass
class Engine:
    """Steps by hand."""

    num_blocks: int = 40
    block_size: int = 4
    max_num_seqs: int = 8
    budget: int = 16
    depth: int = 0
    publish_every: int = 1  # steps, after which the tokens that could wait are told
    drafts: int = 0  # most a sequence and step
    deltas: dict[tuple[int, int], list[Delta]] = field(default_factory=lambda: defaultdict(list))
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.runner = FakeRunner(self.num_blocks, self.block_size, depth=self.depth)
        self.scheduler = Scheduler(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            end_of_text_id=END_OF_TEXT,
            speculation=Speculation(most=self.drafts, clock=lambda: 0.0),  # so that a row costs the same in each run
        )
        self.core = Core(self.scheduler, self.runner)

    def add(self, ask: Ask) -> None:
        """With a grammar, `supply` must follow."""
        self.scheduler.add(ask.request, ask.params, completing_ids=ask.completing_ids, patient=ask.patient)

    def supply(self, ask: Ask) -> None:
        if ask.params.grammar is not None:
            self.scheduler.supply(ask.request.id, FakeConstraint(ask.params.grammar))

    def add_all(self, asks: list[Ask]) -> None:
        for ask in asks:
            self.add(ask)
            self.supply(ask)

    def record(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            self.deltas[delta.request_id, delta.choice].append(delta)

    def step(self) -> None:
        self.num_steps += 1
        self.record(self.core.step())
        if self.num_steps % self.publish_every == 0:
            self.record(self.scheduler.take_held())

    def run(self) -> None:
        while not self.core.idle:
            self.step()
            assert self.num_steps < 20_000, "no progress"

    def answer(self, request_id: int, choice: int) -> Answer:
        """What was said of a sequence, which has finished, as one."""
        first, *rest = self.deltas[request_id, choice]
        assert all(delta.prompt_logprobs is None for delta in rest)
        whole = first
        for delta in rest:
            whole = whole.then(delta)
        assert whole.finish is not None
        return Answer(list(whole.token_ids), whole.finish, whole.logprobs, whole.prompt_logprobs)

    def answers(self, ask: Ask) -> list[Answer]:
        return [self.answer(ask.request.id, choice) for choice in range(ask.request.n)]

    def tokens(self, ask: Ask) -> list[list[int]]:
        return [answer.tokens for answer in self.answers(ask)]

    def check_finished(self, asks: list[Ask]) -> None:
        """Each sequence has one last Delta, whatever is urgent says so, and nothing is held any more."""
        for ask in asks:
            for choice in range(ask.request.n):
                deltas = self.deltas[ask.request.id, choice]
                assert [None] * (len(deltas) - 1) == [delta.finish for delta in deltas[:-1]]
                assert deltas[-1].finish is not None
                assert choice == 0 or deltas[0].cached_tokens == 0
                assert {0} >= {delta.cached_tokens for delta in deltas[1:]}
                for delta in deltas:
                    assert any(completes(ask.completing_ids, token) for token in delta.token_ids) == delta.urgent
        assert 0 == self.scheduler.stats().num_blocks_used
        assert 0 == self.scheduler.stats().num_waiting
        assert 0 == self.scheduler.num_open


def completes(completing_ids: bytes, token: int) -> bool:
    return bool(completing_ids) and (int.from_bytes(completing_ids, "little") >> token) % 2 == 1


def is_beginning(got: Answer, whole: Answer) -> bool:
    """Whether a sequence that was ended before its time said nothing but the beginning of its answer."""
    num = len(got.tokens)
    if got.tokens != whole.tokens[:num] or got.prompt_logprobs not in (None, whole.prompt_logprobs):
        return False
    if not num or whole.logprobs is None:
        return got.logprobs in (None, Logprobs())
    assert got.logprobs is not None
    return len(got.logprobs.chosen) == 4 * num and all(
        getattr(whole.logprobs, name).startswith(getattr(got.logprobs, name)) for name in ("chosen", "top_ids", "top")
    )


def greedy(
    request_id: int, prompt: tuple[int, ...], max_tokens: int, *, n: int = 1, priority: int = 0, **params: Any
) -> Ask:
    """No end of text: exactly `max_tokens`, unless `params` say otherwise."""
    all_params: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True} | params
    return Ask(Request(request_id, prompt, n, priority=priority), SamplingParams(max_tokens, **all_params))


TOKEN_IDS = st.integers(0, VOCAB_SIZE - 1)
# The continuations of the last repeat it (fake_model.py).
PREFIXES = [*(tuple(range(base, base + 40)) for base in (3, 50)), tuple(80 + token % 9 for token in range(40))]


@st.composite
def sampling_params(draw: st.DrawFn, *, most: int) -> SamplingParams:
    """Up to `most` tokens; half of them with nothing that masks, counts or scores, and half with any mix of that."""
    max_tokens = draw(st.integers(0, most))
    plain = SamplingParams(
        max_tokens=max_tokens,
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 3)),
        min_tokens=draw(st.integers(0, min(4, max_tokens))),
        ignore_eos=draw(st.booleans()),
    )
    if draw(st.booleans()):
        return plain
    few_ids = st.lists(TOKEN_IDS, max_size=4, unique=True).map(tuple)
    often = st.integers(0, 9)  # short words over a small alphabet, so that they come up
    return msgspec.structs.replace(
        plain,
        stop_token_ids=draw(st.one_of(st.just(()), few_ids)),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, -0.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.25])),
        logit_bias=draw(st.one_of(st.just(()), few_ids.map(lambda ids: tuple((i, i % 7 - 2.5) for i in ids)))),
        allowed_token_ids=draw(st.one_of(st.none(), st.lists(often, min_size=1, unique=True).map(tuple))),
        banned_token_ids=draw(st.one_of(st.just(()), few_ids)),
        bad_words=draw(
            st.one_of(st.just(()), st.lists(st.lists(often, min_size=2, max_size=3).map(tuple), max_size=20).map(tuple))
        ),
        grammar=draw(st.sampled_from([None, None, None, "one", "two"])),
        num_logprobs=draw(st.sampled_from([None, None, 0, 1, 20])),
    )


@st.composite
def scored_only(draw: st.DrawFn, *, request_id: int) -> Ask:
    """A long prompt, up to a token more than the context, from which nothing is generated."""
    prefix = draw(st.sampled_from(PREFIXES))
    prompt = (*prefix, *draw(st.lists(TOKEN_IDS, min_size=1, max_size=CONTEXT_LENGTH + 1 - len(prefix))))
    request = Request(request_id, prompt, score_from=draw(st.integers(1, len(prompt) - 1)))
    params = SamplingParams(max_tokens=0, temperature=0.0, num_logprobs=draw(st.sampled_from([0, 1, 20])))
    return Ask(request, params, patient=draw(st.booleans()))


@st.composite
def asks_strategy(draw: st.DrawFn, *, most_requests: int = 12) -> list[Ask]:
    """Requests that share prefixes, some of them in groups with the same parameters."""
    asks: list[Ask] = []
    num_requests = draw(st.integers(1, most_requests))
    while len(asks) < num_requests:
        if draw(st.sampled_from([False] * 7 + [True])):
            asks.append(draw(scored_only(request_id=len(asks))))
            continue
        prompts = []
        for _ in range(draw(st.sampled_from([1, 1, 3]))):
            prefix = draw(st.sampled_from(PREFIXES))[: draw(st.integers(0, 40))]
            prompts.append((*prefix, *draw(st.lists(TOKEN_IDS, min_size=0 if prefix else 1, max_size=8))))
        params = draw(sampling_params(most=CONTEXT_LENGTH - max(map(len, prompts))))
        completing_ids = draw(st.sampled_from([b"", bytes(range(40, 53))]))
        for prompt in prompts:
            request = Request(
                len(asks),
                prompt,
                draw(st.sampled_from([1, 1, 1, 2, 5])),
                score_from=draw(st.one_of(st.none(), st.none(), st.integers(1, len(prompt)))),
                priority=draw(st.sampled_from([0, 0, 0, -1, 5])),
                cache_salt=draw(st.sampled_from(["", "", "a"])),
            )
            asks.append(Ask(request, params, completing_ids, patient=draw(st.booleans())))
    return asks


@st.composite
def engines(draw: st.DrawFn) -> Engine:
    """Of any block size, shortage of blocks, budget, interval of publishing, and depth or number of drafts."""
    block_size = draw(st.sampled_from([1, 3, 4, 16]))
    least = -(-CONTEXT_LENGTH // block_size)
    max_num_seqs = draw(st.integers(1, 8))
    depth, drafts = draw(st.sampled_from([(0, 0), (1, 0), (0, 1), (0, 5)]))
    return Engine(
        num_blocks=least + draw(st.integers(0, least)),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        budget=max_num_seqs + draw(st.integers(0, 40)),
        depth=depth,
        publish_every=draw(st.sampled_from([1, 4, 1000])),
        drafts=drafts,
    )


def check_answers(engine: Engine, asks: list[Ask]) -> None:
    """Everybody got all of what they get alone."""
    for ask in asks:
        assert answers(ask) == engine.answers(ask)
    engine.check_finished(asks)
