"""The table of facts is a contract: a change of one name, default, signature or layout entry, on either side, is noticed.

One side is the table, the other a source tree: the stand-in generated from the unchanged table. What stands between the table and NVIDIA's
own files is the record in docs/trtllm-source-check.json: it says which facts were read where, and a fact changed since then is named.
"""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trtllm_layout import complaints
from tests.trtllm_record import RECORD, fingerprint
from tests.trtllm_stand_in import VERSIONS, module_texts, write_stand_in
from tide_pipeline.engine.trtllm import facts as facts_module
from tide_pipeline.engine.trtllm.facts import ANY, FOLDER, LINES, Fact, Field, Layout, load_table, parse, table_for
from tide_pipeline.engine.trtllm.source_check import check_fact, check_source
from tide_pipeline.engine.trtllm.source_tree import SourceTree
from tide_pipeline.errors import SettingsError

ALL = [pytest.param(line, fact.name, id=f"{line}-{fact.name}") for line in LINES for fact in load_table(line).facts]


@pytest.fixture(scope="session")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {line: tmp_path_factory.mktemp(f"stand-in-{line}") for line in LINES}
    for line, folder in folders.items():
        write_stand_in(folder, line)
    return folders


# --- the tables themselves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", LINES)
def test_every_fact_says_what_it_is_for(line: str) -> None:
    table = load_table(line)
    assert all(fact.use and fact.module.startswith("tensorrt_llm") for fact in table.facts)
    assert {"fatal", "capture", "metric"} <= {fact.loss for fact in table.facts}
    # whatever is public and missing stops the adapter or costs a metric: capture alone may rest on private names
    assert {fact.loss for fact in table.facts if fact.access == "public"} <= {"fatal", "metric"}
    assert not {fact.name for fact in table.facts if fact.access == "private" and fact.loss == "fatal"}


def test_a_version_finds_the_table_of_its_line() -> None:
    assert [table_for(version).line for version in ("1.2.1", "1.3.0rc20", "1.4.0", "1.4")] == ["1.2", "1.3", "1.4", "1.4"]
    for unknown in ("1.5.0", "0.21", "1.20.0", "main"):
        with pytest.raises(SettingsError, match="tide doctor --trtllm-source"):
            table_for(unknown)


@pytest.mark.parametrize(("change", "message"), [
    (('kind = "model"', 'kind = "modle"'), "is none of model, class"),
    (('loss = "fatal"', 'loss = "bad"'), "is none of fatal, capture"),
    (('use = "close()"', 'why = "close()"'), "unexpected keyword argument 'why'"),
    (('name = "LLM.shutdown"', 'name = "LLM.generate_async"'), "LLM.generate_async more than once"),
    (('signature = "(self, timeout=2)"', 'signature = "(self, timeout=2"'), "LLM.get_stats_async"),
    (('line = "1.3"', 'line = "1.2"'), "says line = '1.2'"),
    (("optional = true }", "optinal = true }"), "optinal"),
    (('name = "Eagle3OneModelWorker._forward_impl"', 'named = "_forward_impl"'), "unexpected keyword argument 'named'"),
])
def test_a_table_that_is_written_wrong_is_refused(change: tuple[str, str], message: str) -> None:
    text = (FOLDER / "1.3.toml").read_text()
    assert change[0] in text
    with pytest.raises(SettingsError, match=message):
        parse(text.replace(*change, 1), "1.3")


def test_the_tables_are_packaged() -> None:
    root = Path(facts_module.__file__).parents[3]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["tide_pipeline"]
    for line in LINES:
        path = (FOLDER / f"{line}.toml").relative_to(root / "tide_pipeline").as_posix()
        assert any(fnmatch.fnmatch(path, pattern.replace("**/", "*")) for pattern in patterns)


# --- held against a source tree -------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", LINES)
def test_every_fact_is_true_of_its_stand_in_and_the_line_comes_from_the_version(line: str, trees: dict[str, Path]) -> None:
    report = check_source(trees[line])
    assert (report.line, report.version) == (line, VERSIONS[line])
    assert [check.wrong for check in report.checks if not check.is_true] == [] == sorted(report.lost)
    assert "tensorrt_llm/version.py" in report.digests and all(len(digest) == 64 for digest in report.digests.values())


