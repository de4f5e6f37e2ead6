"""Every mixer over sequences that are cut over 8 simulated devices, and whole; prints deviations and collectives as
JSON.

Run as a process of its own: `python -m tests.modules.context_meshes [--packed_only] [KIND ...]`, of all kinds without
one.
"""

import dataclasses
import json
import sys

import jax


def config_of(kind: str):
    """A network of two layers of a mixer, small in every way."""
    from research.models.sequence import SequenceConfig

    spec = SequenceConfig().spec(kind)
    small = {"num_heads": 2, "d_state": 4}
    if (
        kind == "sla"
    ):  # with few features a token may share none with any before it, and its gradient is divided by almost nothing
        small["d_state"] = 16
    if kind == "routing":
        small |= {"num_local_heads": 1, "num_clusters": 2}
    if kind.startswith("mamba"):
        small = {"head_dim": 8, "d_state": 4, "num_rope_angles": 2}
    fields = {k: v for k, v in small.items() if hasattr(spec, k)}
    return SequenceConfig(
        vocab_size=16,
        dim=16,
        depth=2,
        length=32,
        pattern=kind,
        ffn="mlp",
        ffn_dim=16,
        **{kind: dataclasses.replace(spec, **fields)},
    )


def main(kinds: list[str], packed_only: bool) -> None:
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from research.models.sequence import SequenceConfig
    from research.modules.mesh import BATCH_AXES
    from research.modules.state import apply, initialize
    from research.report.collectives import collectives
    from research.train.sharding import make_mesh

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 16, (8, 32)).astype(np.int32)
    packed = np.sort(rng.integers(0, 3, (8, 32)), 1).astype(np.int32)
    ways = [(" packed", packed, dict(data=2, context=4))]
    if not packed_only:
        ways += [("", None, dict(context=8)), ("", None, dict(data=2, context=4))]
    results = {}
    for kind in kinds or [kind for kind, spec in SequenceConfig.specs().items() if getattr(spec, "causal", True)]:
        config = config_of(kind)
        params, stats = jax.jit(lambda key, c=config: initialize(c, key))(jax.random.key(0))

        def loss(params, tokens, ids, config=config, stats=stats):
            logits, _ = apply(config, params, stats, tokens, ids, mode="train")
            return (logits.astype(np.float32) ** 2).mean(), logits

        step = jax.value_and_grad(loss, has_aux=True)
        for name, ids, sizes in ways:
            expected = jax.jit(step)(params, tokens, ids)
            mesh = make_mesh({"data": 1, **sizes})
            batch, whole = NamedSharding(mesh, PartitionSpec(BATCH_AXES)), NamedSharding(mesh, PartitionSpec())
            places = (whole, batch, None if ids is None else batch)
            with jax.set_mesh(mesh):
                program = jax.jit(step, in_shardings=places).lower(params, tokens, ids).compile()
            given = (
                jax.device_put(params, whole),
                jax.device_put(tokens, batch),
                None if ids is None else jax.device_put(ids, batch),
            )
            off = jax.tree.map(
                lambda a, b: float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)), program(*given), expected
            )
            found = collectives(program.as_text(), mesh)
            results[f"{kind}{name} {sizes}"] = {
                "deviation": max(jax.tree.leaves(off)),
                "passed_on": sum(c.kind == "collective-permute" for c in found),
                "gathered": [f"{c.shapes} over {'+'.join(c.axes)}" for c in found if c.kind == "all-gather"],
            }
        print(kind, file=sys.stderr, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main([a for a in sys.argv[1:] if not a.startswith("--")], "--packed_only" in sys.argv)
