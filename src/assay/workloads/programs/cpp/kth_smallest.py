"""kth_smallest: the k-th smallest of many numbers."""

SIZES = (9, 4000)


def generate(size, rng):
    k = rng.randint(1, size) if size <= 9 else size // 3
    return f"{size} {k}\n{' '.join(str(rng.randint(0, 10**6)) for _ in range(size))}\n"


SUBMISSIONS = [
    (
        "cem",
        "the smallest taken out k times",
        r"""
#include <algorithm>
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n, k;
    cin >> n >> k;
    vector<int> a(n);
    for (int i = 0; i < n; i++) cin >> a[i];
    for (int i = 1; i < k; i++) a.erase(min_element(a.begin(), a.end()));
    cout << *min_element(a.begin(), a.end()) << endl;
}
""",
    ),
    (
        "cem",
        "sorted",
        r"""
#include <algorithm>
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n, k;
    cin >> n >> k;
    vector<int> a(n);
    for (int i = 0; i < n; i++) cin >> a[i];
    sort(a.begin(), a.end());
    cout << a[k - 1] << endl;
}
""",
    ),
    (
        "ben",
        "a heap of the k smallest",
        r"""
#include <iostream>
#include <queue>
using namespace std;

int main() {
    int n, k;
    cin >> n >> k;
    priority_queue<int> heap;
    while (n--) {
        int x;
        cin >> x;
        heap.push(x);
        if ((int)heap.size() > k) heap.pop();
    }
    cout << heap.top() << endl;
}
""",
    ),
    (
        "ben",
        "nth_element",
        r"""
#include <algorithm>
#include <cstdio>
#include <vector>

int main() {
    int n, k;
    scanf("%d %d", &n, &k);
    std::vector<int> a(n);
    for (int& x : a) scanf("%d", &x);
    std::nth_element(a.begin(), a.begin() + k - 1, a.end());
    printf("%d\n", a[k - 1]);
}
""",
    ),
]
WRONG = (
    "the k-th largest",
    r"""
#include <algorithm>
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n, k;
    cin >> n >> k;
    vector<int> a(n);
    for (int i = 0; i < n; i++) cin >> a[i];
    sort(a.begin(), a.end());
    cout << a[n - k] << endl;
}
""",
)
