"""Reading from memory, from a cache and from the raw stack, the latter two through a buffer that the images do not fit into.

    python benchmarks/bench_cache.py [--mb 300] [--box 64] [--buffer 0.25] [--repeats 2] [--seeds 3] [--workers 2] [-o benchmarks/results/cache.csv]

A stack of --mb MB is simulated (a hinge phantom), its cache written, and then every way of reading walks through whole epochs in a process of its own, the
page cache of the files dropped first (posix_fadvise). The buffer gets --buffer of the bytes that the images take. Each line tells, as the best of
alternating repetitions:

- images per second of wall time, of reading a whole epoch alone (the first fill of the buffer included) and of training a network that is much smaller than any
  that one would use, so that reading weighs more than it would (--steps steps of 32 images after the first; the time until the first batch is a column of its
  own, and so is opening, which for `memory` includes computing all coefficients). CPU seconds per 1,000 images, all threads together, beside them: a machine that others
  use too disturbs them less. `train / memory` is the speed of training relative to that from memory by these CPU seconds, as on one core: wall time can only be
  better, since reading runs beside the step;
- bytes read from files in an epoch, relative to the images as that file stores them: 1 = each image once;
- the peak of memory of the process, and what of it the process takes before any image is read;
- the mean and the spread of the loss after a short training over --seeds seeds, on the first --train images, through a buffer of the same share.

Lines `threads N` and `layout ...` say what two choices rest on: threads that compute coefficients from pixels, and low frequencies in a slab of their own.
"""

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from recon_nb.caches import arrange_storage, open_cache
from recon_nb.core import Selection, keep_freed_memory
from recon_nb.datasets import ParticleDataset, StackSource, iterate_batches, load_stack, map_ahead
from recon_nb.models import build_model
from recon_nb.runs import make_config, read_log
from recon_nb.simulate import make_hinge_phantom, simulate_stack, write_simulation
from recon_nb.training import train_run

MODES = ("memory", "cache + buffer", "stack + buffer")
NETWORK = {"zdim": 2, "encoder_dim": 64, "encoder_layers": 1, "decoder_dim": 64, "decoder_layers": 1}


def make_stack(folder: Path, megabytes: float, box: int) -> Path:
    """Simulate images until they make up the size; return the particle file."""
    n = int(megabytes * 1e6 / (4 * box**2))
    simulated = simulate_stack(make_hinge_phantom(box), n, snr=0.1, seed=0, scratch=folder)
    return write_simulation(folder / "data", simulated)


def drop_page_cache(folder: Path) -> None:
    """Let the system forget the files of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_disk_bytes() -> int:
    """Return the bytes that this process has had read from the disk, page cache left out."""
    try:
        return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])
    except (OSError, IndexError):
        return 0


def get_peak() -> float:
    """Return the peak of this process's memory, MB (ru_maxrss would begin with that of the process which started this one)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def open_mode(mode: str, star: Path, folder: Path, buffer: float) -> ParticleDataset:
    """Return the data set that reads in a certain way."""
    dataset = ParticleDataset(load_stack(star), in_memory=False)
    if mode == "memory":
        return arrange_storage(dataset, in_memory=True)
    gigabytes = buffer * dataset.count_bytes("float16" if mode.startswith("cache") else "float32") / 1e9
    return arrange_storage(dataset, cache=folder / "caches" if mode.startswith("cache") else None, in_memory=False, buffer_gb=gigabytes)


def walk(dataset: ParticleDataset, options: argparse.Namespace) -> dict[str, float]:
    """Walk through an epoch without training."""
    start, cpu = time.perf_counter(), time.process_time()
    n = sum(batch.n_images for batch in iterate_batches(dataset, 32, n_workers=options.workers))
    if n != dataset.n_images:
        raise RuntimeError(f"{n} images came of {dataset.n_images}")
    return {"read (images/s)": n / (time.perf_counter() - start), "read (CPU s / 1000)": 1000 * (time.process_time() - cpu) / n}


