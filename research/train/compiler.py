"""Compiles programs ahead of time, in a background thread, and keeps them."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax


class Program(Protocol):
    """A program that can be asked for: hashable, equal ones are the same program."""

    @property
    def title(self) -> str:
        """What messages call it."""
        ...

    def lower(self, context: Any) -> jax.stages.Lowered:
        """Traces it for the arguments that it always takes.

        Args:
          context: what the run has that the program is made of.
        """
        ...

    def rarely(self, context: Any) -> bool:
        """Whether it runs so few times that optimising it costs more than it saves."""
        ...


@dataclass
class Compiler:
    """Keeps the compiled programs of a run; `get` waits for one, `prefetch` starts compiling it.

    Attributes:
      context: what programs are made of.
      on_cpu: whether they run on CPUs, where a program that runs a few times is compiled without optimisation.
      waiting: called again and again while `get` waits; may raise to stop.
      compiled: program -> its executable, in order of completion.
      seconds: program -> seconds spent tracing and compiling it.
    """

    context: Any
    on_cpu: bool
    waiting: Callable[[], None] = lambda: None
    compiled: dict[Program, Any] = field(default_factory=dict)
    seconds: dict[Program, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._futures: dict[Program, Future[Any]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")  # XLA itself compiles on all cores

    def _build(self, program: Program) -> Any:
        start = time.perf_counter()
        executable = program.lower(self.context).compile(compiler_options=self.effort(program))
        with self._lock:
            self.compiled[program] = executable
            self.seconds[program] = time.perf_counter() - start
        return executable

    def effort(self, program: Program) -> dict[str, Any] | None:
        """Returns compiler options: on a CPU a program that runs a few times only is compiled without optimisation."""
        return {"xla_backend_optimization_level": 0} if self.on_cpu and program.rarely(self.context) else None

    def prefetch(self, *programs: Program) -> None:
        """Starts compiling what is not at hand yet, in this order."""
        for program in programs:
            with self._lock:
                if program not in self._futures:
                    self._futures[program] = self._pool.submit(self._build, program)

    def get(self, program: Program) -> Any:
        """Returns a compiled program, waiting for it when needed."""
        ready = self.compiled.get(program)
        if ready is not None:
            return ready
        self.prefetch(program)
        future = self._futures[program]
        while not future.done():
            self.waiting()
            time.sleep(0.01)  # a plain result() would hold back signals
        return future.result()

    def busy(self) -> bool:
        """Whether a program is being compiled, or is to be."""
        return any(not future.done() for future in list(self._futures.values()))

    def status(self) -> str:
        """Returns a line on the program that is being compiled: which, and of how many."""
        keys = list(self._futures)
        left = [key for key in keys if not self._futures[key].done()]
        what = f"compiling the {left[0].title} program, " if left else "compiled "
        return f"{what}{len(keys) - len(left) + bool(left)} of {len(keys)}"

    def largest(self) -> tuple[str, int]:
        """Returns the title of the program that takes the most memory beside its arguments, and its bytes; ("", 0)
        without any."""
        sizes = {}
        for program, executable in list(self.compiled.items()):
            if (found := executable.memory_analysis()) is not None:
                sizes[program.title] = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return max(sizes.items(), key=lambda item: item[1], default=("", 0))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
