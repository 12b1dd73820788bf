"""The pages agree with the tree: paths, make targets, commands and their options, the file list."""

import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
# The folders of which the file list in the README names every file.
LISTED_FOLDERS = ("configs", "data", "docs", "eval", "kernels", "model", "training")
GENERATED = (".venv/", "RUN/", "runs/", "prepared/", "pile/")  # not in the tree
OUR_PACKAGES = ("data", "eval", "kernels", "model", "training")
PROGRAMS = (
    "train.py", "data.prepare", "eval.perplexity", "eval.generate", "kernels.aot", "kernels.bench",
    "training.suggest", "training.bench", "eval.harness", "eval.compare", "eval.study",
    "eval.analysis", "eval.throughput", "model.delta", "model.export", "eval.convert",
    "eval.finetune", "eval.finetune.grid", "eval.finetune.table", "eval.finetune.ensemble",
)  # fmt: skip

each_page = pytest.mark.parametrize("page", sorted(PAGES))
run_again = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code_blocks(page: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", read(page), re.M | re.S)


def code_spans(page: str) -> list[str]:
    """The text between backticks, outside of code blocks."""
    text = re.sub(r"^```\w*\n.*?^```", "", read(page), flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def links(page: str) -> list[str]:
    """Targets of links to files, without their fragment."""
    found = re.findall(r"\]\(([^)\s]+)\)", read(page))
    return [target.partition("#")[0] for target in found if not re.match(r"https?:|#", target)]


def file_list() -> list[str]:
    """The block of the README's section Files."""
    section = re.search(r"^## Files\n+```\n(.*?)^```", read("README.md"), re.M | re.S)
    assert section, "README.md has no file list under `## Files`"
    return section[1].splitlines()


def command_lines(page: str) -> list[list[str]]:
    """The commands of a page's code, as words, without comments."""
    lines = [
        line
        for block in code_blocks(page)
        for line in block.replace("\\\n", " ").splitlines()
        if block.splitlines() != file_list()
    ]
    commands = []
    for line in (*lines, *code_spans(page)):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an apostrophe in text that is no command
            continue
        if words:
            commands.append(words)
    return commands


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """The train.py or module of ours that a command runs, and the arguments that it gets."""
    for index, word in enumerate(words):
        if word == "train.py" and index:
            return word, words[index + 1 :]
        if word == "-m" and index and words[index + 1].split(".")[0] in OUR_PACKAGES:
            return words[index + 1], words[index + 2 :]
    return None


def our_commands(page: str) -> Iterator[tuple[str, list[str]]]:
    for words in command_lines(page):
        command = ours(words)
        if command is not None:
            yield command


@cache
def help_of(program: str) -> str:
    """What a program prints for --help, which must exit with 0. In this process: importing torch
    takes seconds, and a program that is run as __main__ does the rest as if it were alone.
    """
    printed, code = io.StringIO(), None
    argv, sys.argv = sys.argv, [program, "--help"]
    try:
        with redirect_stdout(printed):
            if program == "train.py":
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        code = left.code
    finally:
        sys.argv = argv
    assert code == 0, f"{program} --help exits {code}"
    return printed.getvalue()


def knows(program: str, option: str) -> bool:
    """Whether an option is in a program's --help."""
    return bool(re.search(rf"(?<![\w.-]){re.escape(option)}(?![\w.-])", help_of(program)))


def tracked() -> list[str]:
    """Files under version control. Without git: everything that does not look generated."""
    try:
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        listed = []
    if listed:
        return [name for name in listed if (ROOT / name).is_file()]
    names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    skipped = re.compile(r"(^|/)(\.(?!ci/|gitignore)|__pycache__/)|^(runs|prepared|pile)/")
    return [name for name in names if not skipped.search(name)]


def named_paths(page: str) -> set[str]:
    """What in a page's code looks like a path in the tree."""
    folders = "|".join(re.escape(p.name) for p in ROOT.iterdir() if p.is_dir())
    words = {word.rstrip(",.;:") for command in command_lines(page) for word in command}
    words = {word.partition("=")[2] if word.startswith("--") else word for word in words}
    in_tree = re.compile(rf"(?:{folders})/[\w./*-]*|[\w./*-]+\.(?:py|ya?ml|md|toml)")
    return {
        word
        for word in words
        if in_tree.fullmatch(word) and not word.startswith(GENERATED) and word != "NAME.yaml"
    }


@each_page
def test_paths_exist(page: str) -> None:
    for path in named_paths(page):
        places = [path, f"configs/{path}"]  # --config takes the name of a file in configs/
        assert any(any(ROOT.glob(place.rstrip("/"))) for place in places), f"{page} names {path}"


@each_page
def test_links_lead_somewhere(page: str) -> None:
    for target in links(page):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


@each_page
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):(?!=)", read("Makefile"), re.M))
    for words in command_lines(page):
        if words[0] == "make":
            for word in words[1:]:
                assert "=" in word or word in targets, f"{page} names make {word}"


@each_page
@run_again
def test_commands_run_and_know_their_options(page: str) -> None:
    for program, arguments in our_commands(page):
        path = "train" if program == "train.py" else program.replace(".", "/")
        files = (ROOT / f"{path}.py", ROOT / path / "__main__.py")
        assert any(file.exists() for file in files), f"{page} runs {program}, which does not exist"
        help_of(program)
        for argument in arguments:
            option = argument.partition("=")[0]
            if option.startswith("--"):
                assert knows(program, option), f"{page}: {program} has no option {option}"


@each_page
@run_again
def test_options_in_the_text_exist(page: str) -> None:
    for words in command_lines(page):
        option = words[0].partition("=")[0]
        if re.fullmatch(r"--\w[\w.-]*", option):
            assert any(knows(program, option) for program in PROGRAMS), f"{page} names {option}"


@each_page
def test_training_commands_are_accepted(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Option values and configuration names too: the command is parsed as train.py parses it."""
    import train

    monkeypatch.chdir(ROOT)
    for program, arguments in our_commands(page):
        whole = "--config" in arguments and "NAME.yaml" not in arguments
        if program == "train.py" and whole:
            monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
            train.parse()


@each_page
def test_preparation_commands_are_accepted(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from data.prepare_config import parse_config

    monkeypatch.chdir(ROOT)
    for program, arguments in our_commands(page):
        if program == "data.prepare" and arguments and not {"--help", "..."} & {*arguments}:
            parse_config(arguments)


def listed_paths() -> set[str]:
    """The paths in the README's file list, folders with a slash at the end."""
    paths: set[str] = set()
    parents: list[str] = []
    for line in file_list():
        name, *description = line.split()
        assert description, f"README.md, file list: {name} has no description"
        depth, rest = divmod(len(line) - len(line.lstrip()), 2)
        assert not rest, f"README.md, file list: {name} is indented by an odd number"
        path = "".join(parents[:depth]) + name
        assert path not in paths, f"README.md, file list: {path} is there twice"
        paths.add(path)
        parents[depth:] = [name]
    return paths


def test_file_list_names_every_file_of_its_folders() -> None:
    there = {
        str(path.relative_to(ROOT))
        for folder in LISTED_FOLDERS
        for suffix in ("py", "yaml", "md", "sh")
        for path in (ROOT / folder).rglob(f"*.{suffix}")
        if path.name != "__init__.py"
    }
    listed = {path for path in listed_paths() if path.split("/")[0] in LISTED_FOLDERS}
    assert {path for path in listed if not path.endswith("/")} == there
    folders = {f"{Path(path).parent}/" for path in there}
    assert {path for path in listed if path.endswith("/")} == folders


def test_file_list_names_every_entry_of_the_root() -> None:
    listed = {path.split("/")[0] for path in listed_paths()}
    assert all((ROOT / name).exists() for name in listed), listed
    there = {name.split("/")[0] for name in tracked()} - {".gitignore", "README.md"}
    assert there <= listed


@cache
def tracked_texts() -> dict[str, str]:
    texts = {}
    for name in {*tracked(), *PAGES}:
        content = (ROOT / name).read_bytes()
        if b"\0" not in content:
            texts[name] = content.decode("utf-8", errors="replace")
    return texts


# Taken apart, so that this file does not hold what it looks for.
HOSTS = [
    "py" + "pi.org",
    "python" + "hosted.org",
    "download.py" + "torch.org",
    "ana" + "conda.org",
    "npm" + "js.org",
    "pypi.ngc.nv" + "idia.com",
]
HOST = re.compile("|".join(re.escape(host) for host in HOSTS), re.I)
MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:" + "|".join(["work", "root", "home", "tmp"]) + r")\b")


def test_no_registry_host_is_named() -> None:
    for name, text in tracked_texts().items():
        found = HOST.search(text)
        assert not found, f"{name} names the registry host {found and found[0]}"


def test_no_machine_path_is_named() -> None:
    for name, text in tracked_texts().items():
        found = MACHINE_PATH.search(text)
        assert not found, f"{name} names a path of one machine: {found and found[0]}"
