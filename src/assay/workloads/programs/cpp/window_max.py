"""window_max: the largest number in every window of k."""

SIZES = (8, 3000)


def generate(size, rng):
    k = rng.randint(1, size) if size <= 8 else size // 4
    return f"{size} {k}\n{' '.join(str(rng.randint(0, 9999)) for _ in range(size))}\n"


SUBMISSIONS = [
    (
        "ben",
        "each window gone through",
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
    for (int i = 0; i + k <= n; i++) {
        int largest = a[i];
        for (int j = i; j < i + k; j++)
            if (a[j] > largest) largest = a[j];
        cout << largest << endl;
    }
}
""",
    ),
    (
        "ada",
        "a multiset",
        r"""
#include <iostream>
#include <set>
#include <vector>
using namespace std;

int main() {
    int n, k;
    cin >> n >> k;
    vector<int> a(n);
    multiset<int> window;
    for (int i = 0; i < n; i++) {
        cin >> a[i];
        window.insert(a[i]);
        if (i >= k) window.erase(window.find(a[i - k]));
        if (i >= k - 1) cout << *window.rbegin() << endl;
    }
}
""",
    ),
    (
        "ben",
        "a heap that forgets late",
        r"""
#include <iostream>
#include <queue>
using namespace std;

int main() {
    int n, k;
    cin >> n >> k;
    priority_queue<pair<int, int>> heap;
    for (int i = 0; i < n; i++) {
        int x;
        cin >> x;
        heap.push({x, i});
        while (heap.top().second <= i - k) heap.pop();
        if (i >= k - 1) cout << heap.top().first << "\n";
    }
}
""",
    ),
    (
        "ada",
        "a deque that falls",
        r"""
#include <deque>
#include <iostream>
#include <vector>
using namespace std;

int main() {
    ios::sync_with_stdio(false);
    cin.tie(nullptr);
    int n, k;
    cin >> n >> k;
    vector<int> a(n);
    deque<int> best;
    for (int i = 0; i < n; i++) {
        cin >> a[i];
        while (!best.empty() && a[best.back()] <= a[i]) best.pop_back();
        best.push_back(i);
        if (best.front() == i - k) best.pop_front();
        if (i >= k - 1) cout << a[best.front()] << '\n';
    }
}
""",
    ),
]
WRONG = (
    "the window is one too long",
    r"""
#include <algorithm>
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n, k;
    cin >> n >> k;
    vector<int> a(n);
    for (auto& x : a) cin >> x;
    for (int i = 0; i + k <= n; i++) cout << *max_element(a.begin() + i, a.begin() + min(n, i + k + 1)) << "\n";
}
""",
)
