"""Everything one GPU can prove or break about ringattn, in ten minutes and one command:

    PYTHONPATH=. python benchmarks/gpu/run.py [--out DIR] [--stages a,b,c] [--minutes 10] [--device cpu]

Needs torch, Triton and this repository; nothing is installed. Each stage is a process of its own with a time limit of its own
and writes DIR/STAGE.json, so that one which breaks, hangs or dies costs only itself. The last step writes DIR/report.md.
`--device cpu` runs every stage small on a CPU. Exit status 1 if any stage failed or broke, 2 if nothing could be started.

    stages, with their seconds of a ten minute run:
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from stages import SHARES, WHAT  # noqa: E402  (beside this file)

ROOT = HERE.parents[1]
TAIL = 6000  # characters of a stage's output that are kept
# Seconds that a stage gets at least, since importing torch and starting CUDA are not a share of anything; and how far it may
# exceed what it was asked to take before it is killed.
LEAST, PATIENCE = 30.0, 1.5
BAD = ("failed", "broken")


def main() -> int:
    asked = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of `finally`, so that no stage lives on
    card = find_card(asked.device)
    if card is None:
        print("torch finds no CUDA device here; --device cpu runs every stage small on the CPU", file=sys.stderr)
        return 2
    out: Path = asked.out or HERE.parent / "results" / "gpu" / f"{time.strftime('%Y-%m-%d')}-{card}"
    out.mkdir(parents=True, exist_ok=True)
    begin, results = time.monotonic(), []
    for number, name in enumerate(asked.stages):
        left = asked.minutes * 60 - (time.monotonic() - begin)
        result = one_stage(name, asked, out, *seconds_for(asked.stages[number:], left))
        results.append(result)
        print(line(result), flush=True)
    summary = {"device": asked.device, "card": card, "minutes": asked.minutes, "seconds": time.monotonic() - begin}
    stages = [{key: r[key] for key in ("stage", "status", "seconds")} for r in results]
    (out / "run.json").write_text(json.dumps(summary | {"date": time.strftime("%Y-%m-%d"), "stages": stages}, indent=1) + "\n")
    print(table(results, time.monotonic() - begin))
    print(f"results in {out}{report(out)}")
    return int(any(result["status"] in BAD for result in results))


def arguments() -> argparse.Namespace:
    described = "\n".join(f"    {name:12} {SHARES[name]:4}  {what}" for name, what in WHAT.items())
    parser = argparse.ArgumentParser(description=f"{__doc__}{described}", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="by default benchmarks/results/gpu/DATE-CARD; stages run again replace their JSON"
    )
    parser.add_argument(
        "--stages", type=names, default=list(SHARES), help="names with commas between, in the order to run them"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of them; what it leaves no time for is skipped")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        *("--break", "--break-stage"),
        dest="broken",
        type=breakage,
        action="append",
        default=[],
        metavar="STAGE[:raise|hang|die]",
        help="to see that a broken stage is reported and the others go on",
    )
    return parser.parse_args()


def names(text: str) -> list[str]:
    outcomes = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in outcomes if name not in SHARES]
    if unknown or not outcomes:
        raise argparse.ArgumentTypeError(f"no stage {', '.join(unknown)}; there are {', '.join(SHARES)}")
    return outcomes


def breakage(text: str) -> tuple[str, str]:
    name, _, how = text.partition(":")
    if name not in SHARES or how not in ("", "raise", "hang", "die"):
        raise argparse.ArgumentTypeError(f"{text}; give one of {', '.join(SHARES)}, and perhaps :raise, :hang or :die")
    return name, how or "raise"


def find_card(device: str) -> str | None:
    """The GPU's name as part of a path, "cpu", or None where torch finds no GPU. Asked in a process of its own: this one stays
    without torch, whatever breaks."""
    if device == "cpu":
        return "cpu"
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    print(asked.stderr[-TAIL:], end="", file=sys.stderr)
    name = (asked.stdout.strip().splitlines() or [""])[-1]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or None


def seconds_for(stages: list[str], left: float) -> tuple[float, float]:
    """What the first of `stages` should take, and when it is killed, so that all of them fit into `left` seconds.

    Time that earlier stages did not use goes to those that follow.
    """
    share = left * SHARES[stages[0]] / sum(SHARES[name] for name in stages)
    return share, min(left, max(LEAST, PATIENCE * share))


def one_stage(name: str, asked: argparse.Namespace, out: Path, share: float, limit: float) -> dict[str, Any]:
    """Its JSON, as it stands in `out` afterwards, whatever became of the process."""
    path = out / f"{name}.json"
    path.unlink(missing_ok=True)
    if limit < min(LEAST, asked.minutes * 60) / 2:
        return save(path, empty(name, "skipped", asked.device, left_out=[f"no time was left: {max(0, limit):.0f} s"]))
    command = [sys.executable, str(HERE / "stage.py"), name, "--device", asked.device]
    command += ["--seconds", f"{share:.1f}", "--out", str(path)]
    for broken, how in asked.broken:
        command += ["--break", how] if broken == name else []
    begin = time.monotonic()
    code, output = supervised(command, limit)
    seconds = round(time.monotonic() - begin, 2)
    result = read(path) or empty(name, "running", asked.device)
    if result["status"] == "running":
        end = f"killed at its limit of {limit:.0f} s" if code is None else ended(code)
        result |= {"status": "broken", "failures": [*result["failures"], end]}
    return save(
        path, result | {"seconds": seconds, "share": round(share, 1), "limit": round(limit, 1), "output": output[-TAIL:]}
    )


def supervised(command: list[str], limit: float) -> tuple[int | None, str]:
    """Exit code, None where it was killed after `limit` seconds, and what it and its children printed. None survives."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as output:  # a pipe would stay open as long as any child does
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_all(process)
        output.seek(0)
        return code, output.read().replace(f"{ROOT}{os.sep}", "").replace(sys.prefix, "PREFIX")


