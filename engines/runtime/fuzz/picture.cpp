/// A PNG or JPEG file, decoded and processed.
#include "processor.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const skipvision::Document config(
      R"({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8},
          "crop_size": {"height": 8, "width": 12}})",
      "fuzz", "again");
  try {
    skipvision::ImageProcessor processor(config.root());
    processor(skipvision::Picture::decode(data, size));
  } catch (const skipvision::Error&) {
  }
  return 0;
}
