# SPDX-License-Identifier: Apache-2.0
"""What presets share: the settings of training and of families, and `:smoke`, which every preset takes."""

import ml_collections

from llm_jepa_jax.config import base_config
from llm_jepa_jax.errors import UserError


def finish(config: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
    """The preset itself, or with `smoke` a 2-layer miniature of it that runs anywhere in seconds.

    Raises:
        UserError: another argument.
    """
    if arg not in ("", "smoke"):
        raise UserError(f"--config: presets take `:smoke` or nothing, not `:{arg}`")
    return smoke(config) if arg else config


def finetuning() -> ml_collections.ConfigDict:
    """How LLM-JEPA is trained on published models; a preset adds the model.

    λ, k and the learning rate are the published fine-tuning setting; with loss dropout α, λ · (1 − α) is kept at 1.
    """
    config = base_config()
    config.text.vocab_size = 32768
    config.data.update(row_length=8192, rows_per_step=256)
    config.objective.ntp.targets = "all"
    config.objective.jepa.update(weight=4.0, num_predictors=1, dropout=0.75)
    config.mesh.update(data=1, fsdp=-1)
    config.opt.update(learning_rate=2e-5, warmup_steps=100, weight_decay=0.1)
    config.train.update(dtype="bfloat16", remat="full")
    config.eval.max_new_tokens = 512
    return config


def published_row(checkpoint: str, data: str, task: str, learning_rate: float) -> ml_collections.ConfigDict:
    """A fine-tuning row of the LLM-JEPA paper (arXiv 2509.14252): 4 epochs, every token a target, all weights trained.

    `data` names the files `DATA_train.jsonl` and `DATA_test.jsonl`. A preset adds λ and k.
    """
    config = base_config()
    config.init.checkpoint = checkpoint
    config.data.update(
        train=f"{data}_train.jsonl", eval=f"{data}_test.jsonl", layout="shared", row_length=2048, rows_per_step=8
    )
    config.objective.ntp.targets = "all"
    config.mesh.update(data=1, fsdp=-1)
    config.opt.update(learning_rate=learning_rate, warmup_steps=0, schedule="linear", weight_decay=0.0)
    config.train.update(dtype="bfloat16", remat="dots", num_epochs=4)
    config.eval.update(tasks=task, max_new_tokens=256)
    return config


def llama3() -> ml_collections.ConfigDict:
    """What Llama 3.1, 3.2 and 3.3 models share; a preset adds the shape."""
    config = finetuning()
    config.model.update(vocab_size=128256, max_positions=131072, rope_theta=500000.0, norm_eps=1e-5)
    return config


def olmo2() -> ml_collections.ConfigDict:
    """What OLMo 2 models share; a preset adds the shape."""
    config = finetuning()
    config.model.update(
        vocab_size=100352, max_positions=4096, rope_theta=500000.0, norm_placement="post", norm_eps=1e-6,
        qk_norm="full", tie_embeddings=False, family="olmo2",
    )  # fmt: skip
    config.data.row_length = 4096
    return config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrinks sizes and lengths, and keeps what makes the preset itself: dtypes, remat, rope, tying, objective."""
    config.init.checkpoint = ""
    config.text.update(tokenizer="", chat_template="", vocab_size=512)
    config.data.train, config.data.eval = "synthetic", ""
    config.data.synthetic_train, config.data.synthetic_eval = 400, 40
    config.data.row_length, config.data.rows_per_step = 256, 8
    config.model.update(
        vocab_size=0, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128,
        max_positions=1024,
    )  # fmt: skip
    if config.model.layer_heads:
        config.model.update(
            num_heads=8, num_kv_heads=4, layer_heads=(4, 8), layer_kv_heads=(2, 4), layer_mlp_dims=(96, 128)
        )
    if config.model.score_width:
        config.model.score_width = 16.0
    if config.model.window:
        config.model.window = 64
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    config.opt.warmup_steps = 1
    config.train.num_steps, config.train.num_epochs = 4, 0
    config.checkpoint.every_steps = 2
    config.eval.every_steps, config.eval.final_examples, config.eval.tasks = 0, 16, "exact_match"
    config.eval.max_new_tokens = 16
    config.log.every_steps, config.log.report_pairs = 1, 40
    return config
