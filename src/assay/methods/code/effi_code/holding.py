"""What runs inside of the sandbox while its memory is looked at from outside: standard library only, no import of ours.

It loads a program and its arguments, says so, and waits; calls once a word comes, says that word again, and waits to be ended. The program
prints nowhere.
"""

from __future__ import annotations

import os
import sys
from marshal import loads
from os import read, write


def main(entry: str) -> None:
    """See the module. The files are called program.txt and arguments.bin."""
    said, told = os.dup(1), os.dup(0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    with open("program.txt", encoding="utf-8") as file, open("arguments.bin", "rb") as data:
        source, arguments = file.read(), loads(data.read())
    module = type(sys)("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
        function = module.__dict__[entry]
        write(said, b"loaded\n")
        word = read(told, 64)
        function(*arguments)
    except BaseException as error:  # a program may raise what it likes, SystemExit too; it is told, not handled
        write(said, f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:500].replace(b"\n", b" ") + b"\n")
    else:
        write(said, word)
    read(told, 1)


if __name__ == "__main__":
    main(sys.argv[1])