def mutants(fact: Fact) -> Iterator[tuple[str, Fact]]:
    """Each entry of a fact, changed once."""
    for name, value in fact.fields.items():
        others = {key: field for key, field in fact.fields.items() if key != name}
        if not value.optional:
            yield f"{name} renamed", dataclasses.replace(fact, fields={**others, f"{name}_x": value})
        if value.default != ANY:
            changed = dataclasses.replace(value, default="'other'" if value.default is not None else None)
            yield f"{name} default", dataclasses.replace(fact, fields={**others, name: changed if value.default else _given(value)})
        if value.alias:
            yield f"{name} alias", dataclasses.replace(fact, fields={**others, name: dataclasses.replace(value, alias=("other",))})
    for i, text in enumerate(fact.contains):
        yield f"says {text}", dataclasses.replace(fact, contains=(*fact.contains[:i], f"{text} + 1", *fact.contains[i + 1:]))
    for key in fact.returns:
        yield f"returns {key}", dataclasses.replace(fact, returns=tuple(f"{k}_x" if k == key else k for k in fact.returns))
    if fact.signature is not None:
        yield from ((why, dataclasses.replace(fact, signature=text)) for why, text in _signatures(fact.signature))


def _given(value: Field) -> Field:
    return dataclasses.replace(value, default="'given'")


def _signatures(signature: str) -> Iterator[tuple[str, str]]:
    """Each parameter renamed, each default changed, and two swapped."""
    arguments = ast.parse(f"def f{signature}: ...").body[0].args                                # type: ignore[attr-defined]
    names = [arg.arg for arg in [*arguments.args, *arguments.kwonlyargs] if arg.arg != "self"]
    for name in names:
        again = ast.parse(f"def f{signature}: ...").body[0]
        for arg in [*again.args.args, *again.args.kwonlyargs]:                                   # type: ignore[attr-defined]
            if arg.arg == name:
                arg.arg = f"{name}_x"
        yield f"parameter {name} renamed", f"({ast.unparse(again.args)})"                        # type: ignore[attr-defined]
    for i in range(len(arguments.defaults)):
        again = ast.parse(f"def f{signature}: ...").body[0]
        again.args.defaults[i] = ast.Constant("other")                                           # type: ignore[attr-defined]
        yield f"default {i}", f"({ast.unparse(again.args)})"                                     # type: ignore[attr-defined]


@pytest.mark.parametrize(("line", "name"), ALL)
def test_a_mutated_table_is_not_true_of_the_tree(line: str, name: str, trees: dict[str, Path]) -> None:
    tree, fact = SourceTree(trees[line]), load_table(line)[name]
    changed = list(mutants(fact))
    assert changed or all(value.optional or value.default == ANY for value in fact.fields.values()) or fact.signature == "(self)"
    assert [why for why, mutant in changed if check_fact(tree, mutant).is_true] == []
    moved = dataclasses.replace(fact, module=f"{fact.module}_x")
    assert not check_fact(tree, moved).is_true


@pytest.mark.parametrize(("line", "name"), ALL)
def test_a_mutated_tree_is_noticed_by_the_table(line: str, name: str, trees: dict[str, Path], tmp_path: Path) -> None:
    """The tree is generated from the mutant; every other file stays."""
    table = load_table(line)
    fact, unseen = table[name], []
    text_of = {module: text for module, text in module_texts(table).items() if module.startswith("tensorrt_llm")}
    write_stand_in(tmp_path, line)
    file = tmp_path.joinpath(*fact.module.split(".")).with_suffix(".py")
    file = file if file.exists() else file.with_suffix("") / "__init__.py"
    for why, mutant in mutants(fact):
        other = dataclasses.replace(table, facts=tuple(mutant if f.name == name else f for f in table.facts))
        file.write_text(module_texts(other)[fact.module])
        if check_fact(SourceTree(tmp_path), fact).is_true:
            unseen.append(why)
    assert unseen == []
    file.write_text(text_of[fact.module])
    assert check_fact(SourceTree(tmp_path), fact).is_true


OTHERS = [pytest.param(line, fact.name, i, id=f"{line}-{fact.name}-{i}")
          for line in LINES for fact in load_table(line).facts for i in range(len(fact.others))]


