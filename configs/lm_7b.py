"""A language model of seven billion parameters, for a pod: attention and gated FFNs, or a linear mixer by
its name.

    python -m launch.plan --config=configs/lm_7b.py --devices=64 --config.mesh.fsdp=8 --config.mesh.tensor=8
    python -m launch.jobset --image=IMAGE --accelerator=tpu-v5p-slice --topology=4x4x4 --hosts=16 --chips=4 \
        --claim=runs \
        --config=configs/lm_7b.py:attention,tokens --config.data.dir=TOKENS --workdir=/mnt/runs/lm_7b

Argument: attention (the default), gla, mamba2, hgrn; with ",tokens" after it the data are a folder of token files
(research/data/token_files.py), else, to lower it here, the text of Python's standard library. Hardware: 64 chips of 95
GB. No number is promised: it was lowered and counted, never trained here.
"""

from research.errors import UserError
from research.train.config import base_config

PATTERNS = {
    "attention": {"attention": {"num_heads": 32}},
    "gla": {"gla": {"num_heads": 16, "d_state": 128, "head_dim": 256}},
    "mamba2": {"mamba2": {"num_heads": 128, "d_state": 128, "head_dim": 64}},
    "hgrn": {"hgrn": {"d_conv": 4}},
}


def get_config(arg: str = "attention"):
    pattern, _, data = (arg or "attention").partition(",")
    if pattern not in PATTERNS or data not in ("", "tokens"):
        raise UserError(f"lm_7b:{arg} is unknown; valid: {', '.join(PATTERNS)}, each also with ',tokens'")
    config = base_config()
    sizes = {
        "dim": 4096,
        "depth": 32,
        "ffn": "glu",
        "ffn_dim": 11008,
        "vocab_size": 32000,
        "tie_embeddings": False,
        "length": 2048,
    }
    config.model = {"name": "sequence", "pattern": pattern, **sizes, **PATTERNS[pattern]}
    config.data.update({"name": "stdlib_text", "batch_size": 64})
    config.data.options = {"length": 2048, "tokenizer": "bytes", "max_bytes": 4_000_000}
    if data:
        config.data.name, config.data.options = "token_file", {"length": 2048}
    config.task.metric = "loss"
    config.optim.update(
        {"name": "lion", "lr": 1e-4, "weight_decay": 0.1, "b1": 0.95, "b2": 0.98, "clip_norm": 1.0, "warmup": "1%"}
    )
    config.train.update({"duration": "100000", "precision": "bfloat16", "remat": "full", "log_every": "10"})
    config.eval.update({"every": "1%", "batch_size": 64, "calibrate_batches": 0})
    config.checkpoint.update({"every": "1%", "keep_best": False})
    config.mesh.update({"data": -1, "fsdp": 8, "tensor": 8})
    config.report.latency = False
    return config
