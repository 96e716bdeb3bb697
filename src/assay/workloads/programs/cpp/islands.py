"""islands: into how many parts a graph falls."""

SIZES = (8, 900)


def generate(size, rng):
    edges = [f"{rng.randint(1, size)} {rng.randint(1, size)}" for _ in range(size // 2)]
    return f"{size} {len(edges)}\n" + "".join(edge + "\n" for edge in edges)


SUBMISSIONS = [
    (
        "cem",
        "a matrix of neighbours",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int n, m;
vector<vector<bool>> joined;
vector<bool> seen;

void visit(int at) {
    seen[at] = true;
    for (int other = 0; other < n; other++)
        if (joined[at][other] && !seen[other]) visit(other);
}

int main() {
    cin >> n >> m;
    joined.assign(n, vector<bool>(n, false));
    seen.assign(n, false);
    for (int i = 0; i < m; i++) {
        int a, b;
        cin >> a >> b;
        joined[a - 1][b - 1] = joined[b - 1][a - 1] = true;
    }
    int parts = 0;
    for (int i = 0; i < n; i++) {
        if (!seen[i]) {
            parts++;
            visit(i);
        }
    }
    cout << parts << endl;
}
""",
    ),
    (
        "ada",
        "names given again at every edge",
        r"""
#include <iostream>
#include <set>
#include <vector>
using namespace std;

int main() {
    int n, m;
    cin >> n >> m;
    vector<int> name(n + 1);
    for (int i = 1; i <= n; i++) name[i] = i;
    for (int i = 0; i < m; i++) {
        int a, b;
        cin >> a >> b;
        int from = name[a], to = name[b];
        for (int j = 1; j <= n; j++)
            if (name[j] == from) name[j] = to;
    }
    set<int> names;
    for (int i = 1; i <= n; i++) names.insert(name[i]);
    cout << names.size() << endl;
}
""",
    ),
    (
        "cem",
        "lists of neighbours",
        r"""
#include <iostream>
#include <vector>
using namespace std;

vector<vector<int>> near;
vector<bool> seen;

void visit(int at) {
    seen[at] = true;
    for (int other : near[at])
        if (!seen[other]) visit(other);
}

int main() {
    int n, m;
    cin >> n >> m;
    near.resize(n + 1);
    seen.resize(n + 1);
    while (m--) {
        int a, b;
        cin >> a >> b;
        near[a].push_back(b);
        near[b].push_back(a);
    }
    int parts = 0;
    for (int i = 1; i <= n; i++)
        if (!seen[i]) parts++, visit(i);
    cout << parts << endl;
}
""",
    ),
    (
        "ada",
        "union and find",
        r"""
#include <cstdio>

int up[200001];

int top(int x) {
    while (up[x] != x) x = up[x] = up[up[x]];
    return x;
}

int main() {
    int n, m;
    scanf("%d %d", &n, &m);
    for (int i = 1; i <= n; i++) up[i] = i;
    int parts = n;
    while (m--) {
        int a, b;
        scanf("%d %d", &a, &b);
        a = top(a);
        b = top(b);
        if (a != b) {
            up[a] = b;
            parts--;
        }
    }
    printf("%d\n", parts);
}
""",
    ),
]
WRONG = (
    "every edge joins two parts",
    r"""
#include <cstdio>

int main() {
    int n, m;
    scanf("%d %d", &n, &m);
    int parts = n;
    while (m--) {
        int a, b;
        scanf("%d %d", &a, &b);
        if (a != b) parts--;
    }
    printf("%d\n", parts < 1 ? 1 : parts);
}
""",
)
