#!/usr/bin/env python3
"""Makes a golden file with bf16 weights from an f32 one in the hub layout of mixtral.

    round_to_bf16.py mixtral__t7_h72_i40_e8k2_hub.safetensors mixtral__t7_h72_i40_e8k2_bf16_hub.safetensors

The weights are rounded to bf16 and the expected values recomputed from the rounded ones, in plain Python floats
(64 bits). Nothing is shared with the crate, and only the standard library is needed.
"""

import array
import json
import math
import struct
import sys


def read(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        kind = {"F32": "f", "I32": "i"}[entry["dtype"]]
        tensors[name] = (entry["dtype"], entry["shape"], list(array.array(kind, data[start:end])))
    return metadata, tensors


def write(path, metadata, tensors):
    header, data = {"__metadata__": metadata}, b""
    for name, (dtype, shape, values) in sorted(tensors.items()):
        kind = {"F32": "f", "I32": "i", "BF16": "H"}[dtype]
        chunk = array.array(kind, values).tobytes()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(chunk)]}
        data += chunk
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def bf16_bits(value):
    """Nearest bf16, ties to even, as its 16 bits."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def bf16_value(bits):
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def matvec(matrix, columns, vector):
    rows = range(0, len(matrix), columns)
    return [math.fsum(matrix[row + c] * vector[c] for c in range(columns)) for row in rows]


def main(source, target):
    metadata, tensors = read(source)
    config = json.loads(metadata["config"])
    prefix, hidden, inner = metadata["prefix"], config["hidden_size"], config["intermediate_size"]
    experts, top_k = config["num_local_experts"], config["num_experts_per_tok"]

    weights, out = {}, {}
    for name, (dtype, shape, values) in tensors.items():
        if name.startswith(prefix):
            bits = [bf16_bits(value) for value in values]
            out[name] = ("BF16", shape, bits)
            weights[name.removeprefix(prefix)] = [bf16_value(b) for b in bits]

    x = tensors["io.hidden_states"]
    all_y, all_logits, all_experts, all_weights = [], [], [], []
    for start in range(0, len(x[2]), hidden):
        token = x[2][start : start + hidden]
        logits = matvec(weights["gate.weight"], hidden, token)
        exps = [math.exp(logit - max(logits)) for logit in logits]
        chosen = sorted(range(experts), key=lambda e: -logits[e])[:top_k]
        total = math.fsum(exps[e] for e in chosen)
        y = [0.0] * hidden
        for e in chosen:
            gate = matvec(weights[f"experts.{e}.w1.weight"], hidden, token)
            up = matvec(weights[f"experts.{e}.w3.weight"], hidden, token)
            act = [g / (1.0 + math.exp(-g)) * u for g, u in zip(gate, up)]
            for h, value in enumerate(matvec(weights[f"experts.{e}.w2.weight"], inner, act)):
                y[h] += exps[e] / total * value
        all_y += y
        all_logits += logits
        all_experts += chosen
        all_weights += [exps[e] / total for e in chosen]

    tokens = len(x[2]) // hidden
    out["io.hidden_states"] = x
    out["io.output"] = ("F32", x[1], all_y)
    out["io.router_logits"] = ("F32", [tokens, experts], all_logits)
    out["io.topk_indices"] = ("I32", [tokens, top_k], all_experts)
    out["io.topk_weights"] = ("F32", [tokens, top_k], all_weights)
    keep = ["config", "family", "layer_idx", "layout", "model_type", "num_experts", "num_tokens", "prefix", "top_k"]
    metadata = {key: metadata[key] for key in keep}
    metadata["weight_storage"] = "bf16"
    metadata["notes"] = "weights rounded to bf16, expected values recomputed by tests/golden/round_to_bf16.py"
    write(target, metadata, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
