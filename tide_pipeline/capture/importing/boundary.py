"""Where the prompt of a dumped sequence ends. Knows masks and tokens; knows no states.

A window has one boundary, a conversation may have many turns: the last answer counts as generated, what stands before it as prompt.
    loss mask with zeros and ones    the last run of ones is the answer; what follows it is cut off
    otherwise                        `answer_after`: the prompt ends with the last occurrence of these tokens
    neither                          the whole sequence is prompt: it is trained on, and never judged by
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tide_pipeline.capture.importing.dumps import Refused


@dataclass(frozen=True)
class Extent:
    """The sequence's first `end` tokens count, the first `num_prompt_tokens` of them as prompt."""

    num_prompt_tokens: int
    end: int


def find_extent(token_ids: Sequence[int], mask_T: Tensor | None, answer_after: Sequence[int] = ()) -> Extent:
    """Raises Refused for an answer without a prompt, or without the tokens that should stand before it."""
    if mask_T is not None and (mask_T != 0).any() and (mask_T == 0).any():
        return _from_mask([bool(value) for value in mask_T.tolist()])
    if answer_after:
        return _from_tokens(list(token_ids), list(answer_after))
    return Extent(len(token_ids), len(token_ids))


def _from_mask(mask: list[bool]) -> Extent:
    end = len(mask) - mask[::-1].index(True)
    begin = end
    while begin > 0 and mask[begin - 1]:
        begin -= 1
    if begin == 0:
        raise Refused("loss mask marks an answer without a prompt before it")
    if end < 2:
        raise Refused("fewer than two tokens")
    return Extent(begin, end)


def _from_tokens(tokens: list[int], marker: list[int]) -> Extent:
    for begin in range(len(tokens) - len(marker) - 1, -1, -1):         # at least one token of the answer follows
        if tokens[begin:begin + len(marker)] == marker:
            return Extent(begin + len(marker), len(tokens))
    raise Refused("the tokens of --answer-after do not stand in it before another token")
