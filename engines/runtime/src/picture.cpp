/// Decoding with stb_image: PNG and JPEG only, the pictures that data sets hold.
#include <cstring>
#include <string_view>

#include "json.h"
#include "skipvision/skipvision.h"

#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_NO_STDIO
#define STBI_NO_FAILURE_STRINGS
#include <stb_image.h>

namespace skipvision {
namespace {

// Pillow's limit against decompression bombs.
constexpr std::int64_t kMaxPixels = 178956970;

/// stb gives what there is of a truncated JPEG: its last scan has no end marker.
bool truncated_jpeg(std::string_view data) {
  if (data.substr(0, 2) != "\xFF\xD8") return false;
  auto scan = data.rfind("\xFF\xDA");
  return scan == std::string_view::npos || data.find("\xFF\xD9", scan) == std::string_view::npos;
}

}  // namespace

Picture Picture::open(const std::filesystem::path& file) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(file, ignored))
    throw Error("picture " + file.string() + " does not exist");
  std::string data = read_file(file);
  return decode(data.data(), data.size(), "picture " + file.string());
}

Picture Picture::decode(const void* data, std::size_t bytes, const std::string& name) {
  auto* start = static_cast<const stbi_uc*>(data);
  int width = 0, height = 0, channels = 0;
  if (bytes > INT32_MAX) throw Error(name + " is too large: over 2 GiB");
  auto size = static_cast<int>(bytes);
  if (!stbi_info_from_memory(start, size, &width, &height, &channels))
    throw Error(name + " is truncated or no picture; expected PNG or JPEG");
  if (std::int64_t{width} * height > kMaxPixels)
    throw Error(name + " has " + std::to_string(width) + " x " + std::to_string(height) +
                " pixels, over the limit of " + std::to_string(kMaxPixels));
  if (channels < 3 && stbi_is_16_bit_from_memory(start, size))
    throw Error(name + " has 16 bits of grey; save it with 8");
  if (truncated_jpeg({static_cast<const char*>(data), bytes})) throw Error(name + " is truncated");
  std::unique_ptr<stbi_uc, void (*)(void*)> pixels(
      stbi_load_from_memory(start, size, &width, &height, &channels, 3), stbi_image_free);
  if (!pixels) throw Error(name + " is truncated or no picture; expected PNG or JPEG");
  Picture picture;
  picture.width = width;
  picture.height = height;
  picture.rgb.assign(pixels.get(), pixels.get() + std::size_t{3} * width * height);
  return picture;
}

}  // namespace skipvision
