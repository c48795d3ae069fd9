# SPDX-License-Identifier: Apache-2.0
"""Which devices a point sees: each process of a sweep gets one, by its environment."""

import dataclasses
import re
import subprocess

from llm_jepa_jax.errors import UserError

MEMORY_SHARE = 0.9
"""Of a GPU's memory, for all processes on it."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """Those of one machine."""

    kind: str = ""
    """`cuda`, `tpu`, or nothing: every process sees all there are."""
    numbers: tuple[str, ...] = ()

    def environment(self, slot: int, jobs: int) -> dict[str, str]:
        """Variables of the process in one of `jobs` slots; slots are dealt to the devices in turn."""
        if not self.kind:
            return {}
        number = self.numbers[slot % len(self.numbers)]
        if self.kind == "tpu":
            one = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1"}
            return {"TPU_VISIBLE_CHIPS": number} | one
        together = -(-jobs // len(self.numbers))
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{MEMORY_SHARE / together:.3f}"} if together > 1 else {}
        return {"CUDA_VISIBLE_DEVICES": number} | share


def parse_devices(text: str) -> Devices:
    """`cuda:0,1`, `tpu:0,1,2,3`, or `cuda` for all that `nvidia-smi` lists; empty: not told apart.

    Raises:
        UserError: it is none of these.
    """
    if not text:
        return Devices()
    kind, _, numbers = text.partition(":")
    if text == "cuda":
        numbers = ",".join(_gpus())
    if kind not in ("cuda", "tpu") or not re.fullmatch(r"\d+(,\d+)*", numbers):
        raise UserError(f"--devices={text}: cuda, cuda:0,1 or tpu:0,1,2,3 is wanted")
    found = tuple(numbers.split(","))
    if len(set(found)) < len(found):
        raise UserError(f"--devices={text}: a device comes twice; --jobs says how many run at a time")
    return Devices(kind, found)


def _gpus() -> list[str]:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError("--devices=cuda: nvidia-smi lists no GPU here; name them, such as cuda:0,1") from error
    return re.findall(r"^GPU (\d+):", listed, re.MULTILINE)
