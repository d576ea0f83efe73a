/// How LLaVA-NeXT cuts a picture (transformers, image_processing_pil_llava_next.py).
#pragma once

#include <vector>

#include "skipvision/skipvision.h"

namespace skipvision {

struct Size {
  int height = 0;
  int width = 0;
};

/// The grid that shows most of the picture's pixels, and of equal ones the smallest; throws Error
/// for a picture so narrow that none shows any.
Size best_grid(const Picture& picture, const std::vector<Size>& grids);

/// The picture as large as it fits into `grid`, in the middle of black, cut into squares by rows.
std::vector<Picture> cut_tiles(const Picture& picture, Size grid, int tile);

}  // namespace skipvision