def train_steps(dataset: ParticleDataset, options: argparse.Namespace) -> dict[str, float]:
    """Train a small network for some steps of another epoch."""
    torch.manual_seed(0)
    model = build_model(dataset.lattice, **NETWORK)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    start, n = time.perf_counter(), 0
    batches = iterate_batches(dataset, 32, epoch=1, n_workers=options.workers)
    for step, batch in enumerate(batches):
        if step == 0:
            first = time.perf_counter() - start
        model(batch, beta=0.5, noise=torch.randn(len(batch), 2)).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 0:
            start, cpu = time.perf_counter(), time.process_time()
        else:
            n += batch.n_images
        if step == options.steps:
            break
    found = {"train (images/s)": n / (time.perf_counter() - start), "train (CPU s / 1000)": 1000 * (time.process_time() - cpu) / n, "first batch (s)": first}
    batches.close()
    return found


def work(mode: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure one way of reading, in this process."""
    torch.set_num_threads(1)
    keep_freed_memory()
    folder = Path(options.folder)
    before, start = get_peak(), time.perf_counter()
    dataset = open_mode(mode, folder / "data/particles.star", folder, options.buffer)
    opening, source = time.perf_counter() - start, dataset.source
    whole = dataset.count_bytes("float16") if mode.startswith("cache") else source.image_bytes * dataset.n_images if mode.startswith("stack") else math.inf
    drop_page_cache(folder)
    source.n_bytes_read, disk = 0, read_disk_bytes()
    reading = walk(dataset, options)
    n_bytes, from_disk, peak = source.n_bytes_read, read_disk_bytes() - disk, get_peak()
    drop_page_cache(folder)
    return {**reading, **train_steps(dataset, options), "opening (s)": opening, "bytes read / bytes": n_bytes / whole, "from the disk / bytes": from_disk / whole, "peak (MB)": peak, "before (MB)": before}


def measure(mode: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure one way of reading in a process of its own."""
    drop_page_cache(Path(options.folder))
    given = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items() if value is not None and name != "mode"]
    found = subprocess.run([sys.executable, __file__, *given, "--mode", mode], capture_output=True, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def train_briefly(mode: str, options: argparse.Namespace, seed: int) -> float:
    """Return the loss in the last epoch of a short training."""
    folder = Path(options.folder)
    chosen = folder / "first.json"
    if not chosen.exists():
        stack = load_stack(folder / "data/particles.star")
        Selection(tuple(range(min(options.train, stack.n_particles))), stack.n_particles, "the first").save(chosen)
    n = min(options.train, load_stack(folder / "data/particles.star").n_particles)
    share = options.buffer * 4 * n * np.pi * (options.box / 2) ** 2 / 8 / 1e9  # half the box: a quarter of the coefficients, about pi D^2 / 8
    storage = {"memory": {"data.in_memory": True}, "cache + buffer": {"data.cache": str(folder / "caches"), "data.in_memory": False, "data.buffer_gb": share},
               "stack + buffer": {"data.in_memory": False, "data.buffer_gb": 2 * share}}[mode]
    changes = {"data.box": options.box // 2, "data.select": str(chosen), **{f"model.{k}": v for k, v in NETWORK.items()}, "train.learning_rate": 1e-3, "train.epochs": 4,
               "train.encode_every": 0, "train.checkpoint_every": 4, "train.seed": seed, "train.n_workers": options.workers, **storage}
    run = train_run(folder / f"{mode.replace(' ', '')}_{seed}", make_config(str(folder / "data/particles.star"), changes=changes), device="cpu")
    return float(read_log(run)["recon"][-1])


def measure_threads(options: argparse.Namespace) -> list[dict[str, float | str]]:
    """Return images per second of computing coefficients from pixels with 1 and with 2 threads."""
    source = StackSource(load_stack(Path(options.folder) / "data/particles.star"))
    parts = torch.arange(min(8000, source.stack.n_images)).split(250)
    rows = []
    for n_workers in (1, 2):
        rates = []
        for _ in range(max(2, options.repeats)):
            start = time.perf_counter()
            for _ in map_ahead(source.read_packed, parts, n_workers):
                pass
            rates.append(sum(map(len, parts)) / (time.perf_counter() - start))
        rows.append({"way": f"threads {n_workers}", "read (images/s)": max(rates)})
    return rows


def measure_layouts(options: argparse.Namespace) -> list[dict[str, float | str]]:
    """Return images per second of reading half of Nyquist in order: from the slab of the cache, and from whole rows in a file of the same numbers."""
    folder = Path(options.folder)
    source = StackSource(load_stack(folder / "data/particles.star"))
    cached = open_cache(source, folder / "caches")
    n, (_, low, width) = source.stack.n_images, cached.layout.cuts
    rows_file = folder / "caches/rows.bin"
    with open(rows_file, "wb") as file:
        for part in torch.arange(n).split(1000):
            file.write(cached.read_packed(part).numpy().tobytes())

    def read_rows(part: torch.Tensor) -> torch.Tensor:
        """Read through a map that is made anew, since pages of a map cannot be dropped."""
        return torch.from_numpy(np.array(np.memmap(rows_file, np.float16, "r", shape=(n, width, 2))[int(part[0]) : int(part[-1]) + 1, :low]))

    ways = {"layout slab": lambda part: cached.read_packed(part, low), "layout rows": read_rows}
    rates = {name: [] for name in ways}
    disk = {}
    for _ in range(max(2, options.repeats)):
        for name, read in ways.items():
            drop_page_cache(folder)
            before, start = read_disk_bytes(), time.perf_counter()
            for part in torch.arange(n).split(512):
                read(part)
            rates[name].append(n / (time.perf_counter() - start))
            disk[name] = (read_disk_bytes() - before) / (4 * n * width)
    rows_file.unlink()
    return [{"way": name, "read (images/s)": max(values), "from the disk / bytes": disk[name]} for name, values in rates.items()]


def summarize(options: argparse.Namespace) -> pd.DataFrame:
    """Measure everything."""
    source = StackSource(load_stack(Path(options.folder) / "data/particles.star"))
    start = time.perf_counter()
    open_cache(source, Path(options.folder) / "caches")
    rows = [{"way": "writing the cache", "read (images/s)": source.stack.n_images / (time.perf_counter() - start)}]
    found = {mode: [] for mode in MODES}
    for _ in range(options.repeats):
        for mode in MODES:
            found[mode].append(measure(mode, options))
    for mode in MODES:
        best = {name: (max if "images/s" in name or "disk" in name else min)(values[name] for values in found[mode]) for name in found[mode][0]}
        losses = [train_briefly(mode, options, seed) for seed in range(options.seeds)]
        rows.append({"way": mode, **best, "loss": float(np.mean(losses)), "sd over seeds": float(np.std(losses, ddof=1)) if len(losses) > 1 else float("nan")})
    table = pd.DataFrame(rows)
    cost = table["train (CPU s / 1000)"]
    table.insert(table.columns.get_loc("train (CPU s / 1000)") + 1, "train / memory", cost[table["way"] == "memory"].item() / cost)
    return pd.concat([table, pd.DataFrame(measure_threads(options) + measure_layouts(options))], ignore_index=True)


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=300, help="size of the stack")
    parser.add_argument("--box", type=int, default=64, help="px")
    parser.add_argument("--buffer", type=float, default=0.25, help="of the bytes that all images take")
    parser.add_argument("--repeats", type=int, default=2, help="of every measurement of speed")
    parser.add_argument("--seeds", type=int, default=3, help="of the short training")
    parser.add_argument("--train", type=int, default=2000, help="images of the short training")
    parser.add_argument("--steps", type=int, default=60, help="of 32 images, to measure the speed of training")
    parser.add_argument("--workers", type=int, default=2, help="threads that read ahead")
    parser.add_argument("--folder", help="where to keep stack and cache; a temporary folder where it is left out")
    parser.add_argument("-o", "--out", type=Path, help="csv to write")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("recon_nb").setLevel(logging.ERROR)
    if options.mode:
        print(json.dumps(work(options.mode, options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder, out, options.out = folder, options.out, None
        make_stack(Path(folder), options.mb, options.box)
        table = summarize(options)
    print(f"{options.mb:g} MB of images, box {options.box}, buffer {options.buffer:g} of them, {options.workers} threads")
    print(table.round(4).to_string(index=False, na_rep=""))
    if out:
        table.round(5).to_csv(out, index=False)


if __name__ == "__main__":
    main()
