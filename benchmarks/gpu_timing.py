# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""How `gpu.py` measures: device time by replays of CUDA graphs, host time by a loop."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gpu_peers import Call
from torch import Tensor

ROUNDS, REPLAYS_PER_ROUND = 5, 10
FEWEST_CALLS = 10  # in a graph of short calls
LONGEST_GRAPH = 8.0  # milliseconds, unless one call takes longer
LONGEST_ROUND = 80.0  # milliseconds for the replays of one candidate
LONGEST_LOOP = 100.0  # milliseconds for the loop of the host time
# what a candidate may raise without ending the run: a type or size it is not made for, no memory
REFUSALS = (RuntimeError, AssertionError, ValueError, TypeError, AttributeError)


def elapsed(run: Callable[[], Any], repeat: int) -> list[float]:
    """Milliseconds of each of `repeat` runs, by events on the current stream."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(events, events[1:])]


def copy_bandwidth(device: str, numbers: int = 2**28) -> float:
    """Bytes per second of a large copy of float32, read and written bytes counted."""
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    milliseconds = statistics.median(elapsed(lambda: target.copy_(source), 20))
    return 2 * source.numel() * source.element_size() / milliseconds * 1e3


def launch_time(device: str) -> float:
    """Seconds that the smallest kernel takes in a graph: no call can be faster."""
    number, count = torch.zeros(1, device=device), 100
    graph = capture([lambda: number.add_(1)], count)
    return statistics.median(elapsed(graph.replay, 20)) / count / 1e3


def device_state() -> str:
    """Driver, clocks, temperature and power as nvidia-smi tells them."""
    fields = 'driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw'
    command = ['nvidia-smi', f'--query-gpu={fields}', '--format=csv,noheader']
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 'unknown'
    return '; '.join(result.stdout.split('\n')).strip('; ') or 'unknown'


def capture(runs: list[Callable[[], Any]], count: int) -> torch.cuda.CUDAGraph:
    """A graph of `count` runs, those of the list in turn."""
    before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):  # what is set up once must not be captured
        for run in runs[:count]:
            run()
    before.wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            for i in range(count):
                runs[i % len(runs)]()
    finally:  # a capture that fails leaves its own stream behind
        torch.cuda.set_stream(before)
    return graph


class Captured(NamedTuple):
    """A candidate that is ready to be timed."""

    graph: torch.cuda.CUDAGraph
    calls: int  # in the graph
    replays: int  # in a round
    # a graph owns nothing it reads; the next capture gives unused memory back to the device
    keeps: list[Callable[[], Any]]


def prepare(calls: list[Call], with_backward: bool) -> tuple[dict[str, Captured], dict[str, Any]]:
    """Graphs of a candidate over all its inputs ('device_ms') and over one ('hot_ms'); host time.

    A candidate that is slow gets fewer calls per graph, fewer replays and no second graph: what
    takes milliseconds does not gain from a cache.
    """
    calls[0].prepare()
    runs = [runner(call, with_backward) for call in calls]
    once = statistics.median(elapsed(runs[0], 4)[1:])  # the first sets up what is set up once
    wanted = max(FEWEST_CALLS, len(calls))
    count = max(1, min(wanted, int(LONGEST_GRAPH / once)))
    replays = max(1, min(REPLAYS_PER_ROUND, int(LONGEST_ROUND / (once * count))))
    graphs = {'device_ms': Captured(capture(runs, count), count, replays, runs)}
    if len(calls) > 1 and count == wanted:
        graphs['hot_ms'] = Captured(capture(runs[:1], count), count, replays, runs)
    repeat = max(3, min(200, int(LONGEST_LOOP / once)))
    return graphs, dict(host_ms=host_time(runs[0], repeat), calls=count, replays=ROUNDS * replays)


def runner(call: Call, with_backward: bool) -> Callable[[], Any]:
    """Forward, or forward and backward, as a function without arguments."""
    def forward() -> None:
        with torch.no_grad():
            call.run()

    if not with_backward:
        return forward
    grad: Tensor = torch.randn_like(call.run().detach())
    return lambda: torch.autograd.grad(call.run(), call.leaves, grad)


def host_time(run: Callable[[], Any], repeat: int) -> float:
    """Milliseconds per call of a loop with one synchronisation at its end."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat * 1e3


def refusal(error: Exception) -> dict[str, str]:
    """The result of a candidate that raised."""
    return dict(error=(str(error).splitlines() or [''])[0][:200] or type(error).__name__)


def measure(sets: dict[str, list[Call]], with_backward: bool) -> dict[str, dict[str, Any]]:
    """Milliseconds of each candidate, the candidates in turn; or the error it raised.

    Args:
        sets: for each candidate its calls, one for each set of inputs.
        with_backward: forward and backward together, else forward.

    Returns:
        For each candidate `device_ms` (medians of graph replays, inputs in turn), `hot_ms` (the
        same inputs every time), `host_ms`, `spread` (distance of the quartiles over the median),
        `calls` per graph, `replays`; or `error`.
    """
    ready: dict[tuple[str, str], Captured] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, calls in sets.items():
        try:
            graphs, results[name] = prepare(calls, with_backward)
            ready.update({(name, key): graph for key, graph in graphs.items()})
        except REFUSALS as error:
            results[name] = refusal(error)
            torch.cuda.synchronize()  # raises where the device is lost
    times: dict[tuple[str, str], list[float]] = {key: [] for key in ready}
    for _ in range(ROUNDS):
        for key, one in ready.items():
            one.graph.replay()
            times[key] += [ms / one.calls for ms in elapsed(one.graph.replay, one.replays)]
    for (name, key), list_of_ms in times.items():
        results[name][key] = statistics.median(list_of_ms)
        if key == 'device_ms':
            quartiles = statistics.quantiles(list_of_ms, n=4)
            results[name]['spread'] = (quartiles[2] - quartiles[0]) / results[name][key]
    return results


def backward_alone(both: dict[str, Any], forward: dict[str, Any]) -> dict[str, Any]:
    """Times of forward and backward together, less those of forward."""
    return {key: value - forward[key] if key.endswith('_ms') else value
            for key, value in both.items() if not key.endswith('_ms') or key in forward}


def input_sets(bytes_moved: int, cache_bytes: int, most: int = 40) -> int:
    """How many sets of inputs are three times the L2 cache together."""
    return min(most, max(1, -(-3 * cache_bytes // bytes_moved)))
