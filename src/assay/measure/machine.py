"""What machine this is and what it can reach: peak rates and bandwidths, measured once and cached.

Every speed is compared with these figures. They must therefore be attainable: each is the best of many runs of the best library
call over several shapes, never a number from a data sheet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import psutil

from assay.checks import number
from assay.measure.clock import OthersWatch, load_average, synchronize
from assay.paths import atomic_file, cache_dir

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "tokenizers", "triton", "assay")
SIMD = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "amx_", "avx512", "neon", "asimd", "sve", "bf16", "i8mm")

# m, k, n of a matrix product (m, k) @ (k, n): some fit in the caches, one streams; the best one counts
SHAPES = ((2048, 1536, 576), (1024, 1024, 1024), (512, 2048, 512), (2048, 2048, 2048))
SLOW_SHAPES = ((512, 512, 512),)  # for types whose products are slow on many processors
LONGEST_PRODUCT = 1.0  # seconds: what a processor without instructions for a type takes longer for is not tried
CUDA_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192), (8192, 4096, 2048))
METHOD = 1  # part of the cache key: raise it when the way rates are measured changes
LONGEST = 10.0  # seconds after which no new round begins
TRIES = 3  # calibrations of a busy machine before it counts as one that stays busy
CACHE_SIZES = (32 << 10, 512 << 10, 4 << 20, 16 << 20, 64 << 20)


@dataclass(frozen=True)
class Machine:
    """The machine and the software on it. `fingerprint` depends only on the hardware: processor, cores, SIMD, RAM, GPU."""

    cpu: str
    cores: int  # logical processors this process may use
    physical_cores: int
    threads: int  # torch's intra-op threads now
    flags: list[str]
    ram_bytes: int
    os: str
    python: str
    versions: dict[str, str]
    gpu: str
    governor: str  # frequency governor, "" where the system does not say
    virtual: bool  # runs under a hypervisor: frequencies and counters are then second-hand
    load: float  # one-minute load average when this was asked
    fingerprint: str

    def describe(self) -> dict[str, Any]:
        """The same for people, as short lines."""
        found = {
            "processor": f"{self.cpu}, {self.cores} logical cores ({self.physical_cores} physical)",
            "threads": self.threads,
            "SIMD": " ".join(self.flags),
            "memory": f"{self.ram_bytes / 2**30:.1f} GiB",
            "GPU": self.gpu or "none",
            "system": self.os + (", virtual machine" if self.virtual else ""),
            "governor": self.governor or "unknown",
            "python": self.python,
        }
        return found | self.versions | {"load": round(self.load, 2), "fingerprint": self.fingerprint}

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; an unknown load is None."""
        return dataclasses.asdict(self) | {"load": None if math.isnan(self.load) else self.load}


@dataclass(frozen=True)
class Calibration:
    """Attainable rates of one machine with one torch and one thread count, on "cpu" or "cuda".

    `peak_flops`: floating point (int8: integer) operations per second by dtype name, of the fastest kernel found (matrix product or
    3 x 3 convolution); a multiply-add counts as two. `matmul_flops`: the same for torch's plain matrix product alone, which on some
    processors uses a narrower instruction set than the convolutions.
    `read_bandwidth` and `copy_bandwidth`: bytes per second from and to main memory; a copy counts what it reads and what it
    writes. `cache_bandwidth`: bytes per second of repeatedly reading a block of that many bytes (keys in bytes), on the CPU.
    """

    peak_flops: dict[str, float]
    read_bandwidth: float
    copy_bandwidth: float
    cache_bandwidth: dict[int, float]
    device: str
    threads: int
    fingerprint: str
    torch: str
    noisy: bool
    measured_at: str = ""
    matmul_flops: dict[str, float] = field(default_factory=dict)

    def peak(self, dtype: str) -> float:
        """Operations per second of a dtype name such as "float32". Raises ValueError for one that was not calibrated."""
        if dtype not in self.peak_flops:
            raise ValueError(f"dtype must be one of {', '.join(self.peak_flops)}, got {dtype!r}")
        return self.peak_flops[dtype]

    @property
    def memory_bandwidth(self) -> float:
        """The best bytes per second of main memory, reading or copying."""
        return max(self.read_bandwidth, self.copy_bandwidth)

    def bandwidth(self, working_set: float) -> float:
        """The most bytes per second at which `working_set` bytes can be traversed repeatedly, from whichever cache holds them.

        This is the rate of the largest measured block that is no larger, since a larger set cannot be faster. From about four times
        the last cache on, it is DRAM's.
        """
        start = max([size for size in self.cache_bandwidth if size <= working_set], default=0)
        return max([rate for size, rate in self.cache_bandwidth.items() if size >= start] + [self.memory_bandwidth])

    def ridge(self, dtype: str) -> float:
        """Operations per byte of main memory above which arithmetic limits a kernel of this dtype."""
        return self.peak(dtype) / self.memory_bandwidth

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)


