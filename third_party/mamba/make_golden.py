"""Makes golden.json with transformers: python third_party/mamba/make_golden.py (needs torch and transformers)."""

import json
import pathlib

import numpy as np
import torch
import transformers

SIZES = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 4, "expand": 2, "conv_kernel": 4}
MODELS = {
    "hf-mamba": ("MambaForCausalLM", "MambaConfig", {"time_step_rank": 2}),
    "hf-mamba2": ("Mamba2ForCausalLM", "Mamba2Config", {"num_heads": 4, "head_dim": 4, "n_groups": 2, "chunk_size": 4}),
}
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def fill(name, shape, k):
    """0.8 sin(1.7 j + k), j = 1, 2, ... in C order; around 1 for skips and norms; A_log counts from log 1 on its last
    axis."""
    if name.endswith("A_log"):
        return np.broadcast_to(np.log(np.arange(1, shape[-1] + 1)), shape)
    wave = 0.8 * np.sin(1.7 * np.arange(1, np.prod(shape) + 1) + k).reshape(shape)
    return 1 + 0.25 * wave if name.endswith(".D") or "norm" in name else wave


def in_float64(model, tokens):
    """Logits and loss of the model in float64 throughout: its own casts to float32 become casts to float64."""
    plain, to = torch.Tensor.float, torch.Tensor.to
    wide = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
    torch.Tensor.float = torch.Tensor.double
    torch.Tensor.to = lambda self, *args, **named: to(self, *map(wide, args), **{k: wide(v) for k, v in named.items()})
    try:
        return model.double()(tokens, labels=tokens, use_cache=False)
    finally:
        torch.Tensor.float, torch.Tensor.to = plain, to


def main():
    golden = {"tokens": TOKENS, "models": {}}
    for source, (model, config, more) in MODELS.items():
        config = getattr(transformers, config)(**SIZES, **more, tie_word_embeddings=True)
        model = getattr(transformers, model)(config).eval()
        arrays = {name: p for name, p in sorted(model.named_parameters()) if name != "lm_head.weight"}
        with torch.no_grad():
            for k, (name, p) in enumerate(arrays.items()):
                p.copy_(torch.tensor(fill(name, tuple(p.shape), k), dtype=torch.float32))
            out = model(torch.tensor([TOKENS]), labels=torch.tensor([TOKENS]), use_cache=False)
            out = [out, in_float64(model, torch.tensor([TOKENS]))]
        golden["models"][source] = {
            "config": json.loads(config.to_json_string(use_diff=False)),
            "shapes": {name: list(p.shape) for name, p in arrays.items()},
            "logits": [[round(x, 7) for x in row] for row in out[0].logits[0].tolist()],
            "nll": round(out[0].loss.item(), 7),
            "logits_float64": [[round(x, 10) for x in row] for row in out[1].logits[0].tolist()],
            "nll_float64": round(out[1].loss.item(), 10),
        }
    path = pathlib.Path(__file__).with_name("golden.json")
    path.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
