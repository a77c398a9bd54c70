"""One tree of settings. Unknown keys are refused, with the nearest known one named. Standard library only."""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tide_pipeline.errors import SettingsError

T = TypeVar("T")

DRIFT_POLICIES = ("judge", "judge+paper", "judge+change", "ema", "paper", "page_hinkley", "adwin")    # drift/policies.py has the rules


@dataclass(frozen=True)
class ServeSettings:
    """The serving engine and its Triton front."""

    device: str = "cpu"
    gpu: str = ""                      # class of the serving GPUs, such as "h100": what memory is checked against
    gpus: int = 1                      # that one replica's target is split over (tensor parallel)
    trtllm: str = "1.2"                # version line of TensorRT-LLM in the serving container
    threads: int = 1
    max_batch: int = 8                 # requests in one step
    queue_size: int = 64               # waiting requests; one more is a 503
    prefill_chunk: int = 256           # prompt tokens per step
    default_deadline_s: float = 120.0
    replica: str = "replica-0"
    replicas: int = 1                  # of the local stack, behind one front: replica-0, replica-1, ...
    agent_poll_s: float = 0.5          # how often the draft agent reads the deployment record
    report_s: float = 1.0              # how often observed state is written
    draft_swap: str = "blue_green"     # of trtllm: blue_green, restart or in_place (docs/trtllm.md)

    @property
    def replica_names(self) -> tuple[str, ...]:
        """Of the local stack's replicas."""
        return (self.replica,) if self.replicas <= 1 else tuple(f"replica-{i}" for i in range(self.replicas))


@dataclass(frozen=True)
class SpeculationSettings:
    """The controller. See facts on break-even in docs/engine.md."""

    max_draft_length: int = 5
    probe_length: int = 3              # draft length of a probe step
    probe_share: float = 0.005         # of serving time, catch-up included
    survival_window: int = 200         # steps an acceptance estimate remembers (per workload and position)
    prior_acceptance: float = 0.7      # per-position, before anything is known of a draft
    switch_margin: float = 0.01        # expected gain below which the controller stays off
    draft_schedule: tuple[tuple[int, int], ...] = ()   # trtllm 1.3+: (largest batch, length); () is one length for every batch
    early_stop: bool = True            # drafts of greedy requests end where the draft is unsure, and go on where it is not


@dataclass(frozen=True)
class CaptureSettings:
    """What goes into the lake."""

    mode: str = "auto"                 # auto (collection control), on, off
    ema_short: float = 0.9             # lambda_short of Algorithm 1, per request
    ema_long: float = 0.99             # lambda_long
    epsilon: float = 0.05              # how far short must fall below long to start collecting
    init_requests: int = 8             # N_init
    change_delta: float = 0.05         # of the change-point test: drops of the first-position rate below this are no change
    change_threshold: float = 2.0      # and how much of what exceeds it must add up, in requests x rate
    share: float = 1.0                 # of the requests while collecting
    workloads: tuple[str, ...] = ()    # collect only these tags; () is all
    max_bytes_per_hour: int = 4_000_000_000
    queue_windows: int = 256           # closed windows waiting for the writer; more are dropped and counted
    shard_rows: int = 8_192            # token rows per signals shard
    flush_s: float = 10.0              # a shard is closed at this age at the latest
    block_steps: int = 64              # steps per acceptance row
    opted_out_tenants: tuple[str, ...] = ()


