"""Tasks in plain JavaScript, without a library and without maps: what a model can do of the language itself."""

from __future__ import annotations

from assay.workloads.programs.geospatial.task import array, boolean, number, object_, string, task

TASKS = (
    task(
        "sum", "none", "function sum(numbers)", "Return the sum of a list of numbers.",
        "return numbers.reduce((sum, x) => sum + x, 0);",
        number(6, numbers=[1, 2, 3]), number(0, numbers=[]), number(-1.5, numbers=[-2, 0.5]),
    ),
    task(
        "largest", "none", "function largest(numbers)", "Return the largest number of a list.",
        "return Math.max(...numbers);",
        number(9, numbers=[3, 9, 2]), number(-1, numbers=[-5, -1, -7]),
    ),
    task(
        "reversed", "none", "function reversed(text)", "Return a text with its letters in the opposite order.",
        "return text.split('').reverse().join('');",
        string("cba", text="abc"), string("", text=""), string("xx y", text="y xx"),
    ),
    task(
        "vowels", "none", "function vowels(text)", "Return how many vowels (a, e, i, o, u) a text in small letters has.",
        "return [...text].filter((letter) => 'aeiou'.includes(letter)).length;",
        number(3, text="banana"), number(0, text="rhythm"), number(5, text="education"),
    ),
    task(
        "even", "none", "function evenOnes(numbers)", "Return the even numbers of a list, in their order.",
        "return numbers.filter((x) => x % 2 === 0);",
        array([2, 4], numbers=[1, 2, 3, 4]), array([], numbers=[5]), array([0, -2], numbers=[0, -2, 7]),
    ),
    task(
        "factorial", "none", "function factorial(n)", "Return n factorial.",
        "let found = 1;\nfor (let k = 2; k <= n; k++) found *= k;\nreturn found;",
        number(120, n=5), number(1, n=0), number(3628800, n=10),
    ),
    task(
        "palindrome", "none", "function isPalindrome(text)", "Tell whether a text is the same read backwards.",
        "return text === [...text].reverse().join('');",
        boolean(True, text="level"), boolean(False, text="levels"), boolean(True, text=""),
    ),
    task(
        "prime", "none", "function isPrime(n)", "Tell whether a whole number is prime.",
        "if (n < 2) return false;\nfor (let k = 2; k * k <= n; k++) if (n % k === 0) return false;\nreturn true;",
        boolean(True, n=13), boolean(False, n=1), boolean(False, n=49), boolean(True, n=2),
    ),
    task(
        "mean", "none", "function mean(numbers)", "Return the mean of a list of numbers.",
        "return numbers.reduce((sum, x) => sum + x, 0) / numbers.length;",
        number(2, numbers=[1, 2, 3]), number(0.25, numbers=[0, 0.5]),
    ),
    task(
        "unique", "none", "function unique(items)", "Return the items of a list, each once, in the order of their first occurrence.",
        "return [...new Set(items)];",
        array([3, 1, 2], items=[3, 1, 3, 2, 1]), array([], items=[]),
    ),
    task(
        "words", "none", "function countWords(text)", "Return how many words, separated by single spaces, a text has.",
        "return text.split(' ').length;",
        number(3, text="one two three"), number(1, text="word"),
    ),
    task(
        "squares", "none", "function squares(n)", "Return the squares of 1 to n as a list.",
        "return Array.from({ length: n }, (_, k) => (k + 1) ** 2);",
        array([1, 4, 9], n=3), array([1], n=1),
    ),
    task(
        "counts", "none", "function counts(text)", "Return an object with how often each letter of a text occurs.",
        "const found = {};\nfor (const letter of text) found[letter] = (found[letter] ?? 0) + 1;\nreturn found;",
        object_({"a": 3, "b": 1, "n": 2}, text="banana"), object_({}, text=""),
    ),
    task(
        "capital", "none", "function capitalised(text)", "Return a text with its first letter as a capital.",
        "return text.charAt(0).toUpperCase() + text.slice(1);",
        string("Berlin", text="berlin"), string("A", text="a"),
    ),
    task(
        "gcd", "none", "function gcd(a, b)", "Return the greatest common divisor of two whole numbers above 0.",
        "return b === 0 ? a : gcd(b, a % b);",
        number(6, a=12, b=18), number(1, a=7, b=9), number(5, a=5, b=5),
    ),
    task(
        "sorted", "none", "function ascending(numbers)", "Return a new list with numbers from the smallest to the largest.",
        "return [...numbers].sort((a, b) => a - b);",
        array([1, 5, 10], numbers=[10, 1, 5]), array([-3, 2, 100], numbers=[100, -3, 2]),
    ),
    task(
        "fibonacci", "none", "function fibonacci(n)", "Return the n-th Fibonacci number; the first two are 0 and 1, n begins at 0.",
        "let [a, b] = [0, 1];\nfor (let k = 0; k < n; k++) [a, b] = [b, a + b];\nreturn a;",
        number(0, n=0), number(1, n=1), number(55, n=10),
    ),
    task(
        "longest", "none", "function longest(words)", "Return the longest word of a list; of several the first.",
        "return words.reduce((best, word) => (word.length > best.length ? word : best));",
        string("three", words=["one", "three", "seven"]), string("a", words=["a", "b"]),
    ),
    task(
        "celsius", "none", "function celsius(fahrenheit)", "Return a temperature in degrees Fahrenheit in degrees Celsius.",
        "return ((fahrenheit - 32) * 5) / 9;",
        number(0, fahrenheit=32), number(100, fahrenheit=212),
    ),
    task(
        "zip", "none", "function pairs(a, b)", "Return a list of pairs [x, y] of the items of two lists of the same length.",
        "return a.map((x, n) => [x, b[n]]);",
        array([[1, "a"], [2, "b"]], a=[1, 2], b=["a", "b"]), array([], a=[], b=[]),
    ),
)  # fmt: skip
