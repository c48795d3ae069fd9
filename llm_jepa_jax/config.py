# SPDX-License-Identifier: Apache-2.0
"""The one schema: every configuration key once, with its default, unit and meaning.

At the command line a configuration is an `ml_collections.ConfigDict` (`base_config()` changed by a preset and by
`--config.a.b=value` overrides). Below it is the frozen `Config` that `freeze()` makes. Cross-field checks live in
`resolve.py`. `python -m llm_jepa_jax.config` prints `docs/config.md`.
"""

import dataclasses
from typing import Any

import ml_collections

from llm_jepa_jax.eval_config import EvalConfig
from llm_jepa_jax.lora_config import LoraConfig
from llm_jepa_jax.objective_config import ObjectiveConfig
from llm_jepa_jax.schema import describe_section, freeze_section, key, section


@dataclasses.dataclass(frozen=True)
class TextConfig:
    tokenizer: str = key(
        "",
        "a checkpoint's directory or its `tokenizer.json`, with its chat template, or a SentencePiece `.model` file "
        "with reserved pieces; empty: one is trained on the training split",
    )
    chat_template: str = key(
        "",
        "Jinja file in place of the checkpoint's chat template, or `plain` (`User:` and `Assistant:` lines) for one "
        "without; empty: its own",
    )
    vocab_size: int = key(1024, "size of a tokenizer trained here, reserved ids included", "pieces")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    train: str = key(
        "synthetic",
        "`synthetic` (the embedded corpus), or JSONL files and directories of shards: `a.jsonl,DIR*0.5`; "
        "`*w`: copies of each record an epoch",
    )
    eval: str = key(
        "", "as `data.train`; empty: the corpus's own test split, or `data.eval_share` held out of the training files"
    )
    eval_share: float = key(
        0.05, "share of the training records held out when `data.eval` is empty and `data.train` is files"
    )
    synthetic_train: int = key(10000, "size of the embedded corpus's training split", "records")
    synthetic_eval: int = key(1000, "size of the embedded corpus's test split", "records")
    layout: str = key(
        "separate",
        "how views lie in rows: `separate` packs them beside their conversation, `shared` reads the text view inside "
        "the conversation and packs the code view alone, `padded` is `separate` with one example in a row",
        choices=("separate", "shared", "padded"),
    )
    pairs: str = key(
        "last", "a conversation's pairs: its `last` user turn and the answer, or all `turns`", choices=("last", "turns")
    )
    text_views: str = key(
        "continuation",
        "views of plain text, cut anew every epoch: a prefix and its `continuation` to the end; two `adjacent` spans "
        "of equal length; a `sentence` and the next one",
        choices=("continuation", "adjacent", "sentence"),
    )
    row_length: int = key(512, "length of a packed row", "tokens")
    rows_per_step: int = key(32, "rows of one optimizer step, over all devices and micro-batches", "rows")
    row_buckets: int = key(
        0,
        "row lengths in use: `data.row_length`, its half, its quarter, …, with as many more rows a step; short "
        "examples go to short rows, and each length has its own compiled step. 1: one length; 0: as many as pay",
        "lengths",
    )
    shuffle: bool = key(True, "draw a new order every epoch from (`seed`, epoch)")
    max_dropped_share: float = key(
        0.01, "share of records that may be dropped for not fitting `data.row_length` before the run refuses to start"
    )
    target_slots: int = key(0, "next-token target slots a row; 0: sized from the data", "slots")
    pair_slots: int = key(0, "JEPA pair slots a row; 0: sized from the data", "slots")
    workers: int = key(0, "Grain worker processes; 0: rows are built in the training process", "processes")
    prefetch: int = key(2, "steps whose rows are built ahead, by each worker process where there are any", "steps")
    cache_dir: str = key(
        "~/.cache/llm_jepa_jax", "where trained tokenizers and tokenised files are cached by content hash"
    )


