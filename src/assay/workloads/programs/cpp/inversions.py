"""inversions: how many pairs of a list stand in the wrong order."""

SIZES = (7, 3000)


def generate(size, rng):
    numbers = [rng.randint(1, 2 * size) for _ in range(size)]
    return f"{size}\n{' '.join(map(str, numbers))}\n"


SUBMISSIONS = [
    (
        "ada",
        "what stands behind each is copied and counted",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int smaller(vector<int> rest) {
    int count = 0;
    for (int j = 1; j < (int)rest.size(); j++)
        if (rest[0] > rest[j]) count++;
    return count;
}

int main() {
    int n;
    cin >> n;
    vector<int> a(n);
    for (int i = 0; i < n; i++) cin >> a[i];
    long long count = 0;
    for (int i = 0; i < n; i++) count += smaller(vector<int>(a.begin() + i, a.end()));
    cout << count << endl;
}
""",
    ),
    (
        "ben",
        "two loops",
        r"""
#include <iostream>
using namespace std;

int a[200000];

int main() {
    int n;
    cin >> n;
    for (int i = 0; i < n; i++) cin >> a[i];
    long long count = 0;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < i; j++)
            if (a[j] > a[i]) count++;
    cout << count << endl;
}
""",
    ),
    (
        "ada",
        "merge sort",
        r"""
#include <iostream>
#include <vector>
using namespace std;

long long sorted(vector<int>& a, int from, int to) {
    if (to - from < 2) return 0;
    int mid = (from + to) / 2;
    long long count = sorted(a, from, mid) + sorted(a, mid, to);
    vector<int> merged;
    int i = from, j = mid;
    while (i < mid || j < to) {
        if (j == to || (i < mid && a[i] <= a[j])) {
            merged.push_back(a[i++]);
        } else {
            count += mid - i;
            merged.push_back(a[j++]);
        }
    }
    for (int k = 0; k < (int)merged.size(); k++) a[from + k] = merged[k];
    return count;
}

int main() {
    int n;
    cin >> n;
    vector<int> a(n);
    for (int i = 0; i < n; i++) cin >> a[i];
    cout << sorted(a, 0, n) << endl;
}
""",
    ),
    (
        "ben",
        "a Fenwick tree over the values",
        r"""
#include <cstdio>

int tree[400001];

int main() {
    int n;
    scanf("%d", &n);
    long long count = 0;
    for (int i = 0; i < n; i++) {
        int x;
        scanf("%d", &x);
        count += i;
        for (int at = x; at > 0; at -= at & -at) count -= tree[at];
        for (int at = x; at <= 2 * n; at += at & -at) tree[at]++;
    }
    printf("%lld\n", count);
}
""",
    ),
]
WRONG = (
    "equal ones count too",
    r"""
#include <iostream>
using namespace std;

int a[200000];

int main() {
    int n;
    cin >> n;
    for (int i = 0; i < n; i++) cin >> a[i];
    long long count = 0;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < i; j++)
            if (a[j] >= a[i]) count++;
    cout << count << endl;
}
""",
)
