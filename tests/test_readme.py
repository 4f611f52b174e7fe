"""README and guides are true: their code runs, prints what they say, their commands succeed.

The blocks of a page are worked through in its order, each once, in one folder and one namespace,
as a reader would who pastes them into one interpreter.

- ``python``: executed. A top-level ``print(...)  # -> text`` must print exactly ``text``.
- ``bash``, ``console``: one plain command a line (in ``console``, after ``$ ``; other lines are
  output). ``make`` must name a target of the Makefile; ``pip install``, ``git clone`` and ``cd``
  are taken on trust; ``batchlr``, ``python -m batchlr`` and ``torchrun`` are run, and succeed:
  ``batchlr`` by calling what it is installed as, the others as programs. What would take long is
  made smaller (``SMALLER``), unless the page says how large, which is the only change.
- ``yaml``: parsed; a whole configuration (it has a ``model``) must load.
"""

import ast
import contextlib
import importlib.metadata
import io
import itertools
import re
import shlex
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FRAMEWORKS_NEEDED = "docs/integrations.md"  # tests/integrations runs it
FENCE = re.compile(
    r"^(?P<indent> *)```(?:(?P<language>[\w-]*)|\{[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.M | re.S,
)
DISPLAYED = {"text", "json", "bibtex", "mermaid"}  # shown, not run
MAKE_TARGETS = re.findall(
    r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
)
TWO_STEPS = ["train.max_steps=2", "curvature.samples=16"]
SMALLER = {  # by the word that a command line has
    "train": TWO_STEPS,
    "scripts/train.py": TWO_STEPS,
    "lr": ["model.width=0.25"],
    "spectrum": ["spectrum.steps=10", "spectrum.probes=1"],
    "sweep": ["--steps=5", "curvature.samples=16"],
}
SHELL_SYNTAX = {"|", "||", ";", "&", ">", ">>", "<"}


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is where its text starts on the page."""

    page: str
    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.page}-{self.language or 'unnamed'}-line-{self.line}"

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def find_blocks(text: str, page: str) -> list[Block]:
    """The blocks of a page's text; a directive (```` ```{name} ````) is none."""
    return [
        Block(
            page,
            match["language"],
            textwrap.dedent(match["text"]),
            text.count("\n", 0, match.start("text")) + 1,
        )
        for match in FENCE.finditer(text)
        if match["language"] is not None
    ]


