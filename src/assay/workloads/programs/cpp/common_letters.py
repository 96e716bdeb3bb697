"""common_letters: the length of the longest common subsequence of two words."""

SIZES = (9, 150)


def generate(size, rng):
    return "".join(rng.choices("acgt", k=size)) + "\n" + "".join(rng.choices("acgt", k=max(1, size - 1))) + "\n"


SUBMISSIONS = [
    (
        "ada",
        "recursion with a map",
        r"""
#include <iostream>
#include <map>
#include <string>
using namespace std;

string s, t;
map<pair<int, int>, int> known;

int longest(int i, int j) {
    if (i == (int)s.size() || j == (int)t.size()) return 0;
    if (known.count({i, j})) return known[{i, j}];
    int found;
    if (s[i] == t[j]) found = 1 + longest(i + 1, j + 1);
    else found = max(longest(i + 1, j), longest(i, j + 1));
    return known[{i, j}] = found;
}

int main() {
    cin >> s >> t;
    cout << longest(0, 0) << endl;
}
""",
    ),
    (
        "ada",
        "a table",
        r"""
#include <iostream>
#include <string>
#include <vector>
using namespace std;

int main() {
    string s, t;
    cin >> s >> t;
    vector<vector<int>> best(s.size() + 1, vector<int>(t.size() + 1, 0));
    for (size_t i = 1; i <= s.size(); i++) {
        for (size_t j = 1; j <= t.size(); j++) {
            if (s[i - 1] == t[j - 1]) best[i][j] = best[i - 1][j - 1] + 1;
            else best[i][j] = max(best[i - 1][j], best[i][j - 1]);
        }
    }
    cout << best[s.size()][t.size()] << endl;
}
""",
    ),
    (
        "cem",
        "a fixed table",
        r"""
#include <algorithm>
#include <iostream>
#include <string>
using namespace std;

int best[2001][2001];

int main() {
    string s, t;
    cin >> s >> t;
    int n = s.size(), m = t.size();
    for (int j = 1; j <= m; j++)
        for (int i = 1; i <= n; i++)
            best[i][j] = s[i - 1] == t[j - 1] ? best[i - 1][j - 1] + 1 : max(best[i - 1][j], best[i][j - 1]);
    cout << best[n][m] << endl;
}
""",
    ),
    (
        "cem",
        "bits of a row at once",
        r"""
#include <cstdio>
#include <cstring>
#include <vector>
using namespace std;

char s[2002], t[2002];

int main() {
    scanf("%2000s %2000s", s, t);
    int n = strlen(s), words = (n + 63) / 64;
    vector<vector<unsigned long long>> where(128, vector<unsigned long long>(words));
    for (int i = 0; i < n; i++) where[(int)s[i]][i / 64] |= 1ULL << (i % 64);
    vector<unsigned long long> row(words);
    for (int j = 0; t[j]; j++) {
        unsigned long long carry = 1, borrow = 0;
        for (int w = 0; w < words; w++) {
            unsigned long long x = row[w] | where[(int)t[j]][w];
            unsigned long long shifted = row[w] << 1 | carry;
            carry = row[w] >> 63;
            unsigned long long less = x - shifted, lent = x < shifted;
            unsigned long long last = less - borrow;
            lent |= less < borrow;
            borrow = lent;
            row[w] = x & ~last;
        }
    }
    int count = 0;
    for (auto word : row) count += __builtin_popcountll(word);
    printf("%d\n", count);
}
""",
    ),
]
WRONG = (
    "the longest common word",
    r"""
#include <algorithm>
#include <iostream>
#include <string>
using namespace std;

int same[2001][2001];

int main() {
    string s, t;
    cin >> s >> t;
    int best = 0;
    for (size_t i = 1; i <= s.size(); i++)
        for (size_t j = 1; j <= t.size(); j++) {
            same[i][j] = s[i - 1] == t[j - 1] ? same[i - 1][j - 1] + 1 : 0;
            best = max(best, same[i][j]);
        }
    cout << best << endl;
}
""",
)
