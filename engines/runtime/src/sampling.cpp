#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace skipvision {

Sampler::Sampler(const GenerateOptions& options)
    : temperature_(options.temperature),
      top_k_(static_cast<std::size_t>(std::max(options.top_k, 0))),
      top_p_(options.top_p),
      random_(options.seed) {
  if (!(options.temperature >= 0) || !std::isfinite(options.temperature))
    throw Error("temperature is " + std::to_string(options.temperature) +
                ", expected 0 (greedy) or more");
  if (options.top_k < 0)
    throw Error("top_k is " + std::to_string(options.top_k) + ", expected 0 (all) or more");
  if (!(options.top_p > 0 && options.top_p <= 1))
    throw Error("top_p is " + std::to_string(options.top_p) + ", expected over 0 and at most 1");
}

std::int64_t Sampler::operator()(Logits logits) {
  auto likeliest = std::max_element(logits.begin(), logits.end());
  if (temperature_ == 0) return likeliest - logits.begin();
  std::vector<std::int64_t> order(logits.size);
  std::iota(order.begin(), order.end(), 0);
  auto likelier = [&](std::int64_t a, std::int64_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  std::size_t kept = top_k_ == 0 ? order.size() : std::min(top_k_, order.size());
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(),
                    likelier);
  order.resize(kept);
  std::vector<double> weights;
  for (std::int64_t i : order)
    weights.push_back(std::exp((static_cast<double>(logits[i]) - *likeliest) / temperature_));
  double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  if (top_p_ < 1) {
    double reached = 0;
    std::size_t count = 0;
    while (count < kept && reached < top_p_ * total) reached += weights[count++];
    weights.resize(count);
    total = reached;
  }
  // Not std::discrete_distribution, whose results the standard leaves open: 53 random bits.
  double point = static_cast<double>(random_() >> 11) * 0x1p-53 * total;
  std::size_t chosen = 0;
  while (chosen + 1 < weights.size() && point >= weights[chosen]) point -= weights[chosen++];
  return order[chosen];
}

}  // namespace skipvision
