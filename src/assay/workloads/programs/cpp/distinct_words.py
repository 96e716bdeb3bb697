"""distinct_words: how many different words there are."""

SIZES = (9, 800)


def generate(size, rng):
    words = ["".join(rng.choices("abcde", k=rng.randint(1, 2 if size < 10 else 6))) for _ in range(size)]
    return f"{size}\n" + "\n".join(words) + "\n"


SUBMISSIONS = [
    (
        "ada",
        "a vector that is searched",
        r"""
#include <iostream>
#include <string>
#include <vector>
using namespace std;

bool contains(vector<string> words, string word) {
    for (string w : words)
        if (w == word) return true;
    return false;
}

int main() {
    int n;
    cin >> n;
    vector<string> words;
    for (int i = 0; i < n; i++) {
        string word;
        cin >> word;
        if (!contains(words, word)) words.push_back(word);
    }
    cout << words.size() << endl;
}
""",
    ),
    (
        "cem",
        "sorted, neighbours compared",
        r"""
#include <algorithm>
#include <iostream>
#include <string>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<string> words(n);
    for (int i = 0; i < n; i++) cin >> words[i];
    sort(words.begin(), words.end());
    int count = 0;
    for (int i = 0; i < n; i++)
        if (i == 0 || words[i] != words[i - 1]) count++;
    cout << count << endl;
}
""",
    ),
    (
        "ada",
        "a set",
        r"""
#include <iostream>
#include <set>
#include <string>
using namespace std;

int main() {
    int n;
    cin >> n;
    set<string> words;
    for (int i = 0; i < n; i++) {
        string word;
        cin >> word;
        words.insert(word);
    }
    cout << words.size() << endl;
}
""",
    ),
    (
        "ada",
        "a hash set",
        r"""
#include <iostream>
#include <string>
#include <unordered_set>
using namespace std;

int main() {
    ios_base::sync_with_stdio(false);
    cin.tie(NULL);
    int n;
    cin >> n;
    unordered_set<string> words;
    words.reserve(2 * n);
    string word;
    while (n--) {
        cin >> word;
        words.insert(word);
    }
    cout << words.size() << "\n";
}
""",
    ),
]
WRONG = (
    "neighbours that are alike, unsorted",
    r"""
#include <iostream>
#include <string>
using namespace std;

int main() {
    int n;
    cin >> n;
    string before, word;
    int count = 0;
    while (n--) {
        cin >> word;
        if (word != before) count++;
        before = word;
    }
    cout << count << endl;
}
""",
)
