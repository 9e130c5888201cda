"""A decode step as a CUDA graph: one launch in place of hundreds.

A decode step does little arithmetic in many kernels, 30 a layer. A GPU is done with them faster
than Python can launch them. A graph is a recording: made once, then replayed with a single launch.
A replay runs the recorded kernels on the recorded memory, so a step must write its state in place,
make no tensor from Python numbers that change, and not wait for the host.

A recording is of one shape: rows of the batch, length of the cache. Within a call of generate rows
only fall and the cache only grows, so no shape comes back, and one graph is kept at a time.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rollout import Slots


@dataclass
class Graphs:
    """What became of a sampler's graphs."""

    wanted: bool
    captured: int = 0  # shapes that were recorded
    failed: str | None = None  # why all steps are eager from now on


class GraphedStep:
    """Of each shape, the first step is eager, the second is recorded and eager, the third is a replay
    that is compared with an eager one; from then on it is replayed alone. `step` changes the tensors
    slots.state and slots.cache, and draws from `generator`. What goes wrong is told in a line on
    stderr, once for all calls that share `graphs`; from then on steps are eager."""

    def __init__(
        self,
        step: Callable[[], None],
        slots: "Slots",
        generator: torch.Generator,
        graphs: Graphs,
    ) -> None:
        self.step = step
        self.slots = slots
        self.generator = generator
        self.graphs = graphs
        self.graph: torch.cuda.CUDAGraph | None = None
        self.shape: list = []
        self.steps = 0  # in this shape

    def __call__(self) -> None:
        if self.graphs.failed:
            self.step()
            return
        shape = self.shape_now()
        if shape != self.shape:
            self.shape = shape
            self.steps = 0
        self.steps += 1
        if self.steps == 1:
            self.warm_up()
        elif self.steps == 2:
            self.capture()
        elif self.steps == 3:
            self.check()
        else:
            self.graph.replay()

    def shape_now(self) -> list:
        """Whatever a recording depends on: where the tensors are, and their sizes."""
        tensors = [*self.slots.state, self.slots.cache]
        return [(tensor.data_ptr(), tensor.shape) for tensor in tensors]

    def warm_up(self) -> None:
        """An eager step. Libraries choose kernels and take memory at the first use of a shape,
        which may not happen in a recording."""
        before = self.slots.state
        self.step()
        in_place = all(new is old for new, old in zip(self.slots.state, before))
        if not in_place:
            self.fail("the step makes new tensors for its state, and does not write it in place")

    def capture(self) -> None:
        """Records a step, which computes nothing, and makes one eagerly. So the first replay starts
        from another state than the recording, and a number frozen into it shows."""
        random = self.generator.get_state()
        stream = torch.accelerator.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            # The old graph is not replayed again: reuse its memory.
            pool = self.graph.pool() if self.graph else None
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self.step()
            self.graph = graph
            self.graphs.captured += 1
        except RuntimeError as error:
            reason, _, _ = str(error).partition("\n")
            self.fail(f"a step could not be recorded: {reason}")
            # A recording that broke off leaves its own stream in use.
            torch.accelerator.set_stream(stream)
            self.renew_generator(random)
        self.step()

    def renew_generator(self, random: Tensor) -> None:
        """After a recording that broke off, CUDA takes the generator for one that still records."""
        fresh = torch.Generator(self.generator.device)
        fresh.set_state(random)
        try:
            self.generator.graphsafe_set_state(fresh)
        except NotImplementedError:  # only CUDA's own generators record
            self.generator.set_state(random)

    def check(self) -> None:
        """Replays, and makes the same step eagerly from the same state, which stands. A replay reads
        the keys and values that it has written itself, so a wrong place in the cache shows too."""
        before = [tensor.clone() for tensor in self.slots.state]
        random = self.generator.get_state()
        self.graph.replay()
        replayed = [tensor.clone() for tensor in self.slots.state]

        for tensor, old in zip(self.slots.state, before):
            tensor.copy_(old)
        self.generator.set_state(random)
        self.step()
        tolerance = tolerance_of(self.slots.cache.dtype)
        for tensor, other in zip(self.slots.state, replayed):
            if not same(tensor, other, tolerance):
                self.fail("a replay differs from the step itself")
                return

    def fail(self, reason: str) -> None:
        self.graph = None
        self.graphs.failed = f"decode steps run without a CUDA graph: {reason}"
        print(f"warning: {self.graphs.failed}", file=sys.stderr)

    def close(self) -> None:
        """Gives the graph's memory back. Nobody else can use it before the cache is emptied."""
        if self.graph is not None:
            self.graph = None
            torch.cuda.empty_cache()


def tolerance_of(dtype: torch.dtype) -> float:
    """Nats between a step and its replay. They are the same kernels and should be equal to the bit;
    where a library chose others, logits of about 20 differ by roundings."""
    return max(1e-3, 16 * torch.finfo(dtype).eps)


def same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Tokens, counts and flags exactly, other numbers within `tolerance`."""
    if a.is_floating_point():
        return torch.allclose(a, b, rtol=0.0, atol=tolerance)
    return torch.equal(a, b)
