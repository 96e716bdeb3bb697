"""needles: how often a word stands in a text, overlaps counted."""

SIZES = (14, 4000)


def generate(size, rng):
    text = "a" * (size // 2) + "".join(rng.choices("ab", weights=(9, 1), k=size - size // 2))
    return f"{text}\n{'a' * max(1, size // 20)}\n"


SUBMISSIONS = [
    (
        "ada",
        "a part cut out at every place",
        r"""
#include <iostream>
#include <string>
using namespace std;

int main() {
    string text, word;
    cin >> text >> word;
    int count = 0;
    for (int i = 0; i + (int)word.size() <= (int)text.size(); i++)
        if (text.substr(i, word.size()) == word) count++;
    cout << count << endl;
}
""",
    ),
    (
        "cem",
        "letter by letter",
        r"""
#include <cstdio>
#include <cstring>

char text[1000001], word[1000001];

int main() {
    scanf("%1000000s %1000000s", text, word);
    int count = 0;
    for (int i = 0; i + strlen(word) <= strlen(text); i++) {
        int j = 0;
        while (j < strlen(word) && text[i + j] == word[j]) j++;
        if (j == strlen(word)) count++;
    }
    printf("%d\n", count);
}
""",
    ),
    (
        "ada",
        "find, again and again",
        r"""
#include <iostream>
#include <string>
using namespace std;

int main() {
    string text, word;
    cin >> text >> word;
    int count = 0;
    size_t at = text.find(word);
    while (at != string::npos) {
        count++;
        at = text.find(word, at + 1);
    }
    cout << count << endl;
}
""",
    ),
    (
        "cem",
        "Knuth, Morris and Pratt",
        r"""
#include <cstdio>
#include <cstring>

char text[1000001], word[1000001];
int border[1000001];

int main() {
    scanf("%1000000s %1000000s", text, word);
    int n = strlen(text), m = strlen(word), count = 0;
    for (int i = 1, k = 0; i < m; i++) {
        while (k && word[i] != word[k]) k = border[k - 1];
        if (word[i] == word[k]) k++;
        border[i] = k;
    }
    for (int i = 0, k = 0; i < n; i++) {
        while (k && (k == m || text[i] != word[k])) k = border[k - 1];
        if (text[i] == word[k]) k++;
        if (k == m) count++;
    }
    printf("%d\n", count);
}
""",
    ),
]
WRONG = (
    "overlaps are passed over",
    r"""
#include <iostream>
#include <string>
using namespace std;

int main() {
    string text, word;
    cin >> text >> word;
    int count = 0;
    size_t at = text.find(word);
    while (at != string::npos) {
        count++;
        at = text.find(word, at + word.size());
    }
    cout << count << endl;
}
""",
)