@dataclasses.dataclass(frozen=True)
class InitConfig:
    checkpoint: str = key(
        "",
        "what the weights start from: a run's directory (its newest checkpoint), a directory with a published model's "
        "config.json and safetensors, its id on the Hugging Face hub, or either directory in a store "
        "(`gs://BUCKET/DIR`); empty: random weights. Keys of `model` left at their defaults are then the checkpoint's, "
        "and others must agree with it",
    )
    new_rows: str = key(
        "mean",
        "how rows of tokens that the checkpoint does not have start: `mean` of its rows; `normal` (`model.init_std`)",
        choices=("mean", "normal"),
    )
    step: int = key(0, "which checkpoint of a run; 0: its newest", "step")


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    kind: str = key(
        "llama3",
        "`llama3` (Llama 3.1) and `yarn` (YaRN) stretch long wavelengths alone, `linear` all of them",
        choices=("llama3", "linear", "yarn"),
    )
    factor: float = key(1.0, "what wavelengths are stretched by; 1: off")
    low_freq_factor: float = key(1.0, "llama3: wavelengths above original_max_positions / this are divided by `factor`")
    high_freq_factor: float = key(4.0, "llama3: wavelengths below original_max_positions / this are kept")
    original_max_positions: int = key(8192, "llama3, yarn: context length before scaling", "tokens")
    beta_fast: float = key(32.0, "yarn: wavelengths that turn this often in the original context, or oftener, are kept")
    beta_slow: float = key(1.0, "yarn: wavelengths that turn this often, or less often, are stretched in full")
    truncate: bool = key(True, "yarn: the two bounds are moved out to whole frequencies")
    attention_factor: float = key(0.0, "yarn: factor of rotated queries and of keys; 0: 0.1 · ln(`factor`) + 1")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = key(0, "ids that the model knows; 0: the tokenizer's size", "tokens")
    vocab_multiple: int = key(
        128,
        "embedding and head are stored with a multiple of so many rows, raised to one of `mesh.tensor`; those behind "
        "`model.vocab_size` are zeros without probability or gradient, and never exported",
        "tokens",
    )
    embed_dim: int = key(192, "width of the residual stream")
    num_layers: int = key(6, "decoder blocks")
    num_heads: int = key(6, "query heads of a layer, or the most where layers differ")
    num_kv_heads: int = key(3, "key and value heads of a layer, or the most; divides `model.num_heads`")
    head_dim: int = key(32, "width of a head; even")
    mlp_dim: int = key(512, "hidden width of the MLP, or the widest")
    layer_heads: tuple[int, ...] = key((), "query heads layer by layer, such as (4,6); empty: all have `num_heads`")
    layer_kv_heads: tuple[int, ...] = key((), "key and value heads layer by layer; empty: all have `num_kv_heads`")
    layer_mlp_dims: tuple[int, ...] = key((), "hidden width of the MLP layer by layer; empty: all have `mlp_dim`")
    max_positions: int = key(8192, "longest segment the model accepts", "tokens")
    rope_theta: float = key(500000.0, "base of the rotary frequencies")
    rope_scaling: RopeScalingConfig = section(RopeScalingConfig, "rotary scaling")
    rope_share: float = key(1.0, "share of each head's width that is rotated, its first part")
    local_rope_theta: float = key(0.0, "base of the unscaled frequencies of windowed layers; 0: those of all layers")
    window: int = key(0, "tokens that a windowed layer sees, its own included; 0: no layer has a window", "tokens")
    window_pattern: str = key("L", "repeated over the layers: `L` (local) has the window, `G` (global) has not")
    block: str = key(
        "sequential",
        "the MLP reads what attention gave (`sequential`), or both read the same norm (`parallel`)",
        choices=("sequential", "parallel"),
    )
    norm: str = key(
        "rms",
        "RMSNorm (`rms`), RMSNorm with scales stored less 1 (`rms_plus_one`), or LayerNorm with biases (`layer`)",
        choices=("rms", "rms_plus_one", "layer"),
    )
    norm_placement: str = key(
        "pre",
        "norms before attention and MLP (`pre`), on what they give (`post`), or `both`; a parallel block has `pre`",
        choices=("pre", "post", "both"),
    )
    norm_eps: float = key(1e-5, "epsilon of norms")
    qk_norm: str = key(
        "none",
        "norm of queries and keys before the rotation: of each `head`, or of all heads together (`full`)",
        choices=("none", "head", "full"),
    )
    qkv_bias: bool = key(False, "queries, keys and values have biases")
    out_bias: bool = key(False, "what attention gives has a bias")
    mlp_bias: bool = key(False, "the MLP's matrices have biases")
    mlp_gated: bool = key(True, "the MLP's hidden layer is activation(gate) · up; else activation(up)")
    activation: str = key(
        "silu",
        "of the MLP; `gelu_tanh` is the approximation by tanh",
        choices=("silu", "gelu", "gelu_tanh"),
    )
    score_width: float = key(0.0, "attention scores are divided by its square root; 0: by that of `model.head_dim`")
    attention_soft_cap: float = key(0.0, "attention scores become cap · tanh(scores / cap); 0: off")
    scale_embeddings: bool = key(False, "embeddings are multiplied by the square root of `model.embed_dim`")
    tie_embeddings: bool = key(True, "the head is the transposed embedding")
    head_bias: bool = key(False, "logits have biases")
    logit_soft_cap: float = key(0.0, "logits become cap · tanh(logits / cap); 0: off")
    init_std: float = key(0.02, "standard deviation of the initial weights")
    family: str = key("", "the `model_type` that an export writes; empty: the first family that can say this model")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding, padding included."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same shape."""
        return not (self.layer_heads or self.layer_kv_heads or self.layer_mlp_dims)

    def layer(self, number: int) -> "ModelConfig":
        """The uniform model whose layers are all like this one."""
        own = {key: getattr(self, by_layer) for by_layer, key in BY_LAYER.items()}
        changes: dict[str, Any] = {key: values[number] for key, values in own.items() if values}
        return dataclasses.replace(self, **changes | dict.fromkeys(BY_LAYER, ()))


