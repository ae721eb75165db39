"""An installed wheel works far from the checkout: README's example and `ringattn train`; and it holds the package alone."""

import json
import os
import re
import shlex
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
from spawn import finish

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SMALL = shlex.split("--seq-len 203 --dim 24 --heads 3 --kv-heads 3 --head-dim 8 --hidden-dim 32")


@dataclass
class Installed:
    wheel: Path
    environment: Path  # a virtual environment that has the wheel, and behind it the packages of this one without ringattn
    elsewhere: Path  # an empty directory to work in

    def start(self, *command: str) -> "subprocess.Popen[str]":
        """A command of the environment, without what a surrounding job or shell may have set."""
        unset = ("PYTHON", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(unset)} | {"OMP_NUM_THREADS": "1"}
        program = str(self.environment / "bin" / command[0])
        return subprocess.Popen(
            [program, *command[1:]],
            env=environment, cwd=self.elsewhere, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *command: str) -> tuple[str, str]:
        code, out, err = finish(self.start(*command), timeout=120)
        assert code == 0, err
        return out, err

    def torchrun(self, *command: str, ranks: int) -> tuple[str, str]:
        return self.run("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *command)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    source = _source(folder / "source")
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    subprocess.run([*pip, "--python", str(environment / "bin" / "python"), "install", *offline, str(wheel)], check=True)
    # torch and the others, behind the environment's own packages. A path in a .pth file is searched, but the .pth files in it
    # are not read, so that a ringattn which is installed there as editable is not metadata.
    (packages,) = environment.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    (folder / "elsewhere").mkdir()
    return Installed(wheel, environment, folder / "elsewhere")


def _source(folder: Path) -> Path:
    """A copy to build from: setuptools leaves files behind."""
    for name in ("ringattn", "launch", "tests", "benchmarks"):
        copytree(ROOT / name, folder / name, ignore=ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, folder)
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(installed: Installed) -> None:
    files = [Path(name) for name in zipfile.ZipFile(installed.wheel).namelist()]
    there = {str(path) for path in files if path.parts[0] == "ringattn"}
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "ringattn").rglob("*.py")} | {"ringattn/py.typed"}
    assert there == wanted
    assert {path.parts[0] for path in files} == {
        "ringattn",
        f"{installed.wheel.name.removesuffix('-py3-none-any.whl')}.dist-info",
    }


def test_metadata_says_what_a_user_needs(installed: Installed) -> None:
    show = "import json; from importlib.metadata import metadata; print(json.dumps(metadata('ringattn').json))"
    metadata = json.loads(installed.run("python", "-c", show)[0])
    assert (metadata["author"], metadata["license_expression"], metadata["requires_python"]) == (
        "ringattn developers",
        "Apache-2.0",
        ">=3.11",
    )
    assert {line.partition(">")[0] for line in metadata["requires_dist"] if "extra" not in line} == {"torch", "numpy"}
    assert {'tyro>=0.9; extra == "cli"', 'rich>=13; extra == "cli"'} <= set(metadata["requires_dist"])


def test_it_is_the_wheel_that_is_imported(installed: Installed) -> None:
    out, _ = installed.run("python", "-c", "import ringattn; print(ringattn.__file__)")
    assert Path(out.strip()).is_relative_to(installed.environment)


def test_the_example_of_the_readme_runs(installed: Installed) -> None:
    [example, *_] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (installed.elsewhere / "example.py").write_text(example)
    installed.torchrun("example.py", ranks=2)


def test_train_runs_alone(installed: Installed) -> None:
    """`ringattn train --steps 2` by itself: one rank, the default text and pictures."""
    out, err = installed.run("ringattn", "train", "--steps", "2", "--seq-len", "500")
    assert "1 ranks" in err and "step 2/2" in err and "throughput" in out
    run = installed.elsewhere / "runs" / "train"
    assert {path.name for path in run.iterdir()} == {"metrics.jsonl", "step_00000002", "loss.png", "timeline.png"}


def test_train_runs_under_torchrun(installed: Installed) -> None:
    _, err = installed.torchrun("-m", "ringattn", "train", "--steps", "2", *SMALL, "--no-plots", "--out", "two", ranks=2)
    assert "2 ranks" in err and "step 2/2" in err
    assert (installed.elsewhere / "two" / "metrics.jsonl").read_text().count("\n") == 2
