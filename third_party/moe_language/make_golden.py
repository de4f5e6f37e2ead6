"""Makes golden.json with transformers: python third_party/moe_language/make_golden.py (needs torch and
transformers)."""

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

SIZES = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "num_experts_per_tok": 2, "max_position_embeddings": 32}  # fmt: skip
QWEN = {"head_dim": 4, "num_experts": 4, "moe_intermediate_size": 6, "intermediate_size": 12}
MODELS = {
    "mixtral": ("hf-mixtral", "Mixtral", {"num_local_experts": 4, "intermediate_size": 12}),
    "qwen3_moe": ("hf-qwen3-moe", "Qwen3Moe", QWEN | {"norm_topk_prob": True, "decoder_sparse_step": 2}),
    "qwen3_moe_plain": ("hf-qwen3-moe", "Qwen3Moe", QWEN | {"norm_topk_prob": False, "tie_word_embeddings": True}),
}
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
WITH_GRADIENTS = ("layers.1.mlp.gate.weight", "layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj")


def fill(name, shape, k):
    """0.8 sin(1.7 j + 0.6 j^2 / n + k), j = 1 to n in C order; around 1 for norms."""
    j = np.arange(1, np.prod(shape) + 1)
    wave = 0.8 * np.sin(1.7 * j + 0.6 * j**2 / j[-1] + k).reshape(shape)
    return 1 + 0.25 * wave if "norm" in name else wave


def make(model, folder):
    """Fills the file as it is published, experts apart, and lets transformers read it; returns (model, shapes)."""
    model.save_pretrained(folder)
    path = pathlib.Path(folder) / "model.safetensors"
    shapes = {name: list(w.shape) for name, w in sorted(load_file(path).items())}
    state = {name: fill(name, shape, k).astype(np.float32) for k, (name, shape) in enumerate(shapes.items())}
    save_file(state, path, {"format": "pt"})
    again = type(model).from_pretrained(folder, attn_implementation="sdpa", experts_implementation="eager")
    return again.eval(), shapes


def in_float64(model, tokens):
    """Logits and loss of the model in float64 throughout: its own casts to float32 become casts to float64."""
    plain, to, softmax = torch.Tensor.float, torch.Tensor.to, torch.nn.functional.softmax
    wide = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
    torch.Tensor.float = torch.Tensor.double
    torch.Tensor.to = lambda self, *args, **named: to(self, *map(wide, args), **{k: wide(v) for k, v in named.items()})
    torch.nn.functional.softmax = lambda *args, **named: softmax(*args, **{k: wide(v) for k, v in named.items()})
    try:
        out = model.double()(tokens, labels=tokens, use_cache=False, output_router_logits=False)
    finally:
        torch.Tensor.float, torch.Tensor.to, torch.nn.functional.softmax = plain, to, softmax
    out.loss.backward()
    return out


def rounded(values, digits):
    return np.round(np.asarray(values), digits).tolist()


def main():
    golden = {"tokens": TOKENS, "models": {}}
    tokens = torch.tensor([TOKENS])
    for name, (source, prefix, more) in MODELS.items():
        config = getattr(transformers, f"{prefix}Config")(**SIZES, **more)
        with tempfile.TemporaryDirectory() as folder:
            model, shapes = make(getattr(transformers, f"{prefix}ForCausalLM")(config), folder)
        with torch.no_grad():
            out = model(tokens, labels=tokens, use_cache=False, output_router_logits=True)
            for logits in out.router_logits:
                best = torch.softmax(logits, -1).sort(-1).values
                assert (best[:, -2] - best[:, -3]).min() > 1e-3, "two experts are too close to tell apart in float32"
            out = model(tokens, labels=tokens, use_cache=False)
        wide = in_float64(model, tokens)
        golden["models"][name] = {
            "source": source,
            "config": json.loads(config.to_json_string(use_diff=False)),
            "shapes": shapes,
            "logits": rounded(out.logits[0], 7),
            "nll": round(out.loss.item(), 7),
            "logits_float64": rounded(wide.logits[0].detach(), 10),
            "nll_float64": round(wide.loss.item(), 10),
            "gradients_float64": {n: rounded(p.grad, 10) for n, p in model.named_parameters() if n.endswith(WITH_GRADIENTS)},
        }
    path = pathlib.Path(__file__).with_name("golden.json")
    path.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
