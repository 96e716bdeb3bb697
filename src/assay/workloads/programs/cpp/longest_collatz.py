"""longest_collatz: the first number below n whose Collatz sequence is the longest, and its length."""

SIZES = (30, 8000)


def generate(size, rng):
    return f"{size + 1}\n"


SUBMISSIONS = [
    (
        "cem",
        "each by recursion",
        r"""
#include <iostream>
using namespace std;

int length(long long x) {
    if (x == 1) return 1;
    if (x % 2 == 0) return 1 + length(x / 2);
    return 1 + length(3 * x + 1);
}

int main() {
    int n;
    cin >> n;
    int best = 1;
    for (int x = 1; x < n; x++)
        if (length(x) > length(best)) best = x;
    cout << best << " " << length(best) << endl;
}
""",
    ),
    (
        "cem",
        "a map of known ones",
        r"""
#include <iostream>
#include <map>
using namespace std;

map<long long, int> known;

int length(long long x) {
    if (x == 1) return 1;
    if (known.count(x)) return known[x];
    return known[x] = 1 + length(x % 2 ? 3 * x + 1 : x / 2);
}

int main() {
    int n;
    cin >> n;
    int best = 1;
    for (int x = 1; x < n; x++)
        if (length(x) > length(best)) best = x;
    cout << best << " " << length(best) << endl;
}
""",
    ),
    (
        "ada",
        "a loop for each",
        r"""
#include <iostream>
using namespace std;

int main() {
    int n;
    cin >> n;
    int best = 1, longest = 1;
    for (int start = 1; start < n; start++) {
        int steps = 1;
        for (long long x = start; x != 1; x = x % 2 ? 3 * x + 1 : x / 2) steps++;
        if (steps > longest) longest = steps, best = start;
    }
    cout << best << " " << longest << endl;
}
""",
    ),
    (
        "ada",
        "until it falls below its start",
        r"""
#include <cstdio>
#include <vector>

int main() {
    int n;
    scanf("%d", &n);
    std::vector<int> length(n + 1);
    length[1] = 1;
    int best = 1;
    for (int start = 2; start < n; start++) {
        long long x = start;
        int steps = 0;
        while (x >= start) {
            if (x % 2) x = (3 * x + 1) / 2, steps += 2;
            else x /= 2, steps++;
        }
        length[start] = steps + length[x];
        if (length[start] > length[best]) best = start;
    }
    printf("%d %d\n", best, length[best]);
}
""",
    ),
]
WRONG = (
    "steps are counted, not numbers",
    r"""
#include <iostream>
using namespace std;

int main() {
    int n;
    cin >> n;
    int best = 1, longest = 0;
    for (int start = 1; start < n; start++) {
        int steps = 0;
        for (long long x = start; x != 1; x = x % 2 ? 3 * x + 1 : x / 2) steps++;
        if (steps > longest) longest = steps, best = start;
    }
    cout << best << " " << longest << endl;
}
""",
)
