"""Recipe of a language-model run of seconds, for tests: characters of a text given by --config.data.dir.

With the argument "probe" a hybrid of three mixers on made sequences, which needs no text; with "moe" one with mixtures
of experts.
"""

from research.train.config import base_config


def get_config(arg: str = "sandwich"):
    config = base_config()
    config.model = {"name": "sequence", "pattern": "hgrn", "dim": 32, "depth": 2, "hgrn": {"d_conv": 3}}
    config.data.update({"name": "text", "batch_size": 8})
    config.data.options = {"length": 24, "tokenizer": "chars"}
    config.nested.points = {"s": "width=0.5"}
    config.methods = () if arg in ("full", "probe", "moe") else (arg,)
    config.method = {name: {"count": 2} for name in ("sandwich", "sorted")}
    config.optim.update({"name": "muon", "lr": 2e-2, "momentum": 0.9, "weight_decay": 0.05, "warmup": "2"})
    config.train.update({"duration": "40", "log_every": "4"})
    config.eval.update({"every": "20", "batch_size": 16})
    config.checkpoint.update({"every": "20"})
    config.report.latency = False
    return _on_probe(config, arg) if arg in ("probe", "moe") else config


def _on_probe(config, arg):
    mixers = {"mamba2": {"d_state": 8, "head_dim": 8}, "gla": {"num_heads": 4}, "attention": {"num_heads": 8}}
    config.model = {
        "name": "sequence",
        "pattern": "mamba2 gla attention",
        "ffn": "glu",
        "dim": 32,
        "depth": 3,
        "ffn_dim": 64,
        **mixers,
    }
    if arg == "moe":
        config.model.update(
            {
                "pattern": "gla",
                "depth": 2,
                "ffn": "moe",
                "moe": {"num_experts": 8, "num_experts_per_tok": 2, "balance_loss_coef": 0.01},
            }
        )
    config.data.name = "probe:mqar"
    config.data.options = {"vocab_size": 64, "length": 16, "pairs": 2, "train_examples": 256, "test_examples": 60}
    config.methods = ("all",)
    config.train.log_every = "1"
    return config
