"""The documentation: short, plain and up to date, with valid links and examples."""

from __future__ import annotations

import ast
import io
import re
import shlex
import statistics
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from mlflow import MlflowClient

from effv2.cli.main import main, train
from effv2.config.layers import Layer, Written, build, validate
from effv2.config.options import StudyOptions, _layer
from effv2.config.schema import TrainConfig
from effv2.config.studies import open_study, read_study
from effv2.evidence.claims import read_claims
from effv2.pretrained.config import PretrainedConfig
from effv2.tracking import tags
from tests import reference
from tests.conftest import ROOT, TINY_TABLE

README = ROOT / "README.md"
PAGES = [README, *reference.pages()]
RESULTS, POST = (reference.DOCS / "results" / name for name in ("README.md", "the-post.md"))
CODE = [path for place in ("effv2", "tests", "benchmarks", "entry_points") for path in ROOT.glob(f"{place}/**/*.py")]
SOURCES = sorted({*CODE, *ROOT.glob("sweeps/*.yaml"), *ROOT.glob("effv2/**/claims.yaml")} - {Path(__file__)})
SPOKEN = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}  # since Python 3.12
LINKED = [*PAGES, *(reference.DOCS / "results").glob("*.md")]
MOST_LINES, MOST_WORDS, LONGEST_MEAN, LONGEST = 120, 2_000, 18, 35
FEWER_WORDS = {README: 1_200, RESULTS: 1_800, POST: 800}  # of the results without their tables
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
UNITS = "images|seeds|runs|trials|epochs|steps|seconds|hours|minutes|milliseconds|ms|points|bits|calls"
WHOLES = "class|second|minute|step|epoch|image|stage|run|trial|arm|variant|species|round|call|cell|layer|worker"
DIALECT = {
    "goes on with": r"\b(?:go|goes|going|went) on\b",
    "stands": r"\b(?:stand|stands|stood)\b(?! for\b)",
    "told": r"\btold\b(?! to end)",
    "images a class": rf"\b(?:{UNITS}) an? (?:{WHOLES})\b",
    "mended": r"\bmend(?:s|ed)?\b",
    "an epoch's": r"\ban? (?:epoch|arm|seed)'s\b(?! metrics)",
    "what it gave": r"\bwhat (?:it|they|that) (?:gave|gives|give|came|took)\b",
    "what becomes of": r"\bbecomes? of\b",
    "is none": r"(?<!there )\bis none\b",
    "of yours": r"\bof (?:yours|ours|one's own)\b",
    "but for": r"\bbut for\b",
    "for want of": r"\bfor want of\b",
    "at hand": r"\bat hand\b",
    "beside": r"\bbeside\b",
    "anew": r"\banew\b",
    "alone": r"(?<!these files )(?<!right )\balone\b(?! decide)",
    "says so of": r"\b(?:says|say|said) so of\b",
    "lies, lay": r"\b(?:lies|lay)\b",
    "is to be": r"\b(?:is|are) to be\b",
    "what there is": r"\bwhat there (?:is|are)\b",
    "it asks for": r"\bask(?:s|ed)? for\b",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def own_text(path: Path) -> str:
    """Return a page without its generated parts."""
    return reference.BLOCK.sub("", path.read_text())


def checked_text(path: Path) -> str:
    """Return a page without the sources of settings, which quote the post."""
    return reference.BLOCK.sub(lambda found: found[0] if found[1] in reference.BLOCKS else "", path.read_text())


def blocks(path: Path, *languages: str) -> Iterator[str]:
    """Return the fenced blocks of a page in one of the languages."""
    yield from (found[2] for found in FENCE.finditer(own_text(path)) if found[1] in languages)


def plain(path: Path) -> str:
    """Return the words of a page without code blocks and addresses. Inline code, or a list of it, is one word."""
    text = re.sub(r"^    .*$", "", FENCE.sub("", checked_text(path)), flags=re.MULTILINE)
    return re.sub(r"`[^`]+`(?:, `[^`]+`)*", "code", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text))


