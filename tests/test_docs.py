"""README and docs/ point at what exists."""

import inspect
import re

import pytest

import train_cls
from tests.runs import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    for link in links:
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_flags_that_are_named_exist(page):
    """docs/LOG.md is history and may name what is gone."""
    if page.name == "LOG.md":
        return
    text = page.read_text()
    for path in re.findall(
        r"\b((?:grpo|models|rewards|data|demo|tests|benchmarks)/[\w/]+\.py)", text
    ):
        assert (ROOT / path).is_file(), path
    code = "".join(
        path.read_text()
        for folder in (
            "grpo/flags",
            "grpo/report",
            "data",
            "demo",
            "benchmarks",
            "benchmarks/gpu",
            ".",
        )
        for path in (ROOT / folder).glob("*.py")
    )
    ours = set(re.findall(r"^    (\w+): .*= flag\(", code, flags=re.MULTILINE))
    ours |= set(re.findall(r'"--(\w+)"', code)) | {"help", "config"}
    ours |= set(re.findall(r"^\+    (\w+): .*= flag\(", text, flags=re.MULTILINE))  # of a diff
    others = {
        "nproc_per_node",
        "nnodes",
        "rdzv_backend",
        "rdzv_endpoint",
        "max_restarts",
    }  # torchrun
    others |= {"shutdown", "signals"}  # torchrun's --shutdown-timeout and --signals-to-handle
    others |= {"no", "target"}  # pip's --no-deps and --target
    others |= {"git", "emulated"}  # a diff's first line, pytest's --emulated-gpu
    elsewhere = set(re.findall(r'^    "(\w+)": "', code, flags=re.MULTILINE))
    for name in re.findall(r"--([a-z]\w+)", text):
        known = ours | others | (elsewhere if page.name == "from-visual-rft.md" else set())
        assert name in known, f"--{name}"


README = (ROOT / "README.md").read_text()


def test_the_loop_in_readme_stands_in_the_script():
    """Its lines, in their order; what is left out is bookkeeping."""
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    script = iter(line.strip() for line in inspect.getsource(train_cls.train).splitlines())
    for line in block.splitlines():
        assert any(there.startswith(line.strip()) for there in script), line


def test_readme_is_short_and_counts_its_rooms_well():
    assert README.count("\n") <= 128
    rooms = re.findall(r"^\| (\[.*?) \| ([\d,]+) \|", README, flags=re.MULTILINE)
    assert len(rooms) >= 6
    for links, said in rooms:
        paths = [ROOT / path for path in re.findall(r"\]\((.*?)\)", links)]
        files = [
            f
            for path in paths
            for f in (path.rglob if path.name == "models" else path.glob)("*.py")
        ]
        lines = sum(len(file.read_text().splitlines()) for file in files)
        assert lines == pytest.approx(int(said.replace(",", "")), rel=0.05), f"{links}: {lines}"
