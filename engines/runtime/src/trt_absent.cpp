#include "skipvision/skipvision.h"
#include "trt_backend.h"

namespace skipvision {

std::unique_ptr<Backend> make_trt_backend(const std::filesystem::path&, const Manifest&,
                                          const BundleOptions& options) {
  throw Error("this build has no TensorRT, which the engines in " + options.engines.string() +
              " need; build it again with TensorRT_ROOT set, or leave the engines out");
}

}  // namespace skipvision
