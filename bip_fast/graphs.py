"""A whole training iteration in a CUDA graph: forward, backward and step leave the host as one launch.

`GraphedIteration` decides when to record, replay or run eagerly, on any device; only `CudaRecorder` knows CUDA. What the host does
around a step (checks, hyper-parameters, the phase) is `FastBiP.step` itself: a replay only stands in for its kernels.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from .engine.launch.plan import StepPlan
from .optimizer import FastBiP

__all__ = ["GraphedIteration"]

MAX_GRAPHS = 16  # each holds its own batch and results, and batches of ever new shapes must not fill the memory
_failed: list[Any] = []  # graphs whose capture failed: torch's allocators may still ask them whether they are being captured


class CudaRecorder:
    """Records on one device, always on the same side stream and into the same memory pool, so that graphs share their scratch memory."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def warming(self) -> Iterator[None]:
        """Work inside runs on the side stream, in order with the current one: autograd and the libraries must have seen it before."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def record(self, body: Callable[[], Any]) -> Callable[[], Any]:
        """Capture ``body`` without running its kernels; the function returned runs them and gives what ``body`` returned, in place."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The stream is entered here too, because torch.cuda.graph does not leave it when a capture fails. "thread_local": a thread
            # that pins the memory of a loader's next batch may go on.
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                results = body()
        except BaseException:
            self._mend(graph)
            raise

        def replay() -> Any:
            graph.replay()
            return results

        return replay

    def _mend(self, graph: Any) -> None:
        """Torch leaves a failed capture half open: eager training must get its memory and its random numbers back.

        As well as torch allows: where a version has nothing to mend, or another name for it, nothing happens.
        """
        _failed.append(graph)
        with suppress(AttributeError, RuntimeError):  # else the pool never frees what was allocated for the capture
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
            torch._C._cuda_releasePool(self.stream.device_index, self.pool)
        with suppress(RuntimeError):
            graph.reset()
        with (
            suppress(RuntimeError),
            torch.cuda.stream(self.stream),
            torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local"),
        ):
            torch.zeros(1, device=self.stream.device)  # a capture that ends well also ends the one of the random generator


RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaRecorder}


class _Recorded(NamedTuple):
    """A graph: the memory it reads its batch from, and the plan whose tables its kernels read (None: it has no step in it)."""

    replay: Callable[[], tuple[tuple[Tensor, ...] | Tensor, list[Tensor | None]]]
    batch: tuple[Tensor, ...]
    plan: StepPlan | None


class CaptureFailed(Exception):
    """A capture that failed; the message is the first line of the first error."""


