"""top_word: the word that stands there most often, the first by letters among equals, and how often."""

SIZES = (12, 2000)


def generate(size, rng):
    known = ["".join(rng.choices("pqrst", k=rng.randint(1, 7))) for _ in range(max(2, size // 4))]
    return f"{size}\n" + "\n".join(rng.choice(known) for _ in range(size)) + "\n"


SUBMISSIONS = [
    (
        "ben",
        "each word is counted anew",
        r"""
#include <iostream>
#include <string>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    vector<string> words(n);
    for (int i = 0; i < n; i++) cin >> words[i];
    string best;
    int most = 0;
    for (int i = 0; i < n; i++) {
        int count = 0;
        for (int j = 0; j < n; j++)
            if (words[i] == words[j]) count++;
        if (count > most || (count == most && words[i] < best)) {
            most = count;
            best = words[i];
        }
    }
    cout << best << " " << most << endl;
}
""",
    ),
    (
        "ben",
        "a map",
        r"""
#include <iostream>
#include <map>
#include <string>
using namespace std;

int main() {
    int n;
    cin >> n;
    map<string, int> counts;
    for (int i = 0; i < n; i++) {
        string word;
        cin >> word;
        counts[word]++;
    }
    string best;
    int most = 0;
    for (auto entry : counts) {
        if (entry.second > most) {
            most = entry.second;
            best = entry.first;
        }
    }
    cout << best << " " << most << endl;
}
""",
    ),
    (
        "cem",
        "sorted, runs counted",
        r"""
#include <algorithm>
#include <iostream>
#include <string>
#include <vector>
using namespace std;

int main() {
    ios::sync_with_stdio(false);
    int n;
    cin >> n;
    vector<string> words(n);
    for (auto& word : words) cin >> word;
    sort(words.begin(), words.end());
    int best = 0, most = 0;
    for (int i = 0; i < n;) {
        int j = i;
        while (j < n && words[j] == words[i]) j++;
        if (j - i > most) most = j - i, best = i;
        i = j;
    }
    cout << words[best] << ' ' << most << '\n';
}
""",
    ),
    (
        "ben",
        "a hash map",
        r"""
#include <iostream>
#include <string>
#include <unordered_map>
using namespace std;

int main() {
    ios::sync_with_stdio(false);
    cin.tie(nullptr);
    int n;
    cin >> n;
    unordered_map<string, int> counts;
    string word, best;
    while (n--) {
        cin >> word;
        counts[word]++;
    }
    int most = 0;
    for (const auto& [name, count] : counts)
        if (count > most || (count == most && name < best)) most = count, best = name;
    cout << best << ' ' << most << '\n';
}
""",
    ),
]
WRONG = (
    "the first among equals by place",
    r"""
#include <iostream>
#include <map>
#include <string>
#include <vector>
using namespace std;

int main() {
    int n;
    cin >> n;
    map<string, int> counts;
    vector<string> words(n);
    for (auto& word : words) {
        cin >> word;
        counts[word]++;
    }
    string best;
    int most = 0;
    for (auto& word : words)
        if (counts[word] > most) most = counts[word], best = word;
    cout << best << " " << most << endl;
}
""",
)
