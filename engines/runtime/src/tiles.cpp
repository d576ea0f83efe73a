#include "tiles.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "resize.h"

namespace skipvision {

Size best_grid(const Picture& picture, const std::vector<Size>& grids) {
  Size best;
  std::int64_t most = 0, least_wasted = 0;
  std::int64_t own = std::int64_t{picture.width} * picture.height;
  for (Size grid : grids) {
    double scale = std::min(static_cast<double>(grid.width) / picture.width,
                            static_cast<double>(grid.height) / picture.height);
    auto width = static_cast<std::int64_t>(picture.width * scale);
    auto height = static_cast<std::int64_t>(picture.height * scale);
    std::int64_t shown = std::min(width * height, own);
    std::int64_t wasted = std::int64_t{grid.width} * grid.height - shown;
    if (shown > most || (shown == most && most > 0 && wasted < least_wasted)) {
      most = shown;
      least_wasted = wasted;
      best = grid;
    }
  }
  if (most == 0)
    throw Error("the picture is " + std::to_string(picture.width) + " x " +
                std::to_string(picture.height) + " pixels, too narrow to cut into tiles; crop it");
  return best;
}

std::vector<Picture> cut_tiles(const Picture& picture, Size grid, int tile) {
  double across = static_cast<double>(grid.width) / picture.width;
  double down = static_cast<double>(grid.height) / picture.height;
  Size size = grid;
  if (across < down)
    size.height = std::min(static_cast<int>(std::ceil(picture.height * across)), grid.height);
  else
    size.width = std::min(static_cast<int>(std::ceil(picture.width * down)), grid.width);
  Picture scaled = resize_bicubic(picture, size.width, size.height);
  int top = (grid.height - size.height) / 2, left = (grid.width - size.width) / 2;
  std::size_t row = std::size_t{3} * grid.width;
  std::vector<std::uint8_t> canvas(row * grid.height);
  for (int y = 0; y < size.height; ++y)
    std::memcpy(canvas.data() + row * (top + y) + std::size_t{3} * left,
                scaled.rgb.data() + std::size_t{3} * size.width * y, std::size_t{3} * size.width);
  std::vector<Picture> tiles;
  for (int y = 0; y < grid.height; y += tile)
    for (int x = 0; x < grid.width; x += tile) {
      Picture& own = tiles.emplace_back();
      own.width = own.height = tile;
      for (int line = y; line < y + tile; ++line) {
        const std::uint8_t* from = canvas.data() + row * line + std::size_t{3} * x;
        own.rgb.insert(own.rgb.end(), from, from + std::size_t{3} * tile);
      }
    }
  return tiles;
}

}  // namespace skipvision
