"""Tables of a sweep: which model types are exact, in which cases, and which are refused and why."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers

from conformance.batches import CAUSAL

PREFACE = """# Which models of transformers run on shards

Made by `python benchmarks/conform.py --page docs/conformance.md`, with transformers {version}. Every model type of
`AutoModelForCausalLM` and `AutoModelForSeq2SeqLM` was built in a tiny configuration that has each kind of its layers, with all
weights random, and trained for one step: by one process with its own attention ("sdpa", or "eager" where there is none), and on
ranks with `attn_implementation="ringattn"`, `shard_batch` and `ringattn.nn.cross_entropy`.

- *exact*: the loss and the gradients of all weights are those of one process, to a relative 1e-9. Both compute in fp64
  throughout, so that only the order of sums differs: about 1e-14, as the tables say. A key too many, or a position off by one,
  is 1e-4 or more.
- *refused*: `InputError` or `PlanError` on every rank, before any number.
- anything else is a fault: wrong numbers, another error, ranks that disagree, a hang. Such a case fails the sweep.
- *none*: one process cannot do it either.

Cases, each on every number of ranks: *plain*, 2 sequences of 37 tokens (an encoder's have 29); *switched*, the same, with
`set_attn_implementation("ringattn")` after the model was made; *packed*, three documents in one sequence, by `position_ids`;
*padded right* and *left*, by `attention_mask`; *numbered*, padded left with the `position_ids` that generation makes;
*recomputed*, with gradient checkpointing (`use_reentrant=False`). What one process makes of a batch is what counts: where it
lets packed documents see each other, so do ranks, or they refuse. Names with a comma are types otherwise configured; BERT and
its kin were made decoders (`is_decoder=True`).
"""

Line = dict[str, Any]
ORDER = ("third", "refused", "exact", "none")  # of the worlds' outcomes of one case, the first of these is told
WIDTH = 400  # characters of a reason


def lines(path: Path) -> list[Line]:
    """The results in a file so far, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(folder: Path, page: Path | None = None) -> None:
    """Beside the results of each case, what they come to: summary.json; and the page for readers, if wanted."""
    results = lines(folder / "results.jsonl")
    (folder / "summary.json").write_text(json.dumps(summary(results), indent=1) + "\n")
    if page is not None:
        page.write_text(PREFACE.format(version=transformers.__version__) + "\n" + markdown(results))


def summary(results: list[Line]) -> list[dict[str, Any]]:
    """Of each type: its class, the outcome of each case over all worlds, what was said, and the largest error."""
    text_lines = []
    for (task, name), cases in by_type(results).items():
        words: dict[str, list[str]] = defaultdict(list)
        for case, measured in cases.items():
            for text in {line["text"] for line in measured if line["text"]}:
                words[text].append(case)
        error = worst(cases)
        first = next(iter(cases.values()))[0]
        entry = {"task": task, "type": name, "class": first.get("class"), "outcomes": outcomes(cases), "said": words}
        text_lines.append(entry | {"error": None if error != error else error})
    return text_lines


def by_type(results: Iterable[Line]) -> dict[tuple[str, str], dict[str, list[Line]]]:
    """(task, type) to case to the results of all worlds."""
    table: dict[tuple[str, str], dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in results:
        if line["kind"] != "note":
            table[line["task"], line["type"]][line["case"]].append(line)
    return table


def outcome(results: list[Line]) -> str:
    """Of one case over all worlds: what is refused on some number of ranks counts as refused."""
    kinds = {line["kind"] for line in results}
    return next(kind for kind in ORDER if kind in kinds)


def outcomes(cases: dict[str, list[Line]]) -> dict[str, str]:
    return {case: outcome(results) for case, results in cases.items()}


def reasons(cases: dict[str, list[Line]], kind: str) -> str:
    """What was said in the cases with this outcome, each text once."""
    measured: dict[str, list[str]] = defaultdict(list)
    for case, results in cases.items():
        for line in results:
            if line["kind"] == kind and case not in measured[cell(line["text"])]:
                measured[cell(line["text"])].append(case)
    if len(measured) == 1:
        return next(iter(measured))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in measured.items())


def cell(text: str) -> str:
    """A text that stands in one cell of a table."""
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= WIDTH else flat[:WIDTH] + " ..."


def markdown(results: list[Line]) -> str:
    """The whole report."""
    table = by_type(results)
    kinds = {key: outcomes(cases) for key, cases in table.items()}
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for key, measured in kinds.items():
        groups[group_of(set(measured.values()))].append(key)
    parts = [totals(table, kinds, groups)]
    for name, heading in HEADINGS.items():
        if groups[name]:
            parts.append(f"## {heading}\n\n" + rows(name, groups[name], table, kinds))
    parts += own_losses(results, {key for name in ("exact", "some") for key in groups[name]})
    return "\n\n".join(parts) + "\n"


def own_losses(results: list[Line], keys: set[tuple[str, str]]) -> list[str]:
    """Of the types that run, those whose own loss is not that of shifted labels."""
    text_lines = [
        f"{line['type']} ({line['task']})"
        for line in results
        if line["kind"] == "note" and (line["task"], line["type"]) in keys
    ]
    if not text_lines:
        return []
    text = "The loss that these models make of `labels` is not that of each row's logits and the label behind it,\nwhich"
    return [f"## Loss of their own\n\n{text} is what `shard_batch` gives targets for: {', '.join(text_lines)}."]


HEADINGS = {
    "third": "Neither exact nor refused",
    "exact": "Exact in every case",
    "some": "Exact in some cases, refused in others",
    "refused": "Refused in every case",
    "none": "Not run: one process cannot do it either",
}


def group_of(measured: set[str]) -> str:
    """Under which heading a type with these outcomes stands."""
    if "third" in measured:
        return "third"
    if measured <= {"exact", "none"} and "exact" in measured:
        return "exact"
    return "some" if "exact" in measured else "refused" if "refused" in measured else "none"


def totals(
    table: dict[tuple[str, str], dict[str, list[Line]]],
    kinds: dict[tuple[str, str], dict[str, str]],
    groups: dict[str, list[tuple[str, str]]],
) -> str:
    """How many types and cases came to what."""
    worlds = sorted({line["world"] for cases in table.values() for measured in cases.values() for line in measured} - {0})
    count = Counter(kind for measured in kinds.values() for kind in measured.values())
    text_lines = [
        f"{len(table)} pairs of type and task, on {', '.join(map(str, worlds))} ranks.",
        "",
        "| | exact in every case | exact in some, else refused | refused | third outcome | not run |",
        "|---|---|---|---|---|---|",
    ]
    for task in sorted({task for task, _ in table}):
        counts = [str(sum(key[0] == task for key in groups[name])) for name in ("exact", "some", "refused", "third", "none")]
        text_lines.append(f"| {task} | {' | '.join(counts)} |")
    text_lines += ["", f"Cases: {', '.join(f'{count[kind]} {kind}' for kind in ORDER)}."]
    return "\n".join(text_lines)


def rows(
    name: str,
    keys: list[tuple[str, str]],
    table: dict[tuple[str, str], dict[str, list[Line]]],
    kinds: dict[tuple[str, str], dict[str, str]],
) -> str:
    """A table of the types under one heading."""
    text_lines = []
    for task, model_type in keys:
        cases = table[task, model_type]
        first = next(iter(cases.values()))[0]
        head = f"| {model_type} | {first.get('class', '')} |"
        by_case = " | ".join(kinds[task, model_type].get(case, "") for case in CAUSAL)
        if name in ("refused", "none"):
            text_lines.append(f"{head} {reasons(cases, name)} |")
        elif name == "exact":
            text_lines.append(f"{head} {by_case} | {worst(cases):.0e} |")
        else:
            text_lines.append(f"{head} {by_case} | {reasons(cases, 'third' if name == 'third' else 'refused')} |")
    columns = "reason" if name in ("refused", "none") else " | ".join((*CAUSAL, "error" if name == "exact" else "reason"))
    width = 2 + columns.count("|") + 1
    return "\n".join([f"| type | class | {columns} |", "|" + "---|" * width, *text_lines])


def worst(cases: dict[str, list[Line]]) -> float:
    """The largest error of a loss or gradient in the exact cases."""
    errors = [line[name] for results in cases.values() for line in results if line["kind"] == "exact" for name in ERRORS]
    return max(errors, default=float("nan"))


ERRORS = ("loss_error", "grad_error")
