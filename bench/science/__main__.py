"""BiP, as in the paper and joint, against magnitude pruning on CIFAR-10 / ResNet-20, in minutes on one GPU, beside the paper's figures.

    python3 -m bench.science OUTDIR --data DIR            540 seconds, four runs at a time
    python3 -m bench.science OUTDIR --data DIR --device cpu --tiny --limit 30

Measures how long an epoch takes, plans what fits into the time (`plan.py`: epochs, the same for all methods; seeds; sparsities, of which
89.3 and 95.6 % come first), and runs that with the loop of `bip-fast compare`: images, crop and mirror on the device, iterations in CUDA
graphs, channels_last, float32 (cuDNN may use TF32), accuracy on the test images after the last epoch. What is finished at the limit counts:

    runs.csv      a row for every run, appended when it ends
    table.md, accuracy.png, summary.json      means beside the figures of the paper
    runs.tar.gz   report, settings and network of every run

The same command goes on: runs in --work are taken up where they stood. Elsewhere, --from runs.tar.gz has all that were finished.
Needs torch, numpy, matplotlib, pydantic, safetensors and filelock; neither Ray nor rich nor YAML.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from bip_fast.commands.environment import check_extras, pick_device
from bip_fast.errors import UserError

from .plan import Wish

NEEDS = ("matplotlib", "safetensors", "pydantic", "filelock")
FILELOCK = (3, 30)  # torch brings an older one
SPARSITIES = (0.892626, 0.95602, 0.790285, 0.67232)  # 1 - 0.8^i, the most valuable first
RESERVE = 12.0  # seconds before the limit at which runs stop: they save, and table, picture and archive are made
# For a try on a CPU in seconds: what is learned means nothing.
TINY = {"width": 2, "batch_size": 20, "stride": 2}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python3 -m bench.science", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=Path, metavar="OUTDIR", help="folder for the results, five files")
    made.add_argument("--data", type=Path, metavar="DIR", help="cifar-10-batches-py, or the folder that has it; default: $CIFAR10")
    made.add_argument("--work", type=Path, metavar="DIR", help="folder of all runs; default: runs/science, with --tiny OUTDIR.work")
    made.add_argument("--from", dest="source", type=Path, metavar="FILE", help="runs.tar.gz of an earlier call, to go on with")
    made.add_argument("--device", metavar="NAME", default="cuda", help="cpu, cuda or cuda:N; default: cuda")
    made.add_argument("--limit", type=float, metavar="SECONDS", default=540.0, help="at which it has ended; default: 540")
    made.add_argument("--elapsed", type=float, metavar="SECONDS", default=0.0, help="that are gone already; default: 0")
    made.add_argument("--jobs", type=int, metavar="N", help="runs at the same time; default: 4, with --mps 8, with --tiny 2")
    made.add_argument("--epochs", type=int, nargs=2, metavar=("DENSE", "PRUNE"), help="at most; default: 200 100, with --tiny 4 2")
    made.add_argument("--seeds", type=int, metavar="N", help="at most; default: 3, with --tiny 1")
    made.add_argument(
        "--amp", action="store_true", help="bfloat16 autocast; float32 otherwise, as accuracy under bfloat16 was not compared"
    )
    made.add_argument(
        "--mps", action="store_true", help="start NVIDIA's multi-process service, so that runs share the GPU at the same time"
    )
    made.add_argument("--measure", action="store_true", help="only say how long an epoch takes, to choose --jobs, --mps and --amp by")
    made.add_argument("--tiny", action="store_true", help="networks of width 2, images of 16x16: for a try without a GPU")
    return made


def main(arguments: list[str] | None = None) -> int:
    began = time.monotonic()
    options = parser().parse_args(arguments)
    began -= options.elapsed
    try:
        return study(options, began)
    except UserError as error:
        print(f"bench.science: {error}", file=sys.stderr)
        return 2


def study(options: argparse.Namespace, began: float) -> int:
    """Exit code: 0, also when the limit came first; 1: a run failed, or nothing is finished; 2: an argument is wrong."""
    check_extras(NEEDS)
    import filelock

    from bip_fast.experiments.data.cifar import cifar_files
    from bip_fast.experiments.runs.folder import RunFolder
    from bip_fast.experiments.runs.signals import stop_requests

    from .outcome import unpacked
    from .pool import Pool, multi_process_service
    from .study import METHODS, Study

    if tuple(map(int, filelock.__version__.split(".")[:2])) < FILELOCK:
        raise UserError(f"needs filelock {FILELOCK[0]}.{FILELOCK[1]} or newer, got {filelock.__version__}")
    tiny, device = options.tiny, options.device
    pick_device(device)
    data = options.data or (Path(os.environ["CIFAR10"]) if os.environ.get("CIFAR10") else None)
    if data is None:
        raise UserError("--data must name the folder cifar-10-batches-py, and neither it nor CIFAR10 is given")
    if not all(path.is_file() for path in cifar_files(data, 10)):
        raise UserError(f"--data must have the files of CIFAR-10, or a folder cifar-10-batches-py with them, got {data}")
    if data.name == "cifar-10-batches-py":
        data = data.parent  # a run knows its data by the names of the files below this
    if options.source is not None and not options.source.is_file():
        raise UserError(f"--from must be a file runs.tar.gz, got {options.source}")
    dense, prune = options.epochs or ((4, 2) if tiny else (200, 100))
    seeds = (1 if tiny else 3) if options.seeds is None else options.seeds
    jobs = (2 if tiny else 8 if options.mps else 4) if options.jobs is None else options.jobs
    for name, value in (("epochs", min(dense, prune)), ("seeds", seeds), ("jobs", jobs)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    work = options.work or (options.out.with_name(f"{options.out.name}.work") if tiny else Path("runs/science"))
    options.out.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(work)
    folder.make()
    folder.lock()
    if options.source:
        unpacked(options.source, work)
    wish = Wish(tuple(METHODS), SPARSITIES[: 1 if tiny else None], tuple(range(seeds)), dense, prune, least=1 if tiny else 15)
    own = Study(
        wish,
        work,
        options.out,
        data,
        device,
        {**(TINY if tiny else {}), "amp": options.amp},
        began,
        began + options.limit - (3.0 if tiny else RESERVE),
        1.2 if tiny else 6.0,
    )
    with stop_requests() as signals, multi_process_service() if options.mps else nullcontext("not asked for") as why:
        own.stopped = lambda: bool(signals)
        own.say(f"{jobs} runs at a time on {device}, MPS: {why or 'on'}; limit {options.limit:.0f} s, runs in {work}")
        pool, failed = Pool(jobs, device), False
        try:
            own.measure(pool) if options.measure else own.run(pool)
        except (TimeoutError, RuntimeError, ValueError) as error:
            own.say(f"no plan: {error}")
            failed = True
        finally:
            gone = pool.close(max(0.5, min(5.0, began + options.limit - 2.0 - time.monotonic())))
            folder.release()
    if own.plan is not None:
        print(f"\n{(options.out / 'table.md').read_text()}\nin {options.out}: {', '.join(sorted(x.name for x in options.out.iterdir()))}")
    own.say("ended" if gone else "ended; a process would not")
    code = 1 if failed or own.failed or not (options.measure or own.finished()) else 0
    if not gone:  # it hangs in the driver, where waiting for it would hang too
        sys.stdout.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