def machine() -> Machine:
    """Look at the machine. Takes milliseconds and measures nothing."""
    import torch

    cpu, flags = _cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    ram = psutil.virtual_memory().total
    gpu = _gpu()
    hardware = json.dumps([cpu, cores, flags, round(ram / 2**30), gpu])
    return Machine(
        cpu=cpu,
        cores=cores,
        physical_cores=psutil.cpu_count(logical=False) or cores,
        threads=torch.get_num_threads(),
        flags=flags,
        ram_bytes=ram,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=_versions(),
        gpu=gpu,
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        virtual=_virtual(),
        load=load_average(),
        fingerprint=hashlib.sha256(hardware.encode()).hexdigest()[:12],
    )


def calibrate(
    force: bool = False, quick: bool = False, device: str | None = None, say: Callable[[str], None] | None = None
) -> Calibration:
    """Peak operations per second by dtype and memory bandwidth, from the cache if this machine was measured before.

    A cache entry is for one machine, torch version, device and thread count. `force` measures again and keeps the better of the
    old and the new figures: a rate reached once is attainable. A full calibration takes about ten seconds, a `quick` one about
    three. What is measured while other processes keep the machine busy does not count: it is measured again, up to three times in
    all. If the machine stays busy, the figures are marked `noisy`: each is the largest of what all threads reached in any try and what
    one thread reached by its own processor time (for arithmetic and caches, times the number of threads). A noisy entry never takes the
    place of a good one, and is measured again, and replaced, once the machine is idle.
    `device` is "cpu" or "cuda"; None takes CUDA if there is a GPU. `say` is told what happens, if anything is to be measured.
    Two processes never measure at the same time, which would spoil both: the second waits and uses what the first found.

    Raises ValueError for an unknown device.
    """
    import torch

    say = say or _quiet
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    here = machine()
    file = _file(here, device)
    known = _load(file)
    idle = here.load < 0.25 * here.cores
    if known is not None and not force and not (known.noisy and idle):
        return known
    with _alone(file, say):
        meanwhile = _load(file)
        if meanwhile is not None and meanwhile != known:
            return meanwhile
        found = _measure(here, device, rounds=2 if quick else 8, say=say)
        if known is not None and known.noisy == found.noisy:
            found = _better(known, found)
        elif known is not None and found.noisy:
            found = known
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps(found.as_dict(), indent=1))
    return found


def stored_calibration(device: str = "cpu") -> Calibration | None:
    """What `calibrate` found before on this machine, with this torch and thread count; None if it has not been called. Measures nothing."""
    return _load(_file(machine(), device))


def _file(here: Machine, device: str) -> Path:
    import torch

    return cache_dir() / "calibration" / f"{here.fingerprint}-{torch.__version__}-{device}-{here.threads}-{METHOD}.json"


def _quiet(_: str) -> None:
    pass


