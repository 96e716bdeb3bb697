"""coin_ways: in how many ways an amount is paid with given coins, as many of each as one likes."""

SIZES = (25, 110)


def generate(size, rng):
    coins = sorted(rng.sample(range(2, 30), rng.randint(1, 4) if size <= 25 else 5))
    return f"{size} {len(coins)}\n{' '.join(map(str, coins))}\n"


SUBMISSIONS = [
    (
        "ada",
        "the last coin is used or not",
        r"""
#include <iostream>
#include <vector>
using namespace std;

vector<int> coin;

long long ways(int left, int coins) {
    if (left == 0) return 1;
    if (left < 0 || coins == 0) return 0;
    return ways(left, coins - 1) + ways(left - coin[coins - 1], coins);
}

int main() {
    int amount, n;
    cin >> amount >> n;
    coin.resize(n);
    for (int i = 0; i < n; i++) cin >> coin[i];
    cout << ways(amount, n) << endl;
}
""",
    ),
    (
        "ada",
        "a table of coins by amounts",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int amount, n;
    cin >> amount >> n;
    vector<vector<long long>> ways(n + 1, vector<long long>(amount + 1, 0));
    ways[0][0] = 1;
    for (int i = 1; i <= n; i++) {
        int coin;
        cin >> coin;
        for (int a = 0; a <= amount; a++)
            for (int used = 0; used <= a; used += coin) ways[i][a] += ways[i - 1][a - used];
    }
    cout << ways[n][amount] << endl;
}
""",
    ),
    (
        "ben",
        "one row",
        r"""
#include <iostream>
using namespace std;

long long ways[100001];

int main() {
    int amount, n;
    cin >> amount >> n;
    ways[0] = 1;
    while (n--) {
        int coin;
        cin >> coin;
        for (int a = coin; a <= amount; a++) ways[a] += ways[a - coin];
    }
    cout << ways[amount] << endl;
}
""",
    ),
]
WRONG = (
    "orders count",
    r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int amount, n;
    cin >> amount >> n;
    vector<int> coin(n);
    for (auto& c : coin) cin >> c;
    vector<long long> ways(amount + 1);
    ways[0] = 1;
    for (int a = 1; a <= amount; a++)
        for (int c : coin)
            if (c <= a) ways[a] = (ways[a] + ways[a - c]) % 1000000007;
    cout << ways[amount] << endl;
}
""",
)