def read_page(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def expected_prints(text: str) -> dict[int, str]:
    """What the ``# ->`` comments promise, by line of the block."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    return {
        token.start[0]: token.string.removeprefix("# ->").strip()
        for token in comments
        if token.string.startswith("# ->")
    }


def is_print(statement: ast.stmt) -> bool:
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Name(id="print"))):
            return True
    return False


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Execute statement by statement, so that each print can be held to its promise."""
    promised = expected_prints(block.text)
    for statement in ast.parse(block.text).body:
        last_line = statement.end_lineno
        promise = promised.pop(last_line, None) if is_print(statement) else None
        ast.increment_lineno(statement, block.line - 1)
        code = compile(ast.Module([statement], []), block.page, "exec", dont_inherit=True)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        if promise is not None:
            assert printed.getvalue() == f"{promise}\n", f"{block.page}:{statement.end_lineno}"
    astray = [block.line + line - 1 for line in promised]
    assert not astray, f"{block.page}, lines {astray}: '# ->' belongs behind a top-level print"


def commands(block: Block) -> list[list[str]]:
    """The command lines of a block as words, ``a && b`` being two."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        assert lines, f"{block.place}: no line starts with '$ '"
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        assert not SHELL_SYNTAX & set(words), f"not a plain command: {line}"
        command: list[str] = []
        for word in [*words, "&&"]:
            if word != "&&":
                command.append(word)
            elif command:
                found.append(command)
                command = []
    return found


@dataclass(frozen=True)
class Answer:
    code: int
    said: str


def call_batchlr(words: list[str], _: Path) -> Answer:
    """As the installed ``batchlr`` does, in this process, whose imports are made."""
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="batchlr")
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        try:
            script.load()(words)
        except SystemExit as end:
            return Answer(end.code or 0, said.getvalue())
    raise AssertionError("batchlr came back without an exit code")


def start_module(words: list[str], folder: Path) -> Answer:
    answer = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,  # assumed: below the time limit of a test, so that the output is shown
    )
    return Answer(answer.returncode, answer.stdout + answer.stderr)


def runnable(
    command: list[str],
) -> tuple[Callable[[list[str], Path], Answer], list[str]] | None:
    """How to run a command with which words, or nothing where it is not to be run."""
    match command:
        case ["make", *words]:
            unknown = [word for word in words if "=" not in word and word not in MAKE_TARGETS]
            assert not unknown, f"the Makefile has no target {unknown}"
            return None
        case ["pip", "install", *_] | ["git", "clone", *_] | ["cd", _]:
            return None
        case ["batchlr", *words]:
            run = call_batchlr
        case ["python", "-m", "batchlr", *arguments]:
            run, words = start_module, ["batchlr", *arguments]
        case ["torchrun", *arguments]:
            run, words = start_module, ["torch.distributed.run", *arguments]
        case _:
            message = f"not a command this page may use: {shlex.join(command)}"
            raise AssertionError(message)
    return run, [*words, *smaller(words)]


def smaller(words: list[str]) -> list[str]:
    """Sizes to add to a command line: those that it does not say itself."""
    said = {word.partition("=")[0] for word in words}
    sizes = [size for name, sizes in SMALLER.items() if name in said for size in sizes]
    return [size for size in sizes if size.partition("=")[0] not in said]


def run_shell(block: Block, folder: Path) -> None:
    for command in commands(block):
        if (found := runnable(command)) is None:
            continue
        run, words = found
        answer = run(words, folder)
        assert answer.code == 0, f"{shlex.join(command)} -> {answer.code}\n{answer.said}"


def load_yaml(block: Block, folder: Path) -> None:
    content = yaml.safe_load(block.text)
    if isinstance(content, dict) and "model" in content:
        from batchlr.training.config import load_config

        path = folder / "page.yaml"
        path.write_text(block.text, encoding="utf-8")
        load_config(path)


@dataclass
class Reader:
    """Works through blocks in order, each once, and remembers how each went."""

    blocks: list[Block]
    folder: Path
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    outcomes: list[Exception | None] = field(default_factory=list)

    def read(self, block: Block) -> None:
        match block.language:
            case "python":
                run_python(block, self.namespace)
            case "bash" | "console":
                run_shell(block, self.folder)
            case "yaml":
                load_yaml(block, self.folder)
            case language:
                assert language in DISPLAYED, f"{block.place}: name the block's language"

    def reach(self, index: int) -> None:
        """Read up to block ``index``, then raise what that block raised."""
        for block in self.blocks[len(self.outcomes) : index + 1]:
            try:
                self.read(block)
                self.outcomes.append(None)
            except Exception as problem:
                self.outcomes.append(problem)
        if problem := self.outcomes[index]:
            raise problem


PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
BLOCKS = {
    page: blocks
    for page in PAGES
    if page != FRAMEWORKS_NEEDED and (blocks := find_blocks(read_page(page), page))
}


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """One of each page."""
    found = {
        page: Reader(blocks, tmp_path_factory.mktemp("page")) for page, blocks in BLOCKS.items()
    }
    for reader, name in itertools.product(found.values(), ["configs", "scripts"]):
        (reader.folder / name).symlink_to(ROOT / name)
    return found


@pytest.mark.parametrize("block", [*itertools.chain(*BLOCKS.values())], ids=str)
def test_block_is_true(block, readers, monkeypatch):
    reader = readers[block.page]
    monkeypatch.chdir(reader.folder)
    reader.reach(reader.blocks.index(block))


def test_readme_shows_python_and_the_command_line():
    languages = {block.language for block in BLOCKS["README.md"]}
    assert "python" in languages
    assert languages & {"bash", "console"}


def test_guides_show_python():
    for page in ("adaptive_batch", "averaging_and_probes", "on_the_fly", "scaling_rules"):
        assert "python" in {block.language for block in BLOCKS[f"docs/{page}.md"]}


@pytest.mark.parametrize("page", PAGES)
def test_no_fence_escapes_the_reader(page):
    text = read_page(page)
    fences = re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)
    assert len(fences) == 2 * len(FENCE.findall(text))


def read(page: str, folder: Path) -> None:
    blocks = find_blocks(textwrap.dedent(page), "README.md")
    assert blocks
    Reader(blocks, folder).reach(len(blocks) - 1)


def test_a_kept_promise_passes(tmp_path):
    read("```python\nx = 0.1 + 0.2\n```\n\n```python\nprint(f'{x:.2f}')  # -> 0.30\n```", tmp_path)


def test_sizes_that_the_page_says_stay():
    words = ["train", "a.yaml", "curvature.samples=64"]
    assert smaller(words) == ["train.max_steps=2"]
    assert smaller(["sweep", "a.yaml", "--steps", "9"]) == ["curvature.samples=16"]
    assert smaller(["config", "show", "lr.yaml"]) == []


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("```python\nprint(0.31)  # -> 0.3\n```", "README.md:2"),
        ("```python\nfor x in [1]:\n    print(x)  # -> 1\n```", "top-level print"),
        ("```bash\nrm -r runs\n```", "not a command this page may use"),
        ("```bash\nbatchlr env | head\n```", "not a plain command"),
        ("```bash\nbatchlr env && batchlr config check none.yaml\n```", "none.yaml -> 2"),
        ("```bash\nbatchlr trian none.yaml\n```", r"-> 2\n(.*\n)*.*trian"),
        ("```bash\nmake world\n```", "no target"),
        ("```\nx = 1\n```", "name the block's language"),
    ],
)
def test_a_false_page_is_caught(page, complaint, tmp_path):
    with pytest.raises(AssertionError, match=complaint):
        read(page, tmp_path)
