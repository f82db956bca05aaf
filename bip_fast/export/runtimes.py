"""What runs a network when it is timed: torch as it is, or ONNX Runtime, which fuses and lays out a finished network by itself."""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import one_line
from .same import near

__all__ = ["RUNTIMES", "check_runtime", "prepared_call", "version"]

RUNTIMES = ("torch", "onnxruntime")
NEEDED = ("onnxruntime", "onnx", "onnxscript")
TOLERANCE = 1e-3  # see `near`: other kernels add in another order


def check_runtime(runtime: str, device: torch.device) -> None:
    """ValueError if there is no such runtime or not on this device, ImportError if its packages are missing."""
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
    if runtime == "torch":
        return
    if device.type != "cpu":
        raise ValueError(f"runtime onnxruntime is measured on a CPU only, got device {device}")
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"runtime onnxruntime needs the package {name}: pip install 'bip_fast[export]'") from error


def version(runtime: str) -> str:
    """Name and version of a runtime."""
    module = importlib.import_module(runtime)
    return f"{'ONNX Runtime' if runtime == 'onnxruntime' else runtime} {module.__version__}"


def prepared_call(runtime: str, network: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], object]:
    """A function that runs ``network``, which is in eval mode, on ``inputs`` once.

    With "onnxruntime" the network is exported for inputs of this shape and runs on as many threads as torch has.

    Raises:
        ValueError: it cannot be exported, or computes something else there.
    """
    if runtime == "torch":
        return lambda: network(*inputs)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Between calls the threads of one network must not spin on the cores that the next one needs: up to twice its time on 2 cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    expected = [x for x in tree_leaves(network(*inputs)) if isinstance(x, Tensor)]
    try:
        with tempfile.TemporaryDirectory() as folder, _quiet():
            path = Path(folder) / "model.onnx"
            torch.onnx.export(network, inputs, path, dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            given = [x.detach().contiguous().numpy() for x in tree_leaves(inputs) if isinstance(x, Tensor)]
            feed = dict(zip((x.name for x in session.get_inputs()), given, strict=True))
            found = [torch.from_numpy(x) for x in session.run(None, feed)]
    except Exception as error:  # whatever exporter and runtime meet in the model
        raise ValueError(f"ONNX Runtime cannot run the model: {one_line(error, 300)}") from error
    if len(found) != len(expected) or not all(near(a, b, TOLERANCE) for a, b in zip(found, expected, strict=True)):
        raise ValueError("ONNX Runtime cannot run the model: it computes something else there")
    return lambda: session.run(None, feed)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter, which reports packages that it does not find, and its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
