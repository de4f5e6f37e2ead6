"""A mixture of experts on 8 simulated devices under several meshes, and on none; prints deviations and collectives as
JSON.

Run as a process of its own: `python -m tests.modules.expert_meshes`.
"""

import json
import re

import jax


def main() -> None:
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from research.modules.axes import Init
    from research.modules.mesh import BATCH_AXES
    from research.modules.mixers.base import Call
    from research.modules.moe import MoeFfn
    from research.modules.moe_options import Moe
    from research.modules.state import merge, split
    from research.train.sharding import layout, make_mesh

    kinds = {
        "dropless": Moe(num_experts=16, ffn_dim=24),
        "places": Moe(num_experts=16, ffn_dim=24, capacity="megablocks", capacity_factor=0.75),
        "expert_choice": Moe(num_experts=16, ffn_dim=24, router="expert_choice", balance_loss_coef=0.0),
        "soft": Moe(num_experts=16, ffn_dim=24, router="soft", num_experts_per_tok=1, balance_loss_coef=0.0),
    }
    x = np.random.default_rng(0).normal(size=(16, 4, 32)).astype(np.float32)
    results = {}
    for kind, spec in kinds.items():
        graphdef, params, stats, axes = split(
            MoeFfn(spec.resolve(48), 32, ("embed", "layer/mlp"), "layer", Init(jax.random.key(0)))
        )

        def loss(params, x, graphdef=graphdef, stats=stats):
            live = merge(graphdef, params, stats)
            y = live(x, Call("train"))
            after = split(live)[2]
            return (y**2).sum() + after["aux_loss"], (y, after)

        step = jax.value_and_grad(loss, (0, 1), has_aux=True)
        expected = jax.jit(step)(params, x)
        whole = dict(expert=8), dict(data=2, fsdp=2, expert=2)
        more = dict(data=4, expert=2), dict(data=2, expert=4), dict(expert=4, tensor=2)
        for sizes in whole + (more if kind in ("dropless", "places") else ()):
            mesh = make_mesh({"data": 1, **sizes})
            placed, _ = layout(axes, params, mesh, 1)
            batch = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
            with jax.set_mesh(mesh):
                program = jax.jit(step, in_shardings=(placed, batch)).lower(params, x).compile()
            arguments = jax.device_put(params, placed), jax.device_put(x, batch)
            deviations = jax.tree.map(
                lambda a, b: float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)), program(*arguments), expected
            )
            gathered = re.findall(r"= (\S+) all-gather(?:-start)?\(", program.as_text())
            results[f"{kind} {sizes}"] = {
                "deviation": max(jax.tree.leaves(deviations)),
                "split": str(tuple(placed["up"].spec)),
                "gathered": gathered,
                "all_to_all": len(re.findall(r" all-to-all(?:-start)?\(", program.as_text())),
            }
    print(json.dumps(results))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
