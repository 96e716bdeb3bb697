"""best_run: the largest sum of numbers that stand together, at least one of them."""

SIZES = (9, 2500)


def generate(size, rng):
    most = 50 if size > 9 else rng.choice((-1, 50))
    return f"{size}\n{' '.join(str(rng.randint(-50, most)) for _ in range(size))}\n"


SUBMISSIONS = [
    (
        "ada",
        "every start and every end",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<long long> a(n);
    for (int i = 0; i < n; i++) cin >> a[i];
    long long best = a[0];
    for (int i = 0; i < n; i++) {
        long long sum = 0;
        for (int j = i; j < n; j++) {
            sum += a[j];
            if (sum > best) best = sum;
        }
    }
    cout << best << endl;
}
""",
    ),
    (
        "cem",
        "differences of sums from the start",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<long long> total(n + 1, 0);
    for (int i = 1; i <= n; i++) {
        cin >> total[i];
        total[i] += total[i - 1];
    }
    long long best = total[1];
    for (int i = 1; i <= n; i++)
        for (int j = 0; j < i; j++) best = max(best, total[i] - total[j]);
    cout << best << endl;
}
""",
    ),
    (
        "ada",
        "one pass",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<long long> a(n);
    for (int i = 0; i < n; i++) cin >> a[i];
    long long best = a[0], here = a[0];
    for (int i = 1; i < n; i++) {
        here = max(a[i], here + a[i]);
        best = max(best, here);
    }
    cout << best << endl;
}
""",
    ),
    (
        "cem",
        "the least sum so far",
        r"""
#include <cstdio>

int main() {
    int n;
    scanf("%d", &n);
    long long sum = 0, least = 0, best = -1e18;
    while (n--) {
        int x;
        scanf("%d", &x);
        sum += x;
        if (sum - least > best) best = sum - least;
        if (sum < least) least = sum;
    }
    printf("%lld\n", best);
}
""",
    ),
]
WRONG = (
    "none at all may be taken",
    r"""
#include <cstdio>

int main() {
    int n;
    scanf("%d", &n);
    long long here = 0, best = 0;
    while (n--) {
        int x;
        scanf("%d", &x);
        here = here + x > 0 ? here + x : 0;
        if (here > best) best = here;
    }
    printf("%lld\n", best);
}
""",
)
