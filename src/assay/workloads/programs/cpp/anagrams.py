"""anagrams: how many groups of words with the same letters there are."""

SIZES = (8, 500)


def generate(size, rng):
    words = ["".join(rng.choices("abcd", k=rng.randint(1, 3 if size < 10 else 7))) for _ in range(size)]
    return f"{size}\n" + "\n".join(words) + "\n"


SUBMISSIONS = [
    (
        "cem",
        "letters sorted at every comparison",
        r"""
#include <algorithm>
#include <iostream>
#include <string>
#include <vector>
using namespace std;

bool alike(string a, string b) {
    if (a.size() != b.size()) return false;
    sort(a.begin(), a.end());
    sort(b.begin(), b.end());
    return a == b;
}

int main() {
    int n;
    cin >> n;
    vector<string> firsts;
    for (int i = 0; i < n; i++) {
        string word;
        cin >> word;
        bool found = false;
        for (int j = 0; j < (int)firsts.size() && !found; j++) found = alike(firsts[j], word);
        if (!found) firsts.push_back(word);
    }
    cout << firsts.size() << endl;
}
""",
    ),
    (
        "cem",
        "sorted once, then searched",
        r"""
#include <algorithm>
#include <iostream>
#include <string>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<string> keys;
    for (int i = 0; i < n; i++) {
        string word;
        cin >> word;
        sort(word.begin(), word.end());
        if (find(keys.begin(), keys.end(), word) == keys.end()) keys.push_back(word);
    }
    cout << keys.size() << endl;
}
""",
    ),
    (
        "ben",
        "a set of sorted words",
        r"""
#include <algorithm>
#include <iostream>
#include <set>
#include <string>
using namespace std;

int main() {
    int n;
    cin >> n;
    set<string> keys;
    while (n--) {
        string word;
        cin >> word;
        sort(word.begin(), word.end());
        keys.insert(word);
    }
    cout << keys.size() << endl;
}
""",
    ),
    (
        "ben",
        "a map of counts of letters, which is slower",
        r"""
#include <iostream>
#include <map>
#include <set>
#include <string>
using namespace std;

int main() {
    int n;
    cin >> n;
    set<map<char, int>> keys;
    while (n--) {
        string word;
        cin >> word;
        map<char, int> counts;
        for (char c : word) counts[c]++;
        keys.insert(counts);
    }
    cout << keys.size() << endl;
}
""",
    ),
]
WRONG = (
    "sets of letters",
    r"""
#include <iostream>
#include <set>
#include <string>
using namespace std;

int main() {
    int n;
    cin >> n;
    set<set<char>> keys;
    while (n--) {
        string word;
        cin >> word;
        keys.insert(set<char>(word.begin(), word.end()));
    }
    cout << keys.size() << endl;
}
""",
)
