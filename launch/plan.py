"""Tells what a run would need on a mesh that need not exist: bytes a device, collectives of an update, a floor of its
time.

    python -m launch.plan --config=configs/lm_7b.py --devices=64 --config.mesh.fsdp=8 --config.mesh.tensor=8 \\
        --chips=tpu_v5p,h100
    python -m launch.plan --config=configs/fashion_fast.py --devices=8 --config.mesh.data=8

Nothing is trained and no array made: the update is compiled for simulated devices. Bytes of parameters, statistics,
optimizer and gradients are exactly those of the compiled programs; activations are estimated. Times are the longest of
computing, memory and links by the vendors' figures, so floors. --slow_axes names mesh axes that cross the network
between slices or hosts.
"""

import json

from absl import flags

from launch import common, outputs
from research.files import write_text

_CONFIG = common.path_flag("config", None, "Recipe: FILE.py or FILE.py:ARG.")
_DEVICES = flags.DEFINE_integer("devices", 8, "Devices to simulate.", lower_bound=1)
_CHIPS = flags.DEFINE_list("chips", ["tpu_v5e", "tpu_v5p", "tpu_v6e", "h100", "h200", "b200"], "Chips to predict for.")
_SLOW_AXES = flags.DEFINE_list("slow_axes", [], "Mesh axes whose collectives cross the network between slices.")
_OUT = outputs.output_flag("out", outputs.Place.FILE, "Also write everything as JSON to this file.")


def main(overrides: dict[str, str]) -> int:
    from launch import config as recipe
    from research.errors import UserError

    if not _CONFIG.value:
        raise UserError("--config is needed, e.g. --config=configs/lm_7b.py --devices=64 --config.mesh.fsdp=64")
    config = recipe.load(_CONFIG.value, overrides)

    import jax

    jax.config.update(
        "jax_platforms", "cpu"
    )  # reading the config may have imported JAX, which reads its environment then
    jax.config.update("jax_num_cpu_devices", _DEVICES.value)

    from research.modules.mesh import MESH_AXES
    from research.report import roofline
    from research.report.collectives import summary
    from research.report.tables import text_table
    from research.train.plan import plan
    from research.train.setup import make_setup

    for name in _CHIPS.value:
        roofline.chip(name)
    if unknown := sorted(set(_SLOW_AXES.value) - set(MESH_AXES)):
        raise UserError(f"--slow_axes: unknown {unknown[0]!r}; valid: {', '.join(MESH_AXES)}")
    found = plan(make_setup(config))
    gib = lambda n: f"{n / 2**30:.3f} GiB" if n >= 2**27 else f"{n / 2**20:.3f} MiB"
    print(f"bytes a device, of {found.devices}:")
    rows = [{"what": what, "bytes": size, "": gib(size)} for what, size in found.bytes.items()]
    rows.append({"what": "activations (estimate)", "bytes": found.activations, "": gib(found.activations)})
    rows.append({"what": "all", "bytes": found.total, "": gib(found.total)})
    print(text_table(rows, ["what", "bytes", ""]))
    for program, (theirs, ours) in found.arguments.items():
        print(
            f"{program} program: the compiler takes {theirs:,} bytes of arguments, by our count of the arrays "
            f"{ours:,}; "
            f"its temporaries {gib(found.temporaries[program])}"
        )
    for program, several in found.collectives.items():
        print(f"\ncollectives of the {program} program ({found.runs[program]} run(s) an update):")
        table = [
            {
                "kind": c.kind,
                "axes": "+".join(c.axes),
                "result": c.shapes[:60],
                "times": c.times,
                "sent": gib(c.sent * c.times),
            }
            for c in several
        ]
        print(text_table(table, ["kind", "axes", "result", "times", "sent"]) if table else "none")
    print(
        f"\nfloor of an update ({found.flops:.3g} FLOPs in all); MFU where links overlap with computing, and where "
        "nothing does:"
    )
    slow, predictions = tuple(_SLOW_AXES.value), []
    for name in _CHIPS.value:
        p = found.prediction(name, slow)
        ms = lambda s: f"{1e3 * s:.2f}"
        predictions.append(
            {
                "chip": name,
                "compute ms": ms(p.compute_s),
                "memory ms": ms(p.memory_s),
                "links ms": ms(p.links_s),
                "step ms": f"{ms(p.hidden_s)}..{ms(p.exposed_s)}",
                "MFU %": f"{100 * p.mfu(p.hidden_s):.0f}..{100 * p.mfu(p.exposed_s):.0f}",
                "bound": p.bound,
                "fits": "yes" if found.total < roofline.CHIPS[name].memory else "no",
            }
        )
    print(text_table(predictions, list(predictions[0])))
    if _OUT.value:
        record = {
            "devices": found.devices,
            "bytes": dict(found.bytes),
            "activations": found.activations,
            "temporaries": dict(found.temporaries),
            "arguments": dict(found.arguments),
            "collectives": {program: summary(several) for program, several in found.collectives.items()},
            "predictions": predictions,
        }
        write_text(_OUT.value, json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv)
