"""backwards: the lines of a text from the last to the first, each turned around."""

SIZES = (5, 400)


def generate(size, rng):
    lines = ["".join(rng.choices("abcdefgh ", k=rng.randint(1, 30))).strip() or "x" for _ in range(size)]
    return f"{size}\n" + "\n".join(lines) + "\n"


SUBMISSIONS = [
    (
        "ada",
        "a text that grows at its front",
        r"""
#include <iostream>
#include <string>
using namespace std;

int main() {
    int n;
    cin >> n;
    string line;
    getline(cin, line);
    string all = "";
    for (int i = 0; i < n; i++) {
        getline(cin, line);
        string turned = "";
        for (int j = 0; j < (int)line.length(); j++) turned = line[j] + turned;
        all = turned + "\n" + all;
    }
    cout << all;
}
""",
    ),
    (
        "ada",
        "lines in a vector",
        r"""
#include <iostream>
#include <string>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    string line;
    getline(cin, line);
    vector<string> lines;
    for (int i = 0; i < n; i++) {
        getline(cin, line);
        string turned = "";
        for (int j = (int)line.length() - 1; j >= 0; j--) turned = turned + line[j];
        lines.push_back(turned);
    }
    for (int i = n - 1; i >= 0; i--) cout << lines[i] << endl;
}
""",
    ),
    (
        "ben",
        "put at the front of a vector",
        r"""
#include <algorithm>
#include <iostream>
#include <string>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    cin.ignore();
    vector<string> lines;
    for (int i = 0; i < n; i++) {
        string line;
        getline(cin, line);
        reverse(line.begin(), line.end());
        lines.insert(lines.begin(), line);
    }
    for (auto line : lines) cout << line << endl;
}
""",
    ),
    (
        "ben",
        "the whole text turned around",
        r"""
#include <cstdio>

static char text[1 << 22];

int main() {
    int n;
    scanf("%d\n", &n);
    int length = fread(text, 1, sizeof text, stdin);
    if (length && text[length - 1] == '\n') length--;
    while (length--) putchar_unlocked(text[length]);
    putchar('\n');
}
""",
    ),
]
WRONG = (
    "the lines stay in their order",
    r"""
#include <algorithm>
#include <iostream>
#include <string>
using namespace std;

int main() {
    int n;
    cin >> n;
    cin.ignore();
    while (n--) {
        string line;
        getline(cin, line);
        reverse(line.begin(), line.end());
        cout << line << "\n";
    }
}
""",
)
