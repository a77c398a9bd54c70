"""A folder of dumps into the lake: read, fit, split into windows, write. Knows the lake's writer side; knows no screen.

Every row has the id `import-<digest of engine, tokens and states>`, so that a folder imported twice adds nothing. A shard is written at
once, as the engine's writer does; an import that is cut short is simply called again.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tide_pipeline.capture.encode import signals_tables
from tide_pipeline.capture.importing.boundary import find_extent
from tide_pipeline.capture.importing.dumps import FORMATS, Dump, Refused
from tide_pipeline.capture.importing.fit import EngineShape, Fitted, Witnesses, fit
from tide_pipeline.capture.importing.layers import LayerCheck
from tide_pipeline.capture.names import new_shard
from tide_pipeline.capture.reader import list_windows
from tide_pipeline.capture.rows import words_of
from tide_pipeline.capture.schema import SIGNALS_SCHEMA, token_bytes
from tide_pipeline.capture.shard import write_shard
from tide_pipeline.capture.store import Root, open_store
from tide_pipeline.capture.tombstones import read_tombstones
from tide_pipeline.capture.windows import ClosedWindow, WindowAssembler
from tide_pipeline.capture.writer import SHARD_BYTES
from tide_pipeline.contracts import RequestOpened, SamplingParams, StepEvent, StepKind
from tide_pipeline.errors import LakeError, NotEnoughSignals

REPLICA = "import"
CHECKED = 3                        # sequences whose layers are compared with the target's
ALREADY, DELETED = "already in the lake", "deleted from the lake"


@dataclass(frozen=True)
class Labels:
    """What a dump does not know of itself."""

    workload: str
    tenant: str
    answer_after: tuple[int, ...] = ()
    temperature: float = 1.0       # 0 only where the answers are the target's own greedy ones: `verify` holds them to it


@dataclass
class ImportReport:
    """What became of a folder."""

    files: int = 0
    sequences: int = 0             # imported, whole or in part
    windows: int = 0
    rows: int = 0
    shards: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)             # reason -> sequences, or files that can't be read
    first: dict[str, str] = field(default_factory=dict)                # reason -> the first file of which it was said
    rounded: int = 0               # sequences dumped in a wider type than bf16
    normed: int = 0                # sequences whose last state went through the norm here
    judged: int = 0                # sequences with an answer: the others are trained on only
    layers_checked: bool = False

    @property
    def is_clean(self) -> bool:
        return not set(self.skipped) - {ALREADY, DELETED}

    def skip(self, file: Path, reason: str) -> None:
        self.skipped[reason] += 1
        self.first.setdefault(reason, file.name)


Progress = Callable[[int, int, ImportReport], object]


def import_folder(folder: Path, kind: str, root: Root, target: str, engine: EngineShape, labels: Labels, *,
                  layers: LayerCheck | None = None, max_rows: int = 8192, progress: Progress | None = None) -> ImportReport:
    """Write the folder's sequences into `signals/`. Files are taken by name, `progress(files done, files, report)` after each.

    Raises:
        LakeError: there is no dump in the folder, none fits, or the lake refuses.
        EngineMismatch: `layers` says that the dump holds other layers than the engine captures.
    """
    files = sorted(folder.rglob(FORMATS[kind].pattern)) if folder.is_dir() else []
    if not files:
        raise LakeError(f"{folder} holds no {FORMATS[kind].pattern}: name the folder that the dumps lie in, and their --format")
    report, importer = ImportReport(layers_checked=layers is not None), _Importer(root, target, engine, labels, max_rows)
    for file in files:
        importer.take(file, kind, layers, report)
        report.files += 1
        if progress is not None:
            progress(report.files, len(files), report)
    importer.flush(report)
    if not report.sequences and ALREADY not in report.skipped:
        raise LakeError(f"nothing in {folder} could be imported: " + "; ".join(
            f"{count} x {reason} (first {report.first[reason]})" for reason, count in report.skipped.most_common()))
    return report


class _Importer:
    """Windows on their way into shards."""

    def __init__(self, root: Root, target: str, engine: EngineShape, labels: Labels, max_rows: int) -> None:
        self.root, self.target, self.engine, self.labels, self.max_rows = root, target, engine, labels, max_rows
        self.known, self.tombstones = _known(root, target), read_tombstones(root)
        self.witnesses, self.waiting, self.checked = Witnesses(), list[ClosedWindow](), 0

    def take(self, file: Path, kind: str, layers: LayerCheck | None, report: ImportReport) -> None:
        closed_at = min(file.stat().st_mtime, time.time())
        try:
            for dump in FORMATS[kind].read(file):
                try:
                    self.add(self.fitted(dump, kind, layers), file, closed_at, report)
                except Refused as refused:
                    report.skip(file, str(refused))
        except Refused as refused:
            report.skip(file, str(refused))

    def fitted(self, dump: Dump | Refused, kind: str, layers: LayerCheck | None) -> Fitted:
        if isinstance(dump, Refused):
            raise dump
        fitted = fit(dump, self.engine, last_is_a_layer=FORMATS[kind].last_is_a_layer)
        self.witnesses.check(fitted)
        if layers is not None and self.checked < CHECKED:
            layers.check(fitted)
            self.checked += 1
        return fitted

    def add(self, fitted: Fitted, file: Path, closed_at: float, report: ImportReport) -> None:
        windows = list(self.windows_of(fitted, closed_at))
        new = [w for w in windows if (w.request_id, w.start_pos) not in self.known]
        if not new:
            report.skip(file, ALREADY)
            return
        if self.tombstones and self.tombstones.cover(new[0].request_id, self.labels.tenant, closed_at):
            report.skip(file, DELETED)
            return
        report.sequences += 1
        report.rounded += fitted.was_rounded
        report.normed += fitted.was_normed_here
        report.judged += new[0].num_prompt_tokens <= sum(w.num_rows for w in windows)
        for window in new:
            if self.waiting and (sum(w.num_bytes for w in self.waiting) + window.num_bytes > SHARD_BYTES
                                 or sum(w.num_rows for w in self.waiting) + window.num_rows > self.max_rows):
                self.flush(report)
            self.waiting.append(window)
            self.known.add((window.request_id, window.start_pos))

    def windows_of(self, fitted: Fitted, closed_at: float) -> Iterator[ClosedWindow]:
        """As the engine would have closed them: the sequence is one prefill, cut where windows are."""
        extent = find_extent(fitted.token_ids, fitted.mask_T, self.labels.answer_after)
        tokens, shape, made = tuple(fitted.token_ids[:extent.end]), self.engine.rows, list[ClosedWindow]()
        opened = RequestOpened(_request_id(fitted, shape.engine_digest), self.labels.workload, self.labels.tenant,
                               tokens[:extent.num_prompt_tokens], SamplingParams(temperature=self.labels.temperature), "off")
        assembler = WindowAssembler(opened, shape, made.append, lambda: closed_at, shape.max_rows)
        assembler.add(StepEvent(opened.request_id, StepKind.PREFILL, 0, tokens[:-1], tokens[-1:], (), 0, "", 0, 1, 0.0, None),
                      words_of(fitted.rows_TW[:len(tokens) - 1]))
        assembler.close()
        yield from made

    def flush(self, report: ImportReport) -> None:
        """Put what waits into the lake, as one shard."""
        if not self.waiting:
            return
        try:
            shard = write_shard(open_store(self.root), new_shard(self.target, REPLICA), self.target, SIGNALS_SCHEMA,
                                signals_tables(self.waiting))
        except OSError as error:
            raise LakeError(f"can't write to {self.root}: {error}; free or repair it and import the folder again: what is in the lake "
                            "already is passed over") from error
        report.shards.append(shard.uri)
        report.windows += len(self.waiting)
        report.rows += sum(w.num_rows for w in self.waiting)
        self.waiting.clear()


def _known(root: Root, target: str) -> set[tuple[str, int]]:
    """Windows of earlier imports."""
    try:
        return {(w.request_id, w.start_pos) for w in list_windows(root, target).windows if w.request_id.startswith(f"{REPLICA}-")}
    except NotEnoughSignals:
        return set()


def _request_id(fitted: Fitted, engine_digest: str) -> str:
    digest = hashlib.sha256(engine_digest.encode() + token_bytes(fitted.token_ids))
    digest.update(fitted.rows_TW.view(torch.int16).numpy().tobytes())
    return f"{REPLICA}-{digest.hexdigest()[:32]}"
