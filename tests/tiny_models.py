"""Tiny models of every kind that vLLM serves: a configuration and a tokenizer. `load-format: dummy` gives them random weights.

python -m tests.tiny_models DIRECTORY [KIND...]     writes DIRECTORY/<kind> for each
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.llm.plugins.module_utils import start_proof

KINDS = ("generate", "transcribe", "embed", "rerank", "reward", "classify", "pool")
# What vLLM 0.32 needs to serve them on a CPU.
OPTIONS = {"load-format": "dummy", "enforce-eager": True, "dtype": "float32", "max-num-seqs": 4}
WORDS = start_proof.VOCABULARY
# Of these BERT makes its input, and Whisper its prompt: the language, and what to do with the sound.
BERT = ("[UNK]", "[CLS]", "[SEP]", "[PAD]")
LANGUAGES = ("en", "de")
WHISPER = (
    "<|endoftext|>", "<|startoftranscript|>", *(f"<|{language}|>" for language in LANGUAGES), "<|translate|>", "<|transcribe|>", "<|startoflm|>",
    "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>",
)  # fmt: skip
SIZES = {"torch_dtype": "float32", "vocab_size": WORDS}


def labels(*names: str) -> dict[str, Any]:
    """The classes of a classifier."""
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


def bert(architecture: str) -> dict[str, Any]:
    """An encoder of two layers."""
    return {
        **SIZES, "architectures": [architecture], "model_type": "bert", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 256, "type_vocab_size": 2, "hidden_act": "gelu", "pad_token_id": 3,
        "position_embedding_type": "absolute",
    }  # fmt: skip


def whisper() -> dict[str, Any]:
    """A model that hears half a minute, with one layer on each side."""
    return {
        **SIZES, "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "d_model": 128, "encoder_layers": 1,
        "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256,
        "num_mel_bins": 80, "max_source_positions": 1500, "max_target_positions": 448, "num_hidden_layers": 1, "is_encoder_decoder": True,
        "activation_function": "gelu", "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 1,
    }  # fmt: skip


def tokenizer(special: tuple[str, ...], pairs: bool = False) -> dict[str, Any]:
    """Single words; with pairs of texts as BERT wants them."""
    words = {word: number for number, word in enumerate((*special, "Hi"))}
    words |= {f"word{number}": number for number in range(len(words), WORDS)}
    marked: list[dict[str, Any]] = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}]
    for sequence, number in (("A", 0), ("B", 1)):
        marked += [
            {"Sequence": {"id": sequence, "type_id": number}},
            {"SpecialToken": {"id": "[SEP]", "type_id": number}},
        ]
    template = {
        "type": "TemplateProcessing", "single": marked[:3], "pair": marked,
        "special_tokens": {name: {"id": name, "ids": [words[name]], "tokens": [name]} for name in ("[CLS]", "[SEP]") if pairs},
    }  # fmt: skip
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "decoder": None,
        "added_tokens": [{"id": words[word], "content": word, "special": True, **flags} for word in special],
        "post_processor": template if pairs else None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": special[0]},
    }  # fmt: skip


def files(kind: str) -> dict[str, Any]:
    """The files of a model, by their names without .json."""
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if kind in ("generate", "reward", "classify"):
        made = {name.removesuffix(".json"): json.loads(text) for name, text in start_proof.model_files(2, 2).items()}
        made["config"] |= {**SIZES, "pad_token_id": 0}
        if kind != "generate":
            names = labels("score") if kind == "reward" else labels("bad", "fair", "good")
            made["config"] |= {"architectures": ["LlamaForSequenceClassification"], **names}
        return made
    if kind == "transcribe":
        sound = {
            "feature_extractor_type": "WhisperFeatureExtractor", "processor_class": "WhisperProcessor", "feature_size": 80, "sampling_rate": 16000,
            "hop_length": 160, "chunk_length": 30, "n_fft": 400, "n_samples": 480000, "nb_max_frames": 3000, "padding_side": "right",
            "padding_value": 0.0, "return_attention_mask": False,
        }  # fmt: skip
        ends = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), WHISPER[0])
        return {
            "config": whisper(), "preprocessor_config": sound, "tokenizer": tokenizer(WHISPER),
            "tokenizer_config": {**fast, **ends, "processor_class": "WhisperProcessor"},
            "generation_config": {"decoder_start_token_id": 1, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0, "max_length": 448},
        }  # fmt: skip
    config = {
        "embed": bert("BertModel"),
        "rerank": {**bert("BertForSequenceClassification"), **labels("score")},
        "pool": {**bert("BertForTokenClassification"), **labels("O", "B")},
    }[kind]
    marks = {"unk_token": BERT[0], "cls_token": BERT[1], "sep_token": BERT[2], "pad_token": BERT[3]}
    return {"config": config, "tokenizer": tokenizer(BERT, pairs=True), "tokenizer_config": {**fast, **marks}}


def write(directory: Path, kind: str) -> Path:
    """Write a model; returns its directory."""
    target = directory / kind
    target.mkdir(parents=True, exist_ok=True)
    for name, content in files(kind).items():
        (target / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    return target


if __name__ == "__main__":
    for each in sys.argv[2:] or KINDS:
        print(write(Path(sys.argv[1]), each))
