"""palindromes: how many substrings read the same from both ends."""

SIZES = (9, 300)


def generate(size, rng):
    return "".join(rng.choices("ab", k=size)) + "\n"


SUBMISSIONS = [
    (
        "ada",
        "every substring turned around",
        r"""
#include <algorithm>
#include <iostream>
#include <string>
using namespace std;

int main() {
    string s;
    cin >> s;
    int count = 0;
    for (int i = 0; i < (int)s.size(); i++) {
        for (int j = i + 1; j <= (int)s.size(); j++) {
            string part = s.substr(i, j - i);
            string turned = part;
            reverse(turned.begin(), turned.end());
            if (part == turned) count++;
        }
    }
    cout << count << endl;
}
""",
    ),
    (
        "ada",
        "from both ends to the middle",
        r"""
#include <iostream>
#include <string>
using namespace std;

bool palindrome(string s, int i, int j) {
    while (i < j)
        if (s[i++] != s[j--]) return false;
    return true;
}

int main() {
    string s;
    cin >> s;
    int count = 0;
    for (int i = 0; i < (int)s.size(); i++)
        for (int j = i; j < (int)s.size(); j++)
            if (palindrome(s, i, j)) count++;
    cout << count << endl;
}
""",
    ),
    (
        "cem",
        "a table of inner ones",
        r"""
#include <iostream>
#include <string>
#include <vector>
using namespace std;

int main() {
    string s;
    cin >> s;
    int n = s.size(), count = 0;
    vector<vector<bool>> good(n, vector<bool>(n));
    for (int i = n - 1; i >= 0; i--)
        for (int j = i; j < n; j++)
            if (s[i] == s[j] && (j - i < 2 || good[i + 1][j - 1])) {
                good[i][j] = true;
                count++;
            }
    cout << count << endl;
}
""",
    ),
    (
        "cem",
        "around every middle",
        r"""
#include <iostream>
#include <string>
using namespace std;

int main() {
    string s;
    cin >> s;
    int n = s.size(), count = 0;
    for (int middle = 0; middle < 2 * n; middle++) {
        int i = middle / 2, j = i + middle % 2;
        while (i >= 0 && j < n && s[i] == s[j]) {
            count++;
            i--;
            j++;
        }
    }
    cout << count << endl;
}
""",
    ),
]
WRONG = (
    "odd lengths only",
    r"""
#include <iostream>
#include <string>
using namespace std;

int main() {
    string s;
    cin >> s;
    int n = s.size(), count = 0;
    for (int middle = 0; middle < n; middle++)
        for (int d = 0; middle - d >= 0 && middle + d < n && s[middle - d] == s[middle + d]; d++) count++;
    cout << count << endl;
}
""",
)
