"""Real text that packages ship, cut into windows that do not overlap.

    almanack   a handbook on how research software is looked after, written 2024 to 2026: pip install --no-deps almanack
    python     the language reference behind Python's own help(), in prose with short examples: comes with Python
    bible      the King James Bible: apt-get install bible-kjv

The model was published in November 2024. It cannot have seen what was added to the almanack after that; Python's reference it
has probably seen, and much of the Bible it may know by heart, so that there a lost context costs least. Results are
kept apart by source for that reason.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer
from torch import Tensor


def windows(source: str, tokenizer: Tokenizer, number: int, length: int) -> Tensor:
    """int64 (number, length): windows spread evenly over the text of `source`, a key of `SOURCES`.

    Raises SystemExit where the package that carries it is missing, or its text is too short.
    """
    tokens = torch.tensor(tokenizer.encode(SOURCES[source]()).ids)
    if len(tokens) < number * length:
        raise SystemExit(
            f"{source} has {len(tokens)} tokens, room for {len(tokens) // length} windows of {length}, not {number}"
        )
    starts = torch.linspace(0, len(tokens) - length, number).long()
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def _almanack() -> str:
    try:
        package = distribution("almanack")
    except PackageNotFoundError:
        raise SystemExit("this text is missing: pip install --no-deps almanack") from None
    chapters = sorted(Path(str(package.locate_file(file))) for file in package.files or () if file.suffix == ".md")
    texts = [chapter.read_text() for chapter in chapters]
    return "\n\n".join(re.sub(r"^(```+).*?^\1\n", "", text, flags=re.DOTALL | re.MULTILINE) for text in texts)  # figures, code


def _python() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics))


def _bible() -> str:
    if not shutil.which("bible"):
        raise SystemExit("this text is missing: apt-get install bible-kjv")
    verses = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    return re.sub(r"^\w+:\d+ ", "", verses, flags=re.MULTILINE)


SOURCES = {"almanack": _almanack, "python": _python, "bible": _bible}
