#!/usr/bin/env python3
"""Times MixtralSparseMoeBlock of transformers, with its router, on the CPU with f32 weights, in the faster of two
implementations of its experts. (batched_mm copies weights for each token; at hundreds of tokens it takes minutes.)"""

import statistics
import warnings

import worker

IMPLEMENTATIONS = ["eager", "grouped_mm"]

parser = worker.options(__doc__, intermediate=1792, experts=8, top_k=2, tokens=512)
parser.add_argument("--device", default="cpu", choices=["cpu"])
parser.add_argument("--implementation", default="fastest", choices=["fastest", *IMPLEMENTATIONS, "batched_mm"])
args = parser.parse_args()


def load(device):
    warnings.filterwarnings("ignore")
    import torch
    import transformers
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    config = transformers.MixtralConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_local_experts=args.experts,
        num_experts_per_tok=args.top_k,
    )
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).eval()
    for parameter in block.parameters():
        parameter.normal_(0, 0.02)
    x = torch.randn(1, args.tokens, args.hidden, device=device)
    result = []

    def run():
        result[:] = [block(x)]

    def trial(implementation):
        config._experts_implementation = implementation
        try:
            worker.seconds(run, 1)
            return statistics.median(worker.seconds(run, 3))
        except (RuntimeError, ValueError, NotImplementedError):
            return float("inf")

    tried = {}
    chosen = args.implementation
    if chosen == "fastest":
        tried = {name: trial(name) for name in IMPLEMENTATIONS}
        chosen = min(tried, key=tried.get)
    config._experts_implementation = chosen
    facts = dict(
        peer="pytorch",
        device=f"cpu: {torch.get_num_threads()} threads",
        weights="f32",
        layout=chosen,
        tried_s={name: time for name, time in tried.items() if time != float("inf")},
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )

    def output():
        y = result[0]
        return (y[0] if isinstance(y, tuple) else y).numpy()

    return facts, run, output


worker.work(args, load)
