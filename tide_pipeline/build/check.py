"""Everything in an engine's folder that a build, a server or a trainer would stumble over, found on a machine without a GPU.

Knows engine.toml, recipes.toml and the numbers in them; of a draft that lies there, its config and the header of its weights. Loads no
weights, no torch, asks no network: that a revision exists on the hub is not checked, only that it is one and not a branch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tide_pipeline import recipes
from tide_pipeline.build.fits import serving_fits, training_fits
from tide_pipeline.build.snapshots import DRAFT_FILES, TARGET_FILES, check_revision, fetch_line
from tide_pipeline.config import TideConfig
from tide_pipeline.engine.trtllm.facts import LINES, load_table
from tide_pipeline.engine.trtllm.options import llm_arguments, unverified
from tide_pipeline.engine_spec import Architecture, EngineSpec, load_engine_spec
from tide_pipeline.errors import CheckpointError, SettingsError, TideError
from tide_pipeline.models.draft_files import check_draft

REPO, COMMIT = re.compile(r"[\w.-]+/[\w.-]+"), re.compile(r"[0-9a-f]{40}")
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
         "max_position_embeddings", "rope_theta", "rms_norm_eps")
START_S = 600.0                    # a server of TensorRT-LLM loads, tunes and captures graphs: minutes


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `text` says what is right, or what is wrong and how to put it right."""

    engine: str
    check: str
    passed: bool
    text: str


def list_engines(engines: Path) -> list[str]:
    """Folders with an engine.toml, by name."""
    return sorted(file.parent.name for file in engines.glob("*/engine.toml"))


def check_engine(engine_dir: Path) -> list[Finding]:
    """All findings about one engine; what can't be looked at because of an earlier fault is left out."""
    name = engine_dir.name
    try:
        spec = load_engine_spec(engine_dir)
    except TideError as error:
        return [Finding(name, "engine.toml", False, str(error))]
    checks: tuple[tuple[str, Callable[[Path, EngineSpec], str]], ...] = (
        ("engine.toml", _spec), ("target", _target), ("layers", _layers), ("draft", _draft))
    found = [_run(name, what, partial(check, engine_dir, spec)) for what, check in checks]
    if spec.backend == "trtllm" and all(finding.passed for finding in found):
        found += [_run(name, f"TensorRT-LLM {line}", partial(_options, spec, line)) for line in LINES]
        found += list(_recipes(engine_dir, spec))
    return found


