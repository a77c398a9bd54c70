"""Sources are parsed in the forms in which NVIDIA writes them, and never run. Hand-written trees: the table's own are in tests/contract."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tide_pipeline.engine.trtllm.facts import Fact, Field, load_table
from tide_pipeline.engine.trtllm.installed import what_is_wrong
from tide_pipeline.engine.trtllm.source_check import check_fact, check_installed, check_source
from tide_pipeline.engine.trtllm.source_tree import SourceTree
from tide_pipeline.errors import SettingsError
from tide_pipeline.stack.doctor.finding import Finding, exit_code, summary
from tide_pipeline.stack.doctor.trtllm import check_trtllm

ARGS = '''
raise RuntimeError("sources are never run")
import nothing_of_this_name
from .utils import StrictBase

class Base(StrictBase):
    required: str = Field(..., description="none")
    named: Optional[int] = Field(description="no default", default=None, validation_alias=AliasChoices("named", "older"))
    made: Config = Field(default_factory=Config)
    listed: list = field(default_factory=list)
    first: int = pydantic.Field(7, ge=0)
    plain = 3
    _hidden: bool = PrivateAttr(True)

    def __init__(self):
        self.late: int = 5

    @property
    def length(self) -> int:
        return 1

    @functools.cached_property
    def mode(self):
        return 2

class Child(Base):
    plain = 4

    @decorated
    async def run(self, batch, resources=None, *args, quick=False, **kwargs):
        if batch:
            return {"early": 1}
        rows[:n, i * self.width:(i + 1) * self.width] = (self.count +
                                                          1)
        return {"new": rows, "lens": n}
'''
UTILS = '''
class StrictBase(BaseModel):
    class Config:
        extra = "forbid"
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    package = tmp_path / "tensorrt_llm"
    (package / "llmapi").mkdir(parents=True)
    (package / "__init__.py").write_text("from .llmapi import Child\n")
    (package / "version.py").write_text('try:\n    __version__ = read()\nexcept OSError:\n    __version__ = "1.3.0rc24"\n')
    (package / "llmapi" / "__init__.py").write_text("from .args import Child\n")
    (package / "llmapi" / "args.py").write_text(ARGS)
    (package / "llmapi" / "utils.py").write_text(UTILS)
    return tmp_path


def fact(**given: object) -> Fact:
    return Fact(**{"name": "Child", "kind": "model", "module": "tensorrt_llm.llmapi.args", "access": "public",      # type: ignore[arg-type]
                   "use": "a test", "loss": "fatal"} | given)


def test_fields_in_all_their_forms(folder: Path) -> None:
    expected = {"required": None, "named": "None", "made": "Config()", "listed": "[]", "first": "7", "plain": "4", "_hidden": "True"}
    fields = {name: Field(default) for name, default in expected.items()}
    fields |= {"named": Field("None", alias=("older",)), "late": Field(), "length": Field(), "mode": Field(), "odd": Field(optional=True)}
    assert check_fact(SourceTree(folder), fact(fields=fields)).wrong == ()
    assert check_fact(SourceTree(folder), fact(fields={"late": Field("5")})).wrong == (
        "late is set by code, its default can't be read; expected 5",)
    assert check_fact(SourceTree(folder), fact(fields={"required": Field("1")})).wrong == ("required has no default, expected 1",)


def test_a_class_that_takes_any_key_is_noticed(folder: Path) -> None:
    assert check_fact(SourceTree(folder), fact()).is_true
    (folder / "tensorrt_llm" / "llmapi" / "utils.py").write_text(UTILS.replace("forbid", "allow"))
    assert "refuses unknown keys" in check_fact(SourceTree(folder), fact()).wrong[0]


@pytest.mark.parametrize(("signature", "wrong"), [
    ("(self, batch, resources=None)", ()),
    ("(self, batch, resources=None, *, quick=False)", ()),
    ("(self, resources=None)", ("parameter resources is number 2, expected 1", "parameter batch is new and has no default")),
    ("(self, batch, resources=0)", ("parameter resources defaults to None, expected 0",)),
    ("(self, batch, *, quick=True)", ("parameter *quick defaults to False, expected True",)),
])
def test_signatures(folder: Path, signature: str, wrong: tuple[str, ...]) -> None:
    assert check_fact(SourceTree(folder), fact(name="Child.run", kind="function", signature=signature)).wrong == wrong


def test_what_a_function_says_and_returns(folder: Path) -> None:
    says = ("self.count + 1", "rows[:n, i*self.width : (i + 1)*self.width]")
    assert check_fact(SourceTree(folder), fact(name="Child.run", kind="function", contains=says, returns=("new", "lens"))).is_true
    missing = check_fact(SourceTree(folder), fact(name="Child.run", kind="function", contains=("self.count + 2",),
                                                  returns=("new", "early")))
    assert missing.wrong == ("returns no dict with new, early", "nowhere does it say self.count + 2")
    assert check_fact(SourceTree(folder), fact(kind="code", contains=says)).is_true


def test_exports_and_moves(folder: Path) -> None:
    assert check_fact(SourceTree(folder), fact(public_name="tensorrt_llm")).is_true
    assert check_fact(SourceTree(folder), fact(public_name="tensorrt_llm.llmapi.utils")).wrong == (
        "tensorrt_llm.llmapi.utils does not export Child",)
    assert check_fact(SourceTree(folder), fact(module="tensorrt_llm.llmapi")).is_true          # found where it was moved to
    assert check_fact(SourceTree(folder), fact(module="tensorrt_llm.gone")).wrong == ("there is no module tensorrt_llm.gone",)
    assert check_fact(SourceTree(folder), fact(name="Gone")).wrong == ("tensorrt_llm.llmapi.args has no class Gone",)


def test_a_class_that_was_renamed_is_found_under_its_old_name(folder: Path) -> None:
    """As NVIDIA kept CudaGraphConfig: the class is DecodeCudaGraphConfig, its fields are those of a base."""
    args = folder / "tensorrt_llm" / "llmapi" / "args.py"
    args.write_text(f"{ARGS}\n# the old name\nOlder = Child\nAnything: TypeAlias = Child | None\n")
    (folder / "tensorrt_llm" / "llmapi" / "__init__.py").write_text("if mad:\n    pass\nelse:\n    from .args import Child, Older\n")
    tree, fields = SourceTree(folder), {"required": Field(None), "plain": Field("4")}
    assert check_fact(tree, fact(name="Older", public_name="tensorrt_llm.llmapi", fields=fields)).is_true
    assert check_fact(tree, fact(name="Older", module="tensorrt_llm.llmapi", fields={"plain": Field("3")})).wrong == (
        "plain defaults to 4, expected 3",)
    assert check_fact(tree, fact(name="Anything")).wrong == ("tensorrt_llm.llmapi.args has no class Anything",)
    args.write_text(args.read_text().replace("Older = Child", "Older = Older"))
    assert not check_fact(SourceTree(folder), fact(name="Older")).is_true                      # and it ends


def test_what_one_release_says_or_another(folder: Path) -> None:
    early = fact(name="Child.run", kind="function", contains=("self.count + 2",), signature="(self, batch)")
    assert not check_fact(SourceTree(folder), early).is_true
    late = dataclasses.replace(early, contains=("self.count + 1",))
    assert check_fact(SourceTree(folder), dataclasses.replace(early, others=(late,))).is_true
    wrong = dataclasses.replace(late, name="Child.walk")
    assert check_fact(SourceTree(folder), dataclasses.replace(early, others=(wrong,))).wrong == ("nowhere does it say self.count + 2",)


def test_the_installed_package_may_be_one_release_or_another() -> None:
    early = fact(name="dump", kind="function", module="json", loss="capture", signature="(self, obj)")
    late = dataclasses.replace(early, signature="(obj, fp)")
    for others, wrong in (((), 1), ((late,), 0), ((dataclasses.replace(late, name="dumped"),), 1)):
        table = dataclasses.replace(load_table("1.3"), facts=(dataclasses.replace(early, others=others),))
        assert len(what_is_wrong(table, "capture")) == wrong


def test_names_that_a_package_makes_when_they_are_asked_for(folder: Path) -> None:
    """As the newest tensorrt_llm/__init__.py: imports for type checkers only, and a table for `__getattr__`."""
    package = folder / "tensorrt_llm" / "__init__.py"
    table = "_LAZY = {'Child': ('tensorrt_llm.llmapi', 'Child')}\n"
    package.write_text(f"{table}def __getattr__(name):\n    return load(_LAZY[name])\n")
    assert check_fact(SourceTree(folder), fact(public_name="tensorrt_llm")).is_true
    for text in (table, "def __getattr__(name):\n    return load('Child')\n"):
        package.write_text(text)
        assert check_fact(SourceTree(folder), fact(public_name="tensorrt_llm")).wrong == ("tensorrt_llm does not export Child",)


def test_names_that_come_with_a_star(folder: Path) -> None:
    """As executor/__init__.py: `from .result import *`, and a base of LLM's results is found through it."""
    package = folder / "tensorrt_llm"
    (package / "llmapi" / "__init__.py").write_text("from .nothing import *\nfrom .args import *\n")
    (package / "later.py").write_text("from .llmapi import Child\n\nclass Grandchild(Child):\n    own = 1\n")
    grown = fact(name="Grandchild", module="tensorrt_llm.later", fields={"plain": Field("4"), "own": Field("1")})
    assert check_fact(SourceTree(folder), grown).is_true
    assert check_fact(SourceTree(folder), fact(public_name="tensorrt_llm.llmapi")).is_true
    for listed, is_there in (("['Child']", True), ("['Base']", False)):
        (package / "llmapi" / "args.py").write_text(f"__all__ = {listed}\n{ARGS}\nclass _Own: ...\n")
        assert SourceTree(folder).exports("tensorrt_llm.llmapi", "Child") is is_there
        assert not SourceTree(folder).exports("tensorrt_llm.llmapi", "_Own")
    (package / "llmapi" / "args.py").write_text("from . import *\n")                           # and it ends
    assert not SourceTree(folder).exports("tensorrt_llm.llmapi", "Child")


