/// skipvision.json, and the same bytes as an ONNX graph: what is not understood is an Error.
#include "manifest.h"

#include "skipvision/skipvision.h"
#include "weights.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::string text(reinterpret_cast<const char*>(data), size);
  try {
    auto manifest = skipvision::Manifest::parse(skipvision::Document(text, "fuzz", "again"));
    skipvision::prefill_indices({1, 2, 2, 3}, 2, manifest.layout);
  } catch (const skipvision::Error&) {
  }
  try {
    skipvision::external_tensors(text, "fuzz");
  } catch (const skipvision::Error&) {
  }
  return 0;
}
