"""brackets: the length of the longest balanced part of a text of brackets."""

SIZES = (10, 1000)


def generate(size, rng):
    return "".join(rng.choices("()", weights=(10, 10), k=size)) + "\n"


SUBMISSIONS = [
    (
        "cem",
        "every start, every end, counted anew",
        r"""
#include <cstring>
#include <iostream>
using namespace std;

char s[100001];

int main() {
    cin >> s;
    int best = 0;
    for (int i = 0; i < strlen(s); i++) {
        int depth = 0;
        for (int j = i; j < strlen(s); j++) {
            s[j] == '(' ? depth++ : depth--;
            if (depth < 0) break;
            if (depth == 0 && j - i + 1 > best) best = j - i + 1;
        }
    }
    cout << best << endl;
}
""",
    ),
    (
        "ada",
        "a table of where balanced parts end",
        r"""
#include <iostream>
#include <string>
#include <vector>
using namespace std;

int main() {
    string s;
    cin >> s;
    int n = s.size(), best = 0;
    vector<int> length(n + 1);
    for (int i = 1; i < n; i++) {
        if (s[i] != ')') continue;
        int open = i - length[i - 1] - 1;
        if (open < 0 || s[open] != '(') continue;
        length[i] = length[i - 1] + 2 + (open > 0 ? length[open - 1] : 0);
        best = max(best, length[i]);
    }
    cout << best << endl;
}
""",
    ),
    (
        "cem",
        "a stack",
        r"""
#include <iostream>
#include <stack>
#include <string>
using namespace std;

int main() {
    string s;
    cin >> s;
    stack<int> open;
    open.push(-1);
    int best = 0;
    for (int i = 0; i < (int)s.size(); i++) {
        if (s[i] == '(') {
            open.push(i);
            continue;
        }
        open.pop();
        if (open.empty()) open.push(i);
        else best = max(best, i - open.top());
    }
    cout << best << endl;
}
""",
    ),
    (
        "ada",
        "two counters, forth and back",
        r"""
#include <cstdio>
#include <cstring>

char s[1000001];

int main() {
    scanf("%1000000s", s);
    int n = strlen(s), best = 0;
    for (int way = 0; way < 2; way++) {
        int opened = 0, closed = 0;
        for (int i = 0; i < n; i++) {
            char c = way ? s[n - 1 - i] : s[i];
            if ((c == '(') != way) opened++;
            else closed++;
            if (opened == closed && 2 * closed > best) best = 2 * closed;
            if (closed > opened) opened = closed = 0;
        }
    }
    printf("%d\n", best);
}
""",
    ),
]
WRONG = (
    "gaps are passed over",
    r"""
#include <cstdio>

int main() {
    int depth = 0, pairs = 0;
    for (int c; (c = getchar()) != EOF && c > ' ';) {
        if (c == '(') depth++;
        else if (depth) depth--, pairs++;
    }
    printf("%d\n", 2 * pairs);
}
""",
)