@dataclass(frozen=True)
class DriftSettings:
    """When acceptance counts as fallen."""

    policy: str = "judge"              # of DRIFT_POLICIES: docs/drift.md has what each is good for
    recent_s: float = 60.0             # the window that is judged
    min_steps: int = 200               # drafted steps needed in it
    min_drop: float = 0.10             # of first-position acceptance, lower end of the interval
    min_signal_rows: int = 20_000      # captured token rows needed before training starts (N_threshold)
    linger_s: float = 4.0              # a look that is nearly sure is followed by others for as long, in the same tick; below 5, 0 is off
    cooldown_s: float = 60.0           # after an adaptation of the same workload
    max_attempts: int = 3              # per drift episode
    training_hours_per_day: float = 8.0    # adaptations of a target may take together, in any 24 hours; 0 is no limit
    pay_back_s: float = 86_400.0       # in which an adaptation must earn the tokens that training costs; 0 is not asked
    training_slowdown: float = 0.5     # share of serving lost while a draft trains; 0 where it trains on devices of its own

    def __post_init__(self) -> None:
        if self.policy not in DRIFT_POLICIES:
            raise SettingsError(f"settings.drift.policy: no policy {self.policy!r}: choose from {', '.join(DRIFT_POLICIES)}")
        if not 0.0 <= self.linger_s < 5.0:
            raise SettingsError(f"settings.drift.linger_s: {self.linger_s:g} is not between 0 and 5: Dagster's next tick comes after 5 s")


@dataclass(frozen=True)
class TrainingSettings:
    """One training cycle of the draft."""

    device: str = "cpu"
    gpu: str = ""                      # class of the training GPUs, such as "l40s"
    train_devices: tuple[str, ...] = ()    # one process on each, such as ["cuda:0", "cuda:1"] or ["cpu", "cpu"]; () is one on `device`
    threads: int = 1                   # of each process
    nice: int = 5
    time_budget_s: float = 75.0        # 0 is none: a run is then exact to the last bit, by steps
    max_steps: int = 100_000
    ttt_steps: int = 3                 # training-time test depth
    learning_rate: float = 2e-3
    schedule: str = "linear"           # how the rate falls over the budget: linear, cosine, hold (all to zero), constant
    batch_windows: int = 2             # rows of a batch, over all processes
    accumulate: int = 1                # micro-batches a batch is computed in; running out of memory doubles it
    window_rows: int = 192             # longest slice of a window in one batch row
    soft_share: float = 0.5            # weight of the soft (KL) loss; the rest is hard CE
    accept_share: float = 0.0          # weight of the acceptance-direct loss (1 - sum min(p, q)); the rest is the above
    step_decay: float = 0.9            # loss weight per TTT step
    reject_weight: float = 0.0         # added to the weight 1 of rows where the draft that served was rejected; 0 is off
    replay_share: float = 0.4          # of batches, from the replay set (other workloads, older windows)
    eval_share: float = 0.12           # of prompts, held out with all their requests
    eval_every_s: float = 10.0
    patience: int = 0                  # evaluations without a gain after which a run stops early; 0 is never
    ema_decay: float = 0.0             # of averaged weights, evaluated beside the live ones and exported when better; 0 is off
    champion_share: float = 0.0        # of the exported weights: this much of the way back to where they began; 0 is off
    checkpoint_every_s: float = 15.0   # 0 is after every step
    max_windows: int = 4_000           # newest of the drifted workload; replay has as many, shared by the other workloads
    cache_mb: float = 4_096.0          # of states (10^6 bytes) in the memory of a process; windows beyond it are read as they come up
    seed: int = 0
    optimizer: str = "adamw"           # adamw, or muon: Muon for the layer's matrices, AdamW for the rest
    muon_learning_rate: float = 0.02
    warmup_steps: int = 20
    clip_norm: float = 1.0             # of the gradient; 0 is off
    autocast: bool = True              # bf16 products; the residual stream, the loss and the weights stay fp32
    train_lm_head: bool = False        # false keeps the target's own: as good at this scale, and cheaper
    draft_vocab_size: int = 0          # most frequent tokens of the windows; 0 is the target's whole vocabulary
    min_prompts: int = 8               # different ones of the drifted workload, held-out ones included
    eval_windows: int = 32             # held-out windows replayed at each evaluation
    eval_every_steps: int = 0          # evaluate by steps instead of by time: with time_budget_s = 0 a run is then exact


