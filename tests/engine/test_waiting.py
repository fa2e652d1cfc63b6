"""The queue by itself: priorities, ageing, and clients that take turns by tokens."""

from collections import defaultdict
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.request import Request, SamplingParams
from service.engine.sequence import Group, Sequence
from service.engine.waiting import _SPARE, AGE_SECONDS, Waiting
from tests.engine.fake_model import END_OF_TEXT, VOCAB_SIZE


@dataclass
class Queue:
    """A queue with a clock that stands still unless it is told."""

    now: float = 0.0
    num_arrived: int = 0
    waiting: Waiting = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = Waiting(clock=lambda: self.now)

    def add(self, client: str = "", *, cost: int = 10, priority: int = 0) -> Sequence:
        """A sequence of one prompt token."""
        self.num_arrived += 1
        group = Group(SamplingParams(cost - 1), b"", client=client, vocab_size=VOCAB_SIZE, end_of_text_id=END_OF_TEXT)
        request = Request(self.num_arrived, (1,), priority=priority)
        sequence = Sequence(request, 0, group, arrival=self.num_arrived)
        assert cost == sequence.cost
        self.waiting.add(sequence)
        return sequence

    def serve(self) -> Sequence:
        sequence = self.waiting.first()
        self.waiting.remove(sequence, served=True)
        return sequence

    def serve_all(self) -> list[Sequence]:
        return [self.serve() for _ in range(len(self.waiting))]


def test_one_client_is_served_as_it_comes() -> None:
    """Whatever its requests cost."""
    queue = Queue()
    sequences = [queue.add(cost=cost) for cost in (1000, 1, 50, 1000, 2)]
    assert sequences == queue.serve_all()


def test_a_thousand_requests_do_not_keep_another_client_waiting() -> None:
    """Whoever comes late with one is the next but one, and so is each that follows it."""
    queue = Queue()
    for _ in range(1000):
        queue.add("many", cost=500)
    for _ in range(300):
        queue.serve()
    for _ in range(3):
        late = queue.add("one", cost=20)
        assert late in (queue.serve(), queue.serve())


@given(
    asks=st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(1, 1024), st.booleans()),
        min_size=1,
        max_size=80,
    )
)
@settings(max_examples=200, deadline=None)
def test_clients_that_wait_get_equal_shares_of_tokens(asks: list[tuple[str, int, bool]]) -> None:
    """While both wait, no two are further apart than the largest request of each: SFQ's bound."""
    queue = Queue()
    waits: dict[str, int] = defaultdict(int)
    served: dict[tuple[str, str], list[int]] = {}  # by pair, since both wait: tokens of each
    largest: dict[str, int] = defaultdict(int)
    for client, cost, more in asks:
        queue.add(client, cost=cost)
        waits[client] += 1
        largest[client] = max(largest[client], cost)
        if more:
            continue
        sequence = queue.serve()
        name = sequence.group.client
        waits[name] -= 1
        pairs = [(a, b) for a in "abcd" for b in "abcd" if a < b]
        for pair in pairs:
            tokens = served.setdefault(pair, [0, 0])
            if name in pair:
                tokens[pair.index(name)] += sequence.cost
            if not all(waits[each] for each in pair):
                served[pair] = [0, 0]
            else:
                assert abs(tokens[0] - tokens[1]) <= largest[pair[0]] + largest[pair[1]]
    assert sum(waits.values()) == len(queue.waiting)


def test_lower_numbers_come_first_and_waiting_makes_up_for_it() -> None:
    """AGE_SECONDS for each number: a request that waits behind a stream of urgent ones is served in the end."""
    queue = Queue()
    late = queue.add(priority=3)
    num_before = 0
    while True:
        queue.add("urgent", priority=0)
        if queue.serve() is late:
            break
        num_before += 1
        queue.now += 1.0
    assert 3 * AGE_SECONDS <= num_before <= 3 * AGE_SECONDS + 2


def test_newcomers_of_its_priority_do_not_make_a_line_young_again() -> None:
    """A line is as old as its oldest, also where its first is always new: by turn, new clients come before old ones."""
    queue = Queue()
    queue.add("old", priority=1)
    patient = queue.add("old", priority=1)
    assert patient not in (queue.serve(),)
    for number in range(10):
        queue.now += AGE_SECONDS / 9
        queue.add(f"new {number}", priority=1)
        queue.add("urgent", priority=0)
        served = queue.serve()
    assert 1 == served.request.priority


def test_who_comes_back_is_the_next() -> None:
    """Preempted sequences keep their turns, before everybody who has not been let in, also with no line left."""
    queue = Queue()
    first, second = queue.add("a"), queue.add("a")
    assert [first, second] == queue.serve_all()
    queue.waiting.put_back(second)
    others = [queue.add(client) for client in ("a", "b", "c")]
    queue.waiting.put_back(first)
    assert [first, second] == queue.serve_all()[:2]
    assert not any(sequence.waiting for sequence in (first, second, *others))


@given(events=st.lists(st.tuples(st.sampled_from(["add", "serve", "end", "preempt"]), st.integers(0, 10**6))))
@settings(max_examples=200, deadline=None)
def test_nobody_is_lost(events: list[tuple[str, int]]) -> None:
    """In any order of arrivals, ends and returns: exactly those wait that were not taken out."""
    queue = Queue()
    inside: list[Sequence] = []
    outside: list[Sequence] = []
    for event, number in events:
        queue.now += number % 7
        if event == "add":
            inside.append(queue.add(str(number % 5), cost=1 + number % 100, priority=number % 3))
        elif event == "serve" and inside:
            sequence = queue.serve()
            inside.remove(sequence)
            outside.append(sequence)
        elif event == "end" and inside:
            queue.waiting.remove(inside.pop(number % len(inside)), served=False)
        elif event == "preempt" and outside:
            sequence = outside.pop(number % len(outside))
            queue.waiting.put_back(sequence)
            inside.append(sequence)
        assert len(inside) == len(queue.waiting)
    assert set(inside) == set(queue.serve_all())


def test_what_has_left_is_forgotten() -> None:
    """A hundred thousand clients leave nothing, even where one request stays for ever."""
    queue = Queue()
    queue.add("stays", priority=1)
    for number in range(100_000):
        sequence = queue.add(f"client {number}", priority=number % 2)
        if number % 2:
            queue.waiting.remove(sequence, served=False)
        else:
            queue.serve()
        for line in queue.waiting._lines.values():
            assert len(line._ends) <= len(line.sequences) + _SPARE + 1
            assert len(line._arrivals) <= len(line.sequences) + _SPARE + 1


def test_who_comes_back_to_an_empty_line_does_not_wait_for_those_that_came_later() -> None:
    """The scale of turns outlives the line: newcomers begin where it stands."""
    queue = Queue()
    for _ in range(1000):
        queue.add("long ago", cost=500)
    *_, preempted = queue.serve_all()
    queue.waiting.put_back(preempted)
    newcomers = [queue.add(client, cost=100) for client in "ab" * 50]
    assert [preempted, *newcomers] == queue.serve_all()


def test_what_a_client_did_not_get_is_not_held_against_it() -> None:
    """A thousand requests that were given up, or refused, are no reason to wait."""
    queue = Queue()
    given_up = [queue.add("impatient", cost=500) for _ in range(1000)]
    for client in "ab" * 50:
        queue.add(client, cost=100)
    for sequence in given_up:
        queue.waiting.remove(sequence, served=False)
    again = queue.add("impatient", cost=500)
    assert again in [queue.serve() for _ in range(3)]
