# SPDX-License-Identifier: Apache-2.0
"""Which answers one model got right and the other did not: from the lines that an evaluation leaves."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from scipy.stats import binomtest

from llm_jepa_jax.errors import UserError

FIXED, BROKEN, BOTH_RIGHT, BOTH_WRONG = "fixed", "broken", "both right", "both wrong"
Line = dict[str, Any]


def read_answers(path: pathlib.Path) -> list[Line]:
    """The lines of an evaluation's file, `eval/TASK-STEP.jsonl`.

    Raises:
        UserError: a line is not one of an evaluation that judges.
    """
    lines = []
    # Not splitlines: an answer may hold other line separators than the file's.
    for number, text in enumerate(path.read_text("utf-8").split("\n"), start=1):
        if not text:
            continue
        try:
            line = json.loads(text)
            wanted = ("record",) if line["verdict"] == "skipped" else ("record", "prompt", "answer", "target", "reason")
            complete = all(isinstance(line[key], str) for key in wanted)
        except (ValueError, KeyError, TypeError):
            complete = False
        if not complete:
            raise UserError(f"{path}:{number}: no judged answer; evaluate the run again with --mode=eval")
        lines.append(line)
    return lines


@dataclasses.dataclass(frozen=True)
class Change:
    """One record with both answers."""

    kind: str
    first: Line
    second: Line


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the second model made of the first one's answers, record by record."""

    first: str
    second: str
    changes: tuple[Change, ...]
    skipped: int
    """Records that at least one of them was not asked, or that could not be judged."""

    def of(self, kind: str) -> list[Change]:
        return [change for change in self.changes if change.kind == kind]

    def count(self, kind: str) -> int:
        return len(self.of(kind))

    @property
    def p(self) -> float:
        """McNemar's exact test (1947), two-sided: how probable so uneven a split of the records on which they differ
        is, where either is as likely to be the right one. 1 where they differ on none."""
        differing = self.count(FIXED) + self.count(BROKEN)
        return float(binomtest(self.count(FIXED), differing, 0.5).pvalue) if differing else 1.0

    def summary(self) -> dict[str, Any]:
        """Every number, as JSON."""
        kinds = (FIXED, BROKEN, BOTH_RIGHT, BOTH_WRONG)
        counts = {kind.replace(" ", "_"): self.count(kind) for kind in kinds}
        shares = {
            name: (self.count(BOTH_RIGHT) + self.count(kind)) / max(1, len(self.changes))
            for name, kind in (("share_right_first", BROKEN), ("share_right_second", FIXED))
        }
        both = {"first": self.first, "second": self.second, "asked": len(self.changes), "skipped": self.skipped}
        return both | counts | shares | {"mcnemar_p": self.p}

    def lines(self) -> Iterator[Line]:
        """One JSON object a record."""
        for change in self.changes:
            yield {
                "kind": change.kind, "record": change.first["record"], "prompt": change.first["prompt"],
                "target": change.first["target"],
                "answers": {self.first: change.first["answer"], self.second: change.second["answer"]},
                "reasons": {self.first: change.first["reason"], self.second: change.second["reason"]},
            }  # fmt: skip


def compare_answers(first: str, second: str, ours: Sequence[Line], theirs: Sequence[Line]) -> Comparison:
    """Both models' lines, which must be about the same records, in any order.

    Raises:
        UserError: they are not.
    """
    before, after = _by_record(ours), _by_record(theirs)
    if lone := next(iter(before.keys() ^ after.keys()), None):
        with_it, without = (first, second) if lone in before else (second, first)
        raise UserError(
            f"{with_it} answered {lone[0]}, {without} did not: their answers are not about the same records; "
            "pass --answers to ask both the same ones"
        )
    changes, skipped = [], 0
    for record, a in before.items():
        b = after[record]
        if "skipped" in (a["verdict"], b["verdict"]):
            skipped += 1
        elif (a["prompt"], a["target"]) != (b["prompt"], b["target"]):
            raise UserError(
                f"{record[0]}: {first} and {second} were asked other prompts or targets; the file has changed between "
                "their evaluations; pass --answers to ask both the same ones"
            )
        else:
            changes.append(Change(_kind(a["verdict"] == "right", b["verdict"] == "right"), a, b))
    return Comparison(first, second, tuple(changes), skipped)


def _by_record(lines: Sequence[Line]) -> dict[tuple[str, int], Line]:
    """Lines by where their record is from, and by how often it has come before: a file may be named twice."""
    seen: collections.Counter[str] = collections.Counter()
    found = {}
    for line in lines:
        found[line["record"], seen[line["record"]]] = line
        seen[line["record"]] += 1
    return found


def _kind(before: bool, after: bool) -> str:
    return (BOTH_RIGHT if after else BROKEN) if before else (FIXED if after else BOTH_WRONG)