class GraphedIteration:
    """One call is one step of training: forward, loss, backward, ``optimizer.step()``, and gradients back to None.

    On a CUDA device the first ``warmup`` calls of each phase run eagerly. Then the phase is captured, and from there on its calls are
    replays: the host copies the batch into the graph's memory and launches once. Every call trains, also those that warm up or capture.
    On other devices, or where capture is not possible, all calls run eagerly with the same results; `reason` says why.

    Replays follow step sizes, all other options of the optimizer, ``freeze_masks()``, ``with opt.lower():`` and the like. A new graph is
    made when something else changes that a graph depends on: which weights compete with each other, ``model.train()`` and ``eval()``,
    frozen or replaced parameters and buffers. Batches of another shape or dtype (such as a last, smaller one) run eagerly until they have
    come ``warmup`` times and then get a graph of their own. At most 16 graphs are made.

    Other values that Python code reads, such as a drop rate or the number of calls so far, stay as they were at the capture. After such a
    change, or a change of the model's structure, make a new GraphedIteration.

    If the optimizer is not a `FastBiP`, or has another one inside, or has step hooks (which expect to see gradients), the graph holds
    forward, loss and backward, and ``optimizer.step()`` follows it.

    Under DistributedDataParallel all calls run eagerly: what it sends during a backward pass is not captured.

    Args:
        model: called with the first tensor of a batch.
        optimizer: a FastBiP, or any torch optimizer, of parameters on one device.
        loss_fn: called with the model's output and the other tensors of a batch. Returns the loss, or a tuple of it and further
            tensors that you want back, such as the output.
        autocast: torch.bfloat16 runs model and loss under autocast (without its cache of weights). None leaves that to the caller: under an
            autocast around the call they run under it.
        warmup: the number of eager calls before a capture, at least 1.

    Attributes:
        reason: why calls run eagerly, or None if they are captured, or will be.

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> iteration = GraphedIteration(model, opt, torch.nn.functional.cross_entropy, autocast=torch.bfloat16)
        >>> for x, y in loader:
        ...     loss = iteration(x, y)
        ...     scheduler.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[..., Any],
        *,
        autocast: torch.dtype | None = None,
        warmup: int = 3,
    ) -> None:
        if autocast not in (None, torch.bfloat16):
            raise ValueError(f"autocast must be None or torch.bfloat16 (float16 needs a GradScaler, which asks the host), got {autocast}")
        if not isinstance(warmup, int) or warmup < 1:
            raise ValueError(f"warmup must be an integer of at least 1, got {warmup!r}")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(f"optimizer must take steps without a closure, got {type(optimizer).__name__}")
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self._autocast, self._warmup = autocast, warmup
        given = [p for group in optimizer.param_groups for p in group["params"]]
        if not given:
            raise ValueError("the optimizer has no parameters")
        self._params: list[Tensor] = []
        self._device = given[0].device
        self.reason = None
        if self._device.type not in RECORDERS:
            self.reason = f"the parameters are on {self._device}, and only CUDA has graphs"
        elif any(isinstance(module, nn.parallel.DistributedDataParallel) for module in self._modules()):
            self.reason = "the model is in DistributedDataParallel"
        self._recorder: Any = RECORDERS[self._device.type](self._device) if self.reason is None else None
        self._eager_calls: Counter[Any] = Counter()
        self._graphs: dict[Any, _Recorded] = {}
        self._surroundings: Any = None  # that the graphs were made in

    def __call__(self, x: Tensor, *targets: Tensor) -> Any:
        """Train on one batch, of tensors on any device.

        Returns:
            What ``loss_fn`` returned, detached, on the device. Nothing waits for it, and later calls do not overwrite it.

        Raises:
            TypeError: the batch holds something else than tensors.
            RuntimeError: as from ``optimizer.step()``, or from your model.
        """
        batch = (x, *targets)
        if not all(isinstance(t, Tensor) for t in batch):
            raise TypeError(f"a batch must be tensors, got {', '.join(type(t).__name__ for t in batch)}")
        if isinstance(self.optimizer, FastBiP):
            self.optimizer._running("step")
        self._look_around()
        self._clear_gradients()
        if self.reason is None:
            whole = self._whole_step()
            key = (getattr(self.optimizer, "phase", ""), whole, self._autocast_dtype(), *((t.shape, t.dtype) for t in batch))
            if key in self._graphs or (self._eager_calls[key] >= self._warmup and len(self._graphs) < MAX_GRAPHS):
                try:
                    return self._graphed(key, batch, whole)
                except CaptureFailed as error:  # nothing has run, so the batch is not lost
                    self.reason = f"capture failed: {error}"
                    self._graphs.clear()
                    self._recorder = None
                    self._clear_gradients()
            results = self._eager(batch)
            self._eager_calls[key] += 1
            return results
        return self._eager(batch)

    # --- eager -----------------------------------------------------------------------------------------------------------------------

    def _eager(self, batch: tuple[Tensor, ...]) -> Any:
        with self._recorder.warming() if self._recorder else nullcontext():
            results = self._forward_backward(tuple(t.to(self._device, non_blocking=True) for t in batch))
            self.optimizer.step()
            self._clear_gradients()
        return results

    def _forward_backward(self, batch: tuple[Tensor, ...]) -> Any:
        dtype = self._autocast_dtype()
        with torch.enable_grad():
            with torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
                results = self.loss_fn(self.model(batch[0]), *batch[1:])
            loss, *others = results if isinstance(results, tuple) else (results,)
            if not all(isinstance(x, Tensor) for x in (loss, *others)):
                kinds = ", ".join(type(x).__name__ for x in (loss, *others))
                raise TypeError(f"loss_fn must return the loss, a tensor, or a tuple of it and further tensors, got {kinds}")
            loss.backward()
        return tuple(x.detach() for x in results) if isinstance(results, tuple) else results.detach()

    def _autocast_dtype(self) -> torch.dtype | None:
        """Of ``autocast``, or of an autocast that the call is in."""
        if self._autocast is None and torch.is_autocast_enabled(self._device.type):
            return torch.get_autocast_dtype(self._device.type)
        return self._autocast

    def _clear_gradients(self) -> None:
        for p in self._params:
            p.grad = None

    # --- graphs ----------------------------------------------------------------------------------------------------------------------

    def _whole_step(self) -> bool:
        """Whether the step can be in the graph."""
        hooks = (
            self.optimizer._optimizer_step_pre_hooks,
            self.optimizer._optimizer_step_post_hooks,
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        )
        return isinstance(self.optimizer, FastBiP) and not self.optimizer.inner_optimizers and not any(hooks)

    def _modules(self) -> list[nn.Module]:
        return [module for root in (self.model, self.loss_fn) if isinstance(root, nn.Module) for module in root.modules()]

    def _look_around(self) -> None:
        """Find the parameters as they are now, and drop graphs that were made for other ones, elsewhere or in another mode."""
        modules = self._modules()
        given = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._params = list(dict.fromkeys([*given, *(p for module in modules for p in module._parameters.values() if p is not None)]))
        buffers = [t for module in modules for t in module._buffers.values() if t is not None]
        surroundings = (
            [module.training for module in modules],
            [(t.data_ptr(), t.requires_grad) for t in (*self._params, *buffers)],
        )
        if surroundings != self._surroundings:
            if self._graphs:  # torch does not take up a pool again that all graphs have left
                self._graphs.clear()
                self._recorder = RECORDERS[self._device.type](self._device)
            self._eager_calls.clear()
            self._surroundings = surroundings

    def _graphed(self, key: Any, batch: tuple[Tensor, ...], whole: bool) -> Any:
        results: list[Any] = []
        if isinstance(self.optimizer, FastBiP) and whole:
            with _launching(self.optimizer, lambda plan: results.append(self._replay(key, batch, plan))):
                self.optimizer.step()
        else:
            results.append(self._replay(key, batch, None))
            self.optimizer.step()
        self._clear_gradients()
        own = results[0]  # in the graph's memory, which the next replay writes
        return tuple(x.clone() for x in own) if isinstance(own, tuple) else own.clone()

    def _replay(self, key: Any, batch: tuple[Tensor, ...], plan: StepPlan | None) -> Any:
        """Run the graph of ``key``, made anew where its plan is no longer the optimizer's; sets the gradients it leaves."""
        recorded = self._graphs.get(key)
        if recorded is None or recorded.plan is not plan:
            recorded = self._graphs[key] = self._record(batch, plan)
        for to, given in zip(recorded.batch, batch, strict=True):
            to.copy_(given, non_blocking=True)
        if plan is not None:
            plan.hold()
        results, gradients = recorded.replay()
        for p, g in zip(self._params, gradients, strict=True):
            p.grad = g
        return results

    def _record(self, batch: tuple[Tensor, ...], plan: StepPlan | None) -> _Recorded:
        static = tuple(torch.empty_like(t, device=self._device, requires_grad=False) for t in batch)  # keeps channels_last

        def body() -> tuple[Any, list[Tensor | None]]:
            results = self._forward_backward(static)
            if plan is not None:
                assert isinstance(self.optimizer, FastBiP)
                self.optimizer._running("step").kernels(self.optimizer.phase)(plan)
                self._clear_gradients()  # the next capture may use their memory
            return results, [p.grad for p in self._params]

        try:
            return _Recorded(self._recorder.record(body), static, plan)
        except Exception as error:  # of the user's code, of torch or of CUDA: if it has another cause, the eager call raises it again
            raise CaptureFailed(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    """First line of the first error in the chain; the last one only says that a capture failed."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def _launching(optimizer: FastBiP, launch: Callable[[StepPlan], None]) -> Iterator[None]:
    """Inside, a step of ``optimizer`` starts its kernels by ``launch``."""
    optimizer._launch = launch
    try:
        yield
    finally:
        optimizer._launch = None
