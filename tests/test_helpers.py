"""What tests stand on: living ranks that start every run alike, commands in forked processes, and the order of a run."""

import ast
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import order
import pytest
import torch
import torch.distributed as dist
from spawn import RankFailure, finish, run_ranks, start, torchrun


def who(rank: int) -> tuple[int, float]:
    """The process, after a collective, and the first random number in it."""
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size()
    return os.getpid(), torch.randn(1).item()


def does(rank: int, code: str) -> None:
    exec(code)


def test_ranks_are_used_again_and_begin_alike() -> None:
    first = run_ranks(2, who)
    run_ranks(2, does, "import torch; torch.manual_seed(7); torch.distributed.new_group([0, 1])")
    assert run_ranks(2, who) == first
    apart = run_ranks(2, who, isolated=True)
    assert not {pid for pid, _ in apart} & {pid for pid, _ in first} and [x for _, x in apart] == [x for _, x in first]
    assert run_ranks(2, who) == first


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import torch; torch.set_default_dtype(torch.float64)",
        "import torch; torch.use_deterministic_algorithms(True)",
        "import torch; torch.set_grad_enabled(False)",
        "import os; os.environ['RINGATTN_TEST'] = '1'",
        "import threading, time; threading.Thread(target=time.sleep, args=(30,), daemon=True).start()",
        "import signal; signal.signal(signal.SIGTERM, print)",
        "import subprocess; does.child = subprocess.Popen(['sleep', '30'])",
        "import ringattn.plan.plan as plan; plan.Plan.rows = None",
        "import ringattn.kernels as kernels; kernels.get = None",
        "from ringattn.faults.watchdog import watch; watch()",
        "import torch.distributed as dist; dist.destroy_process_group(); import os; os.chdir('/')",
    ],
)
def test_ranks_that_a_run_has_changed_are_replaced(code: str) -> None:
    before = {pid for pid, _ in run_ranks(2, who)}
    run_ranks(2, does, code)
    assert not before & {pid for pid, _ in run_ranks(2, who)}


def test_a_rank_that_raises_or_dies_is_told_of_and_replaced() -> None:
    before = {pid for pid, _ in run_ranks(2, who)}
    with pytest.raises(RankFailure, match=r"(?s)--- rank 0: Traceback.*ZeroDivisionError"):
        run_ranks(2, does, "rank or 1 / rank")
    with pytest.raises(RankFailure, match="--- rank 1: died without a word, exit code 3"):
        run_ranks(2, does, "import os; rank and os._exit(3)")
    assert not before & {pid for pid, _ in run_ranks(2, who)}


SAYS = """
import atexit, os, sys
atexit.register(print, "the end")
print(__name__, sys.argv[1:], os.environ["COLOUR"], "pytest" in sys.modules, any("tests" in path for path in sys.path))
sys.stderr.write("a word")
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("fresh", [False, True])
def test_a_forked_command_is_like_one_in_its_own_interpreter(fresh: bool) -> None:
    actual = finish(start(["-c", SAYS, "7"], fresh=fresh, COLOUR="blue"), timeout=120)
    assert actual == (7, "__main__ ['7'] blue False False\nthe end\n", "a word")


@pytest.mark.parametrize("fresh", [False, True])
def test_signals_and_uncaught_errors_reach_a_command(fresh: bool) -> None:
    sleeping = start(["-c", "import time; time.sleep(100)"], fresh=fresh)
    assert sleeping.poll() is None
    sleeping.send_signal(signal.SIGTERM)
    assert finish(sleeping, timeout=20)[0] == -signal.SIGTERM
    code, _, err = finish(start(["-c", "1 / 0"], fresh=fresh), timeout=20)
    assert code == 1 and err.rstrip().endswith("ZeroDivisionError: division by zero")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, 2])
def test_a_command_that_hangs_shows_its_stacks_and_ends(ranks: int | None) -> None:
    hanging = start(["-c", "import time\ndef waits(): time.sleep(100)\nwaits()"], ranks=ranks)
    with pytest.raises(RankFailure, match=r"(?s)no end within 5 s.*in waits" + ".*in waits" * (ranks == 2)):
        finish(hanging, timeout=5)
    assert hanging.poll() is not None


VARIABLES = """
import os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
known = ("RANK", "WORLD", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL")
own = ("PORT", "RUN_ID", "ERROR_FILE")
values = {k: v for k, v in os.environ.items() if k.startswith(known) and not k.endswith(own)}
print(dist.get_rank(), sorted(values.items()))
"""


@pytest.mark.slow
def test_forked_ranks_get_what_torchrun_sets(tmp_path: Path) -> None:
    script = tmp_path / "variables.py"
    script.write_text(VARIABLES)
    forked, real = (sorted(torchrun(str(script), ranks=2, fresh=fresh)[1].splitlines()) for fresh in (False, True))
    assert len(forked) == 2 and forked == real


def test_when_a_forked_rank_fails_the_others_are_ended() -> None:
    begin = time.monotonic()
    code, _, err = torchrun("-c", "import os, time; time.sleep(100 * (os.environ['RANK'] == '1')); 1 / 0", ranks=2, timeout=60)
    assert code == 1 and "ZeroDivisionError" in err and "rank 1 (pid" in err
    assert time.monotonic() - begin < 50


def test_slow_tests_come_first_in_every_share() -> None:
    def item(name: str, slow: bool) -> SimpleNamespace:
        return SimpleNamespace(name=name, path=name[0], get_closest_marker=lambda _: slow or None)

    items = [item(f"{file}{n}", file in "ab") for file in "xaybz" for n in range(2)]
    order.spread(items, 2)  # type: ignore[arg-type]
    assert [i.name for i in items] == ["a0", "a1", "x0", "x1", "y0", "b0", "b1", "y1", "z0", "z1"]


def imported(rank: int, names: list[str]) -> list[str]:
    return [name for name in names if name not in sys.modules]


def test_the_fork_server_has_imported_what_ranks_need() -> None:
    """One import that fails, as of a module that has a new name, and every rank would silently import all for itself."""
    pytest.importorskip("transformers")
    source = (Path(__file__).parent / "support" / "preload.py").read_text()
    names = [node.names[0].name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)]
    assert len(names) > 5 and run_ranks(2, imported, ["tests.support.preload", *names], isolated=True) == [[], []]
