"""grid_paths: ways from corner to corner of a grid, rightwards and downwards, around its blocked fields, modulo 1,000,007."""

SIZES = (6, 11)


def generate(size, rng):
    rows = [[("#" if rng.random() < 0.05 else ".") for _ in range(size)] for _ in range(size)]
    rows[0][0] = rows[-1][-1] = "."
    return f"{size}\n" + "\n".join("".join(row) for row in rows) + "\n"


SUBMISSIONS = [
    (
        "cem",
        "walking every path",
        r"""
#include <iostream>
#include <string>
#include <vector>
using namespace std;

int n;
vector<string> grid;

int paths(int r, int c) {
    if (r >= n || c >= n || grid[r][c] == '#') return 0;
    if (r == n - 1 && c == n - 1) return 1;
    return (paths(r + 1, c) + paths(r, c + 1)) % 1000007;
}

int main() {
    cin >> n;
    grid.resize(n);
    for (auto& row : grid) cin >> row;
    cout << paths(0, 0) << endl;
}
""",
    ),
    (
        "cem",
        "with known ones",
        r"""
#include <iostream>
#include <string>
#include <vector>
using namespace std;

int n;
vector<string> grid;
vector<vector<int>> known;

int paths(int r, int c) {
    if (r >= n || c >= n || grid[r][c] == '#') return 0;
    if (r == n - 1 && c == n - 1) return 1;
    if (known[r][c] >= 0) return known[r][c];
    return known[r][c] = (paths(r + 1, c) + paths(r, c + 1)) % 1000007;
}

int main() {
    cin >> n;
    grid.resize(n);
    known.assign(n, vector<int>(n, -1));
    for (auto& row : grid) cin >> row;
    cout << paths(0, 0) << endl;
}
""",
    ),
    (
        "ben",
        "row by row while reading",
        r"""
#include <cstdio>

char row[1002];
int ways[1002];

int main() {
    int n;
    scanf("%d", &n);
    ways[0] = 1;
    for (int r = 0; r < n; r++) {
        scanf("%1001s", row);
        for (int c = 0; c < n; c++) {
            if (row[c] == '#') ways[c] = 0;
            else if (c > 0) ways[c] = (ways[c] + ways[c - 1]) % 1000007;
        }
    }
    printf("%d\n", ways[n - 1]);
}
""",
    ),
]
WRONG = (
    "blocked fields are crossed",
    r"""
#include <cstdio>

int ways[1002];

int main() {
    int n;
    scanf("%d", &n);
    ways[0] = 1;
    for (int r = 0; r < n; r++)
        for (int c = 1; c < n; c++) ways[c] = (ways[c] + ways[c - 1]) % 1000007;
    printf("%d\n", ways[n - 1]);
}
""",
)
