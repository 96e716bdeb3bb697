"""DR: C and C++ programs whose output depends on how they are compiled: optimisation, standard, macros, widths of integers."""

from __future__ import annotations

from assay.workloads.programs.surge.source import NAMES, Language, Source

_PROGRAMS: dict[str, tuple[Language, str, list[tuple[str, ...]]]] = {
    "optimised": ("c", r"""
#include <stdio.h>

int main(void) {
#ifdef __OPTIMIZE__
    puts("optimised");
#else
    puts("plain");
#endif
    return 0;
}
""", [("-O0",), ("-O2",)]),
    "standard of C": ("c", r"""
#include <stdio.h>

int main(void) {
    printf("%ld\n", __STDC_VERSION__);
    return 0;
}
""", [("-std=c99", "-O0"), ("-std=c11", "-O2")]),
    "standard of C++": ("cpp", r"""
#include <cstdio>

int main() { std::printf("%ld\n", __cplusplus); }
""", [("-std=c++14", "-O0"), ("-std=c++20", "-O2")]),
    "assertion": ("c", r"""
#include <assert.h>
#include <stdio.h>

int main(void) {
    int n = 3;
    assert(n++ > 0);
    printf("%d\n", n);
    return 0;
}
""", [("-O0",), ("-O2", "-DNDEBUG")]),
    "char": ("c", r"""
#include <stdio.h>

int main(void) {
    char c = (char)200;
    printf("%d\n", c);
    return 0;
}
""", [("-fsigned-char",), ("-funsigned-char",)]),
    "wrapping": ("c", r"""
#include <limits.h>
#include <stdio.h>

int main(void) {
    int x = INT_MAX;
    x += 1;
    printf("%d\n", x < 0);
    return 0;
}
""", [("-O0", "-fwrapv"), ("-O2", "-fwrapv")]),
    "widths": ("c", r"""
#include <stdint.h>
#include <stdio.h>

int main(void) {
    WIDTH x = 250;
    x = (WIDTH)(x + 10);
    printf("%d\n", (int)x);
    return 0;
}
""", [("-DWIDTH=uint8_t",), ("-DWIDTH=int16_t",)]),
    "trigraph": ("c", r"""
#include <stdio.h>

int main(void) {
    puts("what??!");
    return 0;
}
""", [("-std=gnu17",), ("-std=c99",)]),
    "enum": ("c", r"""
#include <stdio.h>

enum colour { RED, GREEN };

int main(void) {
    printf("%zu\n", sizeof(enum colour));
    return 0;
}
""", [("-O2",), ("-O2", "-fshort-enums")]),
    "warning": ("c", r"""
#include <stdio.h>

int main(void) {
    int unused;
    puts("done");
    return 0;
}
""", [("-Wall",), ("-Wall", "-Werror")]),
    "auto": ("cpp", r"""
#include <cstdio>

int main() {
    auto twice = [](auto x) { return x + x; };
    std::printf("%d\n", twice(21));
}
""", [("-std=c++14",), ("-std=c++11", "-pedantic-errors")]),
}  # fmt: skip


def made() -> list[Source]:
    """Eleven programs, each with two sets of flags."""
    return [
        Source(
            f"DR/{name}/{number}", "DR", name, f"DR/{name}", language, {NAMES[language]: text.lstrip("\n")},
            given=" ".join(flags), flags=flags, wants="either",
        )
        for name, (language, text, settings) in _PROGRAMS.items()
        for number, flags in enumerate(settings)
    ]  # fmt: skip