def test_a_field_of_a_base_keeps_its_default_where_a_class_sets_it_on_itself(folder: Path) -> None:
    """As EagleDecodingConfig: `self.max_draft_len = ..` in `__init__`, declared in the class of all drafts."""
    args = folder / "tensorrt_llm" / "llmapi" / "args.py"
    args.write_text(f"{ARGS}\n    def __init__(self, **given):\n        self.first = given['first']\n        self.new = 1\n")
    assert check_fact(SourceTree(folder), fact(fields={"first": Field("7"), "new": Field()})).is_true
    assert check_fact(SourceTree(folder), fact(fields={"new": Field("1")})).wrong == (
        "new is set by code, its default can't be read; expected 1",)


def test_an_older_name_of_a_field_is_a_name_of_it(folder: Path) -> None:
    """As `speculative_model_dir`: a field first, then another name of `speculative_model`."""
    assert check_fact(SourceTree(folder), fact(fields={"older": Field("None")})).is_true
    assert check_fact(SourceTree(folder), fact(fields={"older": Field("3"), "odd": Field("3")})).wrong == (
        "older defaults to None, expected 3", "no field odd")


def test_a_file_that_this_python_can_not_parse_is_named(folder: Path) -> None:
    (folder / "tensorrt_llm" / "llmapi" / "args.py").write_text("x = 1\nmatch_me = = 2\n")
    with pytest.raises(SettingsError, match=r"args\.py, line 2: this Python can't parse it .* with the Python that serves it"):
        check_fact(SourceTree(folder), fact())


