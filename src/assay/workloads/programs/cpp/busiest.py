"""busiest: the most guests that are there at once; a guest who leaves in an hour is no more there in it."""

SIZES = (7, 1500)


def generate(size, rng):
    guests = []
    for _ in range(size):
        come = rng.randint(0, 4000)
        guests.append(f"{come} {come + rng.randint(1, 4000)}\n")
    return f"{size}\n" + "".join(guests)


SUBMISSIONS = [
    (
        "cem",
        "every hour of every guest",
        r"""
#include <iostream>
#include <map>
using namespace std;

int main() {
    int n;
    cin >> n;
    int there[10000] = {};
    for (int i = 0; i < n; i++) {
        int come, leave;
        cin >> come >> leave;
        for (int hour = come; hour < leave; hour++) there[hour]++;
    }
    int most = 0;
    for (int hour = 0; hour < 10000; hour++)
        if (there[hour] > most) most = there[hour];
    cout << most << endl;
}
""",
    ),
    (
        "ada",
        "who is there when one comes",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<pair<int, int>> guests(n);
    for (auto& g : guests) cin >> g.first >> g.second;
    int most = 0;
    for (auto g : guests) {
        int there = 0;
        for (auto h : guests)
            if (h.first <= g.first && g.first < h.second) there++;
        most = max(most, there);
    }
    cout << most << endl;
}
""",
    ),
    (
        "cem",
        "differences by hour",
        r"""
#include <iostream>
#include <map>
using namespace std;

int main() {
    int n;
    cin >> n;
    map<int, int> change;
    for (int i = 0; i < n; i++) {
        int come, leave;
        cin >> come >> leave;
        change[come]++;
        change[leave]--;
    }
    int most = 0, there = 0;
    for (auto entry : change) {
        there += entry.second;
        most = max(most, there);
    }
    cout << most << endl;
}
""",
    ),
    (
        "ada",
        "comings and leavings sorted",
        r"""
#include <algorithm>
#include <cstdio>
#include <vector>
using namespace std;

int main() {
    int n;
    scanf("%d", &n);
    vector<int> come(n), leave(n);
    for (int i = 0; i < n; i++) scanf("%d %d", &come[i], &leave[i]);
    sort(come.begin(), come.end());
    sort(leave.begin(), leave.end());
    int most = 0, gone = 0;
    for (int i = 0; i < n; i++) {
        while (leave[gone] <= come[i]) gone++;
        most = max(most, i + 1 - gone);
    }
    printf("%d\n", most);
}
""",
    ),
]
WRONG = (
    "who leaves in an hour is still there",
    r"""
#include <algorithm>
#include <cstdio>
#include <vector>
using namespace std;

int main() {
    int n;
    scanf("%d", &n);
    vector<int> come(n), leave(n);
    for (int i = 0; i < n; i++) scanf("%d %d", &come[i], &leave[i]);
    sort(come.begin(), come.end());
    sort(leave.begin(), leave.end());
    int most = 0, gone = 0;
    for (int i = 0; i < n; i++) {
        while (leave[gone] < come[i]) gone++;
        most = max(most, i + 1 - gone);
    }
    printf("%d\n", most);
}
""",
)
