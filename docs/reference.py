"""What the reference pages hold, read off the code itself: a Sphinx extension.

- ``public-names GROUP``: the names below the comment ``# GROUP`` of ``batchlr/__init__.py``.
- ``command-line``: the help of every command.
- ``configuration-keys``: every key of a configuration, with what may stand there.

Docstrings of dataclasses get a list of the fields, explained by the comments behind them.
"""

import ast
import dataclasses
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from docutils import nodes
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import batchlr
from batchlr.training.config import TrainConfig
from batchlr.training.config.fields import Options
from batchlr.training.config.schema import SECTIONS
from batchlr.training.config.variants import VARIANTS


def public_names() -> dict[str, list[str]]:
    """The names that ``batchlr`` exports, by the comments that head their groups."""
    groups: dict[str, list[str]] = {}
    for line in Path(batchlr.__file__).read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"# ([A-Z].*)", line):
            names = groups.setdefault(heading[1], [])
        elif export := re.fullmatch(r"from \S+ import \w+ as (\w+)", line):
            names.append(export[1])
    return groups


class PublicNames(SphinxDirective):
    """A table of a group's names, and the docstring of each."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Hands the names to autosummary and autodoc."""
        groups = public_names()
        if self.arguments[0] not in groups:
            msg = f"no group {self.arguments[0]!r}; there are {sorted(groups)}"
            raise self.error(msg)
        names = groups[self.arguments[0]]
        kinds = {n: "class" if inspect.isclass(getattr(batchlr, n)) else "function" for n in names}
        lines = [
            "```{eval-rst}",
            ".. currentmodule:: batchlr",
            ".. autosummary::",
            "   :nosignatures:",
            "",
            *(f"   {name}" for name in names),
            "",
            *(f".. auto{kind}:: {name}" for name, kind in kinds.items()),
            "```",
        ]
        return self.parse_text_to_nodes("\n".join(lines))


def complete_docstring(
    app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]
) -> None:
    """Links the names and pages that a docstring mentions; lists the fields that it does not."""
    lines[:] = map(link, lines)
    listed = {"Attributes:", "Args:"} & {*lines}
    if what == "class" and dataclasses.is_dataclass(documented) and not listed:
        lines += ["", "Attributes:", *(f"    {field}" for field in fields(documented)), ""]


def link(line: str) -> str:
    """``line`` with classes and public functions found wherever they are, which a dot says."""
    known = "|".join([r"[A-Z]\w*", *(name for group in public_names().values() for name in group)])
    line = re.sub(rf"(?<!`)`(?=(?:{known})(?:\.\w+)*`(?!`))", "`.", line)
    return re.sub(r"docs/(\w+)\.md", r":doc:`\1 </\1>`", line)


def fields(documented: type) -> Iterator[str]:
    """``name (type): comment`` of each field that the class itself declares."""
    source = inspect.getsource(documented)
    (declared,) = ast.parse(source).body
    comments = [line.partition("  # ")[2] for line in source.splitlines()]
    for node in declared.body:
        if isinstance(node, ast.AnnAssign):
            said = " ".join(filter(None, comments[node.lineno - 1 : node.end_lineno]))
            said = re.sub(r"([|*])", r"\\\1", said)  # formulas, not reStructuredText
            yield f"{node.target.id} ({ast.unparse(node.annotation)}): {said}"


class CommandLine(SphinxDirective):
    """The help of every command, as typer writes it in Markdown."""

    def run(self) -> list[nodes.Node]:
        """Leaves out what comes before the commands, which the page says."""
        words = ["typer", "batchlr.cli", "utils", "docs", "--name", "batchlr"]
        answer = subprocess.run(
            [sys.executable, "-m", *words], capture_output=True, text=True, check=True
        )
        _, heading, commands = answer.stdout.partition("## ")
        return self.parse_text_to_nodes(heading + commands, allow_section_headings=True)


class ConfigurationKeys(SphinxDirective):
    """Every key of a configuration: what may stand there, the default, and what it means."""

    def run(self) -> list[nodes.Node]:
        """A heading for each section, and one for each ``name`` that chooses its keys."""
        text = "\n".join(describe_configuration())
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def describe_configuration() -> Iterator[str]:
    """Markdown, line by line."""
    keys = TrainConfig.model_fields
    yield "## Top level"
    for key in keys:
        if key not in SECTIONS:
            yield from describe_key(key, keys[key])
    for section, options in SECTIONS.items():
        yield f"## `{section}`: {keys[section].description}\n"
        if section not in VARIANTS:
            yield from describe_options(section, options)
            continue
        for variant, names in names_of_variants(section).items():
            yield "### " + ", ".join(f"`{section}.name: {name}`" for name in names)
            yield from describe_options(section, variant)


def names_of_variants(section: str) -> dict[type[Options], list[str]]:
    """What a section can be, with the names that choose it."""
    variants: dict[type[Options], list[str]] = {}
    for name, options in VARIANTS[section].items():
        variants.setdefault(options, []).append(name)
    return variants


def describe_options(prefix: str, options: type[Options]) -> Iterator[str]:
    """The purpose of a section, and its keys; those of a section within it follow."""
    yield f"{inspect.getdoc(options)}\n".replace("``", "`")
    for key, field in options.model_fields.items():
        if key == "name":
            continue
        yield from describe_key(f"{prefix}.{key}", field)
        for inner in sections_within(field):
            yield from describe_options(f"{prefix}.{key}", inner)


def sections_within(field: FieldInfo) -> list[type[Options]]:
    """The keys that a section may have in place of a value."""
    kinds = [kind for kind in get_args(field.annotation) if inspect.isclass(kind)]
    return [kind for kind in kinds if issubclass(kind, Options)]


def describe_key(key: str, field: FieldInfo) -> Iterator[str]:
    """One entry; of keys that recur under other names of a section the headings are the index."""
    yield f"::::{{confval}} {key}"
    if key.partition(".")[0] in VARIANTS:
        yield ":no-index:"
    yield f":type: {legal_values(field)}"
    yield ":default: " + ("none, it must be given" if field.is_required() else shown(field.default))
    yield f"\n{field.description}\n::::\n"


def legal_values(field: FieldInfo) -> str:
    """What a value that fits nothing is told to be."""
    if field.annotation is str and not field.metadata:
        return "text"
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    if sections_within(field):
        return "the keys below, or null"
    adapter = TypeAdapter(Annotated[field.annotation, *field.metadata])
    try:
        adapter.validate_python(object())
    except ValidationError as refusal:
        return str(refusal.errors()[0]["msg"]).removeprefix("must be ")
    msg = f"anything may stand in {field}"
    raise AssertionError(msg)


def shown(default: Any) -> str:
    """A default as YAML has it, on one line."""
    return f"`{default if isinstance(default, str) else json.dumps(default, default=str)}`"


def link_to_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Links that leave ``docs`` fetch the file; on GitHub they open it."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+)\)", r"](path:\1)", source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx asks for this."""
    app.add_directive("public-names", PublicNames)
    app.add_directive("command-line", CommandLine)
    app.add_directive("configuration-keys", ConfigurationKeys)
    app.connect("autodoc-process-docstring", complete_docstring, priority=400)  # before napoleon
    app.connect("source-read", link_to_files)
    return {"parallel_read_safe": True}
