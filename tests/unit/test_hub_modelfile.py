"""Modelfiles: what is read, what is refused and on which line; recipes in the store; `septet create`."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from septet.cli.main import main
from septet.errors import InvalidRequest, ModelFileError, ModelNotFound
from septet.hub.create import copy, create
from septet.hub.modelfile import Recipe, parse, written
from septet.hub.pull import resolve
from septet.hub.store import FileEntry, Manifest, Store
from tests.unit.test_hub_model_config import make_gguf

if TYPE_CHECKING:
    from pathlib import Path

WHOLE = '''\
# a comment
FROM smollm2
parameter temperature 0.3
PARAMETER stop "<end>"
PARAMETER stop "two words"
PARAMETER num_ctx 4096
PARAMETER use_mmap true
TEMPLATE """{{ .System }}
{{ .Prompt }}"""
SYSTEM You are "Mario"
MESSAGE user Is it you?
MESSAGE assistant """It's
me!"""
LICENSE "MIT"
LICENSE """and
more"""
REQUIRES 0.5
'''


def test_every_command() -> None:
    modelfile = parse(WHOLE)
    assert modelfile.base == "smollm2"
    assert modelfile.recipe == Recipe(
        parent="smollm2",
        template="{{ .System }}\n{{ .Prompt }}",
        system='You are "Mario"',
        parameters={"temperature": 0.3, "stop": ["<end>", "two words"], "num_ctx": 4096, "use_mmap": True},
        messages=(("user", "Is it you?"), ("assistant", "It's\nme!")),
        license="MIT\n\nand\nmore",
    )


def test_windows_line_ends_and_marks() -> None:
    modelfile = parse("\ufeffFROM a\r\nSYSTEM x y\r\nPARAMETER top_k 5\r\n")
    assert (modelfile.base, modelfile.recipe.system, modelfile.recipe.parameters) == ("a", "x y", {"top_k": 5})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: FROM is missing"),
        ("SYSTEM x", "line 1: FROM is missing"),
        ("FROM", "line 1: FROM has no value"),
        ("FROM a\nFROM b", "line 2: FROM is given twice"),
        ("FROM a\n\n# x\nMAGIC y", "line 4: unknown command 'MAGIC'"),
        ("FROM a\nADAPTER ./x.gguf", "line 2: ADAPTER: LoRA adapters are not supported; merge"),
        ("FROM a\nRENDERER x", "line 2: RENDERER: built-in renderers are not supported; give TEMPLATE"),
        ("FROM a\nPARAMETER heat 1", "line 2: unknown parameter 'heat'; known are"),
        ("FROM a\nPARAMETER temperature", "line 2: PARAMETER temperature must be a number"),
        ("FROM a\nPARAMETER temperature hot", "line 2: PARAMETER temperature must be a number, not 'hot'"),
        ("FROM a\nPARAMETER temperature -3", "line 2: PARAMETER temperature must be"),
        ("FROM a\nPARAMETER top_k 1.5", "line 2: PARAMETER top_k must be an integer"),
        ("FROM a\nPARAMETER seed " + "9" * 30, "line 2: PARAMETER seed must be an integer of 64 bits"),
        ("FROM a\nPARAMETER mirostat 2", "line 2: PARAMETER mirostat is not supported"),
        ("FROM a\nMESSAGE bob hi", "line 2: MESSAGE begins with one of system, user, assistant"),
        ('FROM a\nSYSTEM """x\ny', 'line 2: the value opened with """ is never closed'),
        ('FROM a\nSYSTEM """x""" y', "line 2: text after the closing quotes: 'y'"),
        ("FROM a\n" + "SYSTEM x" * 200_000, "larger than 1048576 bytes"),
        ("FROM a\n" + "MESSAGE user x\n" * 2000, "2000 messages; at most 1024"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(text)
    assert words in caught.value.message


_TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n"), max_size=40).filter(
    lambda text: '"""' not in text and not text.endswith('"')
)


