"""powers: many powers, modulo 1,000,007."""

SIZES = (5, 300)


def generate(size, rng):
    most = 60 if size <= 5 else 20_000
    return f"{size}\n" + "".join(f"{rng.randint(0, 999_999)} {rng.randint(0, most)}\n" for _ in range(size))


SUBMISSIONS = [
    (
        "ada",
        "one factor after the other",
        r"""
#include <iostream>
using namespace std;

long long power(long long base, long long exponent) {
    long long found = 1;
    for (int i = 0; i < exponent; i++) found = found * base % 1000007;
    return found;
}

int main() {
    int q;
    cin >> q;
    while (q--) {
        long long base, exponent;
        cin >> base >> exponent;
        cout << power(base, exponent) << endl;
    }
}
""",
    ),
    (
        "ada",
        "halves, each found twice",
        r"""
#include <iostream>
using namespace std;

long long power(long long base, long long exponent) {
    if (exponent == 0) return 1;
    if (exponent == 1) return base % 1000007;
    return power(base, exponent / 2) * power(base, exponent - exponent / 2) % 1000007;
}

int main() {
    int q;
    cin >> q;
    while (q--) {
        long long base, exponent;
        cin >> base >> exponent;
        cout << power(base, exponent) << endl;
    }
}
""",
    ),
    (
        "ada",
        "squares",
        r"""
#include <iostream>
using namespace std;

long long power(long long base, long long exponent) {
    if (exponent == 0) return 1;
    long long half = power(base, exponent / 2);
    half = half * half % 1000007;
    return exponent % 2 ? half * base % 1000007 : half;
}

int main() {
    int q;
    cin >> q;
    while (q--) {
        long long base, exponent;
        cin >> base >> exponent;
        cout << power(base, exponent) << endl;
    }
}
""",
    ),
    (
        "ben",
        "bit by bit",
        r"""
#include <cstdio>

int main() {
    int q;
    scanf("%d", &q);
    while (q--) {
        long long base, exponent, found = 1;
        scanf("%lld %lld", &base, &exponent);
        for (; exponent; exponent >>= 1) {
            if (exponent & 1) found = found * base % 1000007;
            base = base * base % 1000007;
        }
        printf("%lld\n", found);
    }
}
""",
    ),
]
WRONG = (
    "the rest is taken once, of what has overflowed",
    r"""
#include <cstdio>

int main() {
    int q;
    scanf("%d", &q);
    while (q--) {
        unsigned long long base, exponent, found = 1;
        scanf("%llu %llu", &base, &exponent);
        for (; exponent; exponent >>= 1) {
            if (exponent & 1) found *= base;
            base *= base;
        }
        printf("%llu\n", found % 1000007);
    }
}
""",
)
