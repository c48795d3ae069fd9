# SPDX-License-Identifier: Apache-2.0
"""A write that failed is said once, by whoever catches it, and not by every thread that took part in it."""

import logging
import sys
import warnings
from typing import Any

LATE_WRITE = "Event loop is closed"
"""What TensorStore raises, where nobody can catch it, for each write that ends after the first failed one."""
MEANT_WAIT = "Waiting for previous save to complete"


def quiet_failed_writes() -> None:
    """For a whole program: the error reaches `Checkpoints.save` or `.wait`; its echoes, at any time, are left out."""
    logging.getLogger("absl").addFilter(_is_not_orbax_stack)
    # Training waits for saves on purpose (`checkpoint.ahead_steps`); Orbax advises against it at every one.
    logging.getLogger("absl").addFilter(lambda record: not record.getMessage().startswith(MEANT_WAIT))
    logging.getLogger("asyncio").addFilter(lambda record: "was never retrieved" not in record.getMessage())
    # Writes that had not begun when another one failed; they are Orbax's and TensorStore's, this package has none.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _show_unless_late


def _is_not_orbax_stack(record: logging.LogRecord) -> bool:
    return record.exc_info is None or "orbax" not in record.pathname


def _show_unless_late(unraisable: Any) -> None:
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == LATE_WRITE):
        sys.__unraisablehook__(unraisable)
