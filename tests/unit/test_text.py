"""Incremental decoding equals decoding the whole; stop strings end the text before them, wherever tokens fall."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.helpers import write_tokenizer
from tide_pipeline.engine.text import TextCodec, TextStream
from tide_pipeline.errors import CheckpointError, InvalidRequest


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return TextCodec(folder)


def _chunks(ids: list[int], cuts: list[int]) -> list[list[int]]:
    out, at = [], 0
    for cut in cuts:
        out.append(ids[at : at + cut])
        at += cut
    return [c for c in [*out, ids[at:]] if c]


def _told(codec: TextCodec, ids: list[int], cuts: list[int], stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    stream = TextStream(codec, stop)
    text = "".join(stream.push(chunk) for chunk in _chunks(ids, cuts))
    return text + stream.finish(), stream.stopped


cuts = st.lists(st.integers(1, 7), max_size=40)


@given(text=st.text(max_size=60), cuts=cuts)
@example(text="日本語のテキスト" * 4, cuts=[1] * 60)
@example(text="🙂🙃" * 8, cuts=[3] * 30)
def test_pieces_add_up_to_the_whole(codec: TextCodec, text: str, cuts: list[int]) -> None:
    ids = codec.encode(text) if text else []
    assert _told(codec, ids, cuts) == (codec.decode(ids), False)


@given(ids=st.lists(st.integers(0, 256), max_size=60), cuts=cuts)
def test_any_bytes_add_up_to_the_whole(codec: TextCodec, ids: list[int], cuts: list[int]) -> None:
    assert _told(codec, ids, cuts) == (codec.decode(ids), False)


def test_half_a_character_is_held_back(codec: TextCodec) -> None:
    ids = codec.encode("aé!")
    stream = TextStream(codec, ())
    assert [stream.push([i]) for i in ids] == ["a", "", "é", "!"]


@given(text=st.text(alphabet="abé", max_size=40), stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3))
def test_token_by_token_the_text_ends_before_the_first_stop_string_that_completes(codec: TextCodec, text: str, stop: list[str]) -> None:
    ends = [at + len(s) for s in stop if (at := text.find(s)) >= 0]
    first = min(ends, default=None)                                # the stop string that is complete first ..
    want = text if first is None else min((text[: first - len(s)] for s in stop if text[:first].endswith(s)), key=len)   # .. and longest
    ids = codec.encode(text) if text else []
    assert _told(codec, ids, [1] * len(ids), tuple(stop)) == (want, first is not None)


@given(text=st.text(alphabet="ab", max_size=40), cuts=cuts, stop=st.text(alphabet="ab", min_size=1, max_size=4))
def test_one_stop_string_does_not_depend_on_how_tokens_arrive(codec: TextCodec, text: str, cuts: list[int], stop: str) -> None:
    ids = codec.encode(text) if text else []
    assert _told(codec, ids, cuts, (stop,)) == (text.split(stop)[0], stop in text)


def test_what_only_began_a_stop_string_is_told_in_the_end(codec: TextCodec) -> None:
    stream = TextStream(codec, ("END",))
    assert [stream.push(codec.encode(part)) for part in ("xE", "N", "EN")] == ["x", "", "EN"]
    assert stream.finish() == "EN" and not stream.stopped


def test_nothing_follows_a_stop(codec: TextCodec) -> None:
    stream = TextStream(codec, ("b", ""))
    assert [stream.push(codec.encode(part)) for part in ("ab", "c")] == ["a", ""]
    assert stream.finish() == ""


def test_empty_and_invalid_text_are_refused(codec: TextCodec) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        codec.encode("")
    with pytest.raises(InvalidRequest, match="not valid UTF-8"):
        codec.encode("half \ud83d of a pair")


def test_a_missing_or_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    for content in (None, "{}"):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json can't be read"):
            TextCodec(tmp_path)