BY_LAYER = {"layer_heads": "num_heads", "layer_kv_heads": "num_kv_heads", "layer_mlp_dims": "mlp_dim"}
"""Keys of `ModelConfig` that say a size layer by layer, and the keys that say it of all."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    slices: int = key(
        -1,
        "slices (or groups of devices with slow links in between), each with a copy of the parameters: rows are cut "
        "over them, and gradients are added up over their links once a step; every other axis is inside one. -1: what "
        "TPUs say of themselves, 1 elsewhere",
        "slices",
    )
    data: int = key(-1, "data-parallel axis; -1 fills with the devices left", "devices")
    fsdp: int = key(1, "axis over which parameters and optimizer state are sharded, and the batch too", "devices")
    context: int = key(
        1,
        "axis over which the tokens of a row are cut, for rows too long for one device; parameters are stored over it "
        "as over `fsdp`. It divides `data.row_length`",
        "devices",
    )
    tensor: int = key(1, "axis over which heads, mlp and vocabulary are sharded", "devices")


@dataclasses.dataclass(frozen=True)
class OptConfig:
    learning_rate: float = key(2e-3, "peak learning rate of AdamW")
    schedule: str = key("cosine", "shape after the warm-up", choices=("cosine", "linear", "constant"))
    warmup_steps: int = key(50, "linear warm-up to the peak", "steps")
    final_scale: float = key(0.0, "learning rate at the last step as a share of the peak (cosine, linear)")
    weight_decay: float = key(0.1, "decoupled weight decay; never on norms and biases")
    clip_norm: float = key(1.0, "clip the gradient to this global norm; 0: off")
    beta1: float = key(0.9, "decay of the first moment")
    beta2: float = key(0.95, "decay of the second moment")
    eps: float = key(1e-8, "epsilon of AdamW")
    first_moment_dtype: str = key(
        "float32", "type of the first moment; bfloat16 saves 2 bytes a parameter", choices=("float32", "bfloat16")
    )
    second_moment: str = key(
        "full",
        "`full`: one value a parameter (AdamW, `beta2`); `factored`: one a row and one a column of each matrix "
        "(Adafactor), which saves 4 bytes a parameter",
        choices=("full", "factored"),
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    num_steps: int = key(0, "optimizer steps; 0: from `train.num_epochs`", "steps")
    num_epochs: int = key(4, "passes over the training records; 0: from `train.num_steps`", "epochs")
    micro_batches: int = key(1, "parts a step's rows are cut into; gradients are added by weight")
    remat: str = key(
        "none",
        "what the backward pass recomputes: `none`, `dots` (keeps matmul outputs), `hidden` (of those all but the "
        "MLP's hidden layer), `full` (keeps block inputs)",
        choices=("none", "dots", "hidden", "full"),
    )
    attention: str = key(
        "auto",
        "what computes attention in training steps: `xla` runs everywhere, `splash` on TPUs, `triton` on GPUs; `auto` "
        "takes the kernel of the mesh's devices where it can do the shapes, else `xla`",
        choices=("auto", "xla", "splash", "triton"),
    )
    dtype: str = key("float32", "compute type", choices=("float32", "bfloat16"))
    param_dtype: str = key("float32", "type of parameters, and of the second moment", choices=("float32", "bfloat16"))
    max_skipped: int = key(10, "non-finite updates in a row after which the run stops", "steps")
    hang_seconds: float = key(
        1800.0,
        "a step, with its wait for data, or a save that takes longer counts as hung: the log shows where every thread "
        "stands; 0: never",
        "seconds",
    )
    exit_on_hang: bool = key(
        False, "a hung process ends (exit code 75), so that its launcher starts the run again; off: it only tells"
    )
    profile_start: int = key(0, "first step of a profiler trace into `profile/`; 0: off", "step")
    profile_steps: int = key(3, "length of the profiler trace", "steps")
    compiler_options: str = key(
        "auto",
        "`auto` compiles the step with XLA's options for the kind of device (`parallel/compiler_options.py`; CPUs have "
        "none), `none` without",
        choices=("auto", "none"),
    )
    compile_cache: str = key("~/.cache/llm_jepa_jax/xla", "directory of XLA's persistent compile cache; empty: off")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = key(200, "save period; the last step is always saved; 0: only the last", "steps")
    ahead_steps: int = key(
        0,
        "how far training goes on while a checkpoint is being written; a kill loses at most `every_steps` + "
        "`ahead_steps` steps. 0: training waits until it is on disk",
        "steps",
    )
    keep_last: int = key(2, "newest checkpoints kept")
    keep_best: int = key(1, "checkpoints kept by best score of the first of `eval.tasks`, beside the newest")
    verify: bool = key(True, "compare what a run goes on from with the checksums of what was saved")
    retry_seconds: float = key(
        60.0,
        "how long the last save is tried again where the disk refuses it, with growing pauses; an earlier one is tried "
        "again at the next period",
        "seconds",
    )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every_steps: int = key(10, "period of a metrics line", "steps")
    straggler_seconds: float = key(
        5.0,
        "several processes: name the one that starts a step so long after the first, every `log.every_steps`; 0: off",
        "seconds",
    )
    tensorboard: bool = key(True, "write `tensorboard/` beside `metrics.jsonl`")
    report: bool = key(True, "write `report.html` and `plots/` at the end")
    rank_floor: float = key(
        2.0, "warn when the effective rank of a view's embeddings falls below this: they lie on a line; 0: never"
    )
    std_floor: float = key(
        0.01, "warn when a view's embeddings have a smaller standard deviation a dimension: they are equal; 0: never"
    )
    cos_ceiling: float = key(
        0.99, "warn when the mean cosine of views that do not belong together exceeds this: all point one way; 1: never"
    )
    report_pairs: int = key(500, "pairs of views that the report's singular values and t-SNE use", "pairs")


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = key(0, "seed of initial weights, epoch order and loss dropout")
    text: TextConfig = section(TextConfig, "tokenizer")
    data: DataConfig = section(DataConfig, "records, rows and batches")
    init: InitConfig = section(InitConfig, "where weights start from")
    model: ModelConfig = section(ModelConfig, "decoder (standard names)")
    lora: LoraConfig = section(LoraConfig, "adapters that are trained in place of the weights")
    objective: ObjectiveConfig = section(ObjectiveConfig, "losses")
    mesh: MeshConfig = section(MeshConfig, "devices")
    opt: OptConfig = section(OptConfig, "optimizer")
    train: TrainConfig = section(TrainConfig, "length and mechanics of training")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "checkpoints")
    eval: EvalConfig = section(EvalConfig, "generation and scoring")
    log: LogConfig = section(LogConfig, "metrics and report")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested plain dictionaries."""
    return dataclasses.asdict(config)


def base_config() -> ml_collections.ConfigDict:
    """All keys with their defaults: what presets start from."""
    return ml_collections.ConfigDict(to_dict(Config()))


def freeze(values: Any) -> Config:
    """Nested mapping (a `ConfigDict` or parsed JSON) to the frozen `Config`.

    Keys left out take their defaults.

    Raises:
        UserError: unknown key, wrong type, or a string that is not among the key's choices.
    """
    plain = values.to_dict() if isinstance(values, ml_collections.ConfigDict) else values
    return freeze_section(Config, plain, "")


def describe() -> str:
    """The schema as Markdown: what `docs/config.md` holds."""
    lines = [
        "# Configuration keys",
        "",
        "Made from `llm_jepa_jax/config.py` by `python -m llm_jepa_jax.config > docs/config.md`.",
        "Set a key with `--config.SECTION.KEY=VALUE`. Unknown keys and contradictions stop the run with the fix.",
    ]
    lines += describe_section(Config, "", "")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(describe(), end="")
