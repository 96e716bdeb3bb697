"""matrices: the product of two square matrices, modulo 10,007."""

SIZES = (4, 60)


def generate(size, rng):
    rows = "\n".join(" ".join(str(rng.randint(0, 9999)) for _ in range(size)) for _ in range(2 * size))
    return f"{size}\n{rows}\n"


SUBMISSIONS = [
    (
        "ben",
        "the rest taken at every step",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<vector<long long>> a(n, vector<long long>(n)), b = a, c = a;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) cin >> a[i][j];
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) cin >> b[i][j];
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++)
            for (int k = 0; k < n; k++) c[i][j] = (c[i][j] + a[i][k] * b[k][j]) % 10007;
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n; j++) cout << c[i][j] << " ";
        cout << endl;
    }
}
""",
    ),
    (
        "ben",
        "the rest taken at the end",
        r"""
#include <iostream>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<vector<long long>> a(n, vector<long long>(n)), b = a;
    for (auto& row : a)
        for (auto& x : row) cin >> x;
    for (auto& row : b)
        for (auto& x : row) cin >> x;
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n; j++) {
            long long sum = 0;
            for (int k = 0; k < n; k++) sum += a[i][k] * b[k][j];
            cout << sum % 10007 << " ";
        }
        cout << endl;
    }
}
""",
    ),
    (
        "cem",
        "rows added, plain arrays",
        r"""
#include <cstdio>

int n;
long long a[300][300], b[300][300], c[300][300];

int main() {
    scanf("%d", &n);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) scanf("%lld", &a[i][j]);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) scanf("%lld", &b[i][j]);
    for (int i = 0; i < n; i++)
        for (int k = 0; k < n; k++)
            for (int j = 0; j < n; j++) c[i][j] += a[i][k] * b[k][j];
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n; j++) printf("%lld ", c[i][j] % 10007);
        puts("");
    }
}
""",
    ),
    (
        "cem",
        "read by hand",
        r"""
#include <cstdio>

int n;
int a[300][300], b[300][300];

int next() {
    int c = getchar_unlocked();
    while (c < '0') c = getchar_unlocked();
    int x = 0;
    for (; c >= '0'; c = getchar_unlocked()) x = 10 * x + c - '0';
    return x;
}

int main() {
    n = next();
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) a[i][j] = next();
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) b[i][j] = next();
    for (int i = 0; i < n; i++) {
        long long row[300] = {};
        for (int k = 0; k < n; k++)
            for (int j = 0; j < n; j++) row[j] += (long long)a[i][k] * b[k][j];
        for (int j = 0; j < n; j++) printf("%lld ", row[j] % 10007);
        puts("");
    }
}
""",
    ),
]
WRONG = (
    "int is too short",
    r"""
#include <cstdio>

int n;
int a[300][300], b[300][300];

int main() {
    scanf("%d", &n);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) scanf("%d", &a[i][j]);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) scanf("%d", &b[i][j]);
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n; j++) {
            unsigned short sum = 0;
            for (int k = 0; k < n; k++) sum += a[i][k] * b[k][j];
            printf("%d ", sum % 10007);
        }
        puts("");
    }
}
""",
)
