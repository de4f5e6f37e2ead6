"""Trains a recipe on all hosts of a Cloud TPU slice, by gcloud's ssh.

    python -m launch.tpu --tpu=my-slice --zone=us-east5-a --repository=URL --commit=HASH \\
        --config=configs/fashion_fast.py --workdir=/mnt/shared/pod --dry_run

Renders a script that sets every host up (clone, `make install`) and starts the run on all of them; --dry_run prints it.
A run that was killed or crashed is started again by its hosts, up to --restarts times, from its last checkpoint. The
workdir must lie on a file system that all hosts mount. `launch.jobset` does the same under Kubernetes, which also
replaces machines.
"""

import shlex
import subprocess

from absl import flags

from launch import common, remote
from research.errors import UserError

_TPU = flags.DEFINE_string("tpu", None, "Name of the TPU VM slice.")
_ZONE = flags.DEFINE_string("zone", None, "Its zone.")
_PROJECT = flags.DEFINE_string("project", "", "Google Cloud project; default: gcloud's.")
_REPOSITORY = flags.DEFINE_string("repository", "", "URL that hosts clone; default: this checkout's origin.")
_COMMIT = flags.DEFINE_string("commit", "", "What they check out; default: this checkout's HEAD.")
_RESTARTS = flags.DEFINE_integer("restarts", 10, "How often a lost run is started again.", lower_bound=0)
_FOLDER = "nestax"


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def host_script(overrides: dict[str, str]) -> str:
    """Returns what every host runs."""
    repository = _REPOSITORY.value or _git("remote", "get-url", "origin")
    commit = _COMMIT.value or _git("rev-parse", "HEAD")
    if not repository or not commit:
        raise UserError("--repository and --commit are needed: this checkout has no origin, or no commit")
    words = remote.command(overrides, ".venv/bin/python")
    return f"""set -eu
if [ ! -d {_FOLDER} ]; then git clone {shlex.quote(repository)} {_FOLDER}; fi
cd {_FOLDER}
git fetch --quiet origin
git checkout --quiet {shlex.quote(commit)}
make install EXTRAS=tpu
restarts=0
while true; do
  code=0
  {remote.lines(words, "    ")} || code=$?
  # 0: finished; {common.USER_ERROR}: a mistake, which another start would repeat.
  if [ "$code" -eq 0 ] || [ "$code" -eq {common.USER_ERROR} ]; then exit "$code"; fi
  if [ "$restarts" -ge {_RESTARTS.value} ]; then exit "$code"; fi
  restarts=$((restarts + 1))
  echo "exit code $code; start $restarts of {_RESTARTS.value} from the last checkpoint"
  sleep 20
done
"""


def render(overrides: dict[str, str]) -> str:
    """Returns the script for this machine."""
    if not _TPU.value or not _ZONE.value:
        raise UserError("--tpu and --zone are needed, e.g. --tpu=my-slice --zone=us-east5-a")
    where = [_TPU.value, f"--zone={_ZONE.value}", *([f"--project={_PROJECT.value}"] if _PROJECT.value else [])]
    words = " ".join(map(shlex.quote, ["gcloud", "compute", "tpus", "tpu-vm", "ssh", *where, "--worker=all"]))
    return f"""#!/bin/bash
set -eu
host=$(cat <<'HOST'
{host_script(overrides)}HOST
)
{words} --command="bash -c $(printf %q "$host")"
"""


def main(overrides: dict[str, str]) -> int:
    return remote.hand_over(render(overrides), ["bash", "-s"])


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv)