@pytest.mark.parametrize(("line", "name", "i"), OTHERS)
def test_how_another_release_has_it_is_held_to_as_strictly(line: str, name: str, i: int, tmp_path: Path) -> None:
    """The tree is generated from one of the `or`s. Of all the forms of the fact only that one is true of it, and only unchanged."""
    table = load_table(line)
    fact, other = table[name], table[name].others[i]
    write_stand_in(tmp_path, line, dataclasses.replace(table, facts=tuple(other if f.name == name else f for f in table.facts)))
    tree = SourceTree(tmp_path)
    assert check_fact(tree, fact).is_true and not check_fact(tree, dataclasses.replace(fact, others=())).is_true
    changed = [(why, dataclasses.replace(fact, others=(*fact.others[:i], mutant, *fact.others[i + 1:]))) for why, mutant in mutants(other)]
    assert changed and [why for why, mutant in changed if check_fact(tree, mutant).is_true] == []
    assert all(fingerprint(mutant) != fingerprint(fact) for _, mutant in changed)


@pytest.mark.parametrize("line", LINES)
def test_a_field_of_another_line_that_comes_back_is_noticed(line: str, trees: dict[str, Path]) -> None:
    fact = load_table(line)[load_table(line).nested["speculative_config"]]
    back = dataclasses.replace(fact, absent=(*fact.absent, "max_draft_len"))
    assert check_fact(SourceTree(trees[line]), back).wrong == ("field max_draft_len is back",)


# --- the layout -----------------------------------------------------------------------------------------------------

GRAPHS = {"cuda_graph_config": {"enable_padding": True, "batch_sizes": [4, 8]}}
SERVED = {"overlap": {}, "no overlap": {"disable_overlap_scheduler": True}, "padded graphs": GRAPHS,
          "chunked": {"enable_chunked_prefill": True, "max_num_tokens": 32}}


@pytest.mark.parametrize("how", SERVED)
@pytest.mark.parametrize("line", LINES)
def test_the_layout_reads_every_row_of_every_pass(line: str, how: str) -> None:
    assert complaints(load_table(line).layout, line, **SERVED[how]) == []                        # type: ignore[arg-type]


WRONG = {"order": [("generation", "context", "padding"), ("context", "padding", "generation")],
         "generation_row": ["num_ctx_tokens + i * K", "i * (1 + K)"], "draft_length": ["num_layers"],
         "new_tokens": [("B", "K"), ("1 + K", "B")],
         "new_tokens_lens": [("B", "1")], "hidden_states": [("max_num_tokens", "H"), ("B", "H * num_capture_layers")],
         "schedule": ["from", "up to"]}


@pytest.mark.parametrize("entry", [field.name for field in dataclasses.fields(Layout)])
@pytest.mark.parametrize("line", LINES)
def test_a_mutated_layout_reads_wrong(line: str, entry: str) -> None:
    true = load_table(line).layout
    for value in [value for value in WRONG[entry] if value != getattr(true, entry)]:
        assert complaints(dataclasses.replace(true, **{entry: value}), line, **GRAPHS), f"{entry} = {value}"    # type: ignore[arg-type]
    if entry == "draft_length" and true.draft_length == "runtime_draft_len":
        assert complaints(dataclasses.replace(true, draft_length="max_draft_len"), line), "K changes with the batch on this line"


# --- what was read of NVIDIA's files --------------------------------------------------------------------------------


@pytest.mark.parametrize("line", LINES)
def test_the_record_of_what_was_read_is_of_these_facts(line: str) -> None:
    """Change a fact, and it must be read again: then `python -m tests.trtllm_record` writes its fingerprint."""
    record = json.loads(RECORD.read_text())["lines"][line]
    table = load_table(line)
    assert {name: entry["fingerprint"] for name, entry in record["facts"].items()} == {
        **{fact.name: fingerprint(fact) for fact in table.facts}, "[layout]": fingerprint(table.layout)}
    known = {file["name"] for file in record["files"]}
    assert all(set(entry["read_in"]) <= known for entry in record["facts"].values())


def test_a_fingerprint_changes_with_every_entry() -> None:
    for line in LINES:
        for fact in load_table(line).facts:
            assert all(fingerprint(mutant) != fingerprint(fact) for _, mutant in mutants(fact))
