# SPDX-License-Identifier: Apache-2.0
"""What a task is: what is asked of a record, and what its answer is worth. Tasks are the files of `tasks/`.

There are three kinds, by what the model has to do: generate an answer, choose among options by their probability, or
say how probable the record itself is.
"""

import contextlib
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence

from llm_jepa_jax.config import EvalConfig
from llm_jepa_jax.data.records import Record
from llm_jepa_jax.data.sources import Source
from llm_jepa_jax.errors import UserError
from llm_jepa_jax.eval import tasks
from llm_jepa_jax.text.chat import Message
from llm_jepa_jax.text.thoughts import without_thought


class Skip(Exception):  # noqa: N818 - not an error: a record that the task does not ask
    """A record that a task cannot ask. Its text is the reason, under which such records are counted."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What an answer is worth."""

    word: str
    """`right`, `wrong`, `partly` (between them), `unparsed` (holds no answer of the form asked for) or `undecided`."""
    credit: float
    """0 to 1: what it adds to the score."""
    reason: str = ""


RIGHT = Verdict("right", 1.0)


def wrong(reason: str = "") -> Verdict:
    return Verdict("wrong", 0.0, reason)


def partly(credit: float, reason: str = "") -> Verdict:
    """A credit between 0 and 1."""
    return Verdict("right" if credit >= 1.0 else "partly" if credit > 0.0 else "wrong", credit, reason)


def unparsed(reason: str) -> Verdict:
    """The answer has not the form that could be right; no credit."""
    return Verdict("unparsed", 0.0, reason)


def undecided(reason: str) -> Verdict:
    """The limits of the test were reached; no credit, and counted apart."""
    return Verdict("undecided", 0.0, reason)


def before_the_answer(record: Record) -> tuple[Message, ...]:
    """All turns but the last."""
    return record.messages[:-1]


def the_answer(record: Record) -> str:
    """The content of the last turn, without a thought before it."""
    return without_thought(record.messages[-1].content)


Judge = Callable[[Record, str], Verdict]
"""A record and the answer given to it."""
Open = Callable[[EvalConfig, Sequence[Record]], contextlib.AbstractContextManager[Judge]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What every task has. `prompt` and `target` raise `Skip` for a record that cannot be asked."""

    name: str
    """Its name in `eval.tasks`, and of its score in the metrics."""
    summary: str
    """What its score is, in a line."""
    prompt: Callable[[Record], tuple[Message, ...]] = dataclasses.field(default=before_the_answer, kw_only=True)
    target: Callable[[Record], str] = dataclasses.field(default=the_answer, kw_only=True)
    check: Callable[[EvalConfig, Source], None] | None = dataclasses.field(default=None, kw_only=True)
    """Raises UserError, before anything is trained or asked, where the configuration or the records lack something."""


@dataclasses.dataclass(frozen=True)
class AnswerTask(Task):
    """The model answers, and its text is judged."""

    judge: Callable[[str, str], Verdict] | None = None
    """(answer, target) to verdict."""
    open: Open | None = dataclasses.field(default=None, kw_only=True)
    """In place of `judge` where judging needs the whole record, all records, or resources: a context that gives a
    `Judge`."""
    threads: int = dataclasses.field(default=1, kw_only=True)
    """How many answers are judged at a time."""

    @contextlib.contextmanager
    def session(self, config: EvalConfig, records: Sequence[Record]) -> Iterator[Judge]:
        """Judges answers to these records."""
        if self.open is None:
            assert self.judge is not None
            judge = self.judge
            yield lambda record, answer: judge(answer, self.target(record))
        else:
            with self.open(config, records) as opened:
                yield opened


@dataclasses.dataclass(frozen=True)
class ChoiceTask(Task):
    """The most probable of a record's options is its answer; right if it is the target."""

    options: Callable[[Record], tuple[str, ...]] = dataclasses.field(kw_only=True)
    """Whole answers, each of which the target may be."""


@dataclasses.dataclass(frozen=True)
class LikelihoodTask(Task):
    """exp of the mean of −log p over tokens; plain text is asked too."""

    targets: str = dataclasses.field(kw_only=True)
    """Which tokens: `assistant` or `all`, as `objective.ntp.targets` has them."""


AnyTask = AnswerTask | ChoiceTask | LikelihoodTask


def all_tasks() -> dict[str, AnyTask]:
    """Every task by name: the `TASKS` of every file of `tasks/`."""
    modules = (importlib.import_module(f"{tasks.__name__}.{m.name}") for m in pkgutil.iter_modules(tasks.__path__))
    return {task.name: task for module in modules for task in module.TASKS}


def find_tasks(names: str) -> tuple[AnyTask, ...]:
    """The tasks that `eval.tasks` names, in its order.

    Raises:
        UserError: a name is unknown or comes twice, or there is none.
    """
    known = all_tasks()
    wanted = [name.strip() for name in names.split(",")]
    for number, name in enumerate(wanted):
        if name not in known:
            raise UserError(f"config: `eval.tasks`={names!r} names {name!r}; use some of {', '.join(sorted(known))}")
        if name in wanted[:number]:
            raise UserError(f"config: `eval.tasks`={names!r} names {name!r} twice; leave one out")
    return tuple(known[name] for name in wanted)
