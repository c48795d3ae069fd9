# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers with the special tokens and chat templates of the families, written to a directory."""

import json
import pathlib
import string

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEMPLATES = pathlib.Path(__file__).parent / "data" / "templates"
TEXTS = [
    "Convert natural language to a regular expression.", "lines with a digit and the word 'moon'", ".*[0-9].*",
    "You are a helpful assistant. User: question Assistant: answer", "system user assistant model think INST",
    "Cutting Knowledge Date: December 2023 Today Date: 26 Jul 2024", string.printable, "hello  world\n\n  tabs\t\n",
    "naïve café, 日本語, emoji 🙂",
]  # fmt: skip


LLAMA = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"]
FAMILIES = {
    "llama3": {
        "special": [*(f"<|{name}|>" for name in LLAMA), *(f"<|reserved_special_token_{i}|>" for i in range(20))],
        "config": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "stops": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
        "begins": True,
    },
    "gemma2": {
        "special": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        "plain": [f"<unused{i}>" for i in range(15)],
        "config": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        "stops": ["<eos>", "<end_of_turn>"],
        "begins": True,
        "kind": "sentencepiece",
    },
    "qwen3": {
        "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "plain": ["<think>", "</think>", "<tool_call>", "</tool_call>"],
        "config": {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False},
        "stops": ["<|im_end|>", "<|endoftext|>"],
        "normalizer": normalizers.NFC(),
        "model": {"bos_token": "<|endoftext|>"},
    },
    "olmo2": {
        "special": ["<|endoftext|>", *(f"<|extra_id_{i}|>" for i in range(11)), "<|pad|>"],
        "config": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
        "stops": ["<|endoftext|>"],
    },
    "mistral": {
        "special": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"[control_{i}]" for i in range(8, 24))],
        "config": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True},
        "stops": ["</s>"],
        "kind": "sentencepiece",
    },
    "chatml": {
        "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "config": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
        "stops": ["<|im_end|>"],
    },
}

THINKING = {
    "deepseek_r1": {
        "special": ["<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"],
        "plain": ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"],
        "config": {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>", "add_bos_token": True},
        "stops": ["<｜end▁of▁sentence｜>"],
        "begins": True,
    },
}
"""Of models that think before every answer: their prompts open a thought."""


def train(family: dict) -> tokenizers.Tokenizer:
    """Byte-level BPE, or BPE with byte fallback as SentencePiece has it."""
    special, byte_level = family["special"], family.get("kind") != "sentencepiece"
    if byte_level:
        tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special, alphabet = [*special, *(f"<0x{i:02X}>" for i in range(256))], []
    if "normalizer" in family:
        tokenizer.normalizer = family["normalizer"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(
            vocab_size=len(special) + 350, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    )  # fmt: skip
    return tokenizer


def write_family(name: str, directory: pathlib.Path) -> pathlib.Path:
    """A checkpoint's tokenizer files."""
    family, directory = (FAMILIES | THINKING)[name], directory / name
    directory.mkdir(parents=True)
    tokenizer = train(family)
    value = json.loads(tokenizer.to_str())
    value["added_tokens"] = [token for token in value["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(value))
    plain = [tokenizers.AddedToken(piece, normalized=False, special=False) for piece in family.get("plain", [])]
    tokenizer.add_tokens(plain)
    if family.get("begins"):
        bos = family["config"]["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **family["config"]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    stops = [tokenizer.token_to_id(piece) for piece in family["stops"]]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    model = {f"{name}_id": tokenizer.token_to_id(piece) for name, piece in family.get("model", {}).items()}
    (directory / "config.json").write_text(json.dumps(model))
    (directory / "chat_template.jinja").write_text((TEMPLATES / f"{name}.jinja").read_text())
    return directory
