"""Every command and program shown in README.md and docs/ runs unchanged, in a new working directory.

All blocks of a document run in order in one session: python blocks share their variables, and shell blocks
see the files that earlier blocks wrote, and of the checkout benchmarks/ only. An HTML comment on the line
before a block may say otherwise:

- ``<!-- test-command -->``: the command that runs this test suite (once, in README.md; `.ci/run` runs it);
- ``<!-- not run: installs packages -->`` and ``<!-- not run: takes 20 minutes -->``: shell blocks only;
- ``<!-- tested as: structlin demo --quick -->``: this shell command is run in the block's place. The text of
  the document has to name it too, so that a reader sees what is tested.

``python tests/test_readme.py DOCUMENT`` runs one document in the current directory.
"""

import doctest
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL, PYTHON = ("bash", "console", "sh", "shell"), ("pycon", "python")
SHOWN = ("bibtex", "ini", "json", "math", "mermaid", "text", "toml", "yaml")
INSTALLS = re.compile(r"\b(apt|apt-get|conda|curl|docker|git clone|npm|pip|uv|venv|wget)\b")
TEST_COMMAND = "test-command"


@dataclass(frozen=True)
class Block:
    """A fenced block: the line of its first line of text, and the HTML comment before it ("" if none)."""

    line: int
    language: str
    comment: str
    text: str


def read_blocks(document: Path) -> list[Block]:
    """All fenced blocks; of MyST directives only code blocks (under the language that they name)."""
    blocks, comment = [], ""
    lines = iter(enumerate(document.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        if fence := re.match(r"\s*(`{3,}|~{3,})\s*(.*)$", line):
            ticks, info = fence.groups()
            body = []
            for _, inner in lines:
                if re.fullmatch(rf"\s*{ticks[0]}{{{len(ticks)},}}\s*", inner):
                    break
                body.append(inner)
            else:
                raise ValueError(f"{document}:{number}: fence {ticks} is never closed")
            info = re.sub(r"^\{code(-block)?\}\s*", "", info)
            if not info.startswith("{"):
                language = info.split()[0] if info else ""
                blocks.append(Block(number + 1, language, comment, textwrap.dedent("\n".join(body)) + "\n"))
        if found := re.fullmatch(r"\s*<!--\s*(.*?)\s*-->\s*", line):
            comment = found[1]
        elif line.strip():
            comment = ""
    return blocks


def command_of(block: Block) -> str | None:
    """The shell script to run for a shell block, None for one that is not run."""
    if block.comment == TEST_COMMAND or block.comment.startswith("not run:"):
        return None
    if block.comment.startswith("tested as:"):
        return block.comment.removeprefix("tested as:").strip()
    if block.language == "console":
        shown = block.text.splitlines()
        return "\n".join(line[2:] for line in shown if line.startswith(("$ ", "> ")))
    return block.text


def complaints(document: Path) -> list[str]:
    """What is wrong with the way the blocks of a document are marked."""
    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    found = []
    for block in read_blocks(document):
        place = f"{document.name}:{block.line}:"
        reason = block.comment.partition(":")[2].strip()
        marked = block.comment.startswith((TEST_COMMAND, "not run", "tested as"))
        if block.language not in SHELL + PYTHON + SHOWN:
            found.append(f"{place} language {block.language!r} is none of {', '.join(SHELL + PYTHON + SHOWN)}")
        elif marked and block.language not in SHELL:
            found.append(f"{place} only a shell block may be marked {block.comment!r}")
        elif block.comment.startswith("not run"):
            installs = reason == "installs packages" and INSTALLS.search(block.text)
            if not installs and not re.fullmatch(r"takes \d+ (minutes|hours)", reason):
                found.append(f"{place} {block.comment!r}: only an installation, or 'takes N minutes', is a reason")
        elif block.comment.startswith("tested as"):
            program = " ".join(reason.split()[:2])
            if not program or program not in block.text:
                found.append(f"{place} tested as {reason!r}, but the block does not run {program!r}")
            if reason not in prose:
                found.append(f"{place} tested as {reason!r}, which the text does not say")
        elif block.language in SHELL:
            if not (command_of(block) or "").strip() and not marked:
                found.append(f"{place} no command; a console block has them after '$ '")
            if INSTALLS.search(block.text) and not marked:
                found.append(f"{place} a block that installs has to be marked <!-- not run: installs packages -->")
    return found


def run_document(document: Path) -> None:
    """Run the blocks of a document in the current directory; raises at the first that fails."""
    variables: dict[str, Any] = {"__name__": "__main__"}
    for block in read_blocks(document):
        place = f"{document}:{block.line}"
        if block.language == "python":
            print(f"+ {place}", flush=True)
            # Empty lines first, so that a traceback shows the line of the document.
            exec(compile("\n" * (block.line - 1) + block.text, str(document), "exec"), variables)
        elif block.language == "pycon":
            print(f"+ {place}", flush=True)
            example = doctest.DocTestParser().get_doctest(
                block.text, variables, document.name, str(document), block.line - 1
            )
            options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            runner = doctest.DocTestRunner(optionflags=options)
            runner.run(example, clear_globs=False)
            variables.update(example.globs)
            if runner.summarize(verbose=False).failed:
                raise SystemExit(f"{place}: the output is not what the document shows")
        elif block.language in SHELL and (command := command_of(block)) is not None:
            print(f"+ {place}\n{command}", flush=True)
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], stdin=subprocess.DEVNULL)
            if done.returncode:
                raise SystemExit(f"{place}: exit code {done.returncode} from\n{command}")


