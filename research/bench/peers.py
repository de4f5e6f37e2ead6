"""What other frameworks do for the same job, on the same numbers and as many threads; PyTorch is imported when one is
built."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.bench.case import FORWARD
from research.report import machine

MAKE_GOLDEN = Path(__file__).parents[2] / "third_party" / "unireplknet" / "make_golden.py"

Make = Callable[..., Callable[[], Any]]


def torch_package() -> Any:
    """PyTorch with as many threads as this process has cores."""
    import torch

    torch.set_num_threads(machine.num_threads())
    return torch


def torch_op(function: Callable, arrange: Callable, arrange_output: Callable) -> Callable[[str], Make]:
    """An op of PyTorch as a peer of a case made by `op_case`.

    Args:
      function: (torch, *tensors) to the output.
      arrange: tensors of the case's arrays to those of `function`, once, before anything is timed: its favourite
        layout.
      arrange_output: the same for the cotangent.
    """

    def in_direction(direction: str) -> Make:
        def make(*arrays: np.ndarray) -> Callable[[], Any]:
            torch = torch_package()
            tensors = [torch.from_numpy(np.array(a)) for a in arrays]
            if direction == FORWARD:
                inputs = arrange(*tensors)

                def forward() -> Any:
                    with torch.no_grad():
                        return function(torch, *inputs)

                return forward
            cotangent, leaves = arrange_output(tensors[0]), [t.detach().requires_grad_() for t in arrange(*tensors[1:])]

            def both() -> Any:
                for leaf in leaves:
                    leaf.grad = None
                out = function(torch, *leaves)
                out.backward(cotangent)
                return out, [leaf.grad for leaf in leaves]

            return both

        return make

    return in_direction


def _channels_last(x: Any) -> Any:
    return x.permute(0, 3, 1, 2)  # a view of [B, H, W, C]: in memory it stays as it is


def depthwise_conv2d() -> Callable[[str], Make]:
    """channels_last, 'SAME' for odd kernels; x [B, H, W, C], kernel [Kh, Kw, C]."""

    def function(torch: Any, x: Any, kernel: Any) -> Any:
        pads = [size // 2 for size in kernel.shape[2:]]
        return torch.nn.functional.conv2d(x, kernel, padding=pads, groups=x.shape[1])

    return torch_op(
        function, lambda x, k: (_channels_last(x), k.permute(2, 0, 1)[:, None].contiguous()), _channels_last
    )


def causal_conv1d() -> Callable[[str], Make]:
    """Zeros before the first token; x [B, T, C], kernel [K, C], in PyTorch's own layout [B, C, T]."""

    def function(torch: Any, x: Any, kernel: Any) -> Any:
        length, size = x.shape[-1], kernel.shape[-1]
        return torch.nn.functional.conv1d(x, kernel, padding=size - 1, groups=x.shape[1])[..., :length]

    turned = lambda x: x.permute(0, 2, 1).contiguous()
    return torch_op(function, lambda x, k: (turned(x), k.T[:, None].contiguous()), turned)


def attention(*, causal: bool) -> Callable[[str], Make]:
    """scaled_dot_product_attention; query, key and value [B, T, H, K]."""

    def function(torch: Any, *heads: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=causal)

    turned = lambda x: x.permute(0, 2, 1, 3).contiguous()
    return torch_op(function, lambda *heads: tuple(map(turned, heads)), turned)


def language_model(kind: str, sizes: Any, direction: str) -> Make:
    """Loss, or loss and gradients, of transformers' causal language model; inputs are (parameters, ids [B, T]).

    Args:
      kind: "mamba" or "mamba2".
      sizes: see `language_models.Sizes`. Parameters of a model of the same kind are taken over: they have the same
        names.
    """

    def make(params: dict[str, np.ndarray], ids: np.ndarray) -> Callable[[], Any]:
        torch = torch_package()
        model = _transformers_model(kind, sizes)
        ours = {f"backbone.{name}": torch.from_numpy(np.array(value)) for name, value in params.items()}
        if kind == _kind_of(params):
            model.load_state_dict({**ours, "lm_head.weight": ours["backbone.embeddings.weight"]})
        tokens = torch.from_numpy(np.array(ids, np.int64))

        def forward() -> Any:
            with torch.no_grad():
                return model(input_ids=tokens, labels=tokens).loss

        def both() -> Any:
            model.zero_grad(set_to_none=True)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            return loss, {name: p.grad for name, p in model.named_parameters()}

        return forward if direction == FORWARD else both

    return make


def _kind_of(params: dict[str, Any]) -> str | None:
    """The class of transformers that has these parameters, by a name that only it has; None for models that it
    lacks."""
    marks = {"layers.0.mixer.x_proj.weight": "mamba", "layers.0.mixer.dt_bias": "mamba2"}
    return next((kind for name, kind in marks.items() if name in params), None)


def _transformers_model(kind: str, sizes: Any) -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    shared = dict(
        vocab_size=sizes.vocab, hidden_size=sizes.width, num_hidden_layers=sizes.layers, state_size=sizes.state,
        expand=2, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    if kind == "mamba":
        return transformers.MambaForCausalLM(transformers.MambaConfig(**shared, time_step_rank=sizes.dt_rank)).train()
    heads = dict(num_heads=sizes.heads, head_dim=sizes.head_dim, n_groups=1)
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**shared, **heads)).train()


def unireplknet_a(path: str, num_classes: int, *, channels_last: bool) -> Make:
    """Training step of the official class with PyTorch's AdamW; inputs are (our state, images [B, H, W, 3], labels
    [B]).

    Args:
      path: of the official unireplknet.py.
      channels_last: memory layout of model and images; False is what the official scripts use.
    """

    def make(state: Any, images: np.ndarray, labels: np.ndarray) -> Callable[[], Any]:
        del state
        torch = torch_package()
        spec = importlib.util.spec_from_file_location("make_golden", MAKE_GOLDEN)
        assert spec is not None and spec.loader is not None  # as for every path that ends in .py
        golden = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(golden)
        official = golden.load_official(path)
        sizes: dict[str, Sequence[int]] = {"depths": official.UniRepLKNet_A_F_P_depths, "dims": (40, 80, 160, 320)}
        layout = torch.channels_last if channels_last else torch.contiguous_format
        with golden.contextlib.redirect_stdout(golden.io.StringIO()):
            model = (
                official.UniRepLKNet(**sizes, num_classes=num_classes, attempt_use_lk_impl=False)
                .train()
                .to(memory_format=layout)
            )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        y = torch.from_numpy(np.array(labels, np.int64))

        def step() -> Any:
            optimizer.zero_grad(set_to_none=True)
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        return step

    return make
