"""From captured windows to an engine build: train, register, build. Each asset makes one call into the core."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.defs.adaptation import Adaptation, Request, served_build
from tide_pipeline.defs.begun import tag_begun
from tide_pipeline.defs.keys import pool_of
from tide_pipeline.defs.lake import GROUP, signal_windows
from tide_pipeline.defs.limits import AWAY_S, AWAY_TRIES, challenger_tags, runtime_tags
from tide_pipeline.defs.meanwhile import meanwhile
from tide_pipeline.defs.resources import TideResource
from tide_pipeline.defs.split import ASKED, BEGUN, BUILT, DRIFTED, REGISTERED, TRAINED
from tide_pipeline.defs.tags import SINCE, TARGET, UNTIL, WORKLOAD
from tide_pipeline.defs.trainer import (
    DagsterPipesExecutionError,
    after_a_failed_training,
    last_words_of,
    times_waited,
    training_command,
    training_environment,
)

if TYPE_CHECKING:
    from tide_pipeline.registry.registry import RegisteredDraft, Registry

TRAIN_POOL = pool_of("train_gpu")


class AdaptConfig(dg.Config):
    """What to adapt to. The drift sensor fills it in; by hand the defaults will do."""

    workload: str = "default"
    reason: str = ""
    focus_since: float = 0.0               # Unix seconds since which windows count as the drifted traffic; 0 = all of the workload
    drifted_at: float = 0.0                # when it was judged drifted, for the time that the adaptation took
    since: str = ""                        # train on nothing captured before, such as 2026-11-20T09:00 (UTC): a draft over a past window
    until: str = ""                        # train on nothing captured then or later


@dg.asset(deps=[signal_windows], group_name=GROUP, kinds={"pytorch"}, owners=["team:inference"], pool=TRAIN_POOL)
def draft_checkpoint(context: dg.AssetExecutionContext, config: AdaptConfig, tide: TideResource,
                     trainer: dg.PipesSubprocessClient) -> dg.MaterializeResult:
    """An EAGLE-3 draft trained on captured windows of one workload, warm-started from the draft that serves it now.

    Training is a process of its own on the training devices. One that is killed goes on from its last snapshot, and so does one that
    found the lake's storage away.
    """
    settings = tide.settings()
    adaptation = adaptation_of(context, tide)
    asked = understood(config)
    adaptation.save("request", asked)
    tag_run(context, settings, asked)
    adaptation.mark(**({DRIFTED: config.drifted_at} if config.drifted_at else {}), **{ASKED: asked_at(context), BEGUN: time.time()})
    champion = served_build(settings, config.workload)
    command = training_command(adaptation, champion)
    try:
        with meanwhile(lambda: replay_champion(settings, adaptation, champion)):
            done = trainer.run(context=context, command=command, env=training_environment(settings, adaptation))
    except DagsterPipesExecutionError as error:
        run = context.instance, context.run.run_id
        raise after_a_failed_training(error, last_words_of(*run), times_waited(*run)) from error
    adaptation.mark(**{TRAINED: time.time()})
    return done.get_materialize_result()


@dg.asset(deps=[draft_checkpoint], group_name=GROUP, kinds={"mlflow"}, owners=["team:inference"])
def registered_draft(context: dg.AssetExecutionContext, tide: TideResource) -> dg.MaterializeResult:
    """The checkpoint as a version in MLflow, its challenger now: its bytes' digest, its curve, and where it comes from."""
    from tide_pipeline.registry.registry import open_registry
    from tide_pipeline.training.span import Span

    adaptation = adaptation_of(context, tide)
    checkpoint, asked = adaptation.checkpoint(), adaptation.request()
    lineage = {"dagster_run_id": context.run.root_run_id or context.run.run_id, "workload": asked.workload, "reason": asked.reason,
               **Span.of(asked.since, asked.until).facts}
    registry = open_registry(tide.settings())
    with waiting_while_away():
        draft = registry.register(checkpoint, lineage=lineage)
    adaptation.save("registered", draft)
    name_challenger(context, registry, draft)
    adaptation.mark(**{REGISTERED: time.time()})
    return dg.MaterializeResult(metadata={"version": draft.version, "draft_version": draft.draft_version, "digest": draft.digest,
                                          "mlflow_run_id": draft.run_id, "acceptance_length": checkpoint.acceptance_length})


def replay_champion(settings: TideConfig, adaptation: Adaptation, champion: EngineBuild | None) -> None:
    """Half of what the gate replays is known before there is a challenger."""
    from tide_pipeline.gate.remembered import remember

    asked = adaptation.request()
    if champion is not None:
        remember(settings, champion, adaptation.replays, workload=asked.workload, focus_since=asked.focus_since)


class EngineConfig(dg.Config):
    """Which registered draft; the job judge_challenger fills it in."""

    version: int = 0                       # 0 is the one that this run registered