@dataclass(frozen=True)
class GateSettings:
    """What a challenger must show."""

    draft_length: int = 3
    windows: int = 96                  # held-out windows of each workload: the newest, one of every prompt before a second of any
    min_gain: float = 0.05             # acceptance length on the drifted workload, as estimated
    min_gain_low: float = 0.0          # the same, lower end of its 95 % interval; a negative min_gain lowers this too
    max_workload_loss: float = 0.15    # acceptance length, any other workload, as estimated; none of them may surely lose half as much
    min_prompts: int = 8               # different held-out ones; a workload with fewer is not judged
    bootstrap: int = 1_000
    bench_prompts: int = 8
    bench_tokens: int = 32             # of each; more tokens of the same prompts tell little more (docs/LOG.md)
    min_speedup_ratio: float = 1.0     # challenger's tokens/s over champion's, median
    equivalence_prompts: int = 12      # whose greedy output is held against plain decoding: the timed ones and some more
    epsilon: float = 1e-4              # logit gap below which two tokens count as tied in fp32; in bf16 see gate/equivalence.py


@dataclass(frozen=True)
class RolloutSettings:
    """Canary, bake, steps and rollback. The rules are in docs/rollout.md."""

    mode: str = "observe"              # observe: judge, train and gate, never deploy; propose: wait for a person's click; auto
    canaries: int = 1                  # replicas that serve a new draft first; one is left to compare with where there are two
    bake_s: float = 6.0                # at least
    max_bake_s: float = 60.0           # at most
    min_bake_steps: int = 30           # drafted steps the canary must have served
    min_bake_requests: int = 8         # and requests they were of: steps of one request are alike
    max_drop: float = 0.10             # of first-position acceptance, against the control replicas at the same time
    max_slowdown: float = 0.25         # of the time per token
    max_error_rise: float = 0.02       # of the share of requests that end with an error
    steps: tuple[float, ...] = (0.25, 0.5, 1.0)    # shares of the replicas that serve it after the bake, one after the other
    step_s: float = 2.0                # at least, between two of them
    serve_timeout_s: float = 120.0     # for a replica to serve what it should
    heartbeat_s: float = 10.0          # observed state older than this counts as missing


@dataclass(frozen=True)
class RetentionSettings:
    """What maintenance lets go of; 0 keeps for ever."""

    signal_days: float = 0.0           # age of signals
    acceptance_days: float = 0.0       # age of the acceptance log
    signal_gb: float = 0.0             # the oldest signals above it go, of all targets together
    tenant_days: tuple[str, ...] = ()  # such as ["acme=7"]: an age for one tenant's rows
    drafts_keep: int = 0               # the newest versions in MLflow that stay, beside all that are served, named, young or asked for
    training_keep: int = 0             # the newest adaptations whose weights and snapshots stay in training/, beside the unfinished


@dataclass(frozen=True)
class StackSettings:
    """The local stack. Port 0 means any free port; everything listens on loopback."""

    host: str = "127.0.0.1"
    front_port: int = 0                # where clients send requests
    triton_http_port: int = 0          # of the replica behind it
    triton_grpc_port: int = 0
    triton_metrics_port: int = 0
    mlflow_port: int = 0
    dagster_port: int = 0
    dagster_code_port: int = 0         # of the code server that webserver, daemon and commands share
    start_timeout_s: float = 180.0     # a part that ended is noticed at once; this is for slow, busy machines
    sensor_interval_s: int = 2


