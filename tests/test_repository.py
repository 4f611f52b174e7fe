"""What the files around the code say agrees with the code, and with each other."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = ["src", "tests", "docs", "configs", "scripts", "benchmarks"]
HOMES = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work|workspace)/|\b[A-Z]:\\Users\\")


def texts() -> list[Path]:
    """The text files of the tree, without what tools generate into it."""
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    generated = {"__pycache__", "_build"}
    pictures = {".png"}
    found = [p for p in inside if not generated & set(p.parts) and p.suffix not in pictures]
    found += [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml", ".cff", ".yaml"}]
    return sorted([*found, ROOT / "Makefile"])


def test_citation_names_the_software_and_the_article():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "type", "authors", "version"} <= citation.keys()
    assert citation["authors"] == [{"name": "The batchlr developers"}]
    article = citation["preferred-citation"]
    assert [author["family-names"] for author in article["authors"]] == [
        "Granziol",
        "Zohren",
        "Roberts",
    ]
    assert article["title"].startswith("Learning Rates as a Function of Batch Size")
    assert article["journal"] == "Journal of Machine Learning Research"
    assert (article["volume"], article["issue"], article["year"]) == (23, 173, 2022)
    assert article["identifiers"][0]["value"] == "arXiv:2006.09092"


def test_one_version_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["version"] == importlib.metadata.version("batchlr")
    assert PROJECT["version"] == re.findall(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)[0]
    assert PROJECT["version"] == str(citation["version"])


def test_licence_is_apache_2():
    opening = (ROOT / "LICENSE").read_text(encoding="utf-8").split(maxsplit=5)[:5]
    assert " ".join(opening) == "Apache License Version 2.0, January"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["license"] == citation["license"] == "Apache-2.0"


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_path_of_somebodys_machine(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [f"line {at}: {line}" for at, line in enumerate(lines, 1) if HOMES.search(line)]
    assert not found


def test_every_file_in_configs_is_yaml_or_explains_the_others():
    for path in sorted(path for path in (ROOT / "configs").rglob("*") if path.is_file()):
        if path.name == "README.md":
            continue
        assert path.suffix == ".yaml", f"{path} is not a configuration"
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path


def test_every_group_of_public_names_has_its_page():
    front_door = (ROOT / "src/batchlr/__init__.py").read_text(encoding="utf-8")
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.md")]
    shown = re.findall(r"^```{public-names} (.*)$", "\n".join(pages), re.MULTILINE)
    assert sorted(shown) == sorted(re.findall(r"^# ([A-Z].*)", front_door, re.MULTILINE))


def test_files_named_in_the_makefile_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in re.findall(r"configs/[\w/.-]+\.yaml", makefile):
        assert (ROOT / name).is_file(), f"the Makefile names {name}"


def test_text_is_utf_8_in_every_locale():
    source = Path(__file__).parents[1] / "src"
    calls = re.compile(r"\.(?:read_text|write_text)\(|\.open\((?:\"[rwa]\")?\)")
    lines = [line for path in source.rglob("*.py") for line in path.read_text("utf-8").splitlines()]
    found = [line for line in lines if calls.search(line)]
    assert len(found) > 5
    assert [line for line in found if "encoding=" not in line] == []
