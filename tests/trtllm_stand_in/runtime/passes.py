"""One forward pass of the stand-in: rows and results lie as NVIDIA's one-model EAGLE-3 leaves them. The layout is written out here by hand.

    rows         [context tokens ..][generation 0: 1 + K rows][generation 1: 1 + K rows] .. [padding: 1 + K rows each]
    new_tokens   [requests, 1 + K], of which new_tokens_lens[i] count; beyond them, and below the rows of the pass, stands rubbish
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .metadata import draft_of
from .network import Network
from .weights import Weights

RUBBISH = 3
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class PassRunner:
    """Base of PyTorchModelEngine."""

    def __init__(self, args: Any, network: Network, make_dummy: Any) -> None:
        self.args, self.network, self._make_dummy = args, network, make_dummy
        self.spec_config = args.speculative_config
        self.is_draft_model = False
        self.model = Weights(draft_of(self.spec_config) if self.spec_config else None)
        self.runtime_draft_len = self.spec_config.max_draft_len if self.spec_config else 0
        self.spec_metadata = self._make_metadata() if self.spec_config else None
        self.graph_metadata: dict[tuple[int, int], Any] = {}       # each captured graph has its own buffer
        self.stats = {"numDraftTokens": 0, "numAcceptedTokens": 0, "numRequestsWithDraftTokens": 0}

    def _make_metadata(self) -> Any:
        from tensorrt_llm._torch.speculative.eagle3 import Eagle3OneModelSpecMetadata

        spec = self.spec_config
        return Eagle3OneModelSpecMetadata(
            max_num_requests=self.args.max_batch_size, max_draft_len=spec.max_draft_len, max_total_draft_tokens=spec.max_draft_len,
            num_layers=self.network.num_layers, hidden_size=self.network.hidden_size, max_num_tokens=self.args.max_num_tokens,
            layers_to_capture=spec.eagle3_layers_to_capture)

    def draft_length(self, batch_size: int) -> int:
        """Asked for every pass, through the module: replacing the function there takes effect, as it does in NVIDIA's code.

        The newest also give a floor, which is 0 where the draft's cache is filled without drafting.
        """
        if self.spec_config is None:
            return 0
        schedule = self.spec_config.draft_len_schedule
        if schedule is None or "runtime_draft_len" not in type(self.spec_metadata).__dataclass_fields__:
            return int(self.spec_config.max_draft_len)
        from tensorrt_llm._torch.speculative import utils
        from tensorrt_llm.version import __version__

        floor = {"min_draft_len": 0} if __version__.startswith("1.4") else {}
        return int(utils.get_draft_len_for_batch_size(schedule, batch_size, self.spec_config.max_draft_len, **floor))

    def run(self, scheduled: Any) -> dict[str, Any]:
        self.runtime_draft_len = k = self.draft_length(len(scheduled.requests))
        generations = [*scheduled.generation_requests, *self._padding(scheduled)]
        metadata = self._prepare(scheduled.context_requests, generations, k)
        rows: list[Tensor] = []
        news: list[list[int]] = []
        for request in scheduled.context_requests:
            rows.append(self._consume(request, news))
        for request in generations:
            rows.append(self._verify(request, k, news))
        if metadata is None:
            return {"logits": None, "news": news}
        states = torch.cat(rows)
        metadata.hidden_states[: len(states)] = states
        metadata.hidden_states[len(states): len(states) + 3] = RUBBISH
        drafts = [(request.device_drafts + [RUBBISH] * k)[:k] for request in [*scheduled.context_requests, *generations]]
        padded = [(new + [RUBBISH] * (1 + k))[: 1 + k] for new in news]
        lens = torch.tensor([len(new) for new in news], dtype=torch.int32)
        return {"logits": None, "new_tokens": torch.tensor(padded, dtype=torch.int32), "new_tokens_lens": lens,
                "next_draft_tokens": torch.tensor(drafts, dtype=torch.int32).reshape(len(news), k), "next_new_tokens": None, "news": news}

    def _padding(self, scheduled: Any) -> list[Any]:
        """A captured graph has a fixed batch size."""
        graphs, count = self.args.cuda_graph_config, len(scheduled.generation_requests)
        if scheduled.context_requests or graphs is None or not graphs.enable_padding:
            return []
        size = next((n for n in sorted(graphs.batch_sizes or GRAPH_SIZES) if n >= count), count)
        return [self._make_dummy() for _ in range(size - count)]

    def _prepare(self, contexts: list[Any], generations: list[Any], k: int) -> Any:
        if self.spec_metadata is None:
            return None
        metadata = self.spec_metadata
        if not contexts and self.args.cuda_graph_config is not None:
            metadata = self.graph_metadata.setdefault((len(generations), k), self._make_metadata())
        metadata.request_ids = [request.py_request_id for request in [*contexts, *generations]]
        metadata.seq_lens = [request.context_chunk_size for request in contexts] + [1 + k] * len(generations)
        metadata.num_generations, metadata.num_tokens = len(generations), sum(metadata.seq_lens)
        if hasattr(metadata, "runtime_draft_len"):
            metadata.runtime_draft_len = k
        metadata.prepare()
        return metadata

    @property
    def num_taps(self) -> int:
        return len(self.spec_metadata.layers_to_capture) if self.spec_metadata is not None else 1

    def _consume(self, request: Any, news: list[list[int]]) -> Tensor:
        """A chunk of a prompt: its rows, and the token after it, which counts only when the prompt is through."""
        start = request.context_current_position
        stop = start + request.context_chunk_size
        prefix = request.prompt[:stop]
        news.append([self.network.next_token(prefix)])
        if stop == len(request.prompt):
            self._move_on(request, [*prefix, *news[-1]])
        return self.network.states(prefix, start, self.num_taps)

    def _verify(self, request: Any, k: int, news: list[list[int]]) -> Tensor:
        """The pending token and K draft tokens, each with a row. Kept up to the first draft token that the target would not have said."""
        drafts = (request.device_drafts + [0] * k)[:k]
        tokens = request.device_tokens
        consumed = [*tokens, *drafts]
        new = [self.network.next_token(consumed[: len(tokens)])]
        while len(new) <= k and drafts[len(new) - 1] == new[-1]:
            new.append(self.network.next_token(consumed[: len(tokens) + len(new)]))
        news.append(new)
        if not request.is_dummy:
            self.stats["numDraftTokens"] += k
            self.stats["numAcceptedTokens"] += len(new) - 1
            self.stats["numRequestsWithDraftTokens"] += k > 0
        states = self.network.states(consumed, len(tokens) - 1, self.num_taps)
        self._move_on(request, [*tokens, *new])
        return states

    def _move_on(self, request: Any, tokens: list[int]) -> None:
        request.device_tokens = tokens
        request.device_drafts = self.network.draft(tokens, self.runtime_draft_len)
