"""maze: the fewest steps from the first field of a grid to the last, -1 if there is no way."""

SIZES = (6, 70)


def generate(size, rng):
    walls = 0.3 if size <= 6 else 0.15
    rows = [[("#" if rng.random() < walls else ".") for _ in range(size)] for _ in range(size)]
    rows[0][0] = rows[-1][-1] = "."
    return f"{size} {size}\n" + "\n".join("".join(row) for row in rows) + "\n"


SUBMISSIONS = [
    (
        "ada",
        "all fields improved until nothing changes",
        r"""
#include <iostream>
#include <string>
#include <vector>
using namespace std;

int main() {
    int h, w;
    cin >> h >> w;
    vector<string> grid(h);
    for (int i = 0; i < h; i++) cin >> grid[i];
    vector<vector<int>> steps(h, vector<int>(w, 1000000));
    steps[0][0] = 0;
    bool changed = true;
    while (changed) {
        changed = false;
        for (int r = h - 1; r >= 0; r--) {
            for (int c = w - 1; c >= 0; c--) {
                if (grid[r][c] == '#') continue;
                int least = steps[r][c];
                if (r > 0) least = min(least, steps[r - 1][c] + 1);
                if (c > 0) least = min(least, steps[r][c - 1] + 1);
                if (r + 1 < h) least = min(least, steps[r + 1][c] + 1);
                if (c + 1 < w) least = min(least, steps[r][c + 1] + 1);
                if (least < steps[r][c]) {
                    steps[r][c] = least;
                    changed = true;
                }
            }
        }
    }
    if (steps[h - 1][w - 1] >= 1000000) cout << -1 << endl;
    else cout << steps[h - 1][w - 1] << endl;
}
""",
    ),
    (
        "ben",
        "a vector as a queue",
        r"""
#include <iostream>
#include <map>
#include <string>
#include <vector>
using namespace std;

int main() {
    int h, w;
    cin >> h >> w;
    vector<string> grid(h);
    for (int i = 0; i < h; i++) cin >> grid[i];
    map<pair<int, int>, int> steps;
    vector<pair<int, int>> waiting;
    waiting.push_back({0, 0});
    steps[{0, 0}] = 0;
    while (!waiting.empty()) {
        pair<int, int> p = waiting[0];
        waiting.erase(waiting.begin());
        int dr[] = {1, -1, 0, 0}, dc[] = {0, 0, 1, -1};
        for (int d = 0; d < 4; d++) {
            int r = p.first + dr[d], c = p.second + dc[d];
            if (r < 0 || c < 0 || r >= h || c >= w || grid[r][c] == '#') continue;
            if (steps.count({r, c})) continue;
            steps[{r, c}] = steps[p] + 1;
            waiting.push_back({r, c});
        }
    }
    if (steps.count({h - 1, w - 1})) cout << steps[{h - 1, w - 1}] << endl;
    else cout << -1 << endl;
}
""",
    ),
    (
        "ada",
        "a queue",
        r"""
#include <iostream>
#include <queue>
#include <string>
#include <vector>
using namespace std;

int main() {
    int h, w;
    cin >> h >> w;
    vector<string> grid(h);
    for (int i = 0; i < h; i++) cin >> grid[i];
    vector<vector<int>> steps(h, vector<int>(w, -1));
    queue<pair<int, int>> waiting;
    waiting.push({0, 0});
    steps[0][0] = 0;
    int dr[] = {1, -1, 0, 0}, dc[] = {0, 0, 1, -1};
    while (!waiting.empty()) {
        auto [pr, pc] = waiting.front();
        waiting.pop();
        for (int d = 0; d < 4; d++) {
            int r = pr + dr[d], c = pc + dc[d];
            if (r < 0 || c < 0 || r >= h || c >= w || grid[r][c] == '#' || steps[r][c] >= 0) continue;
            steps[r][c] = steps[pr][pc] + 1;
            waiting.push({r, c});
        }
    }
    cout << steps[h - 1][w - 1] << endl;
}
""",
    ),
    (
        "ben",
        "arrays with a border",
        r"""
#include <cstdio>
#include <cstring>

char grid[1003][1003];
int steps[1003 * 1003], waiting[1003 * 1003];

int main() {
    int h, w;
    scanf("%d %d", &h, &w);
    memset(grid, '#', sizeof grid);
    for (int r = 1; r <= h; r++) {
        scanf("%1001s", grid[r] + 1);
        grid[r][w + 1] = '#';
    }
    const int way[] = {1, -1, 1003, -1003};
    char* field = &grid[0][0];
    int head = 0, tail = 0, goal = h * 1003 + w, found = -1;
    waiting[tail++] = 1003 + 1;
    field[1003 + 1] = '#';
    while (head < tail) {
        int at = waiting[head++];
        if (at == goal) {
            found = steps[at];
            break;
        }
        for (int step : way) {
            int next = at + step;
            if (field[next] == '#') continue;
            field[next] = '#';
            steps[next] = steps[at] + 1;
            waiting[tail++] = next;
        }
    }
    printf("%d\n", found);
}
""",
    ),
]
WRONG = (
    "fields are counted, not steps",
    r"""
#include <iostream>
#include <queue>
#include <string>
#include <vector>
using namespace std;

int main() {
    int h, w;
    cin >> h >> w;
    vector<string> grid(h);
    for (int i = 0; i < h; i++) cin >> grid[i];
    vector<vector<int>> steps(h, vector<int>(w, -1));
    queue<pair<int, int>> waiting;
    waiting.push({0, 0});
    steps[0][0] = 1;
    int dr[] = {1, -1, 0, 0}, dc[] = {0, 0, 1, -1};
    while (!waiting.empty()) {
        auto [pr, pc] = waiting.front();
        waiting.pop();
        for (int d = 0; d < 4; d++) {
            int r = pr + dr[d], c = pc + dc[d];
            if (r < 0 || c < 0 || r >= h || c >= w || grid[r][c] == '#' || steps[r][c] >= 0) continue;
            steps[r][c] = steps[pr][pc] + 1;
            waiting.push({r, c});
        }
    }
    cout << steps[h - 1][w - 1] << endl;
}
""",
)
