"""Dumps of other systems into the lake: bit for bit, in line with their tokens, and nothing that is not of this engine."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests.dumps import Said, all_layers, engine_of, speak, states_of, write_modelopt, write_trtllm, write_vllm
from tests.golden.test_alignment import _check
from tests.helpers import Seen, tiny_spec
from tide_pipeline.capture.delete import delete
from tide_pipeline.capture.importing import run as run_module
from tide_pipeline.capture.importing.boundary import Extent, find_extent
from tide_pipeline.capture.importing.dumps import Refused
from tide_pipeline.capture.importing.fit import is_normed
from tide_pipeline.capture.importing.layers import LayerCheck
from tide_pipeline.capture.importing.run import ALREADY, DELETED, ImportReport, Labels, import_folder
from tide_pipeline.capture.layout import live_shards
from tide_pipeline.capture.reader import WindowStates, list_windows, read_states
from tide_pipeline.capture.shard import write_shard
from tide_pipeline.capture.verify import EngineFacts, verify_signals
from tide_pipeline.contracts import RequestOpened, SamplingParams, StepEvent, StepKind
from tide_pipeline.errors import EngineMismatch, LakeError
from tide_pipeline.models.target import Target

TARGET = "tiny"


@pytest.fixture(scope="module")
def full(tiny_dir: Path) -> Target:
    return all_layers(tiny_dir)


@pytest.fixture(scope="module")
def said(tiny_dir: Path, full: Target) -> list[Said]:
    return speak(tiny_dir, full, "a first prompt", "another one, longer than that")


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    return tmp_path / "lake"


@pytest.fixture
def bring(tiny_target: Target, lake: Path) -> Callable[..., ImportReport]:
    def run(folder: Path, kind: str, *, labels: Labels = Labels("de", "acme"), soft_targets: bool = True, **more: Any) -> ImportReport:  # noqa: B008
        return import_folder(folder, kind, lake / "signals", TARGET, engine_of(tiny_target, soft_targets=soft_targets), labels, **more)

    return run


def stored(lake: Path) -> list[WindowStates]:
    return sorted(read_states(list_windows(lake / "signals", TARGET).windows, strict=True), key=lambda s: s.window.num_rows)


def seen(states: WindowStates, answer: list[int]) -> Seen:
    """A window as the sink of the alignment check saw it."""
    tokens = states.token_ids.tolist()
    opened = RequestOpened("r", "de", "acme", tuple(tokens[:-len(answer)]), SamplingParams(), "off")
    event = StepEvent("r", StepKind.PREFILL, 0, tuple(tokens[:-1]), tuple(answer), (), 0, "", 0, 1, 0.0, None)
    assert states.final_TD is not None
    return Seen(opened, [event], [torch.cat((states.taps_TG, states.final_TD), dim=-1)])


WRITERS: dict[str, tuple[str, Callable[..., Path], bool]] = {       # name -> format, writer, whether the last state is raw
    "trtllm": ("trtllm", write_trtllm, False),
    "trtllm, -1 among the layers": ("trtllm", lambda *a: write_trtllm(*a, with_last=True), False),
    "modelopt by Hugging Face": ("modelopt", write_modelopt, False),
    "modelopt by vLLM": ("modelopt", lambda *a: write_modelopt(*a, raw=True), True),
    "vllm": ("vllm", write_vllm, True),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_was_dumped_is_in_the_lake_bit_for_bit_and_in_line(
        name: str, tmp_path: Path, lake: Path, said: list[Said], full: Target, tiny_target: Target, tiny_dir: Path,
        bring: Callable[..., ImportReport]) -> None:
    kind, write, is_raw = WRITERS[name]
    folder = write(tmp_path / "dump", said)
    report = bring(folder, kind, layers=LayerCheck(tiny_dir, tiny_spec(), 4))
    assert (report.sequences, report.windows, report.rounded, report.normed) == (2, 2, 0, 2 if is_raw else 0) and not report.skipped
    for s, states in zip(said, stored(lake), strict=True):
        w, T = states.window, len(s.tokens) - 1
        assert states.token_ids.tolist() == s.tokens and (w.start_pos, w.num_rows) == (0, T)
        assert (w.workload, w.tenant, w.engine_digest, w.draft_version) == ("de", "acme", tiny_target.digest, "")
        assert states.taps_TG.view(torch.int16).equal(torch.cat(s.layers[:3], dim=-1)[:T].view(torch.int16))
        final = F.rms_norm(s.layers[-1].float(), (32,), full.norm, full.shape.eps).to(torch.bfloat16) if is_raw else s.final
        assert states.final_TD is not None and states.final_TD.view(torch.int16).equal(final[:T].view(torch.int16))
        assert w.num_prompt_tokens == (len(s.prompt) if kind == "modelopt" else len(s.tokens))
        if not is_raw:                     # else rounded twice: the next test
            _check(tiny_target, s.prompt, s.answer, seen(states, s.answer))
    (shard,) = live_shards(lake / "signals", TARGET)
    assert stat.S_IMODE(os.stat(shard).st_mode) == 0o600
    assert verify_signals(lake / "signals", TARGET, EngineFacts(tiny_target.digest, 32, 3, tiny_target.lm_head_VD)).is_sound


@pytest.mark.parametrize("name", ["modelopt by vLLM", "vllm"])
def test_a_state_that_was_normed_here_gives_the_tokens_that_were_emitted(name: str, tmp_path: Path, lake: Path, said: list[Said],
                                                                        tiny_target: Target, bring: Callable[..., ImportReport]) -> None:
    kind, write, _ = WRITERS[name]
    bring(write(tmp_path / "dump", said), kind)
    for s, states in zip(said, stored(lake), strict=True):
        assert states.final_TD is not None
        given = (states.final_TD.float() @ tiny_target.lm_head_VD.T).argmax(-1)[len(s.prompt) - 1:].tolist()
        assert sum(a == b for a, b in zip(given, s.answer, strict=True)) >= 0.9 * len(s.answer)


def test_the_alignment_check_sees_an_import_that_is_one_row_off(tmp_path: Path, lake: Path, said: list[Said], tiny_target: Target,
                                                                bring: Callable[..., ImportReport]) -> None:
    off = [Said(s.prompt, s.answer, [layer.roll(1, 0) for layer in s.layers], s.final.roll(1, 0)) for s in said]
    bring(write_modelopt(tmp_path / "dump", off), "modelopt")
    with pytest.raises(AssertionError):
        _check(tiny_target, said[0].prompt, said[0].answer, seen(stored(lake)[0], said[0].answer))


def test_a_folder_imported_again_adds_only_what_is_new(tmp_path: Path, lake: Path, said: list[Said],
                                                       bring: Callable[..., ImportReport]) -> None:
    folder = write_modelopt(tmp_path / "dump", said[:1])
    assert bring(folder, "modelopt").sequences == 1
    again = bring(folder, "modelopt")
    assert (again.sequences, again.shards, dict(again.skipped), again.is_clean) == (0, [], {ALREADY: 1}, True)
    write_modelopt(folder, said)                                       # rewrites the first, with the same states
    more = bring(folder, "modelopt")
    assert (more.sequences, dict(more.skipped)) == (1, {ALREADY: 1}) and len(stored(lake)) == 2
    write_trtllm(tmp_path / "same", said)                              # another format, without a mask: the same states
    assert dict(bring(tmp_path / "same", "trtllm").skipped) == {ALREADY: 2}


def test_an_import_that_was_cut_short_goes_on(tmp_path: Path, lake: Path, said: list[Said], bring: Callable[..., ImportReport],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full after the first shard."""
    folder, shards = write_modelopt(tmp_path / "dump", said), [1]

    def one_shard(*args: Any) -> Any:
        if not shards:
            raise OSError(28, "No space left on device")
        shards.pop()
        return write_shard(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_shard", one_shard)
        with pytest.raises(LakeError, match=r"No space left.*import the folder again"):
            bring(folder, "modelopt", max_rows=1)
    assert len(stored(lake)) == 1
    assert bring(folder, "modelopt").skipped == {ALREADY: 1}
    assert [s.token_ids.tolist() for s in stored(lake)] == [s.tokens for s in said]


def test_one_file_twice_in_a_folder_is_one_window(tmp_path: Path, lake: Path, said: list[Said], bring: Callable[..., ImportReport]) -> None:
    for name in ("a", "b"):
        write_vllm(tmp_path / "dump" / name, said[:1])
    assert dict(bring(tmp_path / "dump", "vllm").skipped) == {ALREADY: 1} and len(stored(lake)) == 1


def test_what_was_deleted_stays_deleted(tmp_path: Path, lake: Path, said: list[Said], bring: Callable[..., ImportReport]) -> None:
    folder = write_vllm(tmp_path / "dump", said)
    bring(folder, "vllm")
    delete(lake, request_id=stored(lake)[0].window.request_id, settle_s=0.0)
    assert dict(bring(folder, "vllm").skipped) == {DELETED: 1, ALREADY: 1} and len(stored(lake)) == 1
    delete(lake, tenant="acme", settle_s=0.0)
    with pytest.raises(LakeError, match=DELETED):
        bring(folder, "vllm")


def test_long_sequences_become_several_windows_and_shards(tmp_path: Path, lake: Path, full: Target, tiny_target: Target,
                                                          bring: Callable[..., ImportReport], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tide_pipeline.capture.windows.MAX_ROWS", 40)
    s = states_of(full, list(range(1, 61)), list(range(61, 131)))
    report = bring(write_modelopt(tmp_path / "dump", [s]), "modelopt", max_rows=80)
    windows = sorted(stored(lake), key=lambda states: states.window.start_pos)
    assert [(w.window.start_pos, w.window.num_rows, w.window.num_prompt_tokens) for w in windows] == [
        (0, 40, 60), (40, 40, 60), (80, 40, 60), (120, 9, 60)]
    assert len(report.shards) == 2 and torch.cat([w.taps_TG for w in windows]).equal(torch.cat(s.layers[:3], dim=-1)[:-1])
    assert bring(tmp_path / "dump", "modelopt").skipped == {ALREADY: 1}


def test_wider_types_are_rounded_and_said_so(tmp_path: Path, lake: Path, said: list[Said], bring: Callable[..., ImportReport]) -> None:
    folder = tmp_path / "dump"
    folder.mkdir()
    wide = torch.cat(said[0].layers[:3], dim=-1).float() * (1 + 2**-12)
    torch.save({"input_ids": torch.tensor(said[0].tokens, dtype=torch.int32), "hidden_states": said[0].final.to(torch.float16),
                "aux_hidden_states": wide, "conversation_id": "c"}, folder / "c.pt")
    assert bring(folder, "modelopt").rounded == 1
    assert stored(lake)[0].taps_TG.equal(wide[:-1].to(torch.bfloat16))


def test_an_engine_without_final_states_takes_none(tmp_path: Path, lake: Path, said: list[Said],
                                                   bring: Callable[..., ImportReport]) -> None:
    bring(write_vllm(tmp_path / "dump", said, last=False), "vllm", soft_targets=False)
    assert [states.final_TD for states in stored(lake)] == [None, None]


def test_rows_that_the_dump_left_undefined_do_not_matter(tmp_path: Path, lake: Path, said: list[Said],
                                                         bring: Callable[..., ImportReport]) -> None:
    """The last token's row is never stored: it has no follower."""
    s = said[0]
    ragged = Said(s.prompt, s.answer, [layer.clone() for layer in s.layers], s.final.clone())
    for state in (*ragged.layers, ragged.final):
        state[-1] = float("nan")
    assert bring(write_trtllm(tmp_path / "dump", [ragged]), "trtllm").sequences == 1


# --- what is refused ----------------------------------------------------------------------------------------------

def _good(s: Said) -> dict[str, Any]:
    return {"input_ids": torch.tensor(s.tokens), "hidden_states": s.final.clone(), "aux_hidden_states": torch.cat(s.layers[:3], dim=-1),
            "loss_mask": s.mask, "conversation_id": "x"}


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def _nan(values: dict[str, Any], name: str) -> torch.Tensor:
    state: torch.Tensor = values[name].clone()
    state[4, 3] = float("nan")
    return state


BAD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "wider": (lambda v: {"hidden_states": torch.zeros(len(v["input_ids"]), 48)}, "hidden size 48, the engine's is 32"),
    "odd": (lambda v: {"aux_hidden_states": v["aux_hidden_states"][:, :90]}, "90 wide, which is no multiple of the engine's"),
    "two layers": (lambda v: {"aux_hidden_states": v["aux_hidden_states"][:, :64]}, "2 layers, the engine captures 3"),
    "four layers": (lambda v: {"aux_hidden_states": torch.cat((v["aux_hidden_states"], v["aux_hidden_states"][:, :32]), 1)},
                    "4 layers, the engine captures 3"),
    "no layers": (lambda v: {"aux_hidden_states": torch.empty(0)}, "no states of inner layers"),
    "token": (lambda v: {"input_ids": v["input_ids"].index_fill(0, torch.tensor([5]), 257)}, "outside the target's vocabulary of 257"),
    "negative token": (lambda v: {"input_ids": v["input_ids"].index_fill(0, torch.tensor([5]), -1)}, "outside the target's vocabulary"),
    "short states": (lambda v: {"hidden_states": v["hidden_states"][8:]}, "differ in length"),
    "short mask": (lambda v: {"loss_mask": v["loss_mask"][1:]}, "differ in length"),
    "nan": (lambda v: {"aux_hidden_states": _nan(v, "aux_hidden_states")}, "NaN or infinite states"),
    "nan final": (lambda v: {"hidden_states": _nan(v, "hidden_states")}, "NaN or infinite states"),
    "beyond bf16": (lambda v: {"aux_hidden_states": v["aux_hidden_states"].float() + 3.4e38}, "beyond what bf16 holds"),
    "unknown key": (lambda v: {"logits": torch.zeros(2)}, "has logits, which this format did not have"),
    "float ids": (lambda v: {"input_ids": v["input_ids"].float()}, "token ids is float32, expected int64, int32"),
    "double": (lambda v: {"hidden_states": v["hidden_states"].double()}, "the last state is float64"),
    "batch": (lambda v: {"hidden_states": v["hidden_states"][None]}, "the last state has 3 dimensions, expected 2"),
    "sparse": (lambda v: {"hidden_states": v["hidden_states"].float().to_sparse()}, "the last state is no plain tensor"),
    "no tensor": (lambda v: {"hidden_states": [1.0]}, "the last state is no plain tensor"),
    "one token": (lambda v: {k: t[:1] for k, t in v.items() if k != "conversation_id"}, "fewer than two tokens"),
    "too long": (lambda v: {k: t.repeat(9, *[1] * (t.dim() - 1)) for k, t in v.items() if k != "conversation_id"},
                 "longer than the target's 256 positions"),
    "no prompt": (lambda v: {"loss_mask": (torch.arange(len(v["loss_mask"])) < 5).long()}, "an answer without a prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sequence_is_refused_by_name_and_the_others_come_in(name: str, tmp_path: Path, lake: Path, said: list[Said],
                                                                  bring: Callable[..., ImportReport]) -> None:
    change, reason = BAD[name]
    folder = write_modelopt(tmp_path / "dump", said[1:])
    values = _good(said[0])
    torch.save(values | change(values), folder / "bad.pt")
    report = bring(folder, "modelopt")
    assert report.sequences == 1 and not report.is_clean and list(report.first.values()) == ["bad.pt"]
    assert reason in next(iter(report.skipped)), report.skipped
    assert [s.token_ids.tolist() for s in stored(lake)] == [said[1].tokens]
    (folder / "talk-0.pt").unlink()
    with pytest.raises(LakeError, match="could be imported"):
        bring(folder, "modelopt")


def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path, said: list[Said], bring: Callable[..., ImportReport]) -> None:
    folder = write_trtllm(tmp_path / "dump", said)
    torch.save([{"id": 1, "input_ids": Evil(tmp_path / "ran")}], folder / "evil.pt")
    report = bring(folder, "trtllm")
    assert report.sequences == 2 and not (tmp_path / "ran").exists() and "would run code" in next(iter(report.skipped))
    assert b"mkdir" in (folder / "evil.pt").read_bytes()               # it was there to be run


def test_a_torch_with_a_known_hole_reads_no_pickle(tmp_path: Path, said: list[Said], bring: Callable[..., ImportReport],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_trtllm(tmp_path / "dump", said)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    with pytest.raises(LakeError, match=r"torch 2\.9\.1\+cu130 may run code.*2\.10 or later"):
        bring(folder, "trtllm")


@pytest.mark.parametrize(("kind", "name"), [("trtllm", "data_2.pt"), ("modelopt", "talk-0.pt"), ("vllm", "cmpl-0.safetensors")])
def test_a_file_that_was_cut_short(kind: str, name: str, tmp_path: Path, said: list[Said], bring: Callable[..., ImportReport]) -> None:
    folder = {"trtllm": write_trtllm, "modelopt": write_modelopt, "vllm": write_vllm}[kind](tmp_path / "dump", said)
    (folder / name).write_bytes((folder / name).read_bytes()[:2000])
    (folder / f"empty{(folder / name).suffix}").touch()
    if kind == "trtllm":
        with pytest.raises(LakeError, match=r"2 x is not a whole file"):
            bring(folder, kind)
    else:
        assert sum(bring(folder, kind).skipped.values()) == 2


def test_the_wrong_format_is_named(tmp_path: Path, said: list[Said], bring: Callable[..., ImportReport]) -> None:
    with pytest.raises(LakeError, match="is it of --format trtllm"):
        bring(write_trtllm(tmp_path / "t", said), "modelopt")
    with pytest.raises(LakeError, match="is it of --format modelopt"):
        bring(write_modelopt(tmp_path / "m", said), "trtllm")
    with pytest.raises(LakeError, match=r"holds no \*.safetensors"):
        bring(tmp_path / "t", "vllm")
    with pytest.raises(LakeError, match=r"holds no \*.pt"):
        bring(tmp_path / "nowhere", "trtllm")
    (tmp_path / "v").mkdir()
    save_file({"token_ids": torch.arange(3), "hidden_states": torch.zeros(3, 4, 32), "x": torch.zeros(1)}, tmp_path / "v" / "a.safetensors")
    with pytest.raises(LakeError, match="has x, which this format"):
        bring(tmp_path / "v", "vllm")


def test_a_dump_without_final_states_for_an_engine_that_stores_them(tmp_path: Path, said: list[Said],
                                                                    bring: Callable[..., ImportReport]) -> None:
    with pytest.raises(LakeError, match="no final state, and the engine stores them"):
        bring(write_vllm(tmp_path / "dump", said, last=False), "vllm")


def test_one_bad_request_of_a_list_does_not_hide_the_next(tmp_path: Path, said: list[Said], bring: Callable[..., ImportReport]) -> None:
    folder = write_trtllm(tmp_path / "dump", said)
    saved = torch.load(folder / "data_2.pt", weights_only=True)
    saved[0]["input_ids"] = saved[0]["input_ids"][:5]
    torch.save(saved, folder / "data_2.pt")
    report = bring(folder, "trtllm")
    assert report.sequences == 1 and sum(report.skipped.values()) == 1


def test_states_of_another_request_of_the_same_step(tmp_path: Path, lake: Path, said: list[Said],
                                                    bring: Callable[..., ImportReport]) -> None:
    """SaveHiddenStates with two requests in one step: the second is saved with the rows that the first one's begin with."""
    first, second = said
    both = Said(first.tokens + second.tokens, [], [torch.cat(pair) for pair in zip(first.layers, second.layers, strict=True)],
                torch.cat((first.final, second.final)))
    n = len(second.tokens)
    mixed = Said(second.prompt, second.answer, [layer[:n] for layer in both.layers], both.final[:n])
    report = bring(write_trtllm(tmp_path / "dump", [first, mixed]), "trtllm")
    assert report.sequences == 1 and "carries the states of another sequence" in next(iter(report.skipped))
    assert stored(lake)[0].token_ids.tolist() == first.tokens


@pytest.mark.parametrize(("layers", "told"), [((1, 2, 3), "1 .*, 2 .*, 3 "), ((0, 2, 1), "0 .*, 2 .*, 1 ")])
def test_other_layers_than_the_engine_captures(layers: tuple[int, ...], told: str, tmp_path: Path, lake: Path, said: list[Said],
                                               tiny_dir: Path, bring: Callable[..., ImportReport]) -> None:
    folder = write_vllm(tmp_path / "dump", said, layers=layers)
    with pytest.raises(EngineMismatch, match=f"layers {told}.*captures 0, 1, 2"):
        bring(folder, "vllm", layers=LayerCheck(tiny_dir, tiny_spec(), 4))
    assert live_shards(lake / "signals", TARGET) == []


def test_a_final_state_of_a_lower_layer(tmp_path: Path, said: list[Said], tiny_dir: Path, bring: Callable[..., ImportReport]) -> None:
    low = [Said(s.prompt, s.answer, [*s.layers[:3], s.layers[0].roll(7, 0)], s.final) for s in said]
    with pytest.raises(EngineMismatch, match=r"final state is .* off the target's.*id 4"):
        bring(write_vllm(tmp_path / "dump", low), "vllm", layers=LayerCheck(tiny_dir, tiny_spec(), 4))


# --- rules --------------------------------------------------------------------------------------------------------

def test_where_the_prompt_ends() -> None:
    def extent(mask: list[int] | None, answer_after: tuple[int, ...] = ()) -> Extent:
        return find_extent([10, 11, 12, 13, 14, 15], None if mask is None else torch.tensor(mask), answer_after)

    assert extent([0, 0, 1, 1, 1, 1]) == Extent(2, 6)
    assert extent([0, 1, 0, 0, 1, 0]) == Extent(4, 5)                  # the last of two answers; the template's end is cut off
    assert extent([1] * 6) == extent(None) == Extent(6, 6)             # a mask of ones says nothing
    assert extent([0] * 6) == Extent(6, 6)
    assert extent(None, (11, 12)) == extent([1] * 6, (11, 12)) == Extent(3, 6)
    assert find_extent([7, 1, 7, 1], None, (7,)) == Extent(3, 4)
    with pytest.raises(Refused, match="answer-after"):
        extent(None, (15,))
    with pytest.raises(Refused, match="without a prompt"):
        extent([1, 1, 0, 0, 0, 0])


def test_the_norm_leaves_its_mark(said: list[Said], full: Target) -> None:
    for s in said:
        assert is_normed(s.final, full.norm) and not any(is_normed(layer, full.norm) for layer in s.layers)