@dataclass(frozen=True)
class TideConfig:
    """Everything a run of the system needs to know."""

    engine: str = "pocket"             # folder under engines/
    engines_dir: str = "engines"
    state_dir: str = ".tide"
    lake: str = ""                     # s3://bucket/prefix, or another folder; empty: lake/ in the state directory
    serve: ServeSettings = field(default_factory=ServeSettings)
    speculation: SpeculationSettings = field(default_factory=SpeculationSettings)
    capture: CaptureSettings = field(default_factory=CaptureSettings)
    drift: DriftSettings = field(default_factory=DriftSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    gate: GateSettings = field(default_factory=GateSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    stack: StackSettings = field(default_factory=StackSettings)

    @property
    def target(self) -> str:
        """Name of the served target in the lake, the registry and the deployment record."""
        return self.engine

    @property
    def engine_dir(self) -> Path:
        return Path(self.engines_dir) / self.engine

    @property
    def state(self) -> StatePaths:
        return StatePaths(Path(self.state_dir).resolve(), self.lake)


class LakeUri(str):
    """s3://bucket/prefix; `/` joins, as with a Path."""

    def __truediv__(self, name: str) -> LakeUri:
        return LakeUri(f"{self.rstrip('/')}/{name}")


@dataclass(frozen=True)
class StatePaths:
    """Where things live: under the state directory, but for a lake elsewhere."""

    root: Path
    lake_uri: str = ""

    @property
    def lake(self) -> Path | LakeUri:
        if "://" in self.lake_uri:
            return LakeUri(self.lake_uri)
        return Path(self.lake_uri).resolve() if self.lake_uri else self.root / "lake"

    @property
    def acceptance(self) -> Path | LakeUri:
        return self.lake / "acceptance"

    @property
    def signals(self) -> Path | LakeUri:
        return self.lake / "signals"

    @property
    def builds(self) -> Path:
        return self.root / "builds"

    @property
    def deployments(self) -> Path:
        return self.root / "deployments"

    @property
    def observed(self) -> Path:
        return self.root / "observed"

    @property
    def drift(self) -> Path:
        return self.root / "drift"

    @property
    def training(self) -> Path:
        return self.root / "training"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def model_repository(self) -> Path:
        return self.root / "model_repository"

    @property
    def mlflow(self) -> Path:
        return self.root / "mlflow"

    @property
    def dagster(self) -> Path:
        return self.root / "dagster"

    @property
    def logs(self) -> Path:
        return self.root / "logs"


def parse(cls: type[T], values: Mapping[str, Any], where: str = "settings") -> T:
    """Build a settings dataclass from nested mappings.

    Raises:
        SettingsError: an unknown key (the nearest known one is named), a missing one, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
            raise SettingsError(f"{where}: unknown key {key!r}{hint}")
        kwargs[key] = _coerce(hints[key], value, f"{where}.{key}")
    try:
        return cls(**kwargs)
    except TypeError as error:
        lacking = [f.name for f in dataclasses.fields(cls) if f.name not in kwargs  # type: ignore[arg-type]
                   and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
        raise SettingsError(f"{where}: lacks {', '.join(lacking)}") from error


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise SettingsError(f"{where}: expected a table, got {value!r}")
        return parse(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise SettingsError(f"{where}: expected a list, got {value!r}")
        kinds = typing.get_args(hint)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(kinds) != len(value):
            raise SettingsError(f"{where}: expected a list of {len(kinds)}, got {value!r}")
        return tuple(_coerce(kind, one, f"{where}[{i}]") for i, (kind, one) in enumerate(zip(kinds, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)):
        raise SettingsError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, `over` winning."""
    out = dict(base)
    for key, value in over.items():
        out[key] = merge(out[key], value) if isinstance(value, Mapping) and isinstance(out.get(key), Mapping) else value
    return out


def override(config: TideConfig, values: Mapping[str, Any]) -> TideConfig:
    """`config` with nested values replaced."""
    return parse(TideConfig, merge(dataclasses.asdict(config), values))


def load_toml(path: Path) -> dict[str, Any]:
    """Raises SettingsError when the file is missing or is no TOML."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise SettingsError(f"no settings file at {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from error


def project_root() -> Path:
    """The checkout this package runs from (engines/, dagster_home/); TIDE_PROJECT_ROOT overrides it."""
    return Path(os.environ.get("TIDE_PROJECT_ROOT", Path(__file__).resolve().parent.parent))
