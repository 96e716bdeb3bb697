"""primes_below: how many primes there are up to n."""

SIZES = (60, 20000)


def generate(size, rng):
    return f"{size}\n"


SUBMISSIONS = [
    (
        "ben",
        "every number divided by all up to its half",
        r"""
#include <iostream>
using namespace std;

bool prime(int x) {
    if (x < 2) return false;
    for (int d = 2; d <= x / 2; d++)
        if (x % d == 0) return false;
    return true;
}

int main() {
    int n;
    cin >> n;
    int count = 0;
    for (int x = 1; x <= n; x++)
        if (prime(x)) count++;
    cout << count << endl;
}
""",
    ),
    (
        "ben",
        "up to the root",
        r"""
#include <cmath>
#include <iostream>
using namespace std;

bool prime(int x) {
    if (x < 2) return false;
    for (int d = 2; d <= sqrt(x); d++)
        if (x % d == 0) return false;
    return true;
}

int main() {
    int n;
    cin >> n;
    int count = 0;
    for (int x = 1; x <= n; x++)
        if (prime(x)) count++;
    cout << count << endl;
}
""",
    ),
    (
        "ada",
        "divided by the primes found before",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<int> primes;
    for (int x = 2; x <= n; x++) {
        bool good = true;
        for (int p : primes) {
            if (p * p > x) break;
            if (x % p == 0) {
                good = false;
                break;
            }
        }
        if (good) primes.push_back(x);
    }
    cout << primes.size() << endl;
}
""",
    ),
    (
        "ben",
        "a sieve",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<bool> composite(n + 1);
    int count = 0;
    for (int x = 2; x <= n; x++) {
        if (composite[x]) continue;
        count++;
        for (long long y = (long long)x * x; y <= n; y += x) composite[y] = true;
    }
    cout << count << endl;
}
""",
    ),
    (
        "ada",
        "a sieve of the odd ones",
        r"""
#include <cstdio>
#include <vector>

int main() {
    int n;
    scanf("%d", &n);
    int count = n >= 2;
    std::vector<char> composite(n / 2 + 1);
    for (int x = 3; x <= n; x += 2) {
        if (composite[x / 2]) continue;
        count++;
        for (long long y = (long long)x * x; y <= n; y += 2 * x) composite[y / 2] = 1;
    }
    printf("%d\n", count);
}
""",
    ),
]
WRONG = (
    "squares of primes are taken for primes",
    r"""
#include <iostream>
using namespace std;

bool prime(int x) {
    if (x < 2) return false;
    for (int d = 2; d * d < x; d++)
        if (x % d == 0) return false;
    return true;
}

int main() {
    int n;
    cin >> n;
    int count = 0;
    for (int x = 1; x <= n; x++)
        if (prime(x)) count++;
    cout << count << endl;
}
""",
)
