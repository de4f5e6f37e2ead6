"""In-context learning of Boolean functions (Bhattamishra et al. 2023, arXiv 2310.03016): a transformer beside its
nearest-neighbour baseline.

    make in-context-boolean
    python -m launch.in_context --config=configs/in_context_boolean.py:dnf --workdir=runs/in_context_dnf

Arguments: FUNCTION or FUNCTION-published, e.g. dnf-published; FUNCTION one of conjunction (default), dnf, parity,
sparse_parity. Small: 10 inputs, 30 examples, 0.2 M parameters, 1,500 updates. Published: 28 inputs (parity 10), 70
examples, 9.5 M parameters, 20,000 updates. Hardware: one CPU core, 391 to 407 s each. Accuracy after 20 examples:
conjunction 97.1 %, dnf 89.5 %, parity 51.0 %, sparse_parity 56.2 %. Any mixer: --config.model.pattern=mamba2; any
function: --config.data.name=in_context:cnf.
"""

from configs.bases.in_context import in_context_config
from research.errors import UserError

FUNCTIONS = ("conjunction", "dnf", "parity", "sparse_parity")


def get_config(arg: str = "conjunction"):
    function, _, size = (arg or "conjunction").partition("-")
    if function not in FUNCTIONS or size not in ("", "published"):
        valid = ", ".join(FUNCTIONS)
        raise UserError(
            f"configs/in_context_boolean.py:{arg} is unknown; valid: FUNCTION or FUNCTION-published, "
            f"FUNCTION one of {valid}"
        )
    if size:
        return in_context_config(function, size, 20_000, {})
    return in_context_config(function, "small", 1500, {"dims": 10, "points": 30})
