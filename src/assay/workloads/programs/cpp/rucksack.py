"""rucksack: the largest value of things, each taken once, whose weights fit into a limit."""

SIZES = (9, 18)


def generate(size, rng):
    limit = 12 * size
    things = "\n".join(f"{rng.randint(1, 40)} {rng.randint(1, 1000)}" for _ in range(size))
    return f"{size} {limit}\n{things}\n"


SUBMISSIONS = [
    (
        "ben",
        "every thing taken or left",
        r"""
#include <iostream>
using namespace std;

int n, limit;
int weight[100], value[100];

int best(int at, int left) {
    if (at == n) return 0;
    int found = best(at + 1, left);
    if (weight[at] <= left) found = max(found, value[at] + best(at + 1, left - weight[at]));
    return found;
}

int main() {
    cin >> n >> limit;
    for (int i = 0; i < n; i++) cin >> weight[i] >> value[i];
    cout << best(0, limit) << endl;
}
""",
    ),
    (
        "cem",
        "every subset",
        r"""
#include <cstdio>
#include <vector>
using namespace std;

int main() {
    int n, limit;
    scanf("%d %d", &n, &limit);
    vector<int> weight(n), value(n);
    for (int i = 0; i < n; i++) scanf("%d %d", &weight[i], &value[i]);
    int best = 0;
    for (int subset = 0; subset < 1 << n; subset++) {
        int heavy = 0, worth = 0;
        for (int i = 0; i < n && heavy <= limit; i++)
            if (subset >> i & 1) heavy += weight[i], worth += value[i];
        if (heavy <= limit && worth > best) best = worth;
    }
    printf("%d\n", best);
}
""",
    ),
    (
        "ben",
        "a table of things by weights",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n, limit;
    cin >> n >> limit;
    vector<vector<int>> best(n + 1, vector<int>(limit + 1));
    for (int i = 1; i <= n; i++) {
        int w, v;
        cin >> w >> v;
        for (int l = 0; l <= limit; l++) {
            best[i][l] = best[i - 1][l];
            if (w <= l) best[i][l] = max(best[i][l], best[i - 1][l - w] + v);
        }
    }
    cout << best[n][limit] << endl;
}
""",
    ),
    (
        "cem",
        "one row",
        r"""
#include <algorithm>
#include <cstdio>

int best[100001];

int main() {
    int n, limit;
    scanf("%d %d", &n, &limit);
    while (n--) {
        int w, v;
        scanf("%d %d", &w, &v);
        for (int l = limit; l >= w; l--) best[l] = std::max(best[l], best[l - w] + v);
    }
    printf("%d\n", best[limit]);
}
""",
    ),
]
WRONG = (
    "things may be taken again",
    r"""
#include <algorithm>
#include <cstdio>

int best[100001];

int main() {
    int n, limit;
    scanf("%d %d", &n, &limit);
    while (n--) {
        int w, v;
        scanf("%d %d", &w, &v);
        for (int l = w; l <= limit; l++) best[l] = std::max(best[l], best[l - w] + v);
    }
    printf("%d\n", best[limit]);
}
""",
)
