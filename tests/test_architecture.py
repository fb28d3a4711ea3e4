"""The house's plan, held to: who imports whom, what is shipped, how long things are, what a cold start loads."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
ARROWS: dict[str, set[str]] = {
    "hub": set(),
    "index": {"hub"},
    "merge": {"hub"},
    "generate": {"hub", "index"},
    "cli": {"hub", "index", "merge", "generate"},
}
PACKAGE = [ROOT / "__init__.py", *(file for folder in ARROWS for file in sorted((ROOT / folder).rglob("*.py")))]
BESIDE = [file for folder in ("tests", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]
PLUGINS = ("merge/methods", "generate/methods", "index/encoders")


def place(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(file: Path) -> Iterator[str]:
    """Dotted paths below the package that a file imports, wherever in it the import stands."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level <= len(package) + 1, f"{place(file)}: imports from above the package"
            stem = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            for alias in node.names:
                yield ".".join(part for part in [*stem, alias.name] if part)


@pytest.mark.parametrize("folder", ARROWS)
def test_folders_import_only_what_the_plan_allows(folder: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        for target in imported(file):
            top = target.split(".")[0]
            assert top == folder or top in ARROWS[folder], f"{place(file)} imports {target}"


def test_the_plan_has_no_cycle() -> None:
    reached = {folder: set(targets) for folder, targets in ARROWS.items()}
    for _ in ARROWS:
        for targets in reached.values():
            targets |= {further for target in targets for further in reached[target]}
    assert all(folder not in targets for folder, targets in reached.items())


def test_the_package_never_imports_itself_by_name() -> None:
    """Spelled absolutely, the code would load twice; names of packages in strings are built from `__package__`."""
    for file in PACKAGE:
        for node in ast.walk(tree(file)):
            match node:
                case ast.Import(names=aliases):
                    spelled = [alias.name for alias in aliases]
                case ast.ImportFrom(level=0, module=str(module)):
                    spelled = [module]
                case ast.Constant(value=str(text)) if re.match(rf"lorahub\.({'|'.join(ARROWS)})\b", text):
                    spelled = [text]
                case _:
                    continue
            assert not any(re.match(r"lorahub(\.|$)", name) for name in spelled), f"{place(file)}:{node.lineno}"


def test_shipped_packages_are_the_folders_there_are() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = settings["tool"]["setuptools"]["packages"]
    folders = [file.parent.relative_to(ROOT).parts for file in PACKAGE if file.name == "__init__.py"]
    assert sorted(declared) == sorted(".".join(("lorahub", *parts)) for parts in folders)
    without = {place(file.parent) for file in PACKAGE} - {"/".join(parts) or "." for parts in folders}
    assert not without, f"folders of code without __init__.py would not ship: {without}"


def test_the_root_holds_no_other_module() -> None:
    assert [file.name for file in ROOT.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("file", [file for file in PACKAGE if file.name == "__init__.py"], ids=place)
def test_an_init_is_a_docstring_only(file: Path) -> None:
    body = tree(file).body
    assert len(body) == 1, f"{place(file)}: one public name, one address"
    assert ast.get_docstring(tree(file))


def test_every_module_has_a_docstring() -> None:
    assert not [place(file) for file in PACKAGE + BESIDE if not ast.get_docstring(tree(file))]


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {place(file): len(file.read_text(encoding="utf-8").splitlines()) for file in PACKAGE + BESIDE}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_no_function_is_longer_than_60_lines() -> None:
    long = {
        f"{place(file)}:{node.name}": node.end_lineno - node.lineno + 1
        for file in PACKAGE + BESIDE
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    }
    assert not {name: length for name, length in long.items() if length > 60}


def test_names_say_what_things_are() -> None:
    vague = {"utils", "helpers", "common", "base", "misc", "manager"}
    assert not [place(file) for file in PACKAGE if file.stem in vague]
    for file in PACKAGE:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert not re.match(r"_?(get|do)_", node.name), f"{place(file)}:{node.name}"
                assert not node.name.endswith(("Manager", "Helper")), f"{place(file)}:{node.name}"


@pytest.mark.parametrize("folder", PLUGINS)
def test_a_plugin_is_a_function_named_after_its_file(folder: str) -> None:
    files = [file for file in (ROOT / folder).glob("*.py") if not file.name.startswith("_")]
    assert files
    for file in files:
        functions = {node.name: node for node in tree(file).body if isinstance(node, ast.FunctionDef)}
        assert file.stem in functions, f"{place(file)} defines no {file.stem}()"
        plugin = functions[file.stem]
        assert ast.get_docstring(plugin), f"{place(file)}: its docstring is its help"
        for option in plugin.args.kwonlyargs:
            assert option.annotation, f"{place(file)}: option {option.arg} has no type"
        assert all(plugin.args.kw_defaults), f"{place(file)}: an option has no default"


def heavy(code: str, *modules: str, home: Path | None = None) -> list[str]:
    """Which of `modules` a fresh interpreter has loaded after running `code`; what it prints is not looked at."""
    program = f"{code}\nimport sys as s; print('LOADED', *[m for m in {modules!r} if m in s.modules])"
    environment = {**os.environ, **({"LORAHUB_HOME": str(home)} if home else {})}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def test_help_loads_nothing_heavy() -> None:
    code = "import lorahub.cli.main"
    assert heavy(code, "torch", "numpy", "sqlalchemy", "transformers", "sentence_transformers", "diffusers") == []


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one adapter file."""
    folder = tmp_path_factory.mktemp("library")
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 6), f"{stem}.lora_up.weight": torch.ones(6, 2)}
    save_file(tensors, folder / "watercolor.safetensors", metadata={"ss_training_comment": "soft watercolor"})
    return folder


def test_everyday_commands_do_without_torch(library: Path, tmp_path: Path) -> None:
    """In one home: what `add` stored, `list`, `show` and `search` find."""
    file = str(library / "watercolor.safetensors")
    for command in (["add", str(library)], ["list"], ["show", "watercolor"], ["inspect", file], ["search", "paint"]):
        code = (
            "import sys, contextlib\n"
            f"sys.argv = {['lorahub', *command, '--json']!r}\n"
            "from lorahub.cli.main import run\n"
            "try: run()\n"
            "except SystemExit as end: assert not end.code, end.code"
        )
        assert heavy(code, "torch", "transformers", "sentence_transformers", "diffusers", home=tmp_path) == [], command
