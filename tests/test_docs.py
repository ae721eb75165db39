"""Every Python block in the README and in docs/ runs as it stands, under torchrun."""

import re
from pathlib import Path

import pytest
from spawn import JITS, torch_extensions, torchrun

ROOT = Path(__file__).parent.parent
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{n}")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for n, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.timeout(JITS + 10)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_example_runs(block: str, tmp_path: Path) -> None:
    script, limit = tmp_path / "example.py", JITS if "deepspeed" in block else 50
    script.write_text(block)
    code, _, err = torchrun(str(script), ranks=4, timeout=limit, TORCH_EXTENSIONS_DIR=torch_extensions(tmp_path))
    assert code == 0, err


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 2


def test_the_readme_loop_fits_on_one_screen() -> None:
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
