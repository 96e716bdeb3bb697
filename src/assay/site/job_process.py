"""What runs in a job's own process: the command of assay, and then its exit code is left in the job's folder.

It is started as a program, and imports almost nothing before it listens to Ctrl-C: a job may be cancelled as soon as it is started.
"""

import os
import signal
import sys


def run() -> None:
    """Run the words behind the job's folder as a command of assay."""
    place = sys.argv.pop(1)
    code: object = 70
    try:
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # ignored, if the server was started in the background of a script
        import runpy

        runpy.run_module("assay", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except KeyboardInterrupt:
        code = 130
    finally:
        from assay.paths import atomic_file

        with atomic_file(os.path.join(place, "code")) as temporary:
            temporary.write_text(str(code if isinstance(code, int) else 70), encoding="utf-8")


if __name__ == "__main__":
    run()
