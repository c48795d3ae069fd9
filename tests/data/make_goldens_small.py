# SPDX-License-Identifier: Apache-2.0
"""Makes `goldens_small.npz` and `.json` from the reference's recorded runs: `make_goldens_small.py SHARED_DIRECTORY`.

Hidden states, picked embeddings, draws and losses only, so that objectives are held to the published values where the
shared directory is absent. Keys are those of the whole set, but for `hidden` (attended places of the conversations, one
row behind the other) and `lengths`.
"""

import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
DATASET = "synth"
NUMBERS = ("jepa", "draws_start_end_full", "weights", "cosine", "curvature")


def select(arrays: dict, values: dict) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and numbers that are kept."""
    used = arrays[f"{DATASET}/attention_mask"] > 0
    kept = {"hidden": arrays[f"{DATASET}/hidden_2"][used], "lengths": used.sum(1)}
    names = [f"{DATASET}/user_start_end", f"{DATASET}/assistant_start_end", "linear_predictor_M"]
    embeddings = [f"{DATASET}/stp/random_span_mask_add"]
    embeddings += [f"{name}_cosine" for name in three_passes(values)]
    names += [f"{run}/{view}_embedding" for run in embeddings for view in ("user", "assistant")]
    kept |= {name: arrays[name] for name in names}
    one = {name: value for name, value in values["stp"].items() if "index_user" not in value or "_mask" in name}
    numbers = {"stp": {name: {key: v[key] for key in NUMBERS if key in v} for name, v in one.items()}}
    three = {name: value for name, value in values["finetune"].items() if "_three_" in name}
    numbers["finetune"] = {name: {"jepa": value["jepa"]} for name, value in three.items()}
    return kept, numbers


def three_passes(values: dict) -> list[str]:
    """Names of runs in three passes, without their distance."""
    return sorted({name.rsplit("_", 1)[0] for name in values["finetune"] if "_three_" in name})


def main(shared: pathlib.Path) -> None:
    arrays = dict(np.load(shared / "goldens" / "goldens.npz"))
    values = json.loads((shared / "goldens" / "goldens.json").read_text())
    kept, numbers = select(arrays, values)
    np.savez_compressed(HERE / "goldens_small.npz", **kept)
    (HERE / "goldens_small.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
