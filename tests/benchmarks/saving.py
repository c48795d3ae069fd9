# SPDX-License-Identifier: Apache-2.0
"""What a save costs: `python tests/benchmarks/saving.py --directory=DIR`, a directory here or `gs://BUCKET/DIR`.

Saves states of random float32 arrays of several sizes as training does. One JSON line a size: the time for which it
stands still in any case (checksums and the copy), that of writing and committing, for which it stands still with
`checkpoint.ahead_steps=0`, and of reading it back and comparing the checksums; medians of `--turns`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from llm_jepa_jax.checkpoint.manager import Checkpoints
from llm_jepa_jax.checkpoint.places import run_place
from llm_jepa_jax.config import CheckpointConfig

ARRAY_MIB = 16


def seconds(*moments: float) -> list[float]:
    return [after - before for before, after in zip(moments, moments[1:], strict=False)]


def main() -> None:
    """Saves and reads, one size after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", default="", help="empty: a temporary one")
    parser.add_argument("--mib", default="64,256,1024", help="sizes of the state")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for mib in map(int, options.mib.split(",")):
            place = run_place(options.directory or temporary) / f"saving-{mib}"
            key = jax.random.key(mib)
            shape = (ARRAY_MIB * 2**18,)
            state = {str(i): jax.random.normal(jax.random.fold_in(key, i), shape) for i in range(mib // ARRAY_MIB)}
            wanted = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
            )
            checkpoints, found = Checkpoints(place, CheckpointConfig(keep_last=1, keep_best=0)), []
            for turn in range(options.turns + 1):  # the first one compiles
                begun = time.monotonic()
                checkpoints.save(turn + 1, state, {})
                copied = time.monotonic()
                checkpoints.settle()
                written = time.monotonic()
                assert checkpoints.restore_latest(wanted) is not None
                found.append(seconds(begun, copied, written, time.monotonic()))
            checkpoints.close()
            copy, write, read = (round(statistics.median(times), 3) for times in zip(*found[1:], strict=True))
            print(json.dumps({"state_mib": mib, "copy_s": copy, "write_s": write, "read_s": read}), flush=True)


if __name__ == "__main__":
    main()
