"""best_trade: the most that is earned by buying once and selling later, 0 if nothing is."""

SIZES = (8, 3000)


def generate(size, rng):
    return f"{size}\n{' '.join(str(rng.randint(1, 10**6)) for _ in range(size))}\n"


SUBMISSIONS = [
    (
        "ben",
        "all days to buy, all days to sell",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<int> price;
    for (int i = 0; i < n; i++) {
        int p;
        cin >> p;
        price.push_back(p);
    }
    int best = 0;
    for (int i = 0; i < n; i++)
        for (int j = i + 1; j < n; j++) best = max(best, price[j] - price[i]);
    cout << best << endl;
}
""",
    ),
    (
        "ben",
        "the highest price that comes later",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<int> price(n), later(n);
    for (int i = 0; i < n; i++) cin >> price[i];
    later[n - 1] = price[n - 1];
    for (int i = n - 2; i >= 0; i--) later[i] = max(price[i], later[i + 1]);
    int best = 0;
    for (int i = 0; i < n; i++) best = max(best, later[i] - price[i]);
    cout << best << endl;
}
""",
    ),
    (
        "ada",
        "the lowest price so far",
        r"""
#include <iostream>
using namespace std;

int main() {
    int n, lowest = 1 << 30, best = 0;
    cin >> n;
    for (int i = 0; i < n; i++) {
        int p;
        cin >> p;
        lowest = min(lowest, p);
        best = max(best, p - lowest);
    }
    cout << best << endl;
}
""",
    ),
    (
        "ada",
        "the same with scanf",
        r"""
#include <cstdio>

int main() {
    int n, p, lowest = 1 << 30, best = 0;
    scanf("%d", &n);
    while (n--) {
        scanf("%d", &p);
        if (p < lowest) lowest = p;
        else if (p - lowest > best) best = p - lowest;
    }
    printf("%d\n", best);
}
""",
    ),
]
WRONG = (
    "sold before it is bought",
    r"""
#include <cstdio>

int main() {
    int n, p, lowest = 1 << 30, highest = 0;
    scanf("%d", &n);
    while (n--) {
        scanf("%d", &p);
        if (p < lowest) lowest = p;
        if (p > highest) highest = p;
    }
    printf("%d\n", highest - lowest);
}
""",
)
