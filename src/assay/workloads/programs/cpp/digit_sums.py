"""digit_sums: the sum of the digits of each of many numbers, one a line."""

SIZES = (6, 3000)


def generate(size, rng):
    return f"{size}\n" + "".join(f"{rng.randint(0, 10**9)}\n" for _ in range(size))


SUBMISSIONS = [
    (
        "ben",
        "by way of a stream of text",
        r"""
#include <iostream>
#include <sstream>
#include <string>
using namespace std;

int main() {
    int n;
    cin >> n;
    for (int i = 0; i < n; i++) {
        int x;
        cin >> x;
        stringstream stream;
        stream << x;
        string digits = stream.str();
        int sum = 0;
        for (int j = 0; j < (int)digits.length(); j++) sum += digits[j] - '0';
        cout << sum << endl;
    }
}
""",
    ),
    (
        "ada",
        "by remainders",
        r"""
#include <iostream>
using namespace std;

int main() {
    int n;
    cin >> n;
    for (int i = 0; i < n; i++) {
        int x, sum = 0;
        cin >> x;
        while (x > 0) {
            sum += x % 10;
            x /= 10;
        }
        cout << sum << endl;
    }
}
""",
    ),
    (
        "ben",
        "by to_string",
        r"""
#include <iostream>
#include <string>
using namespace std;

int main() {
    int n;
    cin >> n;
    for (int i = 0; i < n; i++) {
        int x;
        cin >> x;
        int sum = 0;
        for (char c : to_string(x)) sum += c - '0';
        cout << sum << "\n";
    }
}
""",
    ),
    (
        "ada",
        "digits while they are read",
        r"""
#include <cstdio>

int main() {
    int n, c;
    scanf("%d", &n);
    while ((c = getchar_unlocked()) != '\n') {}
    while (n--) {
        int sum = 0;
        while ((c = getchar_unlocked()) >= '0') sum += c - '0';
        printf("%d\n", sum);
    }
}
""",
    ),
]
WRONG = (
    "the last digit is forgotten",
    r"""
#include <iostream>
using namespace std;

int main() {
    int n;
    cin >> n;
    for (int i = 0; i < n; i++) {
        int x, sum = 0;
        cin >> x;
        while (x >= 10) {
            sum += x % 10;
            x /= 10;
        }
        cout << sum << endl;
    }
}
""",
)