def _run(engine: str, what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(engine, what, True, check())
    except TideError as error:
        return Finding(engine, what, False, str(error))


def _spec(engine_dir: Path, spec: EngineSpec) -> str:
    if spec.name != engine_dir.name:
        raise SettingsError(f"name = {spec.name!r} in a folder called {engine_dir.name!r}: lake, registry and records go by the folder, "
                            "make them the same")
    if spec.backend not in ("embedded", "trtllm"):
        raise SettingsError(f"backend = {spec.backend!r}: there are embedded and trtllm")
    if not 1 <= spec.max_draft_length <= 16:
        raise SettingsError(f"max_draft_length = {spec.max_draft_length}: EAGLE-3 drafts pay between 1 and about 8 tokens")
    return f"backend {spec.backend}"


def _target(engine_dir: Path, spec: EngineSpec) -> str:
    if spec.backend == "embedded":
        if not (engine_dir / spec.model / "config.json").is_file():
            raise CheckpointError(f"model = {spec.model!r}: no config.json in {engine_dir / spec.model}. Put the Hugging Face folder there")
        return str(engine_dir / spec.model)
    _pinned("repo", spec.repo, "revision", spec.revision)
    a = spec.architecture
    if missing := [name for name in SIZES if getattr(a, name) <= 0]:
        raise SettingsError(f"[architecture] lacks {', '.join(missing)}: copy the numbers from the target's config.json")
    if a.num_attention_heads % a.num_key_value_heads:
        raise SettingsError(f"[architecture] has {a.num_attention_heads} query heads over {a.num_key_value_heads} key/value heads: "
                            "one must divide the other, see the target's config.json")
    if spec.max_context > a.max_position_embeddings:
        raise SettingsError(f"max_context = {spec.max_context} is beyond the target's {a.max_position_embeddings} positions: lower it")
    where, folder = f"{spec.repo}@{spec.revision[:8]}", engine_dir / spec.model
    if not (folder / "config.json").is_file():
        return f"{where}, not here: {fetch_line(spec.repo, spec.revision, TARGET_FILES, folder)}"
    check_revision(spec.repo, spec.revision, TARGET_FILES, folder)
    _same_as_snapshot(folder, a)
    return f"{where}, here"


def _same_as_snapshot(folder: Path, a: Architecture) -> None:
    """What a snapshot's own config.json says goes before engine.toml."""
    config = json.loads((folder / "config.json").read_text())
    for name in SIZES:
        if config.get(name, getattr(a, name)) != getattr(a, name):
            raise SettingsError(f"[architecture] {name} = {getattr(a, name)}, but {folder}/config.json says {config[name]}: correct "
                                "engine.toml")


def _pinned(repo_name: str, repo: str, revision_name: str, revision: str) -> None:
    if not REPO.fullmatch(repo):
        raise SettingsError(f"{repo_name} = {repo!r}: expected owner/name as on the Hugging Face hub")
    if not COMMIT.fullmatch(revision):
        raise SettingsError(f"{revision_name} = {revision!r} is no commit hash, and a branch moves: take the 40 digits that "
                            f"`git ls-remote https://huggingface.co/{repo} HEAD` prints")


def _layers(engine_dir: Path, spec: EngineSpec) -> str:
    n = spec.architecture.num_hidden_layers or _layers_of(engine_dir / spec.model)
    usual, layers = (1, n // 2 - 1, n - 4), spec.capture_layers
    if list(layers) != sorted(set(layers)) or not layers or layers[0] < 0 or layers[-1] >= n:
        raise SettingsError(f"capture_layers = {list(layers)} must be ascending layers of the target's {n}, from 0: usual are "
                            f"{list(usual)}")
    if spec.backend == "trtllm" and len(layers) != 3:
        raise SettingsError(f"capture_layers = {list(layers)}: EAGLE-3 on TensorRT-LLM reads three, usual are {list(usual)}")
    if spec.backend == "trtllm" and spec.soft_targets:
        raise SettingsError("soft_targets = true: the final state has no verified source on TensorRT-LLM, set it to false")
    return f"{list(layers)} of {n}" + ("" if layers == usual else f" (usual: {list(usual)}; the draft must have been trained with these)")


def _layers_of(folder: Path) -> int:
    """Of a target that is here; _target has complained where it is not."""
    file = folder / "config.json"
    return int(json.loads(file.read_text()).get("num_hidden_layers", 0)) if file.is_file() else 0


def _draft(engine_dir: Path, spec: EngineSpec) -> str:
    folder = engine_dir / spec.champion
    if spec.backend == "embedded":
        if spec.champion and not (folder / "model.safetensors").is_file():
            raise CheckpointError(f"champion = {spec.champion!r}: no draft in {folder}. Set it to \"\" for none")
        return spec.champion or "none"
    if spec.draft.repo:
        _pinned("[draft] repo", spec.draft.repo, "revision", spec.draft.revision)
        if not spec.champion:
            raise SettingsError('[draft] names a repo, but champion is "": say where its snapshot lies, such as champion = "draft"')
    if spec.champion and folder.is_dir():
        if spec.draft.repo:
            check_revision(spec.draft.repo, spec.draft.revision, DRAFT_FILES, folder)
        check_draft(folder, spec)
        return f"{folder} fits"
    if not spec.draft.repo:
        return "from scratch"
    fetch = fetch_line(spec.draft.repo, spec.draft.revision, DRAFT_FILES, folder)
    return f"{spec.draft.repo}@{spec.draft.revision[:8]}, not here: {fetch}"


def _options(spec: EngineSpec, line: str) -> str:
    arguments = llm_arguments(spec, TideConfig(engine=spec.name), load_table(line), draft="draft")
    unknown = unverified(spec, load_table(line))
    return f"{len(arguments)} arguments" + (f"; only the server can judge {', '.join(unknown)}" if unknown else "")


def _recipes(engine_dir: Path, spec: EngineSpec) -> Iterator[Finding]:
    """Each serving and each training table once for its memory, every pair of them for loading."""
    name, engines = engine_dir.name, engine_dir.parent
    try:
        tables = recipes.gpu_tables(engine_dir)
        if not tables.get("serve"):
            raise SettingsError(f"no [serve.<gpu>] table in {engine_dir / 'recipes.toml'}: nothing says on which GPUs it runs")
        serving = {gpu: recipes.on_gpus(f"{name}/{gpu}", engines) for gpu in tables["serve"]}
        training = {gpu: recipes.on_gpus(f"{name}/+{gpu}", engines) for gpu in tables.get("train", {})}
        for pair in (f"{one}+{other}" for one in serving for other in training):
            recipes.on_gpus(f"{name}/{pair}", engines)
    except TideError as error:
        yield Finding(name, "recipes", False, str(error))
        return
    for gpu, config in serving.items():
        yield _run(name, f"times {gpu}", partial(_times, config))
    for kind, configs, fits in (("serve", serving, serving_fits), ("train", training, training_fits)):
        for gpu, config in configs.items():
            yield _run(name, f"{kind} {gpu}", partial(fits, spec, config))


def _times(config: TideConfig) -> str:
    """A new draft takes a new server: a rollout must wait for it to start. Its bake begins after that."""
    start_s, rollout = config.stack.start_timeout_s, config.rollout
    if start_s < START_S:
        raise SettingsError(f"stack.start_timeout_s = {start_s:g}: a TensorRT-LLM server takes minutes to start, set it to {START_S:g} or "
                            "more in [base]")
    if rollout.serve_timeout_s <= start_s:
        raise SettingsError(f"rollout.serve_timeout_s = {rollout.serve_timeout_s:g}: over before a new server has started, so its draft "
                            f"would be rolled back. Set it above {start_s:g} s, which stack.start_timeout_s allows, in [base]")
    if rollout.max_bake_s <= rollout.bake_s:
        raise SettingsError(f"rollout.max_bake_s = {rollout.max_bake_s:g} must be above rollout.bake_s = {rollout.bake_s:g}")
    return f"a server may take {start_s:g} s to start, a bake {rollout.bake_s:g} to {rollout.max_bake_s:g} s"
