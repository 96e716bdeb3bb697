"""divisor_counts: the number of divisors of all numbers up to n, and which has the most, the smallest one."""

SIZES = (40, 3000)


def generate(size, rng):
    return f"{size}\n"


SUBMISSIONS = [
    (
        "ada",
        "every number tried",
        r"""
#include <iostream>
using namespace std;

int main() {
    int n;
    cin >> n;
    long long total = 0;
    int best = 0, most = 0;
    for (int x = 1; x <= n; x++) {
        int count = 0;
        for (int d = 1; d <= x; d++)
            if (x % d == 0) count++;
        total += count;
        if (count > most) {
            most = count;
            best = x;
        }
    }
    cout << total << " " << best << endl;
}
""",
    ),
    (
        "ada",
        "up to the root",
        r"""
#include <cmath>
#include <iostream>
using namespace std;

int main() {
    int n;
    cin >> n;
    long long total = 0;
    int best = 0, most = 0;
    for (int x = 1; x <= n; x++) {
        int count = 0;
        for (int d = 1; d <= sqrt(x); d++) {
            if (x % d) continue;
            count++;
            if (d != x / d) count++;
        }
        total += count;
        if (count > most) most = count, best = x;
    }
    cout << total << " " << best << endl;
}
""",
    ),
    (
        "ben",
        "from prime factors",
        r"""
#include <iostream>
using namespace std;

int main() {
    int n;
    cin >> n;
    long long total = 0;
    int best = 0, most = 0;
    for (int x = 1; x <= n; x++) {
        int rest = x, count = 1;
        for (int p = 2; p * p <= rest; p++) {
            int times = 1;
            while (rest % p == 0) rest /= p, times++;
            count *= times;
        }
        if (rest > 1) count *= 2;
        total += count;
        if (count > most) most = count, best = x;
    }
    cout << total << " " << best << endl;
}
""",
    ),
    (
        "ben",
        "multiples of every number",
        r"""
#include <cstdio>
#include <vector>

int main() {
    int n;
    scanf("%d", &n);
    std::vector<int> count(n + 1);
    for (int d = 1; d <= n; d++)
        for (int x = d; x <= n; x += d) count[x]++;
    long long total = 0;
    int best = 1;
    for (int x = 1; x <= n; x++) {
        total += count[x];
        if (count[x] > count[best]) best = x;
    }
    printf("%lld %d\n", total, best);
}
""",
    ),
]
WRONG = (
    "the largest with the most",
    r"""
#include <cstdio>
#include <vector>

int main() {
    int n;
    scanf("%d", &n);
    std::vector<int> count(n + 1);
    for (int d = 1; d <= n; d++)
        for (int x = d; x <= n; x += d) count[x]++;
    long long total = 0;
    int best = 1;
    for (int x = 1; x <= n; x++) {
        total += count[x];
        if (count[x] >= count[best]) best = x;
    }
    printf("%lld %d\n", total, best);
}
""",
)
