"""Faults of processes: killed, told to stop, two at once, one of several lost."""

import os
import signal
import time

from tests.faults.base import LIMIT_S, Outcome, Suite, half_saved, require, whole_steps
from tests.train.test_processes import processes_with


def kills(c: Suite, count: int) -> Outcome:
    """kill -9 at random moments, half of them in a save; every run that comes to its end is judged, then a new one
    starts."""
    made = in_saves = ended = 0
    number = 0
    while made < count:
        workdir = c.root / f"killed{number}"
        process, hunt = c.begin(workdir), c.random.random() < 0.6
        until = time.time() + c.random.uniform(0, c.whole_s)
        while process.poll() is None and (time.time() < until or (hunt and not half_saved(workdir))):
            time.sleep(0.001)
        if process.poll() is None:
            time.sleep(c.random.uniform(0, 0.02) if hunt else 0)
            process.kill()
        output = process.communicate()[0]
        require("Traceback" not in output, f"killed{number}: {output[-500:]}")
        if process.returncode == -signal.SIGKILL:
            made += 1
            in_saves += half_saved(workdir)
            print(
                f"kill {made}/{count}: {max(whole_steps(workdir), default=0)} steps are "
                f"safe{', in a save' if half_saved(workdir) else ''}",
                flush=True,
            )
        else:
            require(process.returncode == 0, f"killed{number} ended with {process.returncode}: {output[-500:]}")
            c.check_same(workdir, c.reference)
            ended, number = ended + 1, number + 1
    if (c.root / f"killed{number}").exists():
        c.go_on(c.root / f"killed{number}")
        ended += 1
    return Outcome(
        "kill -9", count, count, f"{in_saves} of them in a save; {ended} runs came to their end, all bit-identical"
    )


def sigterm(c: Suite) -> Outcome:
    workdir = c.root / "sigterm"
    process = c.begin(workdir)
    c.wait_for(process, workdir, 20)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    require(process.returncode == 75 and "Traceback" not in output, f"exit code {process.returncode}: {output[-300:]}")
    said = output.strip().splitlines()[-1]
    c.go_on(workdir, max(whole_steps(workdir)))
    return Outcome("SIGTERM", 1, 1, said)


def two_at_once(c: Suite) -> Outcome:
    workdir = c.root / "shared"
    first = c.begin(workdir)
    c.wait_for(first, workdir, 10)
    said = c.error(c.train(workdir))
    output = first.communicate(timeout=LIMIT_S)[0]
    require(first.returncode == 0, f"the first run was harmed: {output[-300:]}")
    c.check_same(workdir, c.reference)
    return Outcome("two runs on one workdir", 1, 1, said)


def changed_config(c: Suite) -> Outcome:
    workdir = c.root / "changed"
    process = c.begin(workdir)
    c.wait_for(process, workdir, 20)
    process.kill()
    process.communicate()
    said = c.error(c.train(workdir, "--config.optim.lr=0.5"))
    c.go_on(workdir, max(whole_steps(workdir)))
    return Outcome("config changed between runs", 1, 1, said)


def lost_process(c: Suite) -> list[Outcome]:
    """Two processes of one run: one is killed, both are told to stop."""
    module = ("launch.local", "--processes=2")
    reference = c.root / "two_processes"
    require(c.train(reference, module=module).returncode == 0, "two processes did not train")
    outcomes = []
    for name, number in (
        ("SIGKILL of one of two processes", signal.SIGKILL),
        ("SIGTERM to two processes", signal.SIGTERM),
    ):
        workdir = c.root / f"two_{number.name}"
        parent = c.begin(workdir, module=module)
        c.wait_for(parent, workdir, 20)
        if number == signal.SIGKILL:
            os.kill(
                next(pid for pid, words in processes_with(f"--workdir={workdir}") if "--process=1" in words), number
            )
        else:
            parent.send_signal(number)
        begun = time.time()
        output = parent.communicate(timeout=LIMIT_S)[0]
        seconds = time.time() - begun
        require(seconds < 60 and "Traceback" not in output, f"{name}: {seconds:.0f} s, {output[-500:]}")
        require(
            parent.returncode == (1 if number == signal.SIGKILL else 75),
            f"{name}: exit code {parent.returncode}: {output[-500:]}",
        )
        said = output.strip().splitlines()[-1].replace(str(c.root), "RUNS")
        done = c.train(workdir, module=module)
        require(
            done.returncode == 0 and "resumed from step" in done.stdout,
            f"{name}: did not continue: {done.stderr[-300:]}",
        )
        c.check_same(workdir, reference)
        outcomes.append(Outcome(name, 1, 1, f"after {seconds:.1f} s: {said}"))
    return outcomes
