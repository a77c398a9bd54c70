"""Hidden-state dumps as other systems write them, by hand from their sources, of a tiny target's real states."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers import ask, generate, plain_pass, tiny_engine, tiny_spec
from tide_pipeline.capture.importing.fit import EngineShape
from tide_pipeline.capture.windows import RowShape
from tide_pipeline.models.target import Target


@dataclass(frozen=True)
class Said:
    """What the target says, and every state of it in bf16: layers[l] is the output of layer l, `final` has gone through the norm."""

    prompt: list[int]
    answer: list[int]
    layers: list[Tensor]
    final: Tensor

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.answer]

    @property
    def mask(self) -> Tensor:
        return torch.tensor([0] * len(self.prompt) + [1] * len(self.answer))


def all_layers(target_dir: Path) -> Target:
    return Target(target_dir, dataclasses.replace(tiny_spec(), capture_layers=(0, 1, 2, 3)))


def speak(target_dir: Path, target: Target, *prompts: str, max_tokens: int = 24) -> list[Said]:
    """Greedy answers, and a plain pass over each."""
    engine = tiny_engine(target_dir)
    answers = generate(engine, *[ask(f"r{i}", text, max_tokens=max_tokens, ignore_eos=True) for i, text in enumerate(prompts)])
    return [states_of(target, engine.codec.encode(text), answer.tokens) for text, answer in zip(prompts, answers, strict=True)]


def states_of(target: Target, prompt: list[int], answer: list[int]) -> Said:
    taps, final, _ = plain_pass(target, [*prompt, *answer])
    layers = taps.view(len(taps), -1, target.shape.hidden_size).unbind(1)
    return Said(prompt, answer, [layer.to(torch.bfloat16) for layer in layers], final.to(torch.bfloat16))


def write_trtllm(folder: Path, sequences: Sequence[Said], *, with_last: bool = False, layers: Sequence[int] = (0, 1, 2)) -> Path:
    """SaveHiddenStates with write_interval = len(sequences); `with_last`: the user listed layer -1 among those to capture."""
    saved = []
    for i, s in enumerate(sequences):
        aux = [s.layers[n] for n in layers] + ([s.final] if with_last else [])
        saved.append({"id": i + 1, "input_ids": torch.tensor(s.tokens), "hidden_state": s.final.clone(),
                      "aux_hidden_states": torch.cat(aux, dim=-1)})
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(saved, folder / f"data_{len(sequences)}.pt")
    return folder


def write_modelopt(folder: Path, sequences: Sequence[Said], *, raw: bool = False, mask: bool = True,
                   layers: Sequence[int] = (0, 1, 2)) -> Path:
    """compute_hidden_states_hf.py, or with `raw` compute_hidden_states_vllm.py, whose last state has not gone through the norm."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, s in enumerate(sequences):
        torch.save({"input_ids": torch.tensor(s.tokens), "hidden_states": s.layers[-1] if raw else s.final,
                    "aux_hidden_states": torch.cat([s.layers[n] for n in layers], dim=-1),
                    "loss_mask": s.mask if mask else torch.ones(len(s.tokens), dtype=torch.long), "conversation_id": f"talk-{i}"},
                   folder / f"talk-{i}.pt")
    return folder


def write_vllm(folder: Path, sequences: Sequence[Said], *, layers: Sequence[int] = (0, 1, 2), last: bool = True) -> Path:
    """ExampleHiddenStatesConnector with eagle_aux_hidden_state_layer_ids = layers + 1 and, as `last`, the number of layers."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, s in enumerate(sequences):
        states = [s.layers[n] for n in layers] + ([s.layers[-1]] if last else [])
        save_file({"token_ids": torch.tensor(s.tokens), "hidden_states": torch.stack(states, dim=1)}, folder / f"cmpl-{i}.safetensors")
        (folder / f"cmpl-{i}.safetensors.lock").touch()
    return folder


def engine_of(target: Target, *, soft_targets: bool = True) -> EngineShape:
    """As the tiny engine captures: layers 0, 1, 2 of 4."""
    return EngineShape(RowShape(target.shape.hidden_size, 3, soft_targets, target.digest), target.shape.vocab_size,
                       target.shape.max_positions, target.norm, target.shape.eps)
