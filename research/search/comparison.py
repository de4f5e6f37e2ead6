"""Many-in-one training against the same networks trained alone, at equal total training FLOPs."""

from collections.abc import Mapping
from typing import Any

from research.train import costs
from research.train.setup import Setup


def run_flops(setup: Setup) -> float:
    """Training FLOPs of the whole run of a setup, from its draws."""
    flops = {name: costs.training_flops(c) for name, c in setup.space.configs.items()}
    size = setup.config.data.batch_size
    return float(sum(flops[d.name] * size / d.microbatches for step in range(setup.total) for d in setup.draw(step)))


def alone_updates(setup: Setup) -> int:
    """Updates that each network gets alone so that all of them together cost what the many-in-one run costs."""
    once = sum(costs.training_flops(setup.space.configs[name]) for name in setup.order)
    return round(run_flops(setup) / (once * setup.config.data.batch_size))


def join(together: Mapping[str, Any], alone: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row per network: its costs, its value in the many-in-one run and trained alone."""
    rows = []
    for network in together["subnets"]:
        single = alone[network["name"]]["subnets"][0]
        if single["params"] != network["params"]:
            raise ValueError(f"{network['name']}: {network['params']} parameters together, {single['params']} alone")
        row = {k: network.get(k) for k in ("name", "params", "flops", "latency_ms")}
        rows.append({**row, "together": network["value"], "alone": single["value"]})
    return rows
