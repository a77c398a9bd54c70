"""How fast is one request, against Hugging Face on the same target? Batch 1, greedy, split looping / non-looping.

    python benchmarks/decode.py --json benchmarks/results/decode.json

    plain        the embedded engine without a draft
    auto         with the shipped draft, draft lengths chosen by the controller
    hf, hf_bf16  transformers' `generate` in fp32 and in the checkpoint's bf16
    hf_lookup    prompt lookup (n-grams of the text so far as the draft), fp32
    hf_assisted  assisted generation, fp32; needs a small model of the same vocabulary: --assistant FOLDER

A round decodes one prompt with each of them; a ratio is taken per round. Text counts as looping by what plain decoding wrote.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from abba import Block, Work, alternate, median_rate, ratio
from bench_engine import ask, drafts_of, engine_of, pick, prompts_of, serve
from hugging_face import Generator
from options import finish, parser, settle

from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.workloads.loops import is_looping

NO_ASSISTANT = "left out: no smaller model with this target's vocabulary is at hand (an EAGLE-3 draft is none); name one by --assistant"
PAIRS = [("plain", "hf"), ("plain", "hf_bf16"), ("auto", "plain"), ("auto", "hf"), ("auto", "hf_bf16"), ("auto", "hf_lookup"),
         ("auto", "hf_assisted"), ("hf_lookup", "hf"), ("hf_assisted", "hf")]
WARM_UP = 4                        # prompts of their own, so that the controller knows the draft


def generators(model_dir: Path, args: argparse.Namespace) -> dict[str, Generator]:
    made = {"hf": Generator(model_dir, torch.float32), "hf_lookup": Generator(model_dir, torch.float32, lookup_tokens=args.lookup_tokens)}
    if args.assistant:
        made["hf_assisted"] = Generator(model_dir, torch.float32, args.assistant)
    return made if args.quick else made | {"hf_bf16": Generator(model_dir, torch.bfloat16)}


class Systems:
    """The works to alternate, and what each wrote, round by round."""

    def __init__(self, engine: EmbeddedEngine, peers: dict[str, Generator], prompts: Sequence[str], tokens: int) -> None:
        self.engine, self.peers, self.prompts, self.tokens = engine, peers, prompts, tokens
        self.wrote: dict[str, list[list[int]]] = {name: [] for name in ("plain", "auto", *peers)}

    def works(self) -> dict[str, Work]:
        def work(name: str) -> Work:
            def run(round_: int) -> int:
                self.wrote[name].append(self.write(name, pick(self.prompts, 1, round_)[0]))
                return self.tokens

            return run

        return {name: work(name) for name in self.wrote}

    def write(self, name: str, prompt: str) -> list[int]:
        if name in self.peers:
            return self.peers[name](self.engine.codec.encode(prompt), self.tokens)
        return serve(self.engine, [ask(prompt, self.tokens, "off" if name == "plain" else "auto")])[0]

    def agreement(self) -> dict[str, float]:
        """Share of prompts on which each wrote the very tokens that plain decoding wrote."""
        return {name: round(sum(a == b for a, b in zip(wrote, self.wrote["plain"], strict=True)) / len(wrote), 3)
                for name, wrote in self.wrote.items()}


def summarise(blocks: dict[str, list[Block]], chosen: Sequence[int]) -> dict[str, Any]:
    if not chosen:
        return {"rounds": 0}
    of = {name: [all_[i] for i in chosen] for name, all_ in blocks.items()}
    return {"rounds": len(chosen), "tokens_per_s": {name: median_rate(some) for name, some in of.items()},
            "ratios": {f"{a}/{b}": ratio(of[a], of[b]) for a, b in PAIRS if a in of and b in of}}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--domain", default="en", help="of the prompts; the shipped draft knows en, py and c")
    options.add_argument("--rounds", type=int, default=60, help="prompts; at least 30 should turn out non-looping")
    options.add_argument("--tokens", type=int, default=96, help="written per prompt")
    options.add_argument("--lookup-tokens", type=int, default=10, help="prompt_lookup_num_tokens")
    options.add_argument("--assistant", type=Path, help="Hugging Face folder of an assistant model")
    args = options.parse_args()
    result = settle()
    rounds, tokens = (2, 16) if args.quick else (args.rounds, args.tokens)
    prompts = prompts_of(args.engine_dir, args.domain)
    peers = generators(args.engine_dir / load_engine_spec(args.engine_dir).model, args)
    with drafts_of(args.engine_dir) as drafts, engine_of(args.engine_dir, {"*": drafts.champion}, max_batch=1) as engine:
        systems = Systems(engine, peers, prompts[WARM_UP:], tokens)
        for prompt in prompts[: 1 if args.quick else WARM_UP]:
            for name in systems.wrote:
                systems.write(name, prompt)
        blocks = alternate(systems.works(), rounds)
        loops = [is_looping(wrote) for wrote in systems.wrote["plain"]]
        result |= {"engine": engine.digest, "domain": args.domain, "tokens": tokens, "lookup_tokens": args.lookup_tokens,
                   "same_tokens_as_plain": systems.agreement(), "looping_share": round(sum(loops) / rounds, 3),
                   "draft_length_steps": engine.stats().draft_length_steps}
    if not args.assistant:
        result["hf_assisted"] = NO_ASSISTANT
    for name, wanted in (("non_looping", False), ("looping", True)):
        result[name] = summarise(blocks, [i for i, looping in enumerate(loops) if looping == wanted])
    result["all"] = summarise(blocks, range(rounds))
    finish(result, args)


if __name__ == "__main__":
    main()