def test_a_checkout_site_packages_and_the_package_itself_are_the_same(folder: Path) -> None:
    assert SourceTree(folder).version() == SourceTree(folder / "tensorrt_llm").version() == "1.3.0rc24"
    assert check_source(folder).digests == check_source(folder / "tensorrt_llm").digests


def test_a_folder_without_it_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="name a checkout of NVIDIA/TensorRT-LLM"):
        check_source(tmp_path)
    assert check_installed() is None


# --- findings -------------------------------------------------------------------------------------------------------


def test_findings_say_what_is_lost_and_what_to_do(folder: Path) -> None:
    findings = list(check_trtllm(folder))
    assert findings[0] == Finding("TensorRT-LLM: version", "ok", "1.3.0rc24, held against the facts of line 1.3")
    by_name = {finding.name.partition(": ")[2]: finding for finding in findings}
    told = by_name["KvCacheConfig"], by_name["PyTorchModelEngine.forward"], by_name["GenerationResultBase"]
    assert [(finding.state, finding.todo.partition(":")[0]) for finding in told] == [
        ("fail", "the adapter does not start"), ("fail", "it serves, but captures no hidden states"),
        ("warn", "it serves, one metric is missing")]
    assert by_name["KvCacheConfig"].found == "there is no module tensorrt_llm.llmapi.llm_args"
    assert exit_code(findings) == 1 and exit_code(findings[:1]) == 0


def test_a_summary_counts() -> None:
    ok, warn, fail = Finding("a", "ok", "x"), Finding("b", "warn", "x", "y"), Finding("c", "fail", "x", "y")
    assert summary([ok]) == "1 checked: 1 ok"
    assert summary([ok, warn, warn, fail]) == "4 checked: 1 ok, 2 warnings, 1 failure"
    with pytest.raises(AssertionError, match="what to do next"):
        Finding("d", "fail", "x")