def source_words(path: Path) -> str:
    """Return the words of a source: its comments and strings, without code in backticks."""
    text = path.read_text()
    if path.suffix == ".py":
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        text = " | ".join(each.string for each in tokens if each.type in SPOKEN)
    return " ".join(re.sub(r"(?m)`[^`\n]+`|\{[^{}\n]*\}|'[^'\n]{30,}'|^ *# mlflow run.*$|^ +#", "code", text).split())


def words(text: str) -> list[str]:
    return [word for word in text.split() if re.search(r"\w", word)]


def sentences(path: Path) -> Iterator[str]:
    """Return the sentences of paragraphs, items and longer cells of tables, without headings."""
    for part in re.split(r"\n\s*\n|\n(?=[ ]*[-*] |[ ]*\d+\. |#|\|)", plain(path)):
        kind = part.strip()[:1]
        cells = [cell for cell in part.split("|") if len(words(cell)) > 6] if kind == "|" else [part]
        for text in cells if kind != "#" else ():
            flat = " ".join(re.sub(r"^([-*]|\d+\.) ", "", text.strip()).replace("**", "").split())
            yield from (each for each in re.split(r"(?<=[.!?])[\")]*\s+|(?<=[.!?]\")\s+", flat) if len(words(each)) > 2)


@pytest.mark.parametrize("path", [*PAGES, RESULTS, POST], ids=name_of)
def test_a_page_is_short_and_plain(path: Path) -> None:
    found = list(sentences(path))
    counts = [len(words(each)) for each in found]
    whole = re.sub(r"^\|.*$", "", path.read_text(), flags=re.MULTILINE) if path == RESULTS else path.read_text()
    assert len(words(whole)) <= FEWER_WORDS.get(path, MOST_WORDS)
    assert statistics.fmean(counts or [0]) <= LONGEST_MEAN
    assert not [each for each, count in zip(found, counts, strict=True) if count > LONGEST]
    text = " ".join(plain(path).split())
    odd = {name: re.findall(f".{{0,30}}(?:{pattern}).{{0,30}}", text) for name, pattern in DIALECT.items()}
    assert not {name: each for name, each in odd.items() if each}, "say it in standard English"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_source_is_in_standard_english(path: Path) -> None:
    text = source_words(path)
    odd = {name: re.findall(f".{{0,30}}(?:{pattern}).{{0,30}}", text) for name, pattern in DIALECT.items()}
    assert not {name: each for name, each in odd.items() if each}, "say it in standard English"


def test_the_readme_fits_two_screens() -> None:
    assert README.read_text().count("\n") <= MOST_LINES


def test_generated_parts_are_up_to_date() -> None:
    old = [name_of(path) for path in reference.pages() if path.read_text() != reference.filled(path.read_text())]
    assert not old, "write them again: python -m tests.reference"


def test_every_page_is_in_the_navigation() -> None:
    def files(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for each in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from files(each)

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = RESULTS, POST, *reference.pages()
    assert sorted(files(site["nav"])) == sorted(str(path.relative_to(reference.DOCS)) for path in pages)


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page, as GitHub and MkDocs name them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", LINKED, ids=name_of)
def test_links_resolve(path: Path) -> None:
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text()))):
        if not re.match(r"https?://", target):
            file, _, anchor = target.partition("#")
            there = (path.parent / file) if file else path
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def command_lines(path: Path) -> Iterator[list[str]]:
    """Return the words of each effv2 command on a page, in blocks and in lines."""
    shell = [line for block in blocks(path, "bash") for line in block.replace("\\\n", " ").splitlines()]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", own_text(path)))]
    for line in [*shell, *inline]:
        for part in re.split(r"&&|[;|]\s", line):
            if re.search(r"\beffv2 |entry_points/|mlflow run|run --rm study", part):
                yield from wanted(shlex.split(part, comments=True))


