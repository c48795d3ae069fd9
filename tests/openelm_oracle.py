# SPDX-License-Identifier: Apache-2.0
"""OpenELM in NumPy, float64, from arXiv 2404.14619 and the published tensors' names: no code of the package."""

import numpy as np


def widths(config):
    """Query heads and MLP width of each layer: layer-wise scaling (section 2.1), to multiples that divide."""
    layers, width = config["num_transformer_layers"], config["model_dim"]

    def scaled(alphas, multiple):
        if len(alphas) == 2:
            first, last = alphas
            alphas = [round(first + (last - first) * i / (layers - 1), 2) for i in range(layers)]
        sizes = []
        for alpha in alphas:
            wanted = width * alpha
            size = max(multiple, multiple * int((wanted + multiple / 2) // multiple))
            sizes.append(size if size >= 0.9 * wanted else size + multiple)
        return sizes

    queries = scaled(config["qkv_multipliers"], config["head_dim"] * config["num_gqa_groups"])
    return [size // config["head_dim"] for size in queries], scaled(
        config["ffn_multipliers"], config["ffn_dim_divisor"]
    )


def tensor_shapes(config):
    """The published tensors of a model."""
    width, head_dim = config["model_dim"], config["head_dim"]
    shapes = {"transformer.token_embeddings.weight": (config["vocab_size"], width)}
    for i, (heads, inner) in enumerate(zip(*widths(config), strict=True)):
        layer, kv_heads = f"transformer.layers.{i}", heads // config["num_gqa_groups"]
        shapes |= {
            f"{layer}.attn.qkv_proj.weight": ((heads + 2 * kv_heads) * head_dim, width),
            f"{layer}.attn.out_proj.weight": (width, heads * head_dim),
            f"{layer}.attn_norm.weight": (width,),
            f"{layer}.ffn_norm.weight": (width,),
            f"{layer}.ffn.proj_1.weight": ((2 if config["ffn_with_glu"] else 1) * inner, width),
            f"{layer}.ffn.proj_2.weight": (width, inner),
        }
        if config["normalize_qk_projections"]:
            shapes |= {f"{layer}.attn.{name}_norm.weight": (head_dim,) for name in "qk"}
    shapes["transformer.norm.weight"] = (width,)
    if not config["share_input_output_layers"]:
        shapes["transformer.classifier.weight"] = (config["vocab_size"], width)
    return shapes


def random_tensors(config, seed=0):
    """Weights large enough for every part to matter."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(1.0, 0.1, shape) if len(shape) == 1 else rng.normal(0.0, 0.2, shape)).astype(np.float32)
        for name, shape in tensor_shapes(config).items()
    }


def rms(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def swish(x):
    return x / (1.0 + np.exp(-x))


def rotated(x, positions, base):
    """x [L, H, h]: each pair (i, i + h/2) turned by position · base^(-2i/h) (RoFormer)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * base ** (-2.0 * np.arange(half) / x.shape[-1])
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    low, high = x[..., :half], x[..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def attention(queries, keys, values):
    """Causal attention of one head, [L, h] each."""
    scores = queries @ keys.T / np.sqrt(queries.shape[-1])
    scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


def forward(config, tensors, tokens, first_position=0):
    """Hidden states [N + 1, L, D] (embeddings, what each layer gives, the last one after the final norm) and logits."""
    weights = {name.removesuffix(".weight"): np.asarray(value, np.float64) for name, value in tensors.items()}
    positions = np.arange(first_position, first_position + len(tokens))
    hidden = weights["transformer.token_embeddings"][tokens]
    states = [hidden]
    for i, heads in enumerate(widths(config)[0]):
        layer, kv_heads = f"transformer.layers.{i}", heads // config["num_gqa_groups"]
        fused = rms(hidden, weights[f"{layer}.attn_norm"]) @ weights[f"{layer}.attn.qkv_proj"].T
        fused = fused.reshape(len(tokens), heads + 2 * kv_heads, config["head_dim"])
        queries, keys, values = np.split(fused, [heads, heads + kv_heads], axis=1)
        if config["normalize_qk_projections"]:
            queries, keys = rms(queries, weights[f"{layer}.attn.q_norm"]), rms(keys, weights[f"{layer}.attn.k_norm"])
        queries, keys = (rotated(x, positions, config["rope_freq_constant"]) for x in (queries, keys))
        shared = [h // config["num_gqa_groups"] for h in range(heads)]
        mixed = np.stack([attention(queries[:, h], keys[:, k], values[:, k]) for h, k in enumerate(shared)], axis=1)
        hidden = hidden + mixed.reshape(len(tokens), -1) @ weights[f"{layer}.attn.out_proj"].T
        inner = rms(hidden, weights[f"{layer}.ffn_norm"]) @ weights[f"{layer}.ffn.proj_1"].T
        if config["ffn_with_glu"]:
            gate, up = np.split(inner, 2, axis=-1)
            inner = swish(gate) * up
        else:
            inner = swish(inner)
        hidden = hidden + inner @ weights[f"{layer}.ffn.proj_2"].T
        states.append(hidden)
    states[-1] = rms(hidden, weights["transformer.norm"])
    head = weights.get("transformer.classifier", weights["transformer.token_embeddings"])
    return np.stack(states), states[-1] @ head.T


def greedy(config, tensors, prompt, count, forbidden, stops):
    """New tokens up to a stop, and the smallest lead that a chosen token had over the next best."""
    tokens, lead = list(prompt), np.inf
    while len(tokens) < len(prompt) + count:
        logits = np.where(forbidden, -np.inf, forward(config, tensors, np.array(tokens))[1][-1])
        second, best = np.argsort(logits)[-2:]
        lead = min(lead, logits[best] - logits[second])
        if best in stops:
            break
        tokens.append(int(best))
    return tokens[len(prompt) :], lead
