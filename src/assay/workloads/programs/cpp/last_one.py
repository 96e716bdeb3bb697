"""last_one: who is left when every k-th in a circle of n leaves."""

SIZES = (12, 5000)


def generate(size, rng):
    return f"{size} {rng.randint(1, 9) if size <= 12 else 7}\n"


SUBMISSIONS = [
    (
        "ada",
        "a list that is walked along",
        r"""
#include <iostream>
#include <list>
using namespace std;

int main() {
    int n, k;
    cin >> n >> k;
    list<int> circle;
    for (int i = 1; i <= n; i++) circle.push_back(i);
    auto at = circle.begin();
    while (circle.size() > 1) {
        for (int i = 1; i < k; i++) {
            at++;
            if (at == circle.end()) at = circle.begin();
        }
        at = circle.erase(at);
        if (at == circle.end()) at = circle.begin();
    }
    cout << circle.front() << endl;
}
""",
    ),
    (
        "ben",
        "everyone goes to the back of a queue",
        r"""
#include <iostream>
#include <queue>
using namespace std;

int main() {
    int n, k;
    cin >> n >> k;
    queue<int> circle;
    for (int i = 1; i <= n; i++) circle.push(i);
    while (circle.size() > 1) {
        for (int i = 1; i < k; i++) {
            circle.push(circle.front());
            circle.pop();
        }
        circle.pop();
    }
    cout << circle.front() << endl;
}
""",
    ),
    (
        "ben",
        "a vector, and erase",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n, k;
    cin >> n >> k;
    vector<int> circle(n);
    for (int i = 0; i < n; i++) circle[i] = i + 1;
    int at = 0;
    while (circle.size() > 1) {
        at = (at + k - 1) % circle.size();
        circle.erase(circle.begin() + at);
    }
    cout << circle[0] << endl;
}
""",
    ),
    (
        "ada",
        "by recurrence",
        r"""
#include <cstdio>

int main() {
    int n, k, last = 0;
    scanf("%d %d", &n, &k);
    for (int people = 2; people <= n; people++) last = (last + k) % people;
    printf("%d\n", last + 1);
}
""",
    ),
]
WRONG = (
    "counted from 0",
    r"""
#include <cstdio>

int main() {
    int n, k, last = 0;
    scanf("%d %d", &n, &k);
    for (int people = 2; people <= n; people++) last = (last + k) % people;
    printf("%d\n", last);
}
""",
)
