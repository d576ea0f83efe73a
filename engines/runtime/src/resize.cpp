#include "resize.h"

#include <algorithm>
#include <cmath>

namespace skipvision {
namespace {

constexpr int kPrecision = 32 - 8 - 2;

/// Keys' cubic with a = -0.5.
double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

/// The input pixels that make one output pixel, and their weights in fixed point.
struct Window {
  int first = 0;
  std::vector<int> weights;
};

std::vector<Window> windows(int from, int to) {
  double scale = static_cast<double>(from) / to;
  double shrink = std::max(scale, 1.0);
  double support = 2 * shrink;
  std::vector<Window> all(to);
  std::vector<double> exact;
  for (int i = 0; i < to; ++i) {
    double center = (i + 0.5) * scale;
    int first = std::max(static_cast<int>(center - support + 0.5), 0);
    int last = std::min(static_cast<int>(center + support + 0.5), from);
    exact.clear();
    double sum = 0;
    for (int x = first; x < last; ++x) {
      exact.push_back(bicubic((x - center + 0.5) * (1 / shrink)));
      sum += exact.back();
    }
    all[i].first = first;
    for (double weight : exact) {
      if (sum != 0) weight *= 1 / sum;
      double fixed = weight * (1 << kPrecision);
      all[i].weights.push_back(static_cast<int>(fixed < 0 ? fixed - 0.5 : fixed + 0.5));
    }
  }
  return all;
}

/// Resamples `lines` lines of pixels; strides in bytes.
void resample(const std::uint8_t* in, std::ptrdiff_t in_pixel, std::ptrdiff_t in_line,
              std::uint8_t* out, std::ptrdiff_t out_pixel, std::ptrdiff_t out_line, int lines,
              const std::vector<Window>& all) {
  for (int line = 0; line < lines; ++line) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      const std::uint8_t* pixel = in + line * in_line + all[i].first * in_pixel;
      int sums[3] = {1 << (kPrecision - 1), 1 << (kPrecision - 1), 1 << (kPrecision - 1)};
      for (int weight : all[i].weights) {
        for (int c = 0; c < 3; ++c) sums[c] += pixel[c] * weight;
        pixel += in_pixel;
      }
      std::uint8_t* target = out + line * out_line + static_cast<std::ptrdiff_t>(i) * out_pixel;
      for (int c = 0; c < 3; ++c)
        target[c] = static_cast<std::uint8_t>(std::clamp(sums[c] >> kPrecision, 0, 255));
    }
  }
}

Picture blank(int width, int height) {
  return {width, height, std::vector<std::uint8_t>(std::size_t{3} * width * height)};
}

Picture resize_width(const Picture& picture, int width) {
  if (width == picture.width) return picture;
  Picture result = blank(width, picture.height);
  resample(picture.rgb.data(), 3, std::ptrdiff_t{3} * picture.width, result.rgb.data(), 3,
           std::ptrdiff_t{3} * width, picture.height, windows(picture.width, width));
  return result;
}

Picture resize_height(const Picture& picture, int height) {
  if (height == picture.height) return picture;
  Picture result = blank(picture.width, height);
  std::ptrdiff_t row = std::ptrdiff_t{3} * picture.width;
  resample(picture.rgb.data(), row, 3, result.rgb.data(), row, 3, picture.width,
           windows(picture.height, height));
  return result;
}

}  // namespace

Picture resize_bicubic(const Picture& picture, int width, int height) {
  int shorter = picture.height - height, narrower = picture.width - width;
  // Pillow's order, which shows where values are rounded between the passes.
  bool height_first = shorter > 0 && shorter > std::int64_t{2} * narrower;
  return height_first ? resize_width(resize_height(picture, height), width)
                      : resize_height(resize_width(picture, width), height);
}

}  // namespace skipvision
