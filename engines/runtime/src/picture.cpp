/// Decoding with libpng and libjpeg-turbo, which Pillow uses too: the same pixels.
#include <png.h>
#include <turbojpeg.h>

#include <csetjmp>
#include <cstring>
#include <memory>
#include <string_view>

#include "json.h"
#include "skipvision/skipvision.h"

namespace skipvision {
namespace {

// Pillow's limit against decompression bombs.
constexpr std::int64_t kMaxPixels = 178956970;

[[noreturn]] void fail_broken(const std::string& name) {
  throw Error(name + " is truncated or no picture; expected PNG or JPEG");
}

/// A picture of pixels that `decode` writes to memory of its own: nothing fills it beforehand, so that a
/// small file that claims to be large fails as soon as its data ends. `decode` says whether it got them.
template <typename Decode>
Picture decoded(std::int64_t width, std::int64_t height, const std::string& name, Decode decode) {
  if (width < 1 || height < 1) fail_broken(name);
  if (width > kMaxPixels / height)
    throw Error(name + " has " + std::to_string(width) + " x " + std::to_string(height) +
                " pixels, over the limit of " + std::to_string(kMaxPixels));
  auto bytes = static_cast<std::size_t>(3 * width * height);
  std::unique_ptr<std::uint8_t[]> rgb(new std::uint8_t[bytes]);
  if (!decode(rgb.get())) fail_broken(name);
  return {static_cast<int>(width), static_cast<int>(height), {rgb.get(), rgb.get() + bytes}};
}

/// libpng's reader. Its errors jump, over nothing that has a destructor: each step is a function of
/// its own whose variables are plain, and says whether it came to its end.
class PngReader {
 public:
  PngReader(const std::uint8_t* data, std::size_t bytes) : rest_(data), bytes_(bytes) {
    png_ = png_create_read_struct(PNG_LIBPNG_VER_STRING, this, jump, ignore);
    info_ = png_ ? png_create_info_struct(png_) : nullptr;
    if (!info_) throw Error("no memory to read a picture");
    png_set_read_fn(png_, this, read);
  }
  ~PngReader() { png_destroy_read_struct(&png_, &info_, nullptr); }
  PngReader(const PngReader&) = delete;
  PngReader& operator=(const PngReader&) = delete;

  bool read_header() {
    if (setjmp(place_)) return false;
    png_read_info(png_, info_);
    width = png_get_image_width(png_, info_);
    height = png_get_image_height(png_, info_);
    grey16 = png_get_bit_depth(png_, info_) == 16 &&
             !(png_get_color_type(png_, info_) & PNG_COLOR_MASK_COLOR);
    png_set_expand(png_);
    png_set_strip_16(png_);
    png_set_strip_alpha(png_);
    png_set_gray_to_rgb(png_);
    passes_ = png_set_interlace_handling(png_);
    png_read_update_info(png_, info_);
    return png_get_rowbytes(png_, info_) == std::size_t{3} * width;
  }

  bool read_pixels(std::uint8_t* rgb) {
    if (setjmp(place_)) return false;
    for (int pass = 0; pass < passes_; ++pass)
      for (png_uint_32 y = 0; y < height; ++y)
        png_read_row(png_, rgb + std::size_t{3} * width * y, nullptr);
    png_read_end(png_, nullptr);
    return true;
  }

  png_uint_32 width = 0, height = 0;
  bool grey16 = false;

 private:
  static void jump(png_structp png, png_const_charp) {
    std::longjmp(static_cast<PngReader*>(png_get_error_ptr(png))->place_, 1);
  }
  static void ignore(png_structp, png_const_charp) {}
  static void read(png_structp png, png_bytep out, std::size_t count) {
    auto* self = static_cast<PngReader*>(png_get_io_ptr(png));
    if (count > self->bytes_) png_error(png, "truncated");
    std::memcpy(out, self->rest_, count);
    self->rest_ += count;
    self->bytes_ -= count;
  }

  const std::uint8_t* rest_;
  std::size_t bytes_;
  png_structp png_ = nullptr;
  png_infop info_ = nullptr;
  int passes_ = 1;
  std::jmp_buf place_;
};

Picture decode_png(const std::uint8_t* data, std::size_t bytes, const std::string& name) {
  PngReader reader(data, bytes);
  if (!reader.read_header()) fail_broken(name);
  if (reader.grey16) throw Error(name + " has 16 bits of grey; save it with 8");
  return decoded(reader.width, reader.height, name,
                 [&](std::uint8_t* rgb) { return reader.read_pixels(rgb); });
}

Picture decode_jpeg(const std::uint8_t* data, std::size_t bytes, const std::string& name) {
  std::unique_ptr<void, int (*)(tjhandle)> reader(tjInitDecompress(), tjDestroy);
  if (!reader) throw Error("no memory to read a picture");
  int width = 0, height = 0, subsampling = 0, colours = 0;
  if (tjDecompressHeader3(reader.get(), data, bytes, &width, &height, &subsampling, &colours) != 0)
    fail_broken(name);
  if (colours == TJCS_CMYK || colours == TJCS_YCCK)
    throw Error(name + " is in CMYK colours; save it in RGB");
  // Stopped at the first warning, for what there is of a truncated picture comes with one; and in
  // scans, of which a small file may ask for thousands.
  constexpr int kFlags = TJFLAG_ACCURATEDCT | TJFLAG_STOPONWARNING | TJFLAG_LIMITSCANS;
  return decoded(width, height, name, [&](std::uint8_t* rgb) {
    return tjDecompress2(reader.get(), data, bytes, rgb, width, 0, height, TJPF_RGB, kFlags) == 0;
  });
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
  auto* start = static_cast<const std::uint8_t*>(data);
  std::string_view view(static_cast<const char*>(data), bytes);
  if (view.substr(0, 4) == "\x89PNG") return decode_png(start, bytes, name);
  if (view.substr(0, 2) == "\xFF\xD8") return decode_jpeg(start, bytes, name);
  fail_broken(name);
}

}  // namespace skipvision