@settings(deadline=None)
@given(
    system=st.none() | _TEXT,
    template=st.none() | _TEXT,
    messages=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), _TEXT.filter(str.strip)), max_size=3),
    temperature=st.floats(0, 100) | st.none(),
)
def test_what_is_written_reads_back_the_same(
    system: str | None, template: str | None, messages: list[tuple[str, str]], temperature: float | None
) -> None:
    recipe = Recipe(
        parent="base",
        system=system,
        template=template,
        messages=tuple((role, text.strip()) for role, text in messages),
        parameters={} if temperature is None else {"temperature": temperature},
    )
    assert parse(written(recipe)).recipe == recipe


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(InvalidRequest):
        parse("FROM a\n" + text)


# -- in the store -----------------------------------------------------------------------------------------------------
@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SEPTET_HOME", str(tmp_path / "home"))
    store = Store()
    work = store.work_directory("base")
    path = make_gguf(work, "llama")
    raw = path.read_bytes()
    entry = FileEntry("tiny.gguf", hashlib.sha256(raw).hexdigest(), len(raw))
    store.add(Manifest(name="base", source="test", license="MIT", files=(entry,)), {"tiny.gguf": path})
    return store


def test_a_recipe_survives_the_store_and_is_found_by_its_name(store: Store) -> None:
    recipe = parse(WHOLE).recipe
    create("mine:v2", "base", recipe)
    found = resolve("mine:v2", pull=False)
    assert found.recipe == recipe
    assert found.digest == resolve("base", pull=False).digest
    assert found.path.samefile(resolve("base", pull=False).path)  # one copy of the weights
    create("latest", "mine:v2", Recipe(parent="mine:v2", system="other", parameters={"temperature": 1}))
    again = resolve("latest:latest", pull=False).recipe
    assert again is not None
    assert (again.system, again.template) == ("other", recipe.template)
    assert again.parameters == {**recipe.parameters, "temperature": 1}
    copy("latest", "third")
    assert resolve("third", pull=False).recipe == again


def test_a_damaged_recipe_is_not_taken(store: Store) -> None:
    create("mine", "base", Recipe(parent="base"))
    path = store.home / "manifests" / "mine.json"
    sound = json.loads(path.read_text())
    for part in ({"parameters": {"temperature": "hot"}}, {"messages": [["user"]]}, {"system": 5}, {"parent": None}):
        path.write_text(json.dumps({**sound, "recipe": {**sound["recipe"], **part}}))
        assert store.get("mine") is None
    path.write_text(json.dumps(sound))
    assert store.get("mine") is not None


def test_a_model_of_a_file_is_a_copy_that_the_users_file_can_not_change(store: Store, tmp_path: Path) -> None:
    path = make_gguf(tmp_path, "llama")
    model = create("mine", str(path), Recipe(parent=str(path)))
    path.write_bytes(b"changed")
    assert resolve("mine", pull=False).path.read_bytes()[:4] == b"GGUF"
    assert model.digest == hashlib.sha256(model.path.read_bytes()).hexdigest()
    with pytest.raises(ModelFileError):
        create("bad", str(path), Recipe(parent=str(path)))
    assert {manifest.name for manifest in store.all()} == {"base", "mine"}
    assert [path.name for path in (store.home / "tmp").iterdir()] == ["base"]  # the fixture's


def test_names_that_can_not_be_given(store: Store) -> None:
    for name in ("../x", "a/b/c", "", "x" * 300, "smollm2", "a b"):
        with pytest.raises(InvalidRequest):
            create(name, "base", Recipe(parent="base"))
        with pytest.raises(InvalidRequest):
            copy("base", name)
    with pytest.raises(ModelNotFound):
        copy("nope", "x")


def test_create_on_the_command_line(store: Store, tmp_path: Path) -> None:
    make_gguf(tmp_path, "llama")
    (tmp_path / "Modelfile").write_text("FROM ./tiny.gguf\nSYSTEM s\n")
    run = CliRunner().invoke(main, ["create", "mine", "-f", str(tmp_path / "Modelfile")])
    assert run.exit_code == 0, run.output
    assert resolve("mine", pull=False).recipe == Recipe(parent="./tiny.gguf", system="s")
    (tmp_path / "Modelfile").write_text("FROM base\nTEMPLATE {{ .Nope }}\n")
    run = CliRunner().invoke(main, ["create", "bad", "-f", str(tmp_path / "Modelfile")])
    assert run.exit_code == 1
    assert ".Nope is not known" in run.output
    run = CliRunner().invoke(main, ["create", "bad", "-f", str(tmp_path / "none")])
    assert "can't read" in run.output
