"""HumanEval/114 minSubArraySum: the least sum of a run of neighbours."""

# %% task
SIZES = (8, 300, 1_200, 4_000)  # numbers
COMPARE = "same"


def generate(size, rng):
    """Numbers of both signs; at small sizes also of one sign only."""
    low, high = (-100, 100)
    if size < 20:
        low, high = rng.choice((*[(-100, 100)] * 4, (1, 100), (-100, -1)))
    return ([rng.randint(low, high) for _ in range(size)],)


def contract(nums):
    assert isinstance(nums, list)
    assert len(nums) > 0
    assert all(type(number) is int for number in nums)


# %% expert: least sum of a run that ends here, O(n)
def minSubArraySum(nums):
    best = ending = nums[0]
    for number in nums[1:]:
        if ending < 0:
            ending += number
        else:
            ending = number
        if ending < best:
            best = ending
    return best


# %% accumulate with min, O(n)
from itertools import accumulate


def minSubArraySum(nums):
    return min(accumulate(nums, lambda ending, number: min(ending + number, number)))


# %% prefix sums less the highest before, O(n)
def minSubArraySum(nums):
    total, highest, least = 0, 0, None
    for number in nums:
        total += number
        least = total - highest if least is None else min(least, total - highest)
        highest = max(highest, total)
    return least


# %% two arrays of prefix sums and their maxima, O(n)
from itertools import accumulate
from operator import sub


def minSubArraySum(nums):
    sums = list(accumulate(nums, initial=0))
    highest = accumulate(sums, max)
    return min(map(sub, sums[1:], highest))


# %% all runs from each beginning, quadratic
def minSubArraySum(nums):
    least = nums[0]
    for start in range(len(nums)):
        total = 0
        for end in range(start, len(nums)):
            total += nums[end]
            if total < least:
                least = total
    return least


# %% all runs from each beginning by accumulate, quadratic
from itertools import accumulate


def minSubArraySum(nums):
    return min(min(accumulate(nums[start:])) for start in range(len(nums)))


# %% halves and the runs across the middle, O(n log n)
def minSubArraySum(nums):
    def least(low, high):
        if low == high:
            return nums[low]
        middle = (low + high) // 2
        left = right = None
        total = 0
        for i in range(middle, low - 1, -1):
            total += nums[i]
            left = total if left is None else min(left, total)
        total = 0
        for i in range(middle + 1, high + 1):
            total += nums[i]
            right = total if right is None else min(right, total)
        return min(least(low, middle), least(middle + 1, high), left + right)

    return least(0, len(nums) - 1)


# %% segments joined: total, best beginning, best end, best, O(n)
def minSubArraySum(nums):
    segments = [(number, number, number, number) for number in nums]
    while len(segments) > 1:
        joined = []
        for i in range(0, len(segments) - 1, 2):
            (sum1, head1, tail1, best1), (sum2, head2, tail2, best2) = segments[i], segments[i + 1]
            joined.append(
                (sum1 + sum2, min(head1, sum1 + head2), min(tail2, tail1 + sum2), min(best1, best2, tail1 + head2))
            )
        if len(segments) % 2:
            joined.append(segments[-1])
        segments = joined
    return segments[0][3]


# %% a table of the least sums that end at each place, O(n)
def minSubArraySum(nums):
    table = [0] * len(nums)
    table[0] = nums[0]
    for i in range(1, len(nums)):
        table[i] = min(nums[i], table[i - 1] + nums[i])
    return min(table)


# %% wrong: the empty run counts
def minSubArraySum(nums):
    best = ending = 0
    for number in nums:
        ending = min(0, ending + number)
        best = min(best, ending)
    return best


# %% wrong: the sum of all negative numbers
def minSubArraySum(nums):
    negative = [number for number in nums if number < 0]
    return sum(negative) if negative else min(nums)
