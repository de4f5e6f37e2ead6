"""Soft actor-critic whose policy is a mixture of four experts, on the walk round an obstacle: reinforcement learning in
the harness of every other run.

    python -m launch.train --config=configs/control_detour.py --workdir=runs/control_detour

Hardware: two CPU cores, 85 s, 57 of them compiling. Number to expect: 1.5, the mean return of three seeds' last
policies (2.6, 0.9 and 1.0: seeds differ; `launch.control` found 1.3, results/control/detour); the shortest way round
earns about 2.6.
Data: none; every seed makes its own experience, 6,000 steps of its environment after 500 of uniform actions.
"""

from research.train.config import base_config


def get_config():
    config = base_config()
    config.learner = {
        "name": "soft_actor_critic",
        "options": {"task": "detour", "experts": 4, "estimator": "frequency", "seeds": (0, 1, 2), "steps": 100},
    }
    config.train.update({"duration": "6000ex", "log_every": "5%"})
    config.eval.update({"every": "10%"})
    config.checkpoint.update({"every": "25%"})
    return config
