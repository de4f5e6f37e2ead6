"""Makes the golden data of this folder with the official UniRepLKNet class; needs PyTorch and a copy of its file.

    python third_party/unireplknet/make_golden.py /path/to/UniRepLKNet/unireplknet.py
"""

import contextlib
import importlib.util
import io
import os
import sys
import types

import numpy as np
import torch
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
SIZES = {"depths": (1, 2, 4, 1), "dims": (8, 8, 12, 16), "kernel_sizes": ((3,), (7, 7), (13, 3, 13, 3), (5,)), "num_classes": 7, "in_chans": 3}
IMAGE_SIZE, BATCH = 32, 2


def load_official(path: str):
    """Imports the official file; the few names that it takes from timm are given here, so timm is not needed."""
    layers, registry = types.ModuleType("timm.models.layers"), types.ModuleType("timm.models.registry")
    layers.trunc_normal_ = torch.nn.init.trunc_normal_
    layers.DropPath = lambda rate: torch.nn.Identity()
    layers.to_2tuple = lambda v: v if isinstance(v, tuple) else (v, v)
    registry.register_model = lambda f: f
    spec = importlib.util.spec_from_file_location("official_unireplknet", path)
    module = importlib.util.module_from_spec(spec)
    fakes = {"timm": types.ModuleType("timm"), "timm.models": types.ModuleType("timm.models"), layers.__name__: layers, registry.__name__: registry}
    saved = {name: sys.modules.get(name) for name in fakes}
    sys.modules.update(fakes)
    try:
        spec.loader.exec_module(module)
    finally:
        for name, old in saved.items():
            sys.modules.pop(name) if old is None else sys.modules.update({name: old})
    return module


def random_model(official, seed: int, **sizes):
    """An official model in evaluation mode whose every array is random, with layer scales and variances about 0.5 and
    1."""
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        model = official.UniRepLKNet(layer_scale_init_value=0.5, attempt_use_lk_impl=False, **sizes)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = p[0].numel() ** -0.5 if p.dim() > 1 and not name.startswith("head") and "act" not in name else 0.3
            centre = 0.5 if name.endswith(".gamma") and p.dim() == 1 else 1.0 if p.dim() == 1 and name.endswith("weight") else 0.0
            p.copy_(centre + (0.2 if centre else spread) * torch.randn_like(p))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.3 * torch.randn_like(b))
            elif name.endswith("running_var"):
                b.copy_(0.5 + torch.rand_like(b))
            elif name.endswith("num_batches_tracked"):
                b.fill_(1234)
    return model.eval()


def run(model, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits and the gradient of the sum of their squares with respect to the images, both NCHW."""
    x = x.clone().requires_grad_()
    logits = model(x)
    (grad,) = torch.autograd.grad(logits.square().sum(), x)
    return logits.detach().numpy(), grad.numpy()


def main(path: str) -> None:
    official = load_official(path)
    model = random_model(official, 0, **SIZES)
    x = torch.randn(BATCH, SIZES["in_chans"], IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    save_file(model.state_dict(), os.path.join(HERE, "golden_training.safetensors"))
    logits, grad = run(model, x)
    with contextlib.redirect_stdout(io.StringIO()):
        model.reparameterize_unireplknet()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, os.path.join(HERE, "golden_deployed.safetensors"))
    merged_logits, merged_grad = run(model, x)
    arrays = {"images": x.numpy(), "logits": logits, "image_grad": grad, "merged_logits": merged_logits, "merged_image_grad": merged_grad}
    np.savez_compressed(os.path.join(HERE, "golden.npz"), **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
