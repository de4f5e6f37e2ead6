"""The collectives of a training step of every model family on 8 simulated devices; prints them as JSON.

Run as a process of its own: `python -m tests.train.family_meshes [FAMILY ...]`; `--store` renews collectives.json, when
a change is meant. Each family's tiny twin is lowered whole and as a sub-network, over fsdp and over tensor.
"""

import json
import sys
from pathlib import Path

import jax

STORED = Path(__file__).parent / "collectives.json"
MESHES = {"data=2,fsdp=4": dict(data=2, fsdp=4), "data=4,tensor=2": dict(data=4, tensor=2)}
BATCH = 56


def smaller(config):
    """A sub-network, by the first elastic field that takes a half."""
    from research.errors import UserError

    for field in ("ffn", "width", "hidden", "heads", "depth"):
        if field in getattr(config, "elastic", {}):
            try:
                small = config.shrink(**{field: 0.5})
            except (UserError, TypeError, ValueError):
                continue
            if small != config:
                return field, small
    return None, None


def found_in(config, small, sizes):
    """Returns the collectives of the gradient of the network `small` within the parameters of `config`."""
    from jax.sharding import NamedSharding, PartitionSpec

    from research.modules.mesh import BATCH_AXES
    from research.modules.state import abstract
    from research.nested.slicing import slice_like
    from research.report.collectives import collectives
    from research.train.sharding import layout, make_mesh, whole_where_cut
    from tests.models import twins

    full = abstract(config)
    mesh = make_mesh({"data": 1, **sizes})
    shards = dict.fromkeys(("mlp", "heads", "bottleneck"), mesh.shape["tensor"])
    places, _ = layout(full.axes, {**full.params, **full.stats}, mesh, 1)
    params, stats = ({k: places[k] for k in group} for group in (full.params, full.stats))
    batch = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def loss(params, stats, x):
        def cut(arrays):
            return slice_like(
                whole_where_cut(arrays, places, full, abstract(small), shards), full, abstract(small), shards
            )

        return twins.loss(small, cut(params), cut(stats), x)

    x = jax.eval_shape(lambda: twins.images(config, BATCH))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), in_shardings=(params, stats, batch), out_shardings=params)
        program = step.lower(dict(full.params), dict(full.stats), x).compile(compiler_options=twins.FAST)
    return collectives(program.as_text(), mesh)


def main(wanted: list[str]) -> dict:
    from research.report.collectives import summary
    from tests.models import twins

    out: dict = {}
    for config, names in twins.distinct_twins().items():
        if config.family in out or (wanted and config.family not in wanted):
            continue
        field, small = smaller(config)
        out[config.family] = {}
        for name, sizes in MESHES.items():
            for which, network in {"whole": config, f"{field}=0.5": small}.items():
                if network is not None:
                    out[config.family][f"{name} {which}"] = summary(found_in(config, network, sizes))
        print(config.family, names[0], file=sys.stderr, flush=True)
    return out


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    results = main([a for a in sys.argv[1:] if not a.startswith("--")])
    if "--store" in sys.argv:
        STORED.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))
