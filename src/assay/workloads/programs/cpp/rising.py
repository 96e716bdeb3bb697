"""rising: the length of the longest strictly rising subsequence."""

SIZES = (9, 2500)


def generate(size, rng):
    return f"{size}\n{' '.join(str(rng.randint(1, 3 * size)) for _ in range(size))}\n"


SUBMISSIONS = [
    (
        "ben",
        "the longest that ends at each place",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<int> a(n), longest(n, 1);
    for (int i = 0; i < n; i++) cin >> a[i];
    int best = 0;
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < i; j++) {
            if (a[j] < a[i] && longest[j] + 1 > longest[i]) longest[i] = longest[j] + 1;
        }
        best = max(best, longest[i]);
    }
    cout << best << endl;
}
""",
    ),
    (
        "ben",
        "smallest last elements by length, gone through",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<int> last;
    for (int i = 0; i < n; i++) {
        int x;
        cin >> x;
        size_t at = 0;
        while (at < last.size() && last[at] < x) at++;
        if (at == last.size()) last.push_back(x);
        else last[at] = x;
    }
    cout << last.size() << endl;
}
""",
    ),
    (
        "ada",
        "the same in a set",
        r"""
#include <iostream>
#include <set>
using namespace std;

int main() {
    int n;
    cin >> n;
    set<int> last;
    while (n--) {
        int x;
        cin >> x;
        auto at = last.lower_bound(x);
        if (at != last.end()) last.erase(at);
        last.insert(x);
    }
    cout << last.size() << endl;
}
""",
    ),
    (
        "ben",
        "by bisection",
        r"""
#include <algorithm>
#include <cstdio>
#include <vector>
using namespace std;

int main() {
    int n;
    scanf("%d", &n);
    vector<int> last;
    while (n--) {
        int x;
        scanf("%d", &x);
        auto at = lower_bound(last.begin(), last.end(), x);
        if (at == last.end()) last.push_back(x);
        else *at = x;
    }
    printf("%d\n", (int)last.size());
}
""",
    ),
]
WRONG = (
    "not strictly",
    r"""
#include <algorithm>
#include <cstdio>
#include <vector>
using namespace std;

int main() {
    int n;
    scanf("%d", &n);
    vector<int> last;
    while (n--) {
        int x;
        scanf("%d", &x);
        auto at = upper_bound(last.begin(), last.end(), x);
        if (at == last.end()) last.push_back(x);
        else *at = x;
    }
    printf("%d\n", (int)last.size());
}
""",
)
