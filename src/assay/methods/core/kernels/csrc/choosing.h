// Choosing a token from a row of logits, with memory that is kept from one choice to the next.

#pragma once
#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "panels.h"

namespace {

struct Choice {
  double temperature = 0;  // 0: the largest logit
  int64_t top_k = 0;       // 0: all
  double top_p = 1;        // 1: all
};

class Chooser {
 public:
  // So that nothing is allocated later.
  void reserve(int64_t vocabulary) {
    best_.reserve(vocabulary);
    weight_.reserve(vocabulary + 16);
    index_.reserve(vocabulary);
  }

  // Temperature, then top-k, then top-p, as transformers orders them; of what is left, the token where the cumulative
  // probability in index order passes u (0 <= u < 1).
  int64_t draw(const float* logits, int64_t n, const Choice& choice, double u) {
    constexpr float lowest = -std::numeric_limits<float>::infinity();
    float cut = lowest;
    best_.clear();
    if (choice.top_k > 0 && choice.top_k < n) {
      best_.resize(choice.top_k);
      std::partial_sort_copy(logits, logits + n, best_.begin(), best_.end(), std::greater<float>());
      cut = best_.back();
    }
    const float top = best_.empty() ? *std::max_element(logits, logits + n) : best_.front();
    const v16f inverse = splat(static_cast<float>(1.0 / choice.temperature));
    index_.clear();
    weight_.clear();
    if (cut > lowest) {
      for (int64_t i = 0; i < n; ++i)
        if (logits[i] >= cut) index_.push_back(static_cast<int32_t>(i)), weight_.push_back(logits[i]);
    } else {
      weight_.assign(logits, logits + n);
    }
    const int64_t kept = weight_.size();
    weight_.resize((kept + 15) / 16 * 16, lowest);
    for (size_t i = 0; i < weight_.size(); i += 16)
      store(&weight_[i], vexp((load<v16f>(&weight_[i]) - splat(top)) * inverse));
    double total = 0;
    for (int64_t i = 0; i < kept; ++i) total += weight_[i];
    if (choice.top_p < 1.0) total = cut_tail(kept, choice.top_p * total);
    double left = u * total;
    int64_t last = 0;
    for (int64_t i = 0; i < kept; ++i) {
      if (weight_[i] == 0) continue;
      last = i;
      left -= weight_[i];
      if (left < 0) break;
    }
    return index_.empty() ? last : index_[last];
  }

 private:
  std::vector<float> best_, weight_;
  std::vector<int32_t> index_;

  // Drop the weights after those that together reach `wanted`, the largest first; what is left in all.
  double cut_tail(int64_t kept, double wanted) {
    float smallest = 0;
    for (int64_t m = std::min<int64_t>(kept, 64);; m = std::min<int64_t>(kept, m * 16)) {
      best_.resize(m);
      std::partial_sort_copy(weight_.begin(), weight_.begin() + kept, best_.begin(), best_.end(), std::greater<float>());
      double before = 0;
      int64_t i = 0;
      for (; i < m && (i == 0 || before < wanted); ++i) before += best_[i];
      smallest = best_[i - 1];
      if (i < m || m == kept) break;
    }
    double total = 0;
    for (int64_t i = 0; i < kept; ++i) {
      if (weight_[i] < smallest) weight_[i] = 0;
      total += weight_[i];
    }
    return total;
  }
};

}  // namespace
