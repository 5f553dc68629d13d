# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What is written for readers is true: code runs, commands parse, links and files are there, tables are true.

Python blocks run one after the other, page by page, in a folder that holds `region.png` and `slide.tiff`. One that is
not meant to run stands below a comment that says why. Where readers come for one block of a page, each runs alone.
"""

import ast
import builtins
import importlib.util
import re
import shlex
import sys

import pytest
import yaml
from places import ROOT
from skimage.data import immunohistochemistry
from slide_files import stained_image, write_pyramid
from test_layering import FOLDERS

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
PAGE_NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
FENCE = re.compile(r"(?P<before>[^\n]*)\n(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)\n *```", re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: .{10,} -->")
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s#]*)(#[^)\s]*)?\)")
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
# A file or folder of the checkout: below one of its folders, or a file beside them.
PATH = re.compile(
    r"(?:modeling|docs|examples|configuration|model_card|scripts|studies|tests|\.ci)/[\w./-]*|[A-Z]+\.(?:md|cff)|pyproject\.toml"
)
MODULE = re.compile(r"python -m (studies\.\w+)")
EACH_BLOCK_ALONE = ("docs/interop.md",)
MOST_LINES_OF_THE_README = 120
LOWER_CASE_NAMES = ("bfloat16", "mpp", "timm")  # written so at the beginning of a sentence, too


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, language):
    """(line before, code) of every fenced block of a page in one language."""
    found = [match for match in FENCE.finditer(text_of(name)) if match["language"] == language]
    return [(match["before"], re.sub(rf"(?m)^{match['indent']}", "", match["code"])) for match in found]


def commands(name):
    """The commands of a page's bash blocks, without comments; lines that end in a backslash are joined."""
    lines = [line for _, code in blocks(name, "bash") for line in code.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def load_of_docs(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.path.insert(0, str(ROOT / "docs"))  # as where it is run as a script
    try:
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return module


def headings(path):
    """The anchors of a page's headings, as GitHub and MyST name them."""
    titles = re.findall(r"(?m)^#+ (.+)$", path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    """A folder with the files that the pages name: an image and a slide."""
    from PIL import Image

    Image.fromarray(immunohistochemistry()[:448, :448]).save(tmp_path / "region.png")
    write_pyramid(tmp_path / "slide.tiff", stained_image(640, 512, [(64, 96, 384, 256)]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in PAGE_NAMES if blocks(name, "python")])
def test_python_blocks_run_one_after_the_other(name, readers_folder):
    namespace = {"__name__": "reader"}
    run = 0
    for number, (before, code) in enumerate(blocks(name, "python"), start=1):
        if name in EACH_BLOCK_ALONE:
            namespace = {"__name__": "reader"}
        if NOT_RUN.search(before):
            ast.parse(code)  # what is not run is at least Python
            continue
        exec(compile(code, f"{name}, python block {number}", "exec"), namespace)
        run += 1
    assert run, "every page with Python has some that runs"


@pytest.mark.parametrize("name", EACH_BLOCK_ALONE)
def test_blocks_that_are_copied_alone_name_nothing_of_another(name):
    """Also those that are not run here."""
    for number, (_, code) in enumerate(blocks(name, "python"), start=1):
        nodes = list(ast.walk(ast.parse(code)))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        bound = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
        bound |= {alias.asname or alias.name for node in nodes if hasattr(node, "names") for alias in node.names}
        assert {node.id for node in names} <= bound, f"python block {number}"


SPARSEPATH = [
    pytest.param(words, id=f"{name}: {' '.join(words)[:60]}")
    for name in PAGE_NAMES
    for words in commands(name)
    if words[0] == "sparsepath" or ("sparsepath" in words and "-m" in words)
]


@pytest.mark.parametrize("words", SPARSEPATH)
def test_sparsepath_commands_parse(words):
    import typer

    from sparsepath.app import app

    command = typer.main.get_command(app)
    arguments = words[words.index("sparsepath") + 1 :]
    context = command.make_context("sparsepath", list(arguments), resilient_parsing=False)
    name, subcommand, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    subcommand.make_context(name, rest, parent=context)


def test_a_command_that_is_wrong_does_not_parse():
    with pytest.raises(Exception, match="--pixels"):
        test_sparsepath_commands_parse(["sparsepath", "embed", "slides", "--model", "m", "--out", "o", "--pixels", "3"])


def flags_of(source):
    """Flags that a script or study takes: those of argparse as written, and fields of dataclasses in both spellings."""
    tree = ast.parse(source)
    fields = {
        node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and hasattr(node.target, "id")
    }
    if "HfArgumentParser" in source:
        fields |= training_arguments()
    both = {f"--{field}" for field in fields} | {f"--{field.replace('_', '-')}" for field in fields}
    return both | set(re.findall(r'"(--[\w-]+)"', source)) | {"--help"}


def file_of(words):
    """The script or study that a command runs, or None."""
    for word in words:
        if re.fullmatch(r"scripts/\w+\.py", word):
            return word
        if re.fullmatch(r"studies\.\w+", word):
            return f"{word.replace('.', '/')}/__main__.py"
    return None


SCRIPTS = [
    pytest.param(words, id=f"{name}: {' '.join(words)[:60]}")
    for name in PAGE_NAMES
    for words in commands(name)
    if file_of(words)
]


@pytest.mark.parametrize("words", SCRIPTS)
def test_scripts_and_studies_are_there_and_know_their_flags(words):
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    assert not given - flags_of(text_of(file_of(words)))


def training_arguments():
    import dataclasses

    from transformers import TrainingArguments

    return {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_studies_that_are_named_can_be_run(name):
    for module in MODULE.findall(text_of(name).replace("studies.NAME", "")):
        assert (ROOT / module.replace(".", "/") / "__main__.py").exists() or (
            ROOT / f"{module.replace('.', '/')}.py"
        ).exists()


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_make_targets_that_are_named_exist(name):
    targets = set(re.findall(r"(?m)^([a-z-]+):", text_of("Makefile")))
    named = {words[1] for words in commands(name) if words[0] == "make"}
    named |= {
        target for code in INLINE_CODE.findall(text_of(name)) if code.startswith("make ") for target in code.split()[1:]
    }
    assert named <= targets


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{name} links to {target}"
        assert ROOT in [path, *path.parents]
        if anchor:
            assert anchor[1:] in headings(path), f"{name} links to {target}{anchor}"


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_files_that_are_named_exist(name):
    for code in INLINE_CODE.findall(text_of(name)) + re.findall(r"(?:scripts|tests|docs)/[\w./-]+\.\w+", text_of(name)):
        for path in PATH.findall(code):
            # A bare file name (docs of the checkout's root) must be at the root; folders may end in a slash.
            assert (ROOT / path).exists(), f"{name} names {path}"


@pytest.mark.parametrize("name", ["docs/extending.md"])
def test_names_that_extending_tells_to_change_are_in_the_file_it_names(name):
    """`NAME` in `path.py`: the reader has to find the line."""
    told = re.findall(r"`(\w+)`[^`]{0,40}? (?:in|of)\s+`([\w/]+\.(?:py|toml))`", text_of(name))
    assert len(told) >= 12
    for word, path in told:
        if word not in ("packages", "slides"):
            assert re.search(rf"\b{word}\b", text_of(path)), f"{path} has no {word}"


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= MOST_LINES_OF_THE_README


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md", "docs/evidence.md"])
def test_tables_are_those_of_the_recorded_results(name):
    assert load_of_docs("tables").with_tables(text_of(name)) == text_of(name), "make figures"


def test_the_picture_of_the_architecture_is_the_one_its_script_draws():
    assert load_of_docs("draw_architecture").drawing() == text_of("docs/architecture.svg"), "make figures"


def test_the_picture_shows_the_folders_and_no_import_that_is_forbidden():
    drawn = load_of_docs("draw_architecture")
    boxes = {title: (left, top, left + width) for title, _, left, top, width, *_ in drawn.FOLDERS}
    folders = {folder.split(".")[0] for folder in FOLDERS} - {"version", ""}
    assert folders <= set(boxes)

    def box_at(x, y):
        return next(
            title for title, (left, top, right) in boxes.items() if left <= x <= right and top - 5 <= y <= top + 56
        )

    for x1, y1, x2, y2 in drawn.IMPORTS:
        importer, imported = box_at(x1, y1), box_at(x2, y2)
        allowed = FOLDERS.get(importer, folders)
        assert imported in allowed, f"{importer} -> {imported}"


def test_the_citation_is_complete():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version", "license"} <= set(citation)
    from sparsepath_vit import __version__

    assert citation["version"] == __version__
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)


def public_docstrings():
    """(where, first paragraph) of each public module, class and function of the package, and its methods."""
    for file in sorted((ROOT / "modeling").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        nodes = [(tree, "module")]
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                nodes.append((node, node.name))
                if isinstance(node, ast.ClassDef):
                    nodes += [
                        (child, f"{node.name}.{child.name}")
                        for child in node.body
                        if isinstance(child, ast.FunctionDef)
                    ]
        for node, name in nodes:
            docstring = ast.get_docstring(node)
            if docstring and not any(part.startswith("_") for part in name.split(".")):
                yield f"{file.relative_to(ROOT)}: {name}", docstring.split("\n\n")[0]


def is_a_sentence(text):
    begins = text.startswith(LOWER_CASE_NAMES) or re.match(r"[A-Z`(0-9{]", text)
    return bool(begins) and text.endswith((".", ":", "?"))


def test_public_docstrings_are_sentences():
    found = list(public_docstrings())
    assert len(found) > 300
    faulty = [f"{where}: {first}" for where, first in found if not is_a_sentence(first)]
    assert not faulty, "\n".join(faulty)
