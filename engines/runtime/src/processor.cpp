#include "processor.h"

#include <algorithm>

#include "resize.h"

namespace skipvision {
namespace {

constexpr int kMaxSide = 1 << 14;
constexpr int kBicubic = 3;  // PIL.Image.Resampling

int side(const Field& field) { return static_cast<int>(field.integer(1, kMaxSide)); }

std::array<float, 3> channels(const Field& config, const char* name,
                              const std::array<float, 3>& fallback) {
  if (!config.has(name)) return fallback;
  auto items = config.at(name).items();
  if (items.size() != 3) config.at(name).fail("expected three numbers");
  std::array<float, 3> values{};
  for (int c = 0; c < 3; ++c) values[c] = static_cast<float>(items[c].number());
  return values;
}

/// [[height, width], ..], each of whole tiles.
std::vector<Size> read_grids(const Field& field, int tile) {
  std::vector<Size> grids;
  for (const Field& item : field.items()) {
    auto sides = item.items();
    if (sides.size() != 2) item.fail("expected [height, width]");
    Size grid{side(sides[0]), side(sides[1])};
    if (grid.height % tile != 0 || grid.width % tile != 0)
      item.fail("expected multiples of the crop's height, " + std::to_string(tile));
    grids.push_back(grid);
  }
  if (grids.empty()) field.fail("is empty");
  return grids;
}

}  // namespace

ImageProcessor ImageProcessor::load(const std::filesystem::path& folder) {
  std::error_code ignored;
  auto file = folder / "processor_config.json";
  if (std::filesystem::is_regular_file(file, ignored)) {
    Document document(file, "export again");
    if (document.root().has("image_processor"))
      return ImageProcessor(document.root().at("image_processor"));
  }
  Document document(folder / "preprocessor_config.json", "export again");
  return ImageProcessor(document.root());
}

ImageProcessor::ImageProcessor(const Field& config) {
  std::string type = config.at("image_processor_type").text();
  auto is = [&](const std::string& name) {
    return type == name || type == name + "Pil" || type == name + "Fast";
  };
  bool tiles = is("LlavaNextImageProcessor");
  if (!tiles && !is("CLIPImageProcessor"))
    config.at("image_processor_type")
        .fail("'" + type + "' is not supported, only CLIP's and LLaVA-NeXT's are");
  // LLaVA-NeXT's pads batches, which have no padding here.
  if (!tiles && config.has("do_pad") && config.at("do_pad").flag())
    config.at("do_pad").fail("is not supported");
  if (config.has("resample") && config.at("resample").integer() != kBicubic)
    config.at("resample").fail("expected 3, bicubic; others are not supported");
  resize_ = config.flag_or("do_resize", true);
  shortest_edge_ = 224;
  if (config.has("size")) {
    Field size = config.at("size");
    bool exact = size.is_object() && size.has("height");
    shortest_edge_ = exact ? 0 : side(size.is_object() ? size.at("shortest_edge") : size);
    if (exact) {
      resize_height_ = side(size.at("height"));
      resize_width_ = side(size.at("width"));
    }
  }
  if (!config.flag_or("do_center_crop", true))
    config.at("do_center_crop").fail("expected true: the vision encoder takes one size");
  crop_height_ = crop_width_ = 224;
  if (config.has("crop_size")) {
    Field crop = config.at("crop_size");
    crop_height_ = side(crop.is_object() ? crop.at("height") : crop);
    crop_width_ = side(crop.is_object() ? crop.at("width") : crop);
  }
  if (tiles) grids_ = read_grids(config.at("image_grid_pinpoints"), crop_height_);
  rescale_ = config.flag_or("do_rescale", true);
  normalize_ = config.flag_or("do_normalize", true);
  if (config.has("rescale_factor")) factor_ = config.at("rescale_factor").number();
  mean_ = channels(config, "image_mean", {0.48145466f, 0.4578275f, 0.40821073f});
  std_ = channels(config, "image_std", {0.26862954f, 0.26130258f, 0.27577711f});
}

Picture ImageProcessor::resized(const Picture& picture) const {
  if (!resize_) return picture;
  if (shortest_edge_ == 0) return resize_bicubic(picture, resize_width_, resize_height_);
  int shorter = std::min(picture.width, picture.height);
  std::int64_t longer = std::max(picture.width, picture.height);
  // In floating point as Python does: int(size * long / short).
  double exact = static_cast<double>(shortest_edge_ * longer) / shorter;
  if (exact > 64.0 * kMaxSide)
    throw Error("the picture is " + std::to_string(picture.width) + " x " +
                std::to_string(picture.height) + " pixels, too long for its height; crop it");
  int other = static_cast<int>(exact);
  bool tall = picture.height > picture.width;
  return resize_bicubic(picture, tall ? shortest_edge_ : other, tall ? other : shortest_edge_);
}

std::vector<float> ImageProcessor::operator()(const Picture& picture) const {
  auto expected = std::size_t{3} * std::max(picture.width, 0) * std::max(picture.height, 0);
  if (expected == 0 || picture.rgb.size() != expected)
    throw Error("the picture is empty, or its pixels are not width x height x 3");
  std::vector<float> values;
  if (!tiled()) {
    append(picture, values);
    return values;
  }
  bool exact = shortest_edge_ == 0;
  append(resize_bicubic(picture, exact ? resize_width_ : shortest_edge_,
                        exact ? resize_height_ : shortest_edge_),
         values);
  for (const Picture& tile : cut_tiles(picture, best_grid(picture, grids_), crop_height_))
    append(tile, values);
  return values;
}

void ImageProcessor::append(const Picture& picture, std::vector<float>& values) const {
  Picture scaled = resized(picture);
  auto offset = [](int from, int to) {  // floor((from - to) / 2)
    return from >= to ? (from - to) / 2 : -((to - from + 1) / 2);
  };
  int top = offset(scaled.height, crop_height_), left = offset(scaled.width, crop_width_);
  values.reserve(values.size() + std::size_t{3} * crop_height_ * crop_width_);
  for (int c = 0; c < 3; ++c)
    for (int y = top; y < top + crop_height_; ++y)
      for (int x = left; x < left + crop_width_; ++x) {
        bool in = 0 <= y && y < scaled.height && 0 <= x && x < scaled.width;
        int byte = in ? scaled.rgb[(std::size_t{3} * y * scaled.width) + 3 * x + c] : 0;
        // The types of transformers' rescale (float64, then float32) and normalize (float32).
        float value = static_cast<float>(rescale_ ? byte * factor_ : byte);
        values.push_back(normalize_ ? (value - mean_[c]) / std_[c] : value);
      }
}

}  // namespace skipvision
