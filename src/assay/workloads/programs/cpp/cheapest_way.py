"""cheapest_way: the least cost from the first place to the last over roads with costs, -1 if there is no way."""

SIZES = (7, 500)


def generate(size, rng):
    roads = [(rng.randint(1, size), rng.randint(1, size), rng.randint(1, 100)) for _ in range(2 * size)]
    return f"{size} {len(roads)}\n" + "".join(f"{a} {b} {c}\n" for a, b, c in roads)


SUBMISSIONS = [
    (
        "ben",
        "all roads, as often as there are places",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n, m;
    cin >> n >> m;
    vector<int> a(m), b(m);
    vector<long long> c(m), cost(n + 1, 1e15);
    for (int i = 0; i < m; i++) cin >> a[i] >> b[i] >> c[i];
    cost[1] = 0;
    for (int round = 0; round < n; round++) {
        for (int i = 0; i < m; i++) {
            if (cost[a[i]] + c[i] < cost[b[i]]) cost[b[i]] = cost[a[i]] + c[i];
            if (cost[b[i]] + c[i] < cost[a[i]]) cost[a[i]] = cost[b[i]] + c[i];
        }
    }
    if (cost[n] >= 1e15) cout << -1 << endl;
    else cout << cost[n] << endl;
}
""",
    ),
    (
        "cem",
        "the nearest of all places, by a matrix",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n, m;
    cin >> n >> m;
    const int FAR = 1000000000;
    vector<vector<int>> road(n + 1, vector<int>(n + 1, FAR));
    while (m--) {
        int a, b, c;
        cin >> a >> b >> c;
        road[a][b] = road[b][a] = min(road[a][b], c);
    }
    vector<int> cost(n + 1, FAR);
    vector<bool> done(n + 1);
    cost[1] = 0;
    for (int round = 0; round < n; round++) {
        int at = 0;
        for (int i = 1; i <= n; i++)
            if (!done[i] && (at == 0 || cost[i] < cost[at])) at = i;
        done[at] = true;
        if (cost[at] == FAR) break;
        for (int i = 1; i <= n; i++)
            if (road[at][i] < FAR) cost[i] = min(cost[i], cost[at] + road[at][i]);
    }
    cout << (cost[n] == FAR ? -1 : cost[n]) << endl;
}
""",
    ),
    (
        "ben",
        "until nothing changes",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n, m;
    cin >> n >> m;
    vector<int> a(m), b(m);
    vector<long long> c(m), cost(n + 1, 1e15);
    for (int i = 0; i < m; i++) cin >> a[i] >> b[i] >> c[i];
    cost[1] = 0;
    bool changed = true;
    while (changed) {
        changed = false;
        for (int i = 0; i < m; i++) {
            if (cost[a[i]] + c[i] < cost[b[i]]) cost[b[i]] = cost[a[i]] + c[i], changed = true;
            if (cost[b[i]] + c[i] < cost[a[i]]) cost[a[i]] = cost[b[i]] + c[i], changed = true;
        }
    }
    if (cost[n] >= 1e15) cout << -1 << endl;
    else cout << cost[n] << endl;
}
""",
    ),
    (
        "cem",
        "a heap",
        r"""
#include <functional>
#include <iostream>
#include <queue>
#include <vector>
using namespace std;

int main() {
    int n, m;
    cin >> n >> m;
    vector<vector<pair<int, int>>> road(n + 1);
    while (m--) {
        int a, b, c;
        cin >> a >> b >> c;
        road[a].push_back({b, c});
        road[b].push_back({a, c});
    }
    vector<int> cost(n + 1, 1 << 30);
    priority_queue<pair<int, int>, vector<pair<int, int>>, greater<pair<int, int>>> heap;
    heap.push({cost[1] = 0, 1});
    while (!heap.empty()) {
        auto [far, at] = heap.top();
        heap.pop();
        if (far > cost[at]) continue;
        for (auto [to, c] : road[at])
            if (far + c < cost[to]) heap.push({cost[to] = far + c, to});
    }
    cout << (cost[n] == 1 << 30 ? -1 : cost[n]) << endl;
}
""",
    ),
]
WRONG = (
    "roads lead one way",
    r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n, m;
    cin >> n >> m;
    vector<int> a(m), b(m);
    vector<long long> c(m), cost(n + 1, 1e15);
    for (int i = 0; i < m; i++) cin >> a[i] >> b[i] >> c[i];
    cost[1] = 0;
    for (int round = 0; round < n; round++)
        for (int i = 0; i < m; i++)
            if (cost[a[i]] + c[i] < cost[b[i]]) cost[b[i]] = cost[a[i]] + c[i];
    if (cost[n] >= 1e15) cout << -1 << endl;
    else cout << cost[n] << endl;
}
""",
)
