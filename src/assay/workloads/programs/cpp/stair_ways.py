"""stair_ways: in how many ways n steps are climbed by ones, twos and threes, modulo 1,000,007."""

SIZES = (12, 23)


def generate(size, rng):
    return f"{size}\n"


SUBMISSIONS = [
    (
        "cem",
        "by its definition",
        r"""
#include <iostream>
using namespace std;

const long long MOD = 1000007;

long long ways(int n) {
    if (n < 0) return 0;
    if (n == 0) return 1;
    return (ways(n - 1) + ways(n - 2) + ways(n - 3)) % MOD;
}

int main() {
    int n;
    cin >> n;
    cout << ways(n) << endl;
}
""",
    ),
    (
        "cem",
        "with what was found before in a map",
        r"""
#include <iostream>
#include <map>
using namespace std;

const long long MOD = 1000007;
map<int, long long> known;

long long ways(int n) {
    if (n < 0) return 0;
    if (n == 0) return 1;
    if (known.count(n)) return known[n];
    return known[n] = (ways(n - 1) + ways(n - 2) + ways(n - 3)) % MOD;
}

int main() {
    int n;
    cin >> n;
    cout << ways(n) << endl;
}
""",
    ),
    (
        "ada",
        "a table",
        r"""
#include <cstdio>

int main() {
    int n;
    scanf("%d", &n);
    int a = 0, b = 0, c = 1;
    for (int i = 0; i < n; i++) {
        int next = (a + b + c) % 1000007;
        a = b;
        b = c;
        c = next;
    }
    printf("%d\n", c);
}
""",
    ),
]
WRONG = (
    "no threes",
    r"""
#include <cstdio>

int main() {
    int n;
    scanf("%d", &n);
    int b = 0, c = 1;
    for (int i = 0; i < n; i++) {
        int next = (b + c) % 1000007;
        b = c;
        c = next;
    }
    printf("%d\n", c);
}
""",
)
