"""nearest_points: the square of the least distance of two points."""

SIZES = (8, 1500)


def generate(size, rng):
    n = max(size, 2)
    return f"{n}\n" + "".join(f"{rng.randint(0, 50_000)} {rng.randint(0, 50_000)}\n" for _ in range(n))


SUBMISSIONS = [
    (
        "ada",
        "all pairs, with pow",
        r"""
#include <cmath>
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<double> x(n), y(n);
    for (int i = 0; i < n; i++) cin >> x[i] >> y[i];
    double best = 1e18;
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n; j++) {
            if (i == j) continue;
            double distance = sqrt(pow(x[i] - x[j], 2) + pow(y[i] - y[j], 2));
            if (distance < best) best = distance;
        }
    }
    cout << (long long)round(best * best) << endl;
}
""",
    ),
    (
        "ada",
        "all pairs of whole numbers",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<long long> x(n), y(n);
    for (int i = 0; i < n; i++) cin >> x[i] >> y[i];
    long long best = 1LL << 60;
    for (int i = 0; i < n; i++)
        for (int j = i + 1; j < n; j++)
            best = min(best, (x[i] - x[j]) * (x[i] - x[j]) + (y[i] - y[j]) * (y[i] - y[j]));
    cout << best << endl;
}
""",
    ),
    (
        "ben",
        "sorted, and no further than need be",
        r"""
#include <algorithm>
#include <iostream>
#include <vector>
using namespace std;

int main() {
    ios::sync_with_stdio(false);
    cin.tie(nullptr);
    int n;
    cin >> n;
    vector<pair<long long, long long>> p(n);
    for (auto& [x, y] : p) cin >> x >> y;
    sort(p.begin(), p.end());
    long long best = 1LL << 60;
    for (int i = 0; i < n; i++) {
        for (int j = i + 1; j < n; j++) {
            long long dx = p[j].first - p[i].first, dy = p[j].second - p[i].second;
            if (dx * dx >= best) break;
            best = min(best, dx * dx + dy * dy);
        }
    }
    cout << best << '\n';
}
""",
    ),
]
WRONG = (
    "the sum of both differences, squared",
    r"""
#include <cstdlib>
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<long long> x(n), y(n);
    for (int i = 0; i < n; i++) cin >> x[i] >> y[i];
    long long best = 1LL << 60;
    for (int i = 0; i < n; i++)
        for (int j = i + 1; j < n; j++) best = min(best, abs(x[i] - x[j]) + abs(y[i] - y[j]));
    cout << best * best << endl;
}
""",
)
