"""FuxiCTR's DIN_Attention on one request, as a process of its own: for benchmarks/lrea_serving.py.

    python lrea_torch_din.py '{"width": 16, "hidden": 64, "threads": 2}'

needs torch and fuxictr, none of this library. Reads lines {"length", "candidates"} and answers
each with {"seconds"}. The layer concatenates [C, L, 4d] and keeps [C, L, h]; candidates go through
in parts whose widest array is PART bytes, or it would not fit.
"""

import json
import sys
import time

PART = 64 << 20


def main() -> None:
    options = json.loads(sys.argv[1])
    import torch
    from fuxictr.pytorch.layers import DIN_Attention

    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    width = options["width"]
    layer = DIN_Attention(
        embedding_dim=width, attention_units=[options["hidden"]], hidden_activations="Dice"
    ).eval()
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        size = json.loads(line)
        history = torch.randn(1, size["length"], width)
        candidates = torch.randn(size["candidates"], width)
        part = max(1, PART // (size["length"] * 4 * max(4 * width, options["hidden"])))
        start = time.perf_counter()
        with torch.inference_mode():
            for piece in candidates.split(part):
                layer(piece, history.expand(len(piece), -1, -1))
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