@dg.asset(deps=[registered_draft], group_name=GROUP, kinds={"python"}, owners=["team:inference"])
def draft_engine(context: dg.AssetExecutionContext, config: EngineConfig, tide: TideResource) -> dg.MaterializeResult:
    """A folder that the serving engine can load, made from the bytes that the registry gives back, with its warm-up result."""
    from tide_pipeline.build.engine import build_engine
    from tide_pipeline.registry.registry import RegisteredDraft, open_registry

    settings, adaptation = tide.settings(), adaptation_of(context, tide)
    registry = open_registry(settings)
    with waiting_while_away():
        if config.version:
            begin_with(adaptation, registry.get(config.version))
            asked = adaptation.request()
            tag_begun(context.instance, context.run, {TARGET: settings.target, WORKLOAD: asked.workload, **challenger_tags(settings)},
                      asked.reason)
            name_challenger(context, registry, adaptation.load(RegisteredDraft, "registered"))
        draft = adaptation.load(RegisteredDraft, "registered")
        fetched = fetch_or_refuse(registry, draft, adaptation)
    with answering(context, settings, adaptation):
        build = build_engine(settings, fetched, draft.draft_version)
    adaptation.save("build", build)
    adaptation.mark(**{BUILT: time.time()})
    return dg.MaterializeResult(metadata={"build_id": build.build_id, "draft_version": build.draft_version,
                                          "path": dg.MetadataValue.path(build.path), **build.warmup})


@contextlib.contextmanager
def waiting_while_away(tried: int = 0) -> Iterator[None]:
    """A registry or a storage that is away for minutes costs minutes, and no training. What is refused would be refused again.

    `tried`: how often the step was tried again, where somebody must be told why it came to nothing.
    """
    from tide_pipeline.errors import LakeAway, RegistryAway

    try:
        yield
    except (LakeAway, RegistryAway) as error:
        if tried >= AWAY_TRIES:
            raise
        raise dg.RetryRequested(max_retries=AWAY_TRIES, seconds_to_wait=AWAY_S) from error


def begin_with(adaptation: Adaptation, draft: "RegisteredDraft") -> None:
    """An adaptation without training: a version that somebody asked for by moving an alias."""
    from tide_pipeline.rollout.alias import asked_workload

    adaptation.save("request", Request(asked_workload(draft), f"version {draft.version} was asked for in MLflow"))
    adaptation.save("registered", draft)


def name_challenger(context: dg.AssetExecutionContext, registry: "Registry", draft: "RegisteredDraft") -> None:
    """MLflow's alias, for people: no draft waits for it."""
    from tide_pipeline.errors import RegistryError
    from tide_pipeline.rollout.challenger import challenge

    try:
        if (standing := challenge(registry, draft.version)) != draft.version:
            context.log.info(f"challenger stays on version {standing}, which somebody asked for")
    except RegistryError as error:
        context.log.warning(f"{draft.draft_version} is not MLflow's challenger: {error}")


@contextlib.contextmanager
def answering(context: dg.AssetExecutionContext, settings: TideConfig, adaptation: Adaptation) -> Iterator[None]:
    """Whoever asked for the version in MLflow hears why it came to nothing. A run that is run again answers anew."""
    from tide_pipeline.errors import RegistryError, TideError
    from tide_pipeline.registry.registry import RegisteredDraft, open_registry
    from tide_pipeline.rollout.alias import answer_request

    try:
        yield
    except TideError as error:
        try:
            answer_request(open_registry(settings), adaptation.load(RegisteredDraft, "registered").version, f"failed: {error}")
        except RegistryError as away:
            context.log.warning(f"the failure is not in the registry: {away}")
        raise


def fetch_or_refuse(registry: "Registry", draft: "RegisteredDraft", adaptation: Adaptation) -> Path:
    """The draft's bytes, whose digest is checked. Bytes that are others, or gone, answer the request for them."""
    from tide_pipeline.errors import RegistryAway, RegistryError
    from tide_pipeline.rollout.alias import answer_request
    from tide_pipeline.rollout.challenger import step_down

    try:
        return registry.fetch(draft.version, adaptation.fetched / draft.draft_version)
    except RegistryAway:
        raise
    except RegistryError as error:
        answer_request(registry, draft.version, f"refused: {error}")
        step_down(registry, draft.version)
        raise


def understood(config: AdaptConfig) -> Request:
    """What is asked for, the period in UTC. Fails the step, for good, when it makes no sense."""
    from tide_pipeline.errors import InvalidRequest
    from tide_pipeline.training.span import Span

    try:
        span = Span.of(config.since, config.until)
    except InvalidRequest as error:
        raise dg.Failure(f"ops.draft_checkpoint.config: {error}", allow_retries=False) from error
    reason = config.reason or ("" if span.is_all else f"a draft over what was captured {span}")
    return Request(config.workload, reason, config.focus_since, config.drifted_at, *span.texts)


def tag_run(context: dg.AssetExecutionContext, settings: TideConfig, asked: Request) -> None:
    """Why the run exists, and how long it may, for one launched by hand: what its launcher said already stays."""
    wanted = {TARGET: settings.target, WORKLOAD: asked.workload, SINCE: asked.since, UNTIL: asked.until, **runtime_tags(settings)}
    tag_begun(context.instance, context.run, wanted, asked.reason)


def asked_at(context: dg.AssetExecutionContext) -> float:
    """When the run was put into Dagster's queue (Unix seconds)."""
    record = context.instance.get_run_record_by_id(context.run.run_id)
    return record.create_timestamp.timestamp() if record is not None else time.time()


def adaptation_of(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext, tide: TideResource) -> Adaptation:
    """The folder of the run that this step belongs to."""
    run = context.run
    return Adaptation.of(tide.settings(), run.run_id, run.root_run_id)
