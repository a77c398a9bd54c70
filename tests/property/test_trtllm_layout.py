"""The row layout of TensorRT-LLM, decoded, against a batch that is simulated from the other side: every row knows what it is.

The simulation writes a pass as the server does (contexts, generations, dummies, garbage) from texts that are settled before: a draft token
is accepted where it is the text's. It shares nothing with the decoder but the records that cross between them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tide_pipeline.contracts import StepKind
from tide_pipeline.engine.trtllm.layout import UNKNOWN, Context, Decoder, End, Forward, LayoutBroken, Outcome, Step

EOS, GARBAGE, DUMMY = 1, -77, 10**9
MAX_LENGTH = 5

Row = tuple[int, int, int]         # request, position, token consumed


@dataclass
class Text:
    """A request whose whole text is known before: what follows position p is text[p + 1]."""

    number: int
    text: list[int]
    num_prompt: int
    limit: int                     # prompt and output tokens
    cached: int                    # of the prompt, found in the prefix cache
    at: int = 0                    # next position
    fill_to: int = 0               # tokens to be computed as context
    drafts: list[int] = field(default_factory=list)
    lateness: int = 1              # passes that the server still runs after the end

    @property
    def end(self) -> int:
        """Tokens that count."""
        eos = next((p for p in range(self.num_prompt, len(self.text)) if self.text[p] == EOS), len(self.text))
        return min(self.limit, eos + 1)

    @property
    def is_over(self) -> bool:
        return self.at + 1 >= self.end and self.at >= self.num_prompt


class Server:
    """Passes over a batch, as rows that say what they are."""

    def __init__(self, rng: random.Random, texts: list[Text]) -> None:
        self.rng, self.waiting, self.filling, self.running = rng, list(texts), list[Text](), list[Text]()
        self.verified: dict[tuple[int, int], tuple[int, ...]] = {}         # (request, position) -> drafts of the pass that began there

    def step(self) -> tuple[Forward, Outcome, list[Row]]:
        rng, length = self.rng, self.rng.randint(0, MAX_LENGTH)
        if self.running and rng.random() < 0.1:                            # preempted: it computes its prompt and output again
            victim = self.running.pop(rng.randrange(len(self.running)))
            victim.at, victim.fill_to = rng.randint(0, victim.at), victim.at + 1
            self.filling.append(victim)
        while self.waiting and rng.random() < 0.6:
            fresh = self.waiting.pop()
            fresh.at, fresh.fill_to = fresh.cached, fresh.num_prompt
            self.filling.append(fresh)
        contexts, rows, answers, done = [], list[Row](), list[tuple[list[int], list[int]]](), list[Text]()
        for t in self.filling:
            size = rng.randint(1, t.fill_to - t.at)
            is_last = t.at + size == t.fill_to
            contexts.append(Context(t.number, t.at, self.words(t, t.at, size), is_last))
            rows += [(t.number, t.at + j, token) for j, token in enumerate(self.words(t, t.at, size))]
            t.at += size
            t.drafts = self.draft(t, t.at + 1)
            answers.append(([self.word(t, t.at) if is_last else GARBAGE], t.drafts))
            if is_last:
                done.append(t)
        for t in self.running:
            answers.append(self.generate(t, length, rows))
        dummies = rng.randint(0, 2)
        rows += [(GARBAGE, GARBAGE, GARBAGE)] * (dummies * (1 + length) + rng.randint(0, 3))
        numbers = [t.number for t in self.running] + [DUMMY + i for i in range(dummies)]
        answers += [([GARBAGE] * (1 + length), [GARBAGE] * MAX_LENGTH)] * dummies
        self.filling = [t for t in self.filling if t not in done]
        self.running += done
        for t in list(self.running):                                       # the end is noticed a pass late
            if t.is_over:
                t.lateness -= 1
                if t.lateness < 0:
                    self.running.remove(t)
        outcome = Outcome([[*said, *[GARBAGE] * (1 + MAX_LENGTH - len(said))] for said, _ in answers], [len(said) for said, _ in answers],
                          [drafts for _, drafts in answers])
        return Forward(tuple(contexts), tuple(numbers), length), outcome, rows

    def generate(self, t: Text, length: int, rows: list[Row]) -> tuple[list[int], list[int]]:
        drafts = (t.drafts + [self.rng.randint(2, 9) for _ in range(length)])[:length]
        self.verified[t.number, t.at] = tuple(drafts)
        rows.append((t.number, t.at, self.word(t, t.at)))
        rows += [(t.number, t.at + 1 + j, token) for j, token in enumerate(drafts)]
        n = next((j for j, token in enumerate(drafts) if token != self.word(t, t.at + 1 + j)), length)
        said = [self.word(t, t.at + 1 + j) for j in range(n + 1)]
        t.at += n + 1
        t.drafts = self.draft(t, t.at + 1)
        return said, t.drafts

    def word(self, t: Text, p: int) -> int:
        return t.text[p] if p < len(t.text) else 2 + p % 5                 # beyond the end it talks on

    def words(self, t: Text, p: int, n: int) -> tuple[int, ...]:
        return tuple(self.word(t, p + j) for j in range(n))

    def draft(self, t: Text, p: int) -> list[int]:
        return [self.word(t, p + j) if self.rng.random() < 0.7 else self.rng.randint(2, 9) for j in range(MAX_LENGTH)]

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.filling or self.running)


def some_texts(rng: random.Random) -> list[Text]:
    texts = []
    for number in range(rng.randint(1, 5)):
        prompt, output = rng.randint(1, 12), rng.randint(1, 15)
        text = [rng.randint(1 if p >= prompt and rng.random() < 0.3 else 2, 9) for p in range(prompt + output)]
        texts.append(Text(100 + number, text, prompt, prompt + output, rng.randint(0, prompt - 1)))
    return texts


def decoded(rng: random.Random, texts: list[Text]) -> tuple[dict[int, list[Step]], list[tuple[Step, list[Row]]], Server]:
    server, decoder = Server(rng, texts), Decoder()
    for t in texts:
        decoder.open(t.number, End(t.limit, (EOS,)))
    steps: dict[int, list[Step]] = {t.number: [] for t in texts}
    rows_of = []
    for _ in range(1_000):
        if not server.busy:
            break
        forward, outcome, rows = server.step()
        for step in decoder.decode(forward, outcome):
            assert step.rows.stop <= forward.num_rows <= len(rows)
            steps[step.request].append(step)
            rows_of.append((step, [rows[i] for i in step.rows]))
    assert not server.busy
    return steps, rows_of, server


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_every_row_is_what_the_decoder_says_and_nothing_is_missing(seed: int) -> None:
    rng = random.Random(seed)
    texts = some_texts(rng)
    steps, rows_of, server = decoded(rng, texts)
    for step, rows in rows_of:
        assert rows == [(step.request, step.start_pos + j, token) for j, token in enumerate(step.row_tokens)]
    for t in texts:
        truth, seen = t.text[: t.end], set[int]()
        for step in steps[t.number]:
            seen.update(range(step.start_pos, step.start_pos + len(step.row_tokens)))
            assert list(step.row_tokens) == truth[step.start_pos : step.start_pos + len(step.row_tokens)]
            after = step.start_pos + (len(step.row_tokens) if step.kind is StepKind.PREFILL else 1)
            assert list(step.emitted) == truth[after : after + len(step.emitted)]
            check_draft(step, server)
        assert min(seen) <= t.cached and seen == set(range(min(seen), t.end - 1))


def check_draft(step: Step, server: Server) -> None:
    if step.kind is StepKind.PREFILL:
        assert (step.drafted, step.accepted) == ((), 0)
        return
    told = server.verified[step.request, step.start_pos]
    seen = tuple(token for token in step.drafted if token != UNKNOWN)
    assert seen == told[: len(seen)] and step.drafted[: step.accepted] == step.emitted[: step.accepted]
    assert step.draft_length == len(told) and len(step.drafted) <= len(told)
    if len(step.emitted) > step.accepted and len(step.drafted) > step.accepted and step.drafted[step.accepted] != UNKNOWN:
        assert step.drafted[step.accepted] != step.emitted[step.accepted]          # it was refused


# --- one pass, spelled out ----------------------------------------------------------------------------------------

def opened(*ends: End) -> Decoder:
    decoder = Decoder()
    for number, end in enumerate(ends):
        decoder.open(number, end)
    return decoder


def test_a_prompt_with_a_cached_prefix_then_a_verification() -> None:
    decoder = opened(End(20))
    step, = decoder.decode(Forward((Context(0, 3, (13, 14), True),), (), 2), Outcome([[15, 0, 0]], [1], [[16, 99]]))
    assert step == Step(0, StepKind.PREFILL, 3, (13, 14), (15,), (), 0, 0, range(0, 2))
    step, = decoder.decode(Forward((), (0,), 2), Outcome([[16, 17, 18]], [2], [[0, 0]]))
    assert step == Step(0, StepKind.VERIFY, 5, (15, 16), (16, 17), (16, 99), 1, 2, range(0, 2))


def test_generations_stand_behind_all_context_tokens() -> None:
    decoder = opened(End(20), End(20))
    decoder.decode(Forward((Context(0, 0, (1, 2), True),), (), 1), Outcome([[3, 0]], [1], [[4]]))
    first, second = decoder.decode(Forward((Context(1, 0, (7, 8, 9), False),), (0,), 1), Outcome([[0, 0], [4, 5]], [1, 2], [[0], [0]]))
    assert (first.rows, first.emitted) == (range(0, 3), ()) and (second.rows, second.emitted) == (range(3, 5), (4, 5))


def test_a_request_ends_at_its_last_token_whatever_the_pass_goes_on_to() -> None:
    decoder = opened(End(20, (9,)))
    decoder.decode(Forward((Context(0, 0, (1,), True),), (), 3), Outcome([[2]], [1], [[9, 3, 4]]))
    step, = decoder.decode(Forward((), (0,), 3), Outcome([[9, 3, 4, 5]], [4], [[0, 0, 0]]))
    assert (step.emitted, step.drafted, step.accepted, step.rows) == ((9,), (9,), 1, range(0, 1))
    assert decoder.decode(Forward((), (0,), 3), Outcome([[6, 0, 0, 0]], [1], [[0, 0, 0]])) == []


@pytest.mark.parametrize("outcome", [
    Outcome([[4, 5]], [3], [[0]]), Outcome([[4, 5]], [0], [[0]]), Outcome([[4, 5]], [], [[0]]), Outcome([[4]], [2], [[0]]),
    Outcome([[7, 5]], [2], [[0]])], ids=["too many", "none", "missing", "short", "another draft"])
def test_what_can_not_be_stops_the_decoder(outcome: Outcome) -> None:
    decoder = opened(End(20))
    decoder.decode(Forward((Context(0, 0, (1, 2), True),), (), 1), Outcome([[3, 0]], [1], [[4]]))
    with pytest.raises(LayoutBroken):
        decoder.decode(Forward((), (0,), 1), outcome)
    assert decoder.decode(Forward((), (0,), 1), Outcome([[4, 5]], [2], [[0]])) == []           # it knows nothing any more


def test_a_request_that_was_not_opened_is_stepped_over() -> None:
    decoder = opened()
    assert decoder.decode(Forward((Context(5, 0, (1,), True),), (DUMMY,), 1), Outcome([[1, 1]] * 2, [1, 1], [[1]] * 2)) == []
