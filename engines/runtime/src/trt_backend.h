/// The engines of a bundle in TensorRT (skipvision_export/runtime/trt.py).
#pragma once

#include <filesystem>
#include <memory>

#include "backend.h"
#include "manifest.h"

namespace skipvision {

struct BundleOptions;

/// `manifest`, of the bundle in `folder`, must outlive it. Throws Error for engines that cannot be
/// used, without a GPU, and where this was built without TensorRT.
std::unique_ptr<Backend> make_trt_backend(const std::filesystem::path& folder,
                                          const Manifest& manifest, const BundleOptions& options);

}  // namespace skipvision
