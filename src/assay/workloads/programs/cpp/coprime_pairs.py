"""coprime_pairs: how many pairs of numbers from 1 to n have no common divisor."""

SIZES = (20, 300)


def generate(size, rng):
    return f"{size}\n"


SUBMISSIONS = [
    (
        "cem",
        "every divisor tried",
        r"""
#include <algorithm>
#include <iostream>
using namespace std;

int main() {
    int n;
    cin >> n;
    int count = 0;
    for (int a = 1; a <= n; a++) {
        for (int b = a + 1; b <= n; b++) {
            bool common = false;
            for (int d = 2; d <= a; d++)
                if (a % d == 0 && b % d == 0) common = true;
            if (!common) count++;
        }
    }
    cout << count << endl;
}
""",
    ),
    (
        "cem",
        "Euclid by subtraction",
        r"""
#include <iostream>
using namespace std;

int gcd(int a, int b) {
    while (a != b) {
        if (a > b) a -= b;
        else b -= a;
    }
    return a;
}

int main() {
    int n;
    cin >> n;
    int count = 0;
    for (int a = 1; a <= n; a++)
        for (int b = a + 1; b <= n; b++)
            if (gcd(a, b) == 1) count++;
    cout << count << endl;
}
""",
    ),
    (
        "cem",
        "Euclid by remainders",
        r"""
#include <iostream>
using namespace std;

int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

int main() {
    int n;
    cin >> n;
    int count = 0;
    for (int a = 1; a <= n; a++)
        for (int b = a + 1; b <= n; b++)
            if (gcd(a, b) == 1) count++;
    cout << count << endl;
}
""",
    ),
    (
        "ada",
        "the library's gcd",
        r"""
#include <iostream>
#include <numeric>
using namespace std;

int main() {
    int n, count = 0;
    cin >> n;
    for (int a = 1; a <= n; a++)
        for (int b = 1; b < a; b++) count += gcd(a, b) == 1;
    cout << count << "\n";
}
""",
    ),
    (
        "ada",
        "Euler's function by a sieve",
        r"""
#include <cstdio>
#include <vector>

int main() {
    int n;
    scanf("%d", &n);
    std::vector<int> phi(n + 1);
    for (int i = 0; i <= n; i++) phi[i] = i;
    long long count = 0;
    for (int i = 2; i <= n; i++) {
        if (phi[i] == i)
            for (int j = i; j <= n; j += i) phi[j] -= phi[j] / i;
        count += phi[i];
    }
    printf("%lld\n", count);
}
""",
    ),
]
WRONG = (
    "a number and itself are a pair",
    r"""
#include <iostream>
#include <numeric>
using namespace std;

int main() {
    int n, count = 0;
    cin >> n;
    for (int a = 1; a <= n; a++)
        for (int b = 1; b <= a; b++) count += gcd(a, b) == 1;
    cout << count << "\n";
}
""",
)
