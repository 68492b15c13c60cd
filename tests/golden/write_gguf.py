"""Writes gguf_py__mixtral_h32_i32_e4k2.gguf with the gguf package: a reader is tested with somebody else's writer.

    pip install gguf && python write_gguf.py

Values are chosen so that every type holds them exactly; tests/gguf.rs has the same formulas.
"""

import gguf
import numpy as np
from gguf.quants import dequantize, quantize

H = I = 32
E = 4


def values(count, levels, seed):
    """Numbers of a few levels; each 32 of them have the largest."""
    n = np.arange(count, dtype=np.int64)
    picked = (n * 7 + seed) % len(levels)
    picked[n % 32 == 0] = 0
    return np.array(levels, dtype=np.float32)[picked]


LEVELS = {
    gguf.GGMLQuantizationType.Q4_0: [(q - 8) * 0.25 for q in range(16)],
    gguf.GGMLQuantizationType.Q8_0: [(127 - q) * 0.0078125 for q in range(255)],
    gguf.GGMLQuantizationType.MXFP4: [6.0, -4.0, 3.0, -2.0, 1.5, -1.0, 0.5, 0.0],
    gguf.GGMLQuantizationType.F32: [0.1, 0.2, -0.3],
    gguf.GGMLQuantizationType.F16: [0.5, -0.25, 1.0009765625],
}

writer = gguf.GGUFWriter("gguf_py__mixtral_h32_i32_e4k2.gguf", "llama")
writer.add_name("a layer of four experts")
writer.add_block_count(2)
writer.add_context_length(64)
writer.add_embedding_length(H)
writer.add_feed_forward_length(I)
writer.add_head_count(2)
writer.add_expert_count(E)
writer.add_expert_used_count(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_token_list([f"<{n}>".encode() for n in range(300)] + [b"\xff\xfe"])
writer.add_token_scores([float(n) for n in range(301)])
writer.add_array("llama.rope.dimension_sections", [1, 2, 3])
writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)


def add(name, shape, kind, seed):
    numbers = values(int(np.prod(shape)), LEVELS[kind], seed).reshape(shape)
    data = quantize(numbers, kind)
    assert np.array_equal(dequantize(data, kind).reshape(shape), numbers), name
    writer.add_tensor(name, data, raw_dtype=kind)


Q = gguf.GGMLQuantizationType
add("token_embd.weight", [8, H], Q.F16, 0)
for layer, (gate_up, down) in enumerate([(Q.Q4_0, Q.Q8_0), (Q.MXFP4, Q.F16)]):
    add(f"blk.{layer}.attn_norm.weight", [H], Q.F32, 0)
    add(f"blk.{layer}.ffn_gate_inp.weight", [E, H], Q.F32, 1)
    add(f"blk.{layer}.ffn_gate_exps.weight", [E, I, H], gate_up, 2)
    add(f"blk.{layer}.ffn_up_exps.weight", [E, I, H], gate_up, 3)
    add(f"blk.{layer}.ffn_down_exps.weight", [E, H, I], down, 4)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
