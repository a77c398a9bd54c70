"""The function that is put in the place of NVIDIA's is asked as each line's server asks it."""

from __future__ import annotations

import importlib

import pytest

from tests.trtllm_stand_in import stand_in
from tide_pipeline.engine.trtllm.facts import load_table
from tide_pipeline.engine.trtllm.length_override import LengthOverride

FLOORS: dict[str, tuple[tuple[tuple[int, ...], dict[str, int]], ...]] = {       # beyond the three arguments that both lines have
    "1.3": (((), {}),),
    "1.4": (((), {}), ((0,), {}), ((1,), {}), ((), {"min_draft_len": 0})),
}


@pytest.mark.parametrize("line", FLOORS)
def test_a_length_is_bounded_however_the_server_asks(line: str) -> None:
    with stand_in(line):
        utils = importlib.import_module("tensorrt_llm._torch.speculative.utils")
        original = utils.get_draft_len_for_batch_size
        override = LengthOverride(load_table(line), longest=3)
        override.install()
        for floor, named in FLOORS[line]:
            assert [utils.get_draft_len_for_batch_size({2: 3, 4: 2}, batch, 3, *floor, **named) for batch in (1, 3, 9)] == [3, 2, 1]
            assert utils.get_draft_len_for_batch_size({2: 9}, 1, 9, *floor, **named) == 3, "no longer than buffers and graphs are"
        assert utils.get_draft_len_for_batch_size(draft_len_schedule={2: 3}, batch_size=1, max_draft_len=3) == 3
        override.remove()
        assert utils.get_draft_len_for_batch_size is original
