// What libskipvision_kv_prune.so exports to TensorRT: IPluginRegistry::loadLibrary looks these names up.
//
// There is no static registrar (REGISTER_TENSORRT_PLUGIN): it would need symbols of a TensorRT library, and register a
// second time what getCreators already gives.
#include <atomic>
#include <cstdio>

#include "kv_prune_plugin.h"

#define SKIPVISION_EXPORT __attribute__((visibility("default")))

namespace skipvision::tensorrt {

namespace {
std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
}

void log_error(const std::string& reason) {
  const std::string line = "skipvision KVPrune: " + reason;
  nvinfer1::ILoggerFinder* finder = logger_finder.load();
  nvinfer1::ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
  if (logger != nullptr) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
  } else {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
}

}  // namespace skipvision::tensorrt

// The creators of this library and their number.
extern "C" SKIPVISION_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static skipvision::tensorrt::KvPruneCreator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}

// TensorRT hands over its logger; null takes it back.
extern "C" SKIPVISION_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  skipvision::tensorrt::logger_finder.store(finder);
}
