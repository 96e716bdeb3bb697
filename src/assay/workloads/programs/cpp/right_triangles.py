"""right_triangles: how many right triangles have whole sides of at most n."""

SIZES = (30, 250)


def generate(size, rng):
    return f"{size}\n"


SUBMISSIONS = [
    (
        "ben",
        "three loops",
        r"""
#include <iostream>
using namespace std;

int main() {
    int n;
    cin >> n;
    int count = 0;
    for (int a = 1; a <= n; a++)
        for (int b = a; b <= n; b++)
            for (int c = b; c <= n; c++)
                if (a * a + b * b == c * c) count++;
    cout << count << endl;
}
""",
    ),
    (
        "ben",
        "the root of the sum",
        r"""
#include <cmath>
#include <iostream>
using namespace std;

int main() {
    int n;
    cin >> n;
    int count = 0;
    for (int a = 1; a <= n; a++) {
        for (int b = a; b <= n; b++) {
            int c = sqrt(pow(a, 2) + pow(b, 2));
            if (c <= n && c * c == a * a + b * b) count++;
        }
    }
    cout << count << endl;
}
""",
    ),
    (
        "cem",
        "a set of squares",
        r"""
#include <iostream>
#include <set>
using namespace std;

int main() {
    int n;
    cin >> n;
    set<int> squares;
    for (int c = 1; c <= n; c++) squares.insert(c * c);
    int count = 0;
    for (int a = 1; a <= n; a++)
        for (int b = a; b <= n; b++)
            if (squares.find(a * a + b * b) != squares.end()) count++;
    cout << count << endl;
}
""",
    ),
    (
        "cem",
        "the third side grows with the second",
        r"""
#include <cstdio>

int main() {
    int n, count = 0;
    scanf("%d", &n);
    for (int a = 1; a <= n; a++) {
        int c = a;
        for (int b = a; b <= n; b++) {
            int sum = a * a + b * b;
            while (c * c < sum) c++;
            if (c > n) break;
            if (c * c == sum) count++;
        }
    }
    printf("%d\n", count);
}
""",
    ),
]
WRONG = (
    "each counted twice",
    r"""
#include <cstdio>

int main() {
    int n, count = 0;
    scanf("%d", &n);
    for (int a = 1; a <= n; a++)
        for (int b = 1; b <= n; b++)
            for (int c = 1; c <= n; c++) count += a * a + b * b == c * c;
    printf("%d\n", count);
}
""",
)