def wanted(line: list[str]) -> Iterator[list[str]]:
    """Return the words of an effv2 command from its name on, if the line holds one without placeholders."""
    line = [word for number, word in enumerate(line) if not re.match(r"[A-Z_]+=", word) or number > 3]
    if "study" in line and "docker" in line:
        yield line[line.index("study") + 1 :]
    elif line[:2] == ["mlflow", "run"] and "-e" in line:
        given = [line[number + 1] for number, word in enumerate(line) if word == "-P"]
        pairs = [each.partition("=") for each in given]
        yield [line[line.index("-e") + 1], *(word for name, _, value in pairs for word in (f"--{name}", value))]
    elif script := next((word for word in line if word.startswith("entry_points/")), ""):
        yield [Path(script).stem.replace("_", "-"), *line[line.index(script) + 1 :]]
    elif "effv2" in line:
        yield line[line.index("effv2") + 1 :]


EXAMPLES = [
    pytest.param(line, id=f"{name_of(path)}: {' '.join(line)}")
    for path in PAGES
    for line in command_lines(path)
    if not line[0].isupper() and len(line) > 1 and "--help" not in line  # others name a command without using it
]


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_are_valid(line: list[str]) -> None:
    command: click.Command = main
    while isinstance(command, click.Group):
        command = command.commands[line[0]]
        line = line[1:]
    context = command.make_context(str(command.name), [*line])
    layer: Layer = {}
    for each in reference.options_of(command):
        value = context.params[str(each.name)]
        if value and (setting := reference.setting_of(each)):
            layer[setting] = Written(value)
    kind = PretrainedConfig if command.name == "evaluate-pretrained" else TrainConfig
    build(kind, layer | _layer({}, context.params.get("set", ())))
    how = {name: value for name, value in context.params.items() if value and name in StudyOptions.model_fields}
    validate(StudyOptions, how)
    study = str(context.params.get("study") or "")
    if study and (not study.endswith(".yaml") or study.startswith("sweeps/")):
        open_study(study, ROOT)


def test_examples_of_files_are_valid(tmp_path: Path) -> None:
    texts = [text for path in PAGES for text in blocks(path, "yaml")]
    studies = {found[1]: text for text in texts if (found := re.search(r"^name: ([\w-]+)$", text, re.MULTILINE))}
    for name, text in studies.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    assert len(studies) >= 3
    assert all(read_study(tmp_path / f"{name}.yaml").name == name for name in studies)
    claims = [text for text in texts if text not in studies.values()]
    for text in claims:
        (tmp_path / "claims.yaml").write_text(text)
        assert set(re.findall(r"^  (\w+):$", text, re.MULTILINE)) <= read_claims(tmp_path / "claims.yaml").claims.keys()
    assert claims


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_examples_of_python_are_python(path: Path) -> None:
    for text in blocks(path, "python"):
        entry = textwrap.dedent(text)
        ast.parse(f"{{{entry}}}" if entry.startswith('"') else entry)


def test_the_reference_names_what_a_run_logs(sqlite_store: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(
        f"name: tiny\nconfig:\n  model: {{variant: tiny, table: {TINY_TABLE}}}\n"
        "  progressive: {stages: 2, image_size: 8}\n"
    )
    how = ["--study", "tiny.yaml", "--image-size", "12", "--per-class", "12", "--epochs", "2", "--device", "cpu"]
    assert CliRunner().invoke(train, how, catch_exceptions=False).exit_code == 0
    (run,) = MlflowClient().search_runs(["0"])
    assert run.data.metrics.keys() == reference.EPOCH_METRICS.keys() | reference.FINAL_METRICS.keys()
    assert run.data.params.keys() == TrainConfig().flat().keys()
    named = tuple(reference.TAGS)
    assert not [tag for tag in run.data.tags if tag.startswith("effv2.") and not tag.startswith(named)]
    files = {file.path for file in MlflowClient().list_artifacts(run.info.run_id)}
    text = (reference.DOCS / "reference" / "runs.md").read_text()
    assert not [file for file in files if Path(file).stem not in text]


def test_the_reference_names_all_tags_and_keys() -> None:
    own = {value for name, value in vars(tags).items() if name.isupper() and str(value).startswith("effv2.")}
    assert own == reference.TAGS.keys()
    for described, group in reference.KEYS:
        assert described.keys() == reference.keys_of(group)
