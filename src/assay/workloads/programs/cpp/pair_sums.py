"""pair_sums: how many pairs of numbers sum up to a given one."""

SIZES = (8, 3000)


def generate(size, rng):
    numbers = [rng.randint(0, size) for _ in range(size)]
    return f"{size} {size}\n{' '.join(map(str, numbers))}\n"


SUBMISSIONS = [
    (
        "ada",
        "all pairs",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n, k;
    cin >> n >> k;
    vector<int> a;
    for (int i = 0; i < n; i++) {
        int x;
        cin >> x;
        a.push_back(x);
    }
    long long count = 0;
    for (size_t i = 0; i < a.size(); i++)
        for (size_t j = i + 1; j < a.size(); j++)
            if (a[i] + a[j] == k) count++;
    cout << count << endl;
}
""",
    ),
    (
        "ada",
        "a map of those seen",
        r"""
#include <iostream>
#include <map>
using namespace std;

int main() {
    int n, k;
    cin >> n >> k;
    map<int, long long> seen;
    long long count = 0;
    for (int i = 0; i < n; i++) {
        int x;
        cin >> x;
        if (seen.find(k - x) != seen.end()) count += seen[k - x];
        seen[x]++;
    }
    cout << count << endl;
}
""",
    ),
    (
        "cem",
        "sorted, each partner looked for",
        r"""
#include <algorithm>
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n, k;
    cin >> n >> k;
    vector<int> a(n);
    for (auto& x : a) cin >> x;
    sort(a.begin(), a.end());
    long long count = 0;
    for (int i = 0; i < n; i++) {
        auto from = lower_bound(a.begin() + i + 1, a.end(), k - a[i]);
        auto to = upper_bound(a.begin() + i + 1, a.end(), k - a[i]);
        count += to - from;
    }
    cout << count << endl;
}
""",
    ),
    (
        "ada",
        "a hash map, and streams that are not tied",
        r"""
#include <iostream>
#include <unordered_map>
using namespace std;

int main() {
    ios::sync_with_stdio(false);
    cin.tie(nullptr);
    int n, k;
    cin >> n >> k;
    unordered_map<int, long long> seen;
    long long count = 0;
    for (int i = 0; i < n; i++) {
        int x;
        cin >> x;
        auto at = seen.find(k - x);
        if (at != seen.end()) count += at->second;
        seen[x]++;
    }
    cout << count << '\n';
}
""",
    ),
    (
        "cem",
        "counts by value",
        r"""
#include <cstdio>
#include <vector>

int main() {
    int n, k;
    scanf("%d %d", &n, &k);
    std::vector<int> seen(k + 1);
    long long count = 0;
    for (int i = 0; i < n; i++) {
        int x;
        scanf("%d", &x);
        if (x > k) continue;
        count += seen[k - x];
        seen[x]++;
    }
    printf("%lld\n", count);
}
""",
    ),
]
WRONG = (
    "a number may be its own partner",
    r"""
#include <cstdio>
#include <vector>

int main() {
    int n, k;
    scanf("%d %d", &n, &k);
    std::vector<int> seen(k + 1);
    long long count = 0;
    for (int i = 0; i < n; i++) {
        int x;
        scanf("%d", &x);
        seen[x]++;
        count += seen[k - x];
    }
    printf("%lld\n", count);
}
""",
)
