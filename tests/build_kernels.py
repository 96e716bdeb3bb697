"""Before the tests begin: build every compiled kernel, as many at once as there are processors, and hash the sources once.

No test then waits for either.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from assay.methods.core import kernels


def build() -> None:
    """Needs torch and platformdirs alone: CI does it while pip installs the rest."""
    if kernels.compiler() is None:
        print("no C++ compiler: the torch paths serve")
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for library in pool.map(kernels.build, kernels.names()):
            print(f"built {library.name}")


def main() -> None:
    from assay.evidence import hashes

    hashes.keep_everything()
    build()


if __name__ == "__main__":
    main()
