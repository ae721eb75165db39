"""The console script as a user meets it, in a process of its own; and the library without the packages of the command line."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from public import PUBLIC
from spawn import finish, start, torchrun

from ringattn import InputError, load_topology
from ringattn.cli import COMMANDS
from ringattn.cli.plan import _mask
from ringattn.diagnostics import doctor, selftest
from ringattn.kernels import Kernel, Reference
from ringattn.kernels.lse import Partial
from ringattn.sequence.mask import causal, documents, full, prefix_lm, sliding_window

MODEL = ["--world", "4", "--heads", "8", "--kv-heads", "2", "--head-dim", "64"]
NO_TORCH = """
import sys
class No:
    def find_spec(self, name, *rest):
        if name == 'torch': raise ImportError('no torch here')
sys.meta_path.insert(0, No())
"""
# What other projects bring, which may want tyro or rich for themselves.
OF_OTHERS = ("ringattn.integrations.transformers", "ringattn.integrations.trainer", "ringattn.integrations.deepspeed")
NO_CLI = "import sys; sys.modules.update(dict.fromkeys(['tyro', 'rich']))"
LIBRARY = """
import torch
import ringattn
from importlib import import_module
for name in {packages}:
    import_module(name)
plan = ringattn.make_plan(16, world=1, heads=2, head_dim=8)
x = torch.randn(1, 16, 2, 8, requires_grad=True)
ringattn.attention(x, x, x, plan).sum().backward()
print(plan.digest, x.grad.isfinite().all())
"""


def run(*arguments: str, before: str = "", timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """The console script; where torch must be missing, in an interpreter of its own."""
    code = f"{before}\nimport sys; sys.argv[0] = 'ringattn'\nfrom ringattn.cli import main; main()"
    command = ["-c", code, *arguments]
    ended, out, err = finish(start(command, fresh=bool(before), COLUMNS="160", PYTHONPATH=":".join(sys.path)), timeout)
    return subprocess.CompletedProcess(command, ended, out, err)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=str)
def test_help_needs_no_torch(command: tuple[str, ...]) -> None:
    ran = run(*command, "--help", before=NO_TORCH)
    assert ran.returncode == 0 and ran.stdout.startswith(f"usage: {' '.join(['ringattn', *command])}"), ran.stderr
    assert command or all(name in ran.stdout for name in COMMANDS)


def test_a_module_to_run_is_the_console_script() -> None:
    """`python -m ringattn`, with the words of the installed `ringattn`."""
    ran = [
        subprocess.run([*program, "plan", "--help"], capture_output=True, text=True, timeout=120, check=True).stdout
        for program in ([sys.executable, "-m", "ringattn"], [str(Path(sys.executable).with_name("ringattn"))])
    ]
    assert ran[0] == ran[1] and ran[0].startswith("usage: ringattn plan")


def test_a_reader_that_has_enough_causes_no_traceback() -> None:
    """As in `ringattn plan --help | head`."""
    command = [sys.executable, "-m", "ringattn", "plan", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(50) == 1
    process.stderr.close()


def test_no_command_and_one_that_does_not_exist() -> None:
    for command in ((), ("plam",)):
        ran = run(*command)
        assert ran.returncode == 2 and ran.stdout == "" and "plan, train, doctor" in ran.stderr, ran.stderr


def test_without_its_packages_the_command_line_names_them() -> None:
    ran = run("plan", "64", *MODEL, before=NO_CLI)
    assert ran.returncode == 2 and ran.stdout == "" and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("ringattn: tyro and rich cannot be imported") and "pip install 'ringattn[cli]'" in ran.stderr
    ran = run(before="import sys; sys.modules['rich'] = None; from ringattn.cli.train import main; main()")  # launch/train.py
    assert ran.returncode == 2 and "rich cannot be imported" in ran.stderr and "tyro" not in ran.stderr, ran.stderr


def test_the_library_works_without_them() -> None:
    packages = [name for name in PUBLIC if name not in OF_OTHERS]
    ran = subprocess.run(
        [sys.executable, "-c", f"{NO_CLI}\n{LIBRARY.format(packages=packages)}"], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0 and "tensor(True)" in ran.stdout, ran.stderr


def test_plan_compares_chooses_and_draws(tmp_path: Path) -> None:
    """Without torch, which planning must not need."""
    ran = run(
        "plan",
        "4096",
        *MODEL,
        "--topology",
        "pcie",
        "--top",
        "99",
        "--draw",
        f"{tmp_path}/plan.svg",
        before=NO_TORCH,
    )
    assert ran.returncode == 0, ran.stderr
    for word in (
        "candidates on pcie",
        "token_ring (direct)",
        "forward ms",
        "buffers MB",
        "digest ",
        "predicted on pcie",
        "step 0",
    ):
        assert word in ran.stdout, word
    assert (tmp_path / "plan.svg").read_text().lstrip().startswith("<")


def test_a_schedule_of_many_lines_is_left_to_the_picture() -> None:
    ran = run(
        "plan", "4096", "--world", "8", "--heads", "8", "--head-dim", "64", "--schedule", "ring", "--ulysses", "8", "--top", "1"
    )
    assert ran.returncode == 0, ran.stderr
    assert "--draw FILE.svg draws it" in ran.stdout and "step 1" not in ran.stdout and ran.stdout.count("\n") < 40


def test_plan_takes_what_make_plan_takes() -> None:
    flags = "--dtype bfloat16 --mask documents:0,1000,4096&window:512 --schedule token_ring --layout zigzag --kernel reference"
    ran = run("plan", "4096", *MODEL, *flags.split(), "--ulysses", "1", "--top", "1", "--draw-pass", "backward")
    assert ran.returncode == 0, ran.stderr
    assert "causal documents(2) & window(512,0) mask" in ran.stdout and "kernel reference" in ran.stdout
    assert "token_ring" in ran.stdout and "backward" in ran.stdout and "striped" not in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["--topology", "warp"], "topology='warp'; choose one of pcie"),
        (["--topology", "no/such.json"], "topology file no/such.json cannot be read"),
        (["--schedule", "spiral"], "schedule='spiral'"),
        (["--mask", "window:x"], "--mask window:x"),
        (["--ulysses", "3"], "ulysses=3"),
    ],
)
def test_errors_are_one_paragraph_and_status_2(arguments: list[str], output: str) -> None:
    ran = run("plan", "4096", *MODEL, *arguments)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.startswith("ringattn: ") and output in ran.stderr and ran.stderr.count("\n") == 1


def test_thousands_of_ranks_are_priced_by_closed_form() -> None:
    flags = "--world 4096 --heads 32 --kv-heads 8 --head-dim 128 --dtype bfloat16 --topology rails"
    ran = run("plan", "4194304", *flags.split(), before=NO_TORCH)
    assert ran.returncode == 0, ran.stderr
    assert "families on rails, zigzag, by closed form" in ran.stdout and "ulysses 32 x mesh" in ran.stdout
    ran = run("plan", "4194304", *flags.split(), "--ulysses", "2")
    assert ran.returncode == 2 and "add --schedule" in ran.stderr


def test_masks_have_names() -> None:
    assert _mask("full") == full() and _mask("causal") == causal() and _mask("prefix:7") == prefix_lm(7)
    assert _mask("window:9") == sliding_window(9) and _mask("window:9,2") == sliding_window(9, 2)
    assert _mask("documents:0,5,9 & window:3") == documents((0, 5, 9)) & sliding_window(3)


def test_doctor_finds_this_machine_fit() -> None:
    ran = run("doctor")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for word in ("torch", "gloo", "sdpa kernel, bfloat16", "GLOO_SOCKET_IFNAME", "free memory", "not under torchrun"):
        assert word in ran.stdout, word


def test_doctor_says_what_to_do() -> None:
    ran = run("doctor", before="import os; os.environ['RANK'] = '0'")
    assert ran.returncode == 1 and "WORLD_SIZE" in ran.stdout and "start every rank" in ran.stdout
    ran = run("doctor", before=NO_TORCH)
    assert ran.returncode == 2 and "pip install torch" in ran.stderr and "Traceback" not in ran.stderr


def test_doctor_tries_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose numbers are off, and one whose operator this torch does not have."""

    class Off(Reference):
        def forward(self, *args: Any) -> Partial:
            out, lse = super().forward(*args)
            return Partial(out + 0.1, lse)

    def missing(name: str) -> Kernel:
        raise AttributeError("'_OpNamespace' 'aten' object has no attribute 'attention'")

    for get, output in ((lambda name: Off() if name == "sdpa" else Reference(), "within 1e-01"), (missing, "has no attribute")):
        monkeypatch.setattr(doctor, "get", get)
        actual = [finding for finding in doctor.examine() if finding.what.startswith("sdpa")]
        assert len(actual) == 2 and all(output in f.outcome and "kernel='reference'" in f.hint for f in actual), actual


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernels": ["spiral"]}, "kernel='spiral'; choose one of"),
        ({"worlds": [0]}, "worlds=0; must be 1 or more"),
        ({"schedules": ["spiral"]}, "schedules='spiral'; choose one of ring"),
    ],
)
def test_selftest_says_what_it_cannot_try(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        selftest.run(**arguments)


def test_selftest_under_torchrun_refuses_how_to_simulate() -> None:
    """Which would do nothing there."""
    ran = run("selftest", "--worlds", "2", before="import os; os.environ.update(RANK='0', WORLD_SIZE='1')")
    assert ran.returncode == 2 and ran.stderr.startswith("ringattn: worlds=(2,): under torchrun ranks are real"), ran.stderr


def test_train_alone_is_one_rank_unless_a_launcher_started_several(monkeypatch: pytest.MonkeyPatch) -> None:
    from ringattn.cli.train import command

    for name in (*command.TORCHRUN, *command.OTHERS):
        monkeypatch.delenv(name, raising=False)
    assert command._alone()
    for name, value in (("RANK", "0"), ("SLURM_STEP_NUM_TASKS", "2"), ("OMPI_COMM_WORLD_SIZE", "4")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not command._alone()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert command._alone()


def test_probe_needs_ranks(tmp_path: Path) -> None:
    ran = run("probe", "--out", f"{tmp_path}/links.json")
    assert ran.returncode == 2 and "torchrun" in ran.stderr and "Traceback" not in ran.stderr
    assert not (tmp_path / "links.json").exists()


def test_probe_measures_what_plan_reads(tmp_path: Path) -> None:
    out = tmp_path / "loopback.json"
    code, output, err = torchrun("-m", "ringattn", "probe", "--out", str(out), "--megabytes", "1", "--repeats", "2", ranks=2)
    assert code == 0, err
    assert "to 1" in output and str(out) in output
    links = load_topology(out)
    assert (links.name, links.kind, links.world) == ("loopback", "matrix", 2)
    assert 1e-7 < links.latency(0, 1) < 1 and 1e6 < links.bandwidths[1][0] < 1e13 and 1e7 < links.flops < 1e15
    ran = run("plan", "512", "--world", "2", "--heads", "4", "--head-dim", "64", "--topology", str(out))
    assert ran.returncode == 0 and "candidates on loopback" in ran.stdout, ran.stderr
    ran = run("plan", "512", *MODEL, "--topology", str(out))
    assert ran.returncode == 2 and "describes 2 ranks and world=4" in ran.stderr
