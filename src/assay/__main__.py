"""`python -m assay` is the same as `assay`."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the current folder, which `-m` puts there: nothing is imported from it

from assay.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
