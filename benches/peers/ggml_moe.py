#!/usr/bin/env python3
"""Times ggml's experts through its C API: mul_mat_id for gate and up, SwiGLU, mul_mat_id for down, weights of the
routing. The routing is given; the sum over a token's experts is left out."""

import ctypes as C
import glob
import os

import numpy as np
import worker

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "mxfp4": 39}
F32, I32 = 0, 26
P, I64, SIZE = C.c_void_p, C.c_int64, C.c_size_t

parser = worker.options(__doc__)
parser.add_argument("--lib", required=True, help="folder with libggml-*.so")
parser.add_argument("--device", default="Vulkan0,CPU", help="names of ggml's devices, with a comma between")
parser.add_argument("--weights", default="f16", choices=TYPES)
args = parser.parse_args()


class InitParams(C.Structure):
    _fields_ = [("mem_size", SIZE), ("mem_buffer", P), ("no_alloc", C.c_bool)]


def typed(function, result, *arguments):
    function.restype, function.argtypes = result, list(arguments)
    return function


class Ggml:
    """The functions that are used, and the devices."""

    def __init__(self, folder):
        folder = os.path.realpath(folder)
        names = glob.glob(folder + "/libggml.*so*")
        if not names:
            raise FileNotFoundError(f"no ggml libraries in {folder}")
        base = C.CDLL(folder + "/libggml-base.so", mode=C.RTLD_GLOBAL)
        registry = C.CDLL(names[0], mode=C.RTLD_GLOBAL)
        self.init = typed(base.ggml_init, P, InitParams)
        self.tensor = typed(base.ggml_new_tensor_3d, P, P, C.c_int, I64, I64, I64)
        self.matrix = typed(base.ggml_new_tensor_2d, P, P, C.c_int, I64, I64)
        self.mul_mat_id = typed(base.ggml_mul_mat_id, P, P, P, P, P)
        self.swiglu = typed(base.ggml_swiglu_split, P, P, P, P)
        self.mul = typed(base.ggml_mul, P, P, P, P)
        self.new_graph = typed(base.ggml_new_graph, P, P)
        self.expand = typed(base.ggml_build_forward_expand, None, P, P)
        self.alloc = typed(base.ggml_backend_alloc_ctx_tensors, P, P, P)
        self.alloc_from = typed(base.ggml_backend_alloc_ctx_tensors_from_buft, P, P, P)
        self.free = typed(base.ggml_backend_buffer_free, None, P)
        self.buffer_name = typed(base.ggml_backend_buft_name, C.c_char_p, P)
        self.set = typed(base.ggml_backend_tensor_set, None, P, P, SIZE, SIZE)
        self.get = typed(base.ggml_backend_tensor_get, None, P, P, SIZE, SIZE)
        self.compute = typed(base.ggml_backend_graph_compute, C.c_int, P, P)
        self.synchronize = typed(base.ggml_backend_synchronize, None, P)
        self.type_name = typed(base.ggml_type_name, C.c_char_p, C.c_int)
        self.quantize = typed(base.ggml_quantize_chunk, SIZE, C.c_int, P, P, I64, I64, I64, P)
        self.row_size = typed(base.ggml_row_size, SIZE, C.c_int, I64)
        self.supports = typed(base.ggml_backend_dev_supports_op, C.c_bool, P, P)
        self.describe = typed(base.ggml_backend_dev_description, C.c_char_p, P)
        self.open = typed(base.ggml_backend_dev_init, P, P, C.c_char_p)
        self.registry_of = typed(base.ggml_backend_dev_backend_reg, P, P)
        self.address = typed(base.ggml_backend_reg_get_proc_address, P, P, C.c_char_p)
        self.version = typed(base.ggml_version, C.c_char_p)().decode()
        self.commit = typed(base.ggml_commit, C.c_char_p)().decode()
        typed(registry.ggml_backend_load_all_from_path, None, C.c_char_p)(folder.encode())
        count, get = typed(registry.ggml_backend_dev_count, SIZE), typed(registry.ggml_backend_dev_get, P, SIZE)
        name = typed(base.ggml_backend_dev_name, C.c_char_p, P)
        self.devices = {name(get(i)).decode(): get(i) for i in range(count())}

    def function_of(self, device, name, result, *arguments):
        """A function that only this device's backend has, or None."""
        address = self.address(self.registry_of(device), name)
        return C.CFUNCTYPE(result, *arguments)(address) if address else None

    def weight_buffers(self, device):
        """Kinds of buffers with layouts of their own: llama.cpp prefers them for weights where they support the product."""
        extra = self.function_of(device, b"ggml_backend_dev_get_extra_bufts", C.POINTER(P), P)
        kinds = extra(device) if extra else None
        found = []
        while kinds and kinds[len(found)]:
            found.append(kinds[len(found)])
        return found


