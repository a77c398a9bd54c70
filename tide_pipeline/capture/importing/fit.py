"""Hold a dumped sequence against the engine, and give the rows that the engine would have captured. Knows no files.

T = tokens, D = hidden size, G = num_taps * D, W = G or G + D. The last token of a sequence is the follower of the last row.

A dump doesn't say whether its last state went through the target's last norm: TensorRT-LLM's and Hugging Face's did, vLLM's did not.
The state itself says it: divided by the norm's weights, a normed row has a root mean square of 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tide_pipeline.capture.importing.dumps import Dump, Refused
from tide_pipeline.capture.schema import token_bytes
from tide_pipeline.capture.windows import RowShape
from tide_pipeline.provenance import digest_bytes

NORMED_WITHIN = 0.02               # of 1: what bf16 leaves of a normed row's root mean square
WITNESSES = (3, 15, 63, 255)       # rows whose states are remembered, to find a sequence that carries another one's states


@dataclass(frozen=True)
class EngineShape:
    """What a sequence has to fit."""

    rows: RowShape
    vocab_size: int
    max_positions: int
    norm_D: Tensor                 # weights of the target's last norm, fp32
    eps: float

    @property
    def needs_final(self) -> bool:
        return self.rows.with_final


@dataclass(frozen=True)
class Fitted:
    """Rows of the first T - 1 tokens as the engine captures them."""

    token_ids: list[int]           # T
    rows_TW: Tensor                # bf16 [T - 1, W]
    mask_T: Tensor | None
    was_rounded: bool              # the dump was in a wider type than bf16
    was_normed_here: bool          # its last state had not gone through the norm


def fit(dump: Dump, engine: EngineShape, *, last_is_a_layer: bool = False) -> Fitted:
    """Raises Refused when the dump is not of this engine, or not sound."""
    num_tokens = len(dump.token_ids_T)
    if num_tokens < 2:
        raise Refused("fewer than two tokens")
    if num_tokens > engine.max_positions:
        raise Refused(f"longer than the target's {engine.max_positions} positions")
    ids = dump.token_ids_T
    if int(ids.min()) < 0 or int(ids.max()) >= engine.vocab_size:
        raise Refused(f"token ids outside the target's vocabulary of {engine.vocab_size}")
    taps_TG, last_TD = _split(dump, engine, last_is_a_layer)
    parts, normed_here = [taps_TG[:-1]], False
    if engine.needs_final:
        if last_TD is None:
            raise Refused("has no final state, and the engine stores them (soft_targets = true): dump the last layer too")
        final_TD, normed_here = _final(last_TD[:-1], engine)
        parts.append(final_TD)
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise Refused("NaN or infinite states")
    rows_TW = torch.cat([part.to(torch.bfloat16) for part in parts], dim=-1)
    if not bool(torch.isfinite(rows_TW).all()):
        raise Refused("states beyond what bf16 holds")
    return Fitted(ids.tolist(), rows_TW, dump.mask_T, dump.aux_TX.dtype != torch.bfloat16, normed_here)


class Witnesses:
    """Finds states that were dumped under another sequence's tokens.

    SaveHiddenStates copies the first rows of the step's buffer: of two requests in one step the second gets the first one's states.
    A row depends on all tokens up to it, so the same bits under other tokens are misplaced.
    """

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}       # digest of a row -> digest of the tokens up to it

    def check(self, fitted: Fitted) -> None:
        """Raises Refused; else remembers the rows."""
        mine = {digest_bytes(fitted.rows_TW[t].view(torch.int16).numpy().tobytes()): digest_bytes(token_bytes(fitted.token_ids[:t + 1]))
                for t in WITNESSES if t < len(fitted.rows_TW)}
        if any(self._seen.get(row, prefix) != prefix for row, prefix in mine.items()):
            raise Refused("carries the states of another sequence of the dump: it was made with more than one request in a step")
        self._seen.update(mine)


def _split(dump: Dump, engine: EngineShape, last_is_a_layer: bool) -> tuple[Tensor, Tensor | None]:
    """Taps and last state. A dump may hold the last state beside the layers, as the last of them, or both."""
    D, taps = engine.rows.hidden_size, engine.rows.num_taps
    width, last_TD = dump.aux_TX.shape[1], dump.last_TD
    if last_TD is not None and last_TD.shape[1] != D:
        raise Refused(f"hidden size {last_TD.shape[1]}, the engine's is {D}")
    if width % D:
        raise Refused(f"states {width} wide, which is no multiple of the engine's hidden size {D}")
    if width == taps * D:
        return dump.aux_TX, last_TD
    if width == (taps + 1) * D:
        beside_TD = dump.aux_TX[:, taps * D:]
        if last_is_a_layer or (last_TD is not None and beside_TD[:-1].equal(last_TD[:-1])):
            return dump.aux_TX[:, :taps * D], beside_TD
    raise Refused(f"{width // D} layers, the engine captures {taps}: dump the layers that engine.toml names")


def _final(last_TD: Tensor, engine: EngineShape) -> tuple[Tensor, bool]:
    """The state after the last norm, and whether the norm was applied here."""
    if is_normed(last_TD, engine.norm_D):
        return last_TD, False
    return F.rms_norm(last_TD.float(), last_TD.shape[-1:], engine.norm_D, engine.eps), True


def is_normed(state_TD: Tensor, norm_D: Tensor) -> bool:
    """Whether every row looks as the norm leaves it."""
    used = norm_D.abs() > 1e-6
    rms_T = (state_TD[:, used].float() / norm_D[used]).pow(2).mean(-1).sqrt()
    return bool(((rms_T - 1).abs() < NORMED_WITHIN).all())
