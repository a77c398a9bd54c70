"""Records that cross borders between stages. Frozen, standard library only; no record holds a tensor.

Positions count tokens from 0 at the first prompt token. "Row t" of captured states belongs to the token at position t:
its taps g_t and final state f_t are what the target computed when it *consumed* token x_t.
"""

from __future__ import annotations

import dataclasses
import json
import time
import typing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

SCHEMA_VERSION = 1                 # of acceptance/; that of signals/ is capture.schema.SIGNALS_VERSION
ANY_WORKLOAD = "*"                 # the draft for workload tags that have none of their own


# --- requests --------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt. `speculation` is "auto" (the controller decides), "off", or a fixed draft length such as "3"."""

    request_id: str
    prompt: str
    sampling: SamplingParams = field(default_factory=SamplingParams)
    speculation: str = "auto"
    workload: str = "default"
    tenant: str = "default"
    deadline_s: float = 120.0      # from submission; then the request ends with finish reason "deadline"


class FinishReason(StrEnum):
    STOP = "stop"                  # end-of-text token or a stop string
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """What one engine step gave one request. The last chunk carries `finish_reason` and the request's totals."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    error: str = ""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0     # so far
    drafted_tokens: int = 0        # so far
    accepted_tokens: int = 0       # so far
    verify_steps: int = 0          # so far: target steps that had draft tokens to verify
    target_steps: int = 0          # so far: every decode or verify step
    draft_version: str = ""


# --- what the engine tells a sink ------------------------------------------------------------------------------

class StepKind(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"              # no draft tokens
    VERIFY = "verify"
    PROBE = "probe"                # a verification of fixed length made only to observe acceptance


class TapHandle(NamedTuple):
    """Rows `start:stop` of slot `slot` of the engine's TapRing. Good as long as `TapRing.must_read` says."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One engine step of one request: its accepted rows and what became of its draft tokens.

    `row_tokens` are the tokens consumed at positions start_pos, start_pos+1, ... (one per row of `taps`);
    `emitted` are the tokens this step added: emitted[i] follows row_tokens[i] on a verify step.
    `drafted[:accepted]` were accepted; `drafted[accepted]` would have stood at position start_pos + accepted + 1, and is -1 where
    the engine does not tell which token it was.
    """

    request_id: str
    kind: StepKind
    start_pos: int
    row_tokens: tuple[int, ...]
    emitted: tuple[int, ...]
    drafted: tuple[int, ...]
    accepted: int
    draft_version: str
    draft_length: int              # depth chosen for this step; 0 = not drafted
    batch_size: int                # requests in the step
    step_ms: float                 # wall time of the whole step, shared by its requests
    taps: TapHandle | None


@dataclass(frozen=True, slots=True)
class RequestOpened:
    """Told to a sink before the first StepEvent of a request."""

    request_id: str
    workload: str
    tenant: str
    prompt_ids: tuple[int, ...] = field(repr=False)
    sampling: SamplingParams
    speculation: str

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)


@dataclass(frozen=True, slots=True)
class RequestClosed:
    """Told to a sink after the last StepEvent of a request."""

    request_id: str
    finish_reason: FinishReason
    ttft_ms: float
    total_ms: float
    num_output_tokens: int


# --- the lake --------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class AcceptanceRow:
    """A closed block of one request's steps that share draft version, draft length and kind. Nothing textual."""

    time: float                    # Unix seconds at closing
    request_id: str
    workload: str
    tenant: str
    replica: str
    engine_digest: str
    draft_version: str
    speculation: str
    temperature: float
    draft_length: int
    is_probe: bool
    num_steps: int
    drafted: tuple[int, ...]       # per position: steps that drafted a token there
    accepted: tuple[int, ...]      # per position: steps that accepted it
    emitted_tokens: int
    mean_batch_size: float
    duration_ms: float             # sum of step_ms
    num_prompt_tokens: int
    finish_reason: str             # "" while the request goes on
    ttft_ms: float                 # 0 while the request goes on


@dataclass(frozen=True, slots=True)
class SignalWindow:
    """A closed window of captured traffic. Points at a row of a Parquet shard; holds no tensors."""

    uri: str
    row: int
    request_id: str
    tenant: str
    workload: str
    draft_version: str
    engine_digest: str
    start_pos: int
    num_rows: int                  # captured rows; the window has num_rows + 1 token ids
    num_prompt_tokens: int
    prompt_digest: str = field(repr=False)     # of the request's whole prompt; user data, as prompts can be guessed from it
    temperature: float
    closed_at: float
    digest: str = field(default="", repr=False)    # of tokens and states; with the request and the position it outlives compaction
    top_k: int = 0                 # of the sampling; 0 and 1.0 are off
    top_p: float = 1.0


# --- drift, training, gate, deployment -------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class DriftVerdict:
    """Whether acceptance of one (target, workload) has fallen, and by what evidence."""

    target: str
    workload: str
    drifted: bool
    enough_data: bool
    first_position_rate: float     # recent share of accepted first draft tokens
    baseline_rate: float           # the same at promotion, or of the long window
    drop: float                    # baseline - recent
    drop_low: float                # lower end of the 95 % interval of the drop
    drop_high: float
    num_steps: int                 # drafted steps judged
    baseline_steps: int
    draft_version: str
    reason: str                    # one sentence with the numbers


