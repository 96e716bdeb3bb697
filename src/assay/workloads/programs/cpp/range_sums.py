"""range_sums: the sums of many ranges of a list."""

SIZES = (7, 2000)


def generate(size, rng):
    numbers = " ".join(str(rng.randint(-99, 99)) for _ in range(size))
    ranges = [sorted((rng.randint(1, size), rng.randint(1, size))) for _ in range(size)]
    return f"{size} {size}\n{numbers}\n" + "".join(f"{a} {b}\n" for a, b in ranges)


SUBMISSIONS = [
    (
        "cem",
        "each one added up",
        r"""
#include <iostream>
#include <vector>
using namespace std;

long long total(vector<int> a, int from, int to) {
    long long sum = 0;
    for (int i = from; i <= to; i++) sum += a[i];
    return sum;
}

int main() {
    int n, q;
    cin >> n >> q;
    vector<int> a(n + 1);
    for (int i = 1; i <= n; i++) cin >> a[i];
    while (q--) {
        int from, to;
        cin >> from >> to;
        cout << total(a, from, to) << endl;
    }
}
""",
    ),
    (
        "cem",
        "sums from the start",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n, q;
    cin >> n >> q;
    vector<long long> sum(n + 1, 0);
    for (int i = 1; i <= n; i++) {
        int x;
        cin >> x;
        sum[i] = sum[i - 1] + x;
    }
    while (q--) {
        int from, to;
        cin >> from >> to;
        cout << sum[to] - sum[from - 1] << endl;
    }
}
""",
    ),
    (
        "ada",
        "a Fenwick tree",
        r"""
#include <iostream>
using namespace std;

long long tree[200001];
int n, q;

long long before(int at) {
    long long sum = 0;
    for (; at > 0; at -= at & -at) sum += tree[at];
    return sum;
}

int main() {
    cin >> n >> q;
    for (int i = 1; i <= n; i++) {
        int x;
        cin >> x;
        for (int at = i; at <= n; at += at & -at) tree[at] += x;
    }
    while (q--) {
        int from, to;
        cin >> from >> to;
        cout << before(to) - before(from - 1) << "\n";
    }
}
""",
    ),
    (
        "ada",
        "sums from the start, read and written by hand",
        r"""
#include <cstdio>
#include <string>

static char text[1 << 22];
static long long sum[200001];

int main() {
    size_t length = fread(text, 1, sizeof text - 1, stdin);
    text[length] = 0;
    const char* at = text;
    auto next = [&]() {
        while (*at <= ' ') at++;
        bool minus = *at == '-';
        if (minus) at++;
        int x = 0;
        while (*at > ' ') x = 10 * x + (*at++ - '0');
        return minus ? -x : x;
    };
    int n = next(), q = next();
    for (int i = 1; i <= n; i++) sum[i] = sum[i - 1] + next();
    std::string out;
    while (q--) {
        int from = next(), to = next();
        out += std::to_string(sum[to] - sum[from - 1]);
        out += '\n';
    }
    fwrite(out.data(), 1, out.size(), stdout);
}
""",
    ),
]
WRONG = (
    "without the first of each range",
    r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n, q;
    cin >> n >> q;
    vector<long long> sum(n + 1, 0);
    for (int i = 1; i <= n; i++) {
        int x;
        cin >> x;
        sum[i] = sum[i - 1] + x;
    }
    while (q--) {
        int from, to;
        cin >> from >> to;
        cout << sum[to] - sum[from] << endl;
    }
}
""",
)
