"""How a GPU is timed: device time between two events, host time without waiting, launches by the profiler."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from bip_fast.timing import clock

HIDE_AT_MOST = 0.03  # seconds


class EventTime:
    """What `event_timer` returns: the difference of two is the seconds that the device spent between them."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: EventTime) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def event_timer() -> EventTime:
    """For pytest-benchmark: an event on the current stream, recorded in order with the work on it."""
    return EventTime()


def hide_host(seconds: float) -> None:
    """Keep the device busy for about ``seconds``, so that the host can enqueue what comes next: then events time the device alone."""
    torch.cuda._sleep(int(min(seconds, HIDE_AT_MOST) * 2e9))  # cycles


def copy_seconds(num_bytes: float, device: torch.device) -> float:
    """Median time of a copy that moves ``num_bytes``; on a GPU by events, as the steps are timed."""
    if device.type != "cuda":
        return clock.copy_seconds(num_bytes, device, 0.05)
    call, times = clock.copy_call(num_bytes, device)
    host = host_seconds(call)

    def once() -> float:
        hide_host(15 * host + 1e-4)
        start = EventTime()
        for _ in range(10):
            call()
        return (EventTime() - start) / 10

    return times * statistics.median(once() for _ in range(7))


def host_seconds(call: Callable[[], object], times: int = 5) -> float:
    """Median time that the host needs to enqueue ``call`` while the device has nothing to do."""

    def once() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    median = statistics.median(once() for _ in range(times))
    torch.cuda.synchronize()
    return median


def launches(call: Callable[[], object]) -> dict[str, int]:
    """Work that the device did for one ``call`` (kernels, copies and fills), and how often the host had to start some."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
        call()
        torch.cuda.synchronize()
    events = run.events()
    starts = ("LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync")  # of the runtime and of the driver
    return {
        "kernels": sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation for event in events),
        "host_launches": sum(event.device_type == DeviceType.CPU and any(part in event.name for part in starts) for event in events),
    }
