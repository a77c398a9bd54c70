"""Collect five text domains from ordinary packages on this machine. Knows nothing of models.

Debian packages: `perl-doc` (en), `manpages-de` (de), `python3-doc` (html), `libc6-dev`, `linux-libc-dev` (c);
the running Python's standard library (py). Each document goes whole into one split, by a hash of its name,
so that held-out text never shares a file with training text.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DOMAINS = ("en", "py", "c", "de", "html")
MAX_BYTES_PER_DOMAIN = 11_000_000
HELD_OUT_PERCENT = 4


def build_corpus(out_dir: Path) -> dict[str, dict[str, int]]:
    """Write `<domain>.<split>.jsonl` (one `{"text"}` per document) and return bytes by domain and split."""
    out_dir.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, dict[str, int]] = {}
    for domain in DOMAINS:
        sizes[domain] = {"train": 0, "heldout": 0}
        seen: set[bytes] = set()
        handles = {split: (out_dir / f"{domain}.{split}.jsonl").open("w") for split in ("train", "heldout")}
        for name, raw in SOURCES[domain]():
            text = _drop_repeated_paragraphs(raw, seen)
            if len(text) < 400 or sizes[domain]["train"] > MAX_BYTES_PER_DOMAIN:
                continue
            split = "heldout" if _bucket(name) < HELD_OUT_PERCENT else "train"
            handles[split].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            sizes[domain][split] += len(text.encode())
        for handle in handles.values():
            handle.close()
    return sizes


def _bucket(name: str) -> int:
    return hashlib.sha256(name.encode()).digest()[0] * 100 // 256


def _drop_repeated_paragraphs(text: str, seen: set[bytes]) -> str:
    """Licence headers and navigation repeat in every file; a model trained on them learns to loop."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        if len(paragraph) > 60:
            digest = hashlib.blake2b(re.sub(r"\W+", " ", paragraph).encode(), digest_size=8).digest()
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(paragraph)
    return "\n\n".join(kept).strip()


def _shuffled(paths: Iterator[Path]) -> list[Path]:
    return sorted(paths, key=lambda p: hashlib.sha256(p.name.encode()).digest())


def _english() -> Iterator[tuple[str, str]]:
    paths = [p for root in ("/usr/share/perl", "/usr/lib/x86_64-linux-gnu/perl", "/usr/share/perl5")
             for p in Path(root).rglob("*.p[om]*") if p.is_file() and "unicore" not in str(p)]
    with ThreadPoolExecutor(2) as pool:
        def as_text(path: Path) -> tuple[str, str]:
            return path.name, subprocess.run(["pod2text", str(path)], capture_output=True, text=True,
                                             errors="replace", check=False).stdout
        yield from pool.map(as_text, _shuffled(iter(paths)))


def _python() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _shuffled(root.rglob("*.py")):
        if not {"site-packages", "test", "tests", "pydoc_data", "encodings"} & set(path.parts):
            yield str(path.relative_to(root)), path.read_text(errors="replace")


def _c_headers() -> Iterator[tuple[str, str]]:
    for path in _shuffled(Path("/usr/include").rglob("*.h")):
        if path.is_file() and path.stat().st_size < 200_000:
            text = path.read_text(errors="replace")
            yield path.name, re.sub(r"\A(\s*/\*.*?\*/)+", "", text, flags=re.S)   # the licence comment


def _german() -> Iterator[tuple[str, str]]:
    for path in _shuffled(Path("/usr/share/man/de").rglob("*.gz")):
        yield path.name, roff_to_text(gzip.decompress(path.read_bytes()).decode(errors="replace"))


def roff_to_text(roff: str) -> str:
    """Reduce a man page to its running text (macros, fonts and escapes removed)."""
    lines = []
    for line in roff.splitlines():
        if line.startswith((".\\\"", "'", ".TH", ".de", ".if", ".ie", ".el", ".nr", ".ds", ".ad", ".nh")):
            continue
        if match := re.match(r"\.(SH|SS)\s+(.*)", line):
            line = "\n" + match[2].strip('" ')
        elif re.match(r"\.(PP|P|LP|TP|IP|HP|RS|RE|br|sp|nf|fi|EX|EE)\b", line):
            line = "\n" if line.startswith((".PP", ".P", ".LP", ".TP", ".IP")) else ""
        elif match := re.match(r"\.[A-Za-z]{1,3}\s+(.*)", line):
            line = match[1].replace('"', "")
        elif line.startswith("."):
            continue
        lines.append(line)
    text = "\n".join(lines)
    for pattern, plain in ((r"\\f(\(..|\[[^]]*\]|.)", ""), (r"\\\((aq|cq|oq)", "'"), (r"\\\(bu", "*"), (r"\\\(em", "—"),
                           (r"\\s[-+]?\d", ""), (r"\\[-]", "-"), (r"\\e", r"\\"), (r"\\[&,/|^%:]", ""), (r"\\~", " "),
                           (r"\\\*\(..", ""), (r"\\\[[^]]*\]", ""), (r"\\ ", " ")):
        text = re.sub(pattern, plain, text)
    return re.sub(r"\n{3,}", "\n\n", text)


def _html() -> Iterator[tuple[str, str]]:
    for path in _shuffled(Path("/usr/share/doc").glob("python3*/html/**/*.html")):
        if path.is_file() and not path.name.startswith("genindex"):
            body = re.search(r'<div class="body" role="main">(.*?)<div class="clearer">', path.read_text(errors="replace"), re.S)
            if body:
                yield path.name, re.sub(r'<a class="headerlink".*?</a>', "", body[1], flags=re.S)


SOURCES = {"en": _english, "py": _python, "c": _c_headers, "de": _german, "html": _html}
