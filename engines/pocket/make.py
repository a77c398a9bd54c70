"""Make the pocket target again, step by step.

    python engines/pocket/make.py corpus      # text from ordinary packages on this machine   (1 min)
    python engines/pocket/make.py tokenizer   # byte-level BPE of 4,096                        (1 min)
    python engines/pocket/make.py target      # the Llama itself                               (--minutes 120, both cores)
    python engines/pocket/make.py prompts     # the target writes the prompts that ship        (10 min)
    python engines/pocket/make.py champion    # capture, train the first draft                 (20 min)
    python engines/pocket/make.py card        # losses, looping share, acceptance -> README.md (5 min)

Intermediate files go to .work/ (never committed); results go into this folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(ROOT))

SEEN = ("en", "c")                      # domains the champion draft is trained on; py, de and html stay unseen
PROMPTS = {"en": 120, "py": 240, "c": 240, "de": 320, "html": 900}  # html: what the demo shifts to; no prompt is sent twice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=["corpus", "tokenizer", "target", "prompts", "champion", "card"])
    parser.add_argument("--work", type=Path, default=ROOT / ".work")
    parser.add_argument("--minutes", type=float, help="training time of target (120) or champion (15)")
    parser.add_argument("--resume", action="store_true", help="target: go on from WORK/target.safetensors instead of from random weights")
    parser.add_argument("--seed", type=int, default=0, help="target: which windows are drawn (another one for every resume)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    for step in args.steps:
        STEPS[step](args)


def corpus(args: argparse.Namespace) -> None:
    from recipe.corpus import build_corpus

    print(build_corpus(args.work / "corpus"))


def tokenizer(args: argparse.Namespace) -> None:
    from recipe.tokenizer import encode_corpus, train_tokenizer

    train_tokenizer(args.work / "corpus", args.work / "tokenizer.json")
    encode_corpus(args.work / "corpus", args.work / "tokenizer.json")


def target(args: argparse.Namespace) -> None:
    from recipe.export import export_target
    from recipe.target import TargetSchedule, train_target

    plan = TargetSchedule(minutes=args.minutes or TargetSchedule.minutes, seed=args.seed)
    train_target(args.work / "corpus", args.work, plan, resume=args.resume)
    export_target(args.work / "target.safetensors", args.work / "tokenizer.json", HERE / "target")


def prompts(args: argparse.Namespace) -> None:
    from recipe.prompts import write_prompts

    write_prompts(HERE, args.work / "corpus", PROMPTS)


def champion(args: argparse.Namespace) -> None:
    from recipe.champion import capture_domains, train_champion

    from tide_pipeline.recipes import load

    state = args.work / "champion"
    shutil.rmtree(state, ignore_errors=True)
    config = load(values={"state_dir": str(state), "engines_dir": str(HERE.parent)})
    capture_domains(HERE, args.work / "corpus", config.state.lake, SEEN, requests_per_domain=750)
    train_champion(config, state / "draft", args.minutes or 15.0)
    (HERE / "champion").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(state / "draft" / name, HERE / "champion" / name)
    born = json.loads((state / "draft" / "provenance.json").read_text())
    born = {key: value for key, value in born.items() if key not in ("shards", "curve")}     # the scratch lake is gone after this
    (HERE / "champion" / "provenance.json").write_text(json.dumps(born, indent=2) + "\n")


def card(args: argparse.Namespace) -> None:
    from recipe.card import write_card

    write_card(HERE, args.work)


STEPS = {"corpus": corpus, "tokenizer": tokenizer, "target": target, "prompts": prompts, "champion": champion, "card": card}

if __name__ == "__main__":
    main()
