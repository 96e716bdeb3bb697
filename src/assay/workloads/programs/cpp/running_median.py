"""running_median: the lower median after each number."""

SIZES = (8, 800)


def generate(size, rng):
    return f"{size}\n{' '.join(str(rng.randint(-999, 999)) for _ in range(size))}\n"


SUBMISSIONS = [
    (
        "ada",
        "sorted after each",
        r"""
#include <algorithm>
#include <iostream>
#include <vector>
using namespace std;

int median(vector<int> a) {
    sort(a.begin(), a.end());
    return a[(a.size() - 1) / 2];
}

int main() {
    int n;
    cin >> n;
    vector<int> a;
    for (int i = 0; i < n; i++) {
        int x;
        cin >> x;
        a.push_back(x);
        cout << median(a) << endl;
    }
}
""",
    ),
    (
        "cem",
        "nth_element after each",
        r"""
#include <algorithm>
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
        a.push_back(x);
        auto middle = a.begin() + i / 2;
        nth_element(a.begin(), middle, a.end());
        cout << *middle << "\n";
    }
}
""",
    ),
    (
        "ada",
        "put in by bisection",
        r"""
#include <algorithm>
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
        a.insert(lower_bound(a.begin(), a.end(), x), x);
        cout << a[i / 2] << endl;
    }
}
""",
    ),
    (
        "cem",
        "two heaps",
        r"""
#include <functional>
#include <iostream>
#include <queue>
#include <vector>
using namespace std;

int main() {
    ios::sync_with_stdio(false);
    cin.tie(nullptr);
    int n;
    cin >> n;
    priority_queue<int> low;
    priority_queue<int, vector<int>, greater<int>> high;
    while (n--) {
        int x;
        cin >> x;
        if (low.empty() || x <= low.top()) low.push(x);
        else high.push(x);
        if (low.size() > high.size() + 1) {
            high.push(low.top());
            low.pop();
        } else if (low.size() < high.size()) {
            low.push(high.top());
            high.pop();
        }
        cout << low.top() << '\n';
    }
}
""",
    ),
]
WRONG = (
    "the upper one",
    r"""
#include <algorithm>
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
        a.insert(lower_bound(a.begin(), a.end(), x), x);
        cout << a[(i + 1) / 2] << endl;
    }
}
""",
)
