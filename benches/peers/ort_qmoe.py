#!/usr/bin/env python3
"""Times ONNX Runtime's operator QMoE: experts quantised in blocks to 4 or 8 bits, SwiGLU, on its WebGPU or its CPU
provider. Logits of the router are given; the operator picks the experts. Its input and output are copied each time."""

import numpy as np
import onnx
import onnx.numpy_helper
import worker

PROVIDERS = {"webgpu": "WebGpuExecutionProvider", "cpu": "CPUExecutionProvider"}

parser = worker.options(__doc__)
parser.add_argument("--device", default="webgpu,cpu", help="webgpu or cpu, or both with a comma between")
parser.add_argument("--bits", type=int, default=4, choices=[4, 8])
parser.add_argument("--block", type=int, default=32)
args = parser.parse_args()


def model():
    rng = np.random.default_rng(0)
    experts, hidden, inner, per_byte = args.experts, args.hidden, args.intermediate, 8 // args.bits
    tensors = []
    for name, rows, columns in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
        values = rng.integers(0, 256, (experts, rows, columns // per_byte), dtype=np.uint8)
        scales = (rng.random((experts, rows, columns // args.block)) * 0.02).astype(np.float32)
        tensors += [onnx.numpy_helper.from_array(values, name), onnx.numpy_helper.from_array(scales, name + "_scale")]
    node = onnx.helper.make_node(
        "QMoE",
        ["x", "router", "gate_up", "gate_up_scale", "", "down", "down_scale", "", "", "", ""],
        ["y"],
        domain="com.microsoft",
        activation_alpha=1.0,
        activation_beta=0.0,
        activation_type="swiglu",
        block_size=args.block,
        expert_weight_bits=args.bits,
        k=args.top_k,
        normalize_routing_weights=1,
        swiglu_fusion=1,
        use_sparse_mixer=0,
    )
    value = lambda name, width: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["T", width])
    inputs, outputs = [value("x", hidden), value("router", experts)], [value("y", hidden)]
    graph = onnx.helper.make_graph([node], "moe", inputs, outputs, tensors)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    made = onnx.helper.make_model(graph, opset_imports=opsets)
    made.ir_version = 10
    return made.SerializeToString()


def load(device):
    import onnxruntime  # reads XDG_RUNTIME_DIR

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.log_severity_level = 3
    if device == "webgpu":
        # Rather a failure than the time of the CPU.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = onnxruntime.InferenceSession(model(), options, providers=[PROVIDERS[device]])
    provider = session.get_providers()[0]
    if provider != PROVIDERS[device]:
        raise RuntimeError(f"asked for {PROVIDERS[device]}, got {provider}")
    rng = np.random.default_rng(1)
    inputs = {
        name: rng.standard_normal((args.tokens, width)).astype(np.float32)
        for name, width in (("x", args.hidden), ("router", args.experts))
    }
    result = []

    def run():
        result[:] = session.run(None, inputs)

    facts = dict(
        peer="onnxruntime",
        device=f"{device}: {provider}",
        weights=f"int{args.bits}, blocks of {args.block}",
        versions={"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__},
    )
    return facts, run, lambda: result[0]


worker.work(args, load)
