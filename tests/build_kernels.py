"""Build every compiled kernel before the tests begin, as many at once as there are processors, so that no test waits for one."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from assay.methods.core import kernels


def main() -> None:
    if kernels.compiler() is None:
        print("no C++ compiler: the torch paths serve")
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for library in pool.map(kernels.build, kernels.names()):
            print(f"built {library.name}")


if __name__ == "__main__":
    main()
