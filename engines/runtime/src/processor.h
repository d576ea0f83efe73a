/// A Hugging Face image processor: from a picture to what the vision encoder takes.
#pragma once

#include <array>
#include <filesystem>
#include <vector>

#include "json.h"
#include "skipvision/skipvision.h"
#include "tiles.h"

namespace skipvision {

/// CLIPImageProcessorPil: resize, center crop, rescale, normalize; or LlavaNextImageProcessorPil:
/// the same of a thumbnail and of the tiles of the best of several grids.
class ImageProcessor {
 public:
  /// Of the bundle's processor_config.json or preprocessor_config.json; throws Error that names the
  /// field of what is not supported.
  static ImageProcessor load(const std::filesystem::path& folder);
  /// `config`: the image processor's own object.
  explicit ImageProcessor(const Field& config);

  /// [3, height(), width()], in that order; where tiled(), of each crop: the thumbnail, then the
  /// tiles by rows. Throws Error for a picture that it cannot take.
  std::vector<float> operator()(const Picture& picture) const;
  bool tiled() const { return !grids_.empty(); }
  int height() const { return crop_height_; }
  int width() const { return crop_width_; }

 private:
  Picture resized(const Picture& picture) const;
  /// Resized, cropped and normalized, behind `values`.
  void append(const Picture& picture, std::vector<float>& values) const;

  std::vector<Size> grids_;  // sizes that tiles divide; none where pictures are not cut
  bool resize_ = true;
  int shortest_edge_ = 0;  // or, where it is 0, to exactly this size:
  int resize_height_ = 0, resize_width_ = 0;
  int crop_height_ = 0, crop_width_ = 0;
  bool rescale_ = true, normalize_ = true;
  double factor_ = 1.0 / 255;
  std::array<float, 3> mean_{}, std_{};
};

}  // namespace skipvision