def run_in_new_process(document: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a document in `folder/work`; `structlin` and `python` are those that this process tests."""
    spec = importlib.util.find_spec("structlin")
    assert spec is not None
    assert spec.origin is not None
    programs = {
        "python": f'exec "{sys.executable}" "$@"',
        "structlin": f'exec "{sys.executable}" -P -c '
        '\'import sys; from structlin_nn.cli import main; sys.argv[0] = "structlin"; sys.exit(main())\' "$@"',
    }
    (folder / "bin").mkdir()
    (folder / "work").mkdir()
    (folder / "work" / "benchmarks").symlink_to(ROOT / "benchmarks")
    for name, line in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        (folder / "bin" / name).chmod(0o755)
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "MPLBACKEND": "Agg",
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(Path(spec.origin).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-P", __file__, str(document)]
    pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run(command, cwd=folder / "work", env=environment, **pipes)


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_blocks_are_marked(document: Path) -> None:
    assert complaints(document) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_blocks_run(document: Path, tmp_path: Path) -> None:
    done = run_in_new_process(document, tmp_path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_readme_states_the_test_command_that_ci_runs() -> None:
    marked = [b for document in DOCUMENTS for b in read_blocks(document) if b.comment == TEST_COMMAND]
    assert [b for b in read_blocks(ROOT / "README.md") if b.comment == TEST_COMMAND] == marked
    assert len(marked) == 1, "README.md needs one shell block after the comment <!-- test-command -->"
    command = marked[0].text
    assert 'pip install -c constraints.txt ".[train,jax,vision,text,peers,test]"' in command
    assert re.search(r"\bpytest\b", command)
    environment = {**os.environ, "PYTHON": sys.executable}
    assert subprocess.check_output([ROOT / ".ci" / "run", "--print-command"], env=environment, text=True) == command


class TestThisTest:
    """A document with a fault in it has to fail."""

    @pytest.fixture
    def document(self, tmp_path: Path) -> Path:
        return tmp_path / "document.md"

    def test_session_is_shared_and_output_compared(self, document: Path, tmp_path: Path) -> None:
        document.write_text(
            "```python\nx = 2\n```\n"
            "~~~pycon\n>>> x + 1\n3\n>>> y = x\n~~~\n"
            "1. item\n   ```{code-block} sh\n   echo text > file\n   ```\n"
            "```console\n$ python -c 'print(open(\"file\").read())'\ntext\n```\n"
            "<!-- not run: installs packages -->\n```sh\npip install nothing\n```\n"
            "`echo quick`\n<!-- tested as: echo quick -->\n\n```sh\necho quick but long; exit 1\n```\n"
            "```python\nassert y == x and open('file').read() == 'text\\n'\n```\n",
            encoding="utf-8",
        )
        assert complaints(document) == []
        done = run_in_new_process(document, tmp_path)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("```python\nx = 1\nraise OSError\n```\n", 'document.md", line 3'),
            ("```pycon\n>>> 1 + 1\n3\n```\n", "document.md:2: the output is not what the document shows"),
            ("```sh\nfalse | true\ntrue\n```\n", "document.md:2: exit code 1"),
            ("```console\n$ false\n```\n", "document.md:2: exit code 1"),
            ("```sh\nstructlin no-such-command\n```\n", "document.md:2: exit code"),
        ],
    )
    def test_failures_are_seen(self, text: str, message: str, document: Path, tmp_path: Path) -> None:
        document.write_text(text, encoding="utf-8")
        done = run_in_new_process(document, tmp_path)
        assert done.returncode != 0
        assert message in done.stderr

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("```\nx\n```\n", "language ''"),
            ("<!-- not run: takes 3 minutes -->\n```python\nx\n```\n", "only a shell block"),
            ("<!-- not run: tedious -->\n```sh\nx\n```\n", "is a reason"),
            ("<!-- not run: installs packages -->\n```sh\nstructlin demo\n```\n", "is a reason"),
            ("<!-- tested as: structlin demo --quick -->\n```sh\nstructlin demo\n```\n", "does not say"),
            ("`true x`\n<!-- tested as: true x -->\n```sh\nstructlin demo\n```\n", "does not run 'true x'"),
            ("```sh\npip install x\n```\n", "has to be marked"),
            ("```console\nstructlin demo\n```\n", "no command"),
        ],
    )
    def test_unmarked_blocks_are_seen(self, text: str, message: str, document: Path) -> None:
        document.write_text(text, encoding="utf-8")
        (complaint,) = complaints(document)
        assert message in complaint

    def test_open_fence(self, document: Path) -> None:
        document.write_text("```sh\ntrue\n", encoding="utf-8")
        with pytest.raises(ValueError, match="never closed"):
            read_blocks(document)


if __name__ == "__main__":
    run_document(Path(sys.argv[1]).resolve())
