"""in_order: numbers from 0 to 999, sorted, one a line."""

SIZES = (8, 2500)


def generate(size, rng):
    return f"{size}\n{' '.join(str(rng.randint(0, 999)) for _ in range(size))}\n"


SUBMISSIONS = [
    (
        "ben",
        "neighbours exchanged",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<int> a(n);
    for (int i = 0; i < n; i++) cin >> a[i];
    for (int i = 0; i < n; i++)
        for (int j = 0; j + 1 < n; j++)
            if (a[j] > a[j + 1]) swap(a[j], a[j + 1]);
    for (int i = 0; i < n; i++) cout << a[i] << endl;
}
""",
    ),
    (
        "ben",
        "each put where it belongs",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<int> a;
    for (int i = 0; i < n; i++) {
        int x;
        cin >> x;
        int at = a.size();
        while (at > 0 && a[at - 1] > x) at--;
        a.insert(a.begin() + at, x);
    }
    for (int i = 0; i < n; i++) cout << a[i] << endl;
}
""",
    ),
    (
        "cem",
        "std::sort",
        r"""
#include <algorithm>
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<int> a(n);
    for (int i = 0; i < n; i++) cin >> a[i];
    sort(a.begin(), a.end());
    for (int x : a) cout << x << endl;
}
""",
    ),
    (
        "ben",
        "the library's sort, lines not flushed",
        r"""
#include <algorithm>
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<int> a(n);
    for (auto& x : a) cin >> x;
    sort(a.begin(), a.end());
    for (auto x : a) cout << x << '\n';
}
""",
    ),
    (
        "cem",
        "counted",
        r"""
#include <cstdio>

int count[1000];

int main() {
    int n, x;
    scanf("%d", &n);
    while (n--) {
        scanf("%d", &x);
        count[x]++;
    }
    for (int v = 0; v < 1000; v++)
        for (int i = 0; i < count[v]; i++) printf("%d\n", v);
}
""",
    ),
]
WRONG = (
    "equal ones once only",
    r"""
#include <iostream>
#include <set>
using namespace std;

int main() {
    int n, x;
    cin >> n;
    set<int> a;
    while (n--) {
        cin >> x;
        a.insert(x);
    }
    for (int v : a) cout << v << "\n";
}
""",
)