@contextlib.contextmanager
def _alone(file: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a calibration; it ends with the process that holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say("another process is calibrating this machine: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _measure(here: Machine, device: str, rounds: int, say: Callable[[str], None] = _quiet) -> Calibration:
    """All rates, from the first try in which the machine was quiet; if there is none, with a look that does not need all cores at once."""
    import torch

    tries: list[Calibration] = []
    while len(tries) < TRIES:
        if tries:
            say(f"the machine is busy: calibrating again, try {len(tries) + 1} of {TRIES}")
        watch = OthersWatch()
        tries.append(_rates(here, device, rounds, time.perf_counter, say))
        if not watch.stop()[1]:
            return dataclasses.replace(tries[-1], noisy=False)
    found = functools.reduce(_better, tries)  # a rate reached once is attainable
    if device == "cpu":
        say("the machine stays busy: calibrating once more, on one thread")
        torch.set_num_threads(1)
        try:
            found = _better(_of_all_threads(_rates(here, device, rounds, time.thread_time, say), here.threads), found)
        finally:
            torch.set_num_threads(here.threads)
    return dataclasses.replace(found, noisy=True)


def _of_all_threads(one: Calibration, threads: int) -> Calibration:
    """What `threads` threads could do if each did as well as one alone; main memory keeps the single thread's rate (our choice)."""
    return dataclasses.replace(
        one,
        peak_flops={name: threads * rate for name, rate in one.peak_flops.items()},
        matmul_flops={name: threads * rate for name, rate in one.matmul_flops.items()},
        cache_bandwidth={
            n: rate * (threads if n <= last_cache_bytes() else 1) for n, rate in one.cache_bandwidth.items()
        },
    )


def _rates(
    here: Machine, device: str, rounds: int, clock: Callable[[], float], say: Callable[[str], None] = _quiet
) -> Calibration:
    """The best of several rounds over all cases, so that a short disturbance does not spoil any of them for good."""
    import torch

    products: dict[str, float] = {}
    convolutions: dict[str, float] = {}
    caches: dict[int, float] = {}
    read = copy = 0.0
    with torch.inference_mode():
        cases = [(products, *case) for case in _products(device)]
        cases += [(convolutions, *case) for case in _convolutions(device)]
        size = _stream_bytes(device)
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        blocks = {} if device == "cuda" else {n: torch.ones(n // 4).expand((64 << 20) // n, -1) for n in CACHE_SIZES}
        begin = time.perf_counter()
        for done in range(rounds):
            if done >= 2 and time.perf_counter() - begin > LONGEST:
                break
            say(f"calibrating the machine: round {done + 1} of {rounds}")
            for rates, name, operations, run in cases:
                rates[name] = max(rates.get(name, 0.0), operations / _seconds(run, clock))
            read = max(read, size / _seconds(source.sum, clock), size / _seconds(source.amax, clock))
            copy = max(copy, 2 * size / _seconds(functools.partial(target.copy_, source), clock))
            for n, block in blocks.items():
                again = _seconds(functools.partial(torch.sum, block, 1), clock)
                caches[n] = max(caches.get(n, 0.0), 4 * block.numel() / again)
    if device == "cpu":
        caches[size] = read
    return Calibration(
        peak_flops={name: max(rate, convolutions.get(name, 0.0)) for name, rate in products.items()},
        matmul_flops=products,
        read_bandwidth=read,
        copy_bandwidth=copy,
        cache_bandwidth=caches,
        device=device,
        threads=here.threads,
        fingerprint=here.fingerprint,
        torch=torch.__version__,
        noisy=False,
        measured_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


Case = tuple[str, int, Callable[[], Any]]
"""dtype name, operations, run"""


def _convolutions(device: str) -> list[Case]:
    """3 x 3 convolutions, 128 channels, channels last: the library may use wider instructions here than in matrix products."""
    import torch

    found: list[Case] = []
    for name in ("float32", "bfloat16"):
        images = torch.ones((1, 128, 56, 56), dtype=getattr(torch, name), device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        weight = torch.ones((128, 128, 3, 3), dtype=images.dtype, device=device)
        run = functools.partial(torch.conv2d, images, weight, padding=1)
        found.append((name, 2 * 128 * 128 * 9 * 56 * 56, run))
    return found


def _products(device: str) -> list[Case]:
    """Every matrix product that is tried; one that this torch lacks is left out."""
    import torch

    found: list[Case] = []
    for name in ("float32", "bfloat16", "int8", "float16", "float64"):
        dtype = getattr(torch, name)
        shapes = CUDA_SHAPES if device == "cuda" else SLOW_SHAPES if name in ("float16", "float64") else SHAPES
        product = torch._int_mm if name == "int8" else torch.mm
        try:
            rate = _rate(product, dtype, device)
        except (RuntimeError, AttributeError, NotImplementedError):
            continue
        for m, k, n in _short_enough(shapes, rate):
            a = torch.ones((m, k), dtype=dtype, device=device)
            b = torch.ones((n, k), dtype=dtype, device=device).t()
            found.append((name, 2 * m * k * n, functools.partial(product, a, b)))
    return found


def _rate(product: Callable[[Any, Any], Any], dtype: Any, device: str) -> float:
    """Operations a second of a small product. Raises what torch raises where it lacks it."""
    import torch

    ((m, k, n),) = SLOW_SHAPES
    a, b = torch.ones((m, k), dtype=dtype, device=device), torch.ones((n, k), dtype=dtype, device=device).t()
    product(a, b)  # the first one chooses its code
    synchronize()
    begin = time.perf_counter()
    product(a, b)
    synchronize()
    return 2 * m * k * n / max(time.perf_counter() - begin, 1e-9)


def _short_enough(shapes: Sequence[tuple[int, int, int]], rate: float) -> Sequence[tuple[int, int, int]]:
    """The shapes whose product takes no longer than `LONGEST_PRODUCT` at a rate; the small one where none does."""
    kept = [shape for shape in shapes if 2 * math.prod(shape) <= rate * LONGEST_PRODUCT]
    return kept or SLOW_SHAPES


def _seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    """The shortest of two runs, or of as many as fit into 20 ms: short ones are easily disturbed."""
    best, begin, runs = float("inf"), time.perf_counter(), 0
    while runs < 2 or time.perf_counter() - begin < 0.02:
        synchronize()
        start = clock()
        run()
        synchronize()
        best = min(best, clock() - start)
        runs += 1
    return max(best, 1e-9)


def _stream_bytes(device: str) -> int:
    """A block far larger than the last cache."""
    return 1 << 30 if device == "cuda" else min(max(4 * last_cache_bytes(), 128 << 20), 1 << 30)


def last_cache_bytes() -> int:
    """Size of the third-level cache; 32 MiB if the system does not say."""
    size = _read("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(size[:-1]) << 10 if size.endswith("K") and size[:-1].isdigit() else 32 << 20


def _better(a: Calibration, b: Calibration) -> Calibration:
    """The higher one of each rate, and otherwise `b`."""

    def higher(one: dict[Any, float], other: dict[Any, float]) -> dict[Any, float]:
        return {key: max(one.get(key, 0.0), rate) for key, rate in other.items()}

    return dataclasses.replace(
        b,
        peak_flops=higher(a.peak_flops, b.peak_flops),
        matmul_flops=higher(a.matmul_flops, b.matmul_flops),
        read_bandwidth=max(a.read_bandwidth, b.read_bandwidth),
        copy_bandwidth=max(a.copy_bandwidth, b.copy_bandwidth),
        cache_bandwidth=higher(a.cache_bandwidth, b.cache_bandwidth),
    )


def _load(file: Path) -> Calibration | None:
    """The stored calibration; None if there is none or it cannot be read (it is then measured again)."""
    try:
        values = json.loads(file.read_text())
        for name in ("peak_flops", "matmul_flops", "cache_bandwidth"):
            values[name] = {key: number(name, rate, above=0) for key, rate in values[name].items()}
        for name in ("read_bandwidth", "copy_bandwidth"):
            values[name] = number(name, values[name], above=0)
        values["cache_bandwidth"] = {int(n): rate for n, rate in values["cache_bandwidth"].items()}
        return Calibration(**values) if values["peak_flops"] else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _cpu() -> tuple[str, list[str]]:
    """Model name and the SIMD flags that matter for arithmetic."""
    model = ""
    flags: set[str] = set()
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "cpu model") and not model:
            model = value.strip()
        if name.strip() in ("flags", "Features"):
            flags.update(flag for flag in value.split() if any(flag == s or flag.startswith(s) for s in SIMD))
    return model or platform.processor() or platform.machine(), sorted(flags)


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return ""
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _virtual() -> bool:
    return " hypervisor" in _read("/proc/cpuinfo")


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