@dataclass(frozen=True, slots=True)
class DraftCheckpoint:
    """A trained draft in the EAGLE-3 Hugging Face format, with its birth certificate beside it."""

    path: str
    digest: str                    # of config.json and model.safetensors
    target: str
    engine_digest: str
    parent: str                    # draft version it was warm-started from, "" from scratch
    steps: int
    train_s: float
    num_windows: int
    num_rows: int
    acceptance_length: float       # offline, on held-out windows, greedy chain of gate.draft_length


@dataclass(frozen=True, slots=True)
class EngineBuild:
    """A digest-named directory that an engine can load: `path/build.json`, `path/draft/`, `path/model_repository/`."""

    build_id: str                  # first 16 hex digits of the digest
    target: str
    backend: str                   # "embedded" or "trtllm"
    path: str
    draft_version: str             # e.g. "v3-1f0a9c2b": registry version and draft digest
    draft_digest: str
    engine_digest: str
    created_at: float
    warmup: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """Numbers measured on one build; `tokens_per_s` and friends are medians."""

    build_id: str
    draft_version: str
    acceptance_length: float
    tokens_per_s: float
    plain_tokens_per_s: float
    speedup: float
    speedup_low: float             # bootstrap 95 %
    speedup_high: float
    itl_p99_ms: float              # inter-token latency
    prompts: int
    compared_tokens: int           # greedy equivalence: tokens checked
    ties: int                      # differences within epsilon of the argmax
    mismatches: int                # differences beyond epsilon: must be 0
    over_champion: tuple[float, float, float] = (0.0, 0.0, 0.0)    # its speed over the champion's, prompt by prompt, and the interval


@dataclass(frozen=True, slots=True)
class PairedAcceptance:
    """Champion and challenger replayed on the same held-out windows; intervals by cluster bootstrap over prompts."""

    champion: float
    challenger: float
    gain: float
    gain_low: float
    gain_high: float
    prompts: int
    rows: int
    by_workload: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """Passed or not, each door with its numbers. `promote()` reads it again."""

    passed: bool
    doors: dict[str, dict[str, Any]]     # name -> {"passed": bool, "reason": str, numbers ...}; "measured_on": not here but there
    champion: str
    challenger: str
    challenger_digest: str

    @property
    def reasons(self) -> str:
        return "; ".join(f"{name}: {door['reason']}" for name, door in self.doors.items())

    @property
    def deferred(self) -> tuple[str, ...]:
        """Doors that were opened for the canary alone: what they ask is measured there, before any other replica serves the draft."""
        return tuple(name for name, door in self.doors.items() if door.get("measured_on") == "canary")


@dataclass(frozen=True, slots=True)
class Deployment:
    """Desired state number `n` of one target: workload tag -> build id, for each group of replicas."""

    n: int
    target: str
    groups: dict[str, dict[str, str]]    # "rest" and, during a rollout, "canary": {"*": build_id, "<workload>": build_id}
    canary_replicas: tuple[str, ...]     # all that serve the new drafts: the canaries, and more with every step
    stage: str                           # "proposed", "canary", "rolling", "stable", "rolled_back"
    who: str
    reason: str
    created_at: float = field(default_factory=time.time)
    workload: str = ""                   # the tag whose draft the rollout changes; "" where there is none
    began: int = 0                       # number of the record that opened the rollout this one belongs to; 0 where there is none
    hold: str = ""                       # "paused": the rollout waits; "pinned": no rollout may begin
    first_position: float = 0.0          # accepted first draft tokens of the rollout's draft in the gate; 0 where none was asked
    deferred: tuple[str, ...] = ()       # doors of the gate that the canary has yet to open

    def drafts_for(self, replica: str) -> dict[str, str]:
        """Workload tag -> build id that `replica` should serve."""
        group = "canary" if replica in self.canary_replicas and "canary" in self.groups else "rest"
        return dict(self.groups[group])


@dataclass(frozen=True, slots=True)
class ObservedState:
    """What a replica says of itself, next to the deployment records."""

    replica: str
    target: str
    deployment: int                      # highest n it has applied
    drafts: dict[str, str]               # workload tag -> build id being served
    draft_digests: dict[str, str]
    acceptance_length: float
    tokens_per_s: float
    error: str
    at: float
    pid: int
    needs_restart: int = 0               # number of a deployment that only a new server can serve; 0 for none
    serving_since: float = 0.0           # Unix seconds of the first report with these drafts; 0 where an older version reports


def to_json(record: Any) -> str:
    """JSON text of any record here."""
    return json.dumps(dataclasses.asdict(record))


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """The record again; lists become tuples where the record has tuples. Raises TypeError on unknown or missing fields."""
    hints = typing.get_type_hints(cls)
    kwargs = {k: _revive(hints[k], v) if k in hints else v for k, v in values.items()}
    return cls(**kwargs)


def from_json(cls: type[T], text: str, **more: Any) -> T:
    """`from_dict` of a file that another version may have written (replicas and pipeline are not upgraded at once), and of `more`.

    Fields that this version does not know are left out. Raises ValueError, TypeError.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise TypeError(f"a {cls.__name__} is a JSON object, not {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    return from_dict(cls, {name: value for name, value in (values | more).items() if name in hints})


def _revive(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value)
    return value
