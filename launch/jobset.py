"""Trains a recipe on TPU slices or GPU machines of a Kubernetes cluster, as a JobSet.

    python -m launch.jobset --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x4 --hosts=4 --chips=4 \\
        --config=configs/fashion_fast.py --workdir=/mnt/runs/pod --claim=shared-runs --dry_run

Renders a manifest (JobSet, jobset.x-k8s.io/v1alpha2) and gives it to `kubectl apply`; --dry_run prints it. The image
holds the repository at /nestax with its packages. When a pod is lost, JobSet starts all of them again, up to --restarts
times, and the run continues from its last checkpoint; a mistake in the recipe (exit code 2) ends it at once. --slices
above 1 lays the mesh's data axis over several slices.
"""

from typing import Any

from absl import flags

from launch import common, remote
from research.errors import UserError

_IMAGE = flags.DEFINE_string("image", None, "Container image with the repository at /nestax.")
_ACCELERATOR = flags.DEFINE_string(
    "accelerator", "", "Node label of the kind, e.g. tpu-v5-lite-podslice, or nvidia-h100-80gb."
)
_TOPOLOGY = flags.DEFINE_string("topology", "", "Of a TPU slice, e.g. 4x4; empty for GPUs.")
_HOSTS = flags.DEFINE_integer("hosts", 1, "Machines of a slice.", lower_bound=1)
_CHIPS = flags.DEFINE_integer("chips", 4, "Accelerators of each machine.", lower_bound=1)
_SLICES = flags.DEFINE_integer("slices", 1, "Slices.", lower_bound=1)
_CLAIM = flags.DEFINE_string("claim", "", "PersistentVolumeClaim, mounted at --mount.")
_MOUNT = flags.DEFINE_string("mount", "/mnt/runs", "Where it is mounted; the workdir lies below.")
_RESTARTS = flags.DEFINE_integer("restarts", 10, "How often all pods are started again.", lower_bound=0)
_SAVE_S = flags.DEFINE_integer(
    "save_s", 120, "Seconds that pods have to save when they are told to stop.", lower_bound=10
)

PORT = 8476  # of JAX's coordinator


def manifest(overrides: dict[str, str]) -> dict[str, Any]:
    """Returns the JobSet as plain values."""
    if not _IMAGE.value or not _ACCELERATOR.value:
        raise UserError(
            "--image and --accelerator are needed, e.g. --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x4"
        )
    name, tpu = remote.name(), bool(_TOPOLOGY.value)
    processes = _HOSTS.value * _SLICES.value
    words = [word for word in remote.command(overrides) if tpu or word != "--distributed"]
    container: dict[str, Any] = {
        "name": "train",
        "image": _IMAGE.value,
        "workingDir": "/nestax",
        "command": words,
        "resources": {"limits": {"google.com/tpu" if tpu else "nvidia.com/gpu": _CHIPS.value}},
        "ports": [{"containerPort": PORT}],
    }
    if not tpu:  # JobSet gives pods of one job stable names; JAX finds its processes by these
        index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
        container["env"] = [{"name": "PROCESS", "valueFrom": index}]
        container["command"] = [
            *words,
            f"--processes={processes}",
            "--process=$(PROCESS)",
            f"--coordinator={name}-slice-0-0.{name}:{PORT}",
        ]
    selector = {
        "cloud.google.com/gke-tpu-accelerator" if tpu else "cloud.google.com/gke-accelerator": _ACCELERATOR.value
    }
    if tpu:
        selector["cloud.google.com/gke-tpu-topology"] = _TOPOLOGY.value
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _SAVE_S.value,
        "nodeSelector": selector,
        "containers": [container],
    }
    if _CLAIM.value:
        container["volumeMounts"] = [{"name": "runs", "mountPath": _MOUNT.value}]
        pod["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": _CLAIM.value}}]
    mistake = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "train", "operator": "In", "values": [common.USER_ERROR]},
    }
    job = {
        "parallelism": _HOSTS.value,
        "completions": _HOSTS.value,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [mistake]},
        "template": {"spec": pod},
    }
    rules = [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": {"maxRestarts": _RESTARTS.value, "rules": rules},
            "replicatedJobs": [{"name": "slice", "replicas": _SLICES.value, "template": {"spec": job}}],
        },
    }


def main(overrides: dict[str, str]) -> int:
    import yaml

    if not _TOPOLOGY.value and _SLICES.value > 1:
        raise UserError(
            f"--slices={_SLICES.value} is for TPU slices (--topology); GPU machines are --hosts of one slice"
        )
    return remote.hand_over(
        yaml.safe_dump(manifest(overrides), sort_keys=False, width=10**6), ["kubectl", "apply", "-f", "-"]
    )


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv)