def end_all(process: subprocess.Popen[bytes]) -> None:
    """Kills the process, its group, and children that have left the group."""
    apart = descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in apart:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(child) for child in listed.read_text().split()] if listed.exists() else []
    return children + [d for child in children for d in descendants(child)]


def ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} before it was done"
    with contextlib.suppress(ValueError):
        return f"died of {signal.Signals(-code).name}"
    return f"died of signal {-code}"


def empty(name: str, status: str, device: str, **more: Any) -> dict[str, Any]:
    result = {"stage": name, "status": status, "seconds": 0.0, "device": device, "figures": {}, "failures": []}
    return result | {"goals": [], "left_out": []} | more


def read(path: Path) -> dict[str, Any] | None:
    try:
        outcomes: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return outcomes


def save(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def line(result: Mapping[str, Any]) -> str:
    words = result["failures"][:3] or result["left_out"][:1]
    more = f" (and {len(result['failures']) - 3} more)" if len(result["failures"]) > 3 else ""
    return f"{result['stage']:12} {result['status']:15} {result['seconds']:6.1f} s  {'; '.join(words)}{more}".rstrip()


def table(results: list[dict[str, Any]], seconds: float) -> str:
    lines = ["", f"{'stage':12} {'status':15} {'seconds':>7}  {'failures':>8}  goals met"]
    for result in results:
        met = f"{sum(goal['met'] for goal in result['goals'])} of {len(result['goals'])}" if result["goals"] else ""
        lines.append(
            f"{result['stage']:12} {result['status']:15} {result['seconds']:7.1f}  {len(result['failures']):8}  {met}".rstrip()
        )
    bad = [result["stage"] for result in results if result["status"] in BAD]
    return "\n".join([*lines, f"{seconds:.0f} s; " + (f"not right: {', '.join(bad)}" if bad else "nothing failed or broke")])


def report(out: Path) -> str:
    """Tables and pictures are the last step. They can be made again from the JSONs, so an error here is only said."""
    try:
        import report as writer

        return f"; tables in {writer.write(out)}"
    except Exception as error:
        return f"; no report could be made of them ({type(error).__name__}: {error})"


if __name__ == "__main__":
    sys.exit(main())