def packed(ggml, kind, experts, rows, columns, rng):
    """Weights of all experts. Each has the rows of the first in another order: that is fast to make, and a wrong expert
    still gives a wrong result."""
    first = rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(np.sqrt(columns))
    if args.weights == "f16":
        first = first.astype(np.float16)
    elif args.weights != "f32":
        values, first = first, np.empty((rows, ggml.row_size(kind, columns)), np.uint8)
        ggml.quantize(kind, values.ctypes.data, first.ctypes.data, 0, rows, columns, None)
    every = np.empty((experts, *first.shape), first.dtype)
    for expert in range(experts):
        every[expert] = np.roll(first, expert, axis=0)
    return every


class Experts:
    """The tensors and the graph, with the weights in `buffers` or, where that is None, in the backend's usual ones."""

    def __init__(self, ggml, backend, kind, buffers):
        tokens, hidden, inner, experts, top_k = args.tokens, args.hidden, args.intermediate, args.experts, args.top_k
        weights, rest = (ggml.init(InitParams(16 << 20, None, True)) for _ in range(2))
        self.gate, self.up = (ggml.tensor(weights, kind, hidden, inner, experts) for _ in range(2))
        self.down = ggml.tensor(weights, kind, inner, hidden, experts)
        self.x = ggml.tensor(rest, F32, hidden, 1, tokens)
        self.ids = ggml.matrix(rest, I32, top_k, tokens)
        self.routing = ggml.tensor(rest, F32, 1, top_k, tokens)
        self.products = [ggml.mul_mat_id(rest, matrix, self.x, self.ids) for matrix in (self.gate, self.up)]
        h = ggml.swiglu(rest, *self.products)
        self.products.append(ggml.mul_mat_id(rest, self.down, h, self.ids))
        self.y = ggml.mul(rest, self.products[2], self.routing)
        self.graph = ggml.new_graph(rest)
        ggml.expand(self.graph, self.y)
        self.buffer = ggml.alloc_from(weights, buffers) if buffers else ggml.alloc(weights, backend)
        self.activations = ggml.alloc(rest, backend)
        if not (self.buffer and self.activations):
            raise MemoryError("ggml could not allocate its buffers")


def load(device_name):
    # Without this the Vulkan backend skips adapters that are processors.
    os.environ.setdefault("GGML_VK_VISIBLE_DEVICES", "0")
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # it would start a debugger after a failure
    ggml = Ggml(args.lib)
    kind = TYPES[args.weights]
    if ggml.type_name(kind).decode().lower() != args.weights:
        raise ValueError(f"type {kind} of this ggml is {ggml.type_name(kind).decode()}, not {args.weights}")
    if device_name not in ggml.devices:
        raise ValueError(f"ggml has no device {device_name}; it has {', '.join(ggml.devices)}")
    device = ggml.devices[device_name]
    backend = ggml.open(device, None)
    if device_name == "CPU":
        ggml.function_of(device, b"ggml_backend_set_n_threads", None, P, C.c_int)(backend, args.threads)

    for buffers in [*ggml.weight_buffers(device), None]:
        block = Experts(ggml, backend, kind, buffers)
        if all(ggml.supports(device, product) for product in block.products):
            break
        ggml.free(block.buffer)
        ggml.free(block.activations)
    else:
        # Most often a tensor that is larger than what a shader can bind.
        size = ggml.row_size(kind, args.hidden) * args.intermediate * args.experts / 2**20
        what = f"{args.weights} experts, {size:.0f} MiB in one tensor"
        raise ValueError(f"ggml says that {device_name} cannot multiply {what}")

    rng = np.random.default_rng(1)

    def fill(tensor, values):
        ggml.set(tensor, values.ctypes.data, 0, values.nbytes)

    for tensor, rows, columns in (
        (block.gate, args.intermediate, args.hidden),
        (block.up, args.intermediate, args.hidden),
        (block.down, args.hidden, args.intermediate),
    ):
        fill(tensor, packed(ggml, kind, args.experts, rows, columns, rng))
    fill(block.x, rng.standard_normal((args.tokens, args.hidden)).astype(np.float32))
    fill(block.ids, np.stack([rng.permutation(args.experts)[: args.top_k] for _ in range(args.tokens)]).astype(np.int32))
    fill(block.routing, np.full((args.tokens, args.top_k), 1 / args.top_k, np.float32))

    def run():
        if ggml.compute(backend, block.graph) != 0:
            raise RuntimeError("ggml could not compute its graph")
        ggml.synchronize(backend)

    def output():
        y = np.empty(args.tokens * args.top_k * args.hidden, np.float32)
        ggml.get(block.y, y.ctypes.data, 0, y.nbytes)
        return y

    facts = dict(
        peer="ggml",
        device=f"{device_name}: {ggml.describe(device).decode()}",
        weights=args.weights,
        layout=ggml.buffer_name(buffers).decode() if buffers else "plain",
        versions={"ggml": f"{ggml.version} ({ggml.commit})"},
    )
    return facts, run, output


worker.work(args, load)
